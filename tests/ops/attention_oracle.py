"""Attention in float64 NumPy, one head at a time, with the gradient written out by hand."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxlong.core.mask import causal, dilated, full, longformer, sliding, strided

MASKS = {
    "full": (full(), lambda i, j, h: i >= 0),
    "causal": (causal(), lambda i, j, h: j <= i),
    "sliding": (sliding(9), lambda i, j, h: (j <= i) & (j > i - 9)),
    "two-sided": (sliding(5, 3), lambda i, j, h: (j > i - 5) & (j <= i + 3)),
    "strided": (strided(7), lambda i, j, h: (j <= i) & ((i - j < 7) | ((i - j) % 7 == 0))),
    "global": (longformer(6, 2) & causal(), lambda i, j, h: (j <= i) & ((j > i - 6) | (j < 2) | (i < 2))),
    "dilated": (
        dilated(16, 2) & causal(),
        lambda i, j, h: (j <= i) & (i // 16 == j // 16) & (i % 16 % 2 == h % 2) & (j % 16 % 2 == h % 2),
    ),
    "nothing": (~full(), lambda i, j, h: i < 0),
}
"""A mask of the library, and the same predicate written again."""


@dataclass
class Case:
    """Inputs of one attention call. `floats` has gradients; `ints` and `options` are passed on as they are."""

    name: str
    floats: dict[str, jax.Array]
    ints: dict[str, jax.Array]
    options: dict[str, float]
    dout: jax.Array
    dlse: jax.Array

    def run(self, attention, floats=None):
        """(out, lse) and the gradients of sum(out * dout) + sum(lse * dlse) over the finite lse, by name."""
        floats = self.floats if floats is None else floats
        options = tuple(self.options.items())
        return _run(attention, self.name, options, floats, self.ints, self.dout, self.dlse)

    def oracle(self):
        """The same from float64 NumPy."""
        exact = {name: np.asarray(x, np.float64) for name, x in self.floats.items()}
        ints = {name: np.asarray(x) for name, x in self.ints.items()}
        out, lse, backward = attention(**exact, **ints, sees=MASKS[self.name][1], **self.options)
        dlse = np.where(np.isneginf(lse), 0, np.asarray(self.dlse, np.float64))
        return (out, lse), backward(np.asarray(self.dout, np.float64), dlse)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _run(attention, name, options, floats, ints, dout, dlse):
    def objective(floats):
        out, lse = attention(**floats, **ints, mask=MASKS[name][0], **dict(options))
        kept = jnp.where(lse == -jnp.inf, 0, lse)
        return (out.astype(jnp.float32) * dout).sum() + (kept * dlse).sum(), (out, lse)

    gradients, results = jax.grad(objective, has_aux=True)(floats)
    return results, gradients


def case(name, *, B=2, T=63, S=None, H=4, K=2, C=16, V=None, dtype=jnp.float32, features=(), seed=0) -> Case:
    """Random inputs. Queries are the last T of S tokens; features: bias, row-bias, alibi, cap, sinks, segments."""
    S, V = S or T, V or C
    random = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(random.standard_normal(shape), dtype)
    floats = {"q": normal(B, T, H, C), "k": normal(B, S, K, C), "v": normal(B, S, K, V)}
    k_positions = np.broadcast_to(np.arange(S, dtype=np.int32), (B, S))
    ints = {"k_positions": k_positions, "q_positions": (k_positions[:, :1] + np.arange(S - T, S)).astype(np.int32)}
    options = {"scale": 0.3}
    if "bias" in features:
        floats["bias"] = normal(1, H, T, S)
    if "row-bias" in features:
        floats["bias"] = normal(B, 1, 1, S)
    if "alibi" in features:
        floats["alibi_slopes"] = jnp.asarray(random.uniform(0.01, 0.5, H), jnp.float32)
    if "cap" in features:
        options["soft_cap"] = 1.5
    if "sinks" in features:
        floats["sinks"] = normal(H).astype(jnp.float32)
    if "segments" in features:  # documents, empty slots among the keys, one row of a document that has no keys
        k_segments = np.sort(random.integers(1, 4, (B, S)), axis=1).astype(np.int32)
        ints["q_segments"] = k_segments[:, S - T :].copy()
        ints["q_segments"][0, 0] = 9
        k_segments[:, random.integers(0, S, S // 5)] = -1
        ints["k_segments"] = k_segments
    ints = {key: jnp.asarray(x) for key, x in ints.items()}
    rest = [jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in ((B, T, H, V), (B, T, H))]
    return Case(name, floats, ints, options, *rest)


def attention(
    q,
    k,
    v,
    *,
    q_positions,
    k_positions,
    sees,
    scale,
    q_segments=None,
    k_segments=None,
    bias=None,
    alibi_slopes=None,
    soft_cap=None,
    sinks=None,
):
    """(out, lse, backward), where backward(dout, dlse) gives the gradient of each float argument by name."""
    (B, T, H, _), (S, K, V) = q.shape, v.shape[1:]
    out, lse = np.zeros((B, T, H, V)), np.full((B, T, H), -np.inf)
    saved = {}
    for b in range(B):
        i, j = q_positions[b][:, None], k_positions[b][None, :]
        for h in range(H):
            seen = np.broadcast_to(sees(i, j, h), (T, S))
            if q_segments is not None:
                seen = seen & (q_segments[b][:, None] == k_segments[b][None, :]) & (k_segments[b] >= 0)
            raw = scale * (q[b, :, h] @ k[b, :, h * K // H].T)
            slope = 1.0
            if soft_cap is not None:
                raw = soft_cap * np.tanh(raw / soft_cap)
                slope = 1 - (raw / soft_cap) ** 2
            if bias is not None:
                raw = raw + np.broadcast_to(bias, (B, H, T, S))[b, h]
            if alibi_slopes is not None:
                raw = raw - alibi_slopes[h] * np.abs(i - j)
            weights = np.where(seen, np.exp(np.where(seen, raw, 0)), 0)
            total = weights.sum(1) + (0 if sinks is None else np.exp(sinks[h]))
            some = total > 0
            p = weights / np.where(some, total, 1)[:, None]
            out[b, :, h] = p @ v[b, :, h * K // H]
            lse[b, some, h] = np.log(total[some])
            saved[b, h] = p, slope

    def backward(dout, dlse):
        d = {"q": np.zeros_like(q), "k": np.zeros_like(k), "v": np.zeros_like(v)}
        dscores = np.zeros((B, H, T, S))
        dsinks = np.zeros(H)
        for (b, h), (p, slope) in saved.items():
            kept = h * K // H
            delta = (dout[b, :, h] * out[b, :, h]).sum(1) - dlse[b, :, h]
            ds = p * (dout[b, :, h] @ v[b, :, kept].T - delta[:, None])
            dscores[b, h] = ds
            if sinks is not None:
                dsinks[h] -= (np.exp(sinks[h] - lse[b, :, h]) * delta).sum()
            d["q"][b, :, h] += scale * (ds * slope) @ k[b, :, kept]
            d["k"][b, :, kept] += scale * (ds * slope).T @ q[b, :, h]
            d["v"][b, :, kept] += p.T @ dout[b, :, h]
        if bias is not None:
            shared = tuple(axis for axis, size in enumerate(bias.shape) if size == 1)
            d["bias"] = dscores.sum(shared, keepdims=True)
        if alibi_slopes is not None:
            away = np.abs(q_positions[:, None, :, None] - k_positions[:, None, None, :])
            d["alibi_slopes"] = -(dscores * away).sum((0, 2, 3))
        if sinks is not None:
            d["sinks"] = dsinks
        return d

    return out, lse, backward


def assert_same(got, want, tolerance: float) -> None:
    """Equal trees, relative to the largest entry of each array; infinities must stand in the same places."""
    got, want = jax.tree.leaves_with_path(got), jax.tree.leaves(want)
    assert len(got) == len(want)
    for (path, x), y in zip(got, want, strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert x.shape == y.shape, jax.tree_util.keystr(path)
        np.testing.assert_array_equal(np.isfinite(x), np.isfinite(y), err_msg=jax.tree_util.keystr(path))
        x, y = (np.where(np.isfinite(z), z, 0) for z in (x, y))
        error = np.abs(x - y).max() / max(np.abs(y).max(), 1e-3)
        assert error <= tolerance, f"{jax.tree_util.keystr(path)}: {error:.2e} > {tolerance:.0e}"
