"""Attention over a mesh of simulated devices beside attention on one: inputs, masks, and what programs contain."""

from __future__ import annotations

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlong.core.mask import bigbird, causal, prefix, sliding
from jaxlong.core.position import Alibi
from jaxlong.ops.attend import Backend, attend_with_lse
from jaxlong.ops.latent import attend_latent
from jaxlong.parallel.layout import permute, restore
from jaxlong.parallel.mesh import make_mesh

MASKS = {
    "causal": causal(),
    "window": sliding(9),
    "documents": causal(),
    "prefix": prefix(11),
    "bigbird": bigbird(1, 1, 1, 4, 0) & causal(),
    "alibi": causal(),
}
HEADS = {"mha": (4, 4), "gqa": (4, 2), "mqa": (4, 1), "mla": (4, 1)}
COLLECTIVES = ("collective-permute", "all-to-all", "all-gather", "all-reduce", "reduce-scatter")


class Case(NamedTuple):
    """Arrays [B, T, ...] in the order of the text, and those that all tokens share."""

    tokens: dict[str, np.ndarray]
    shared: dict[str, np.ndarray]
    mask: str
    heads: str


def case(mask: str, heads: str, length: int, *, sizes: tuple[int, int] | None = None, seed: int = 0) -> Case:
    """Two rows of random q, k, v, cotangents, positions and segment ids; latents and weights for "mla"."""
    random, (H, K), C, R = np.random.default_rng(seed), sizes or HEADS[heads], 8, 6
    normal = lambda *shape: random.standard_normal(shape).astype(np.float32)
    ids = np.zeros((2, length), np.int32)
    if mask == "documents":
        ids = np.sort(random.integers(1, 5, (2, length)), axis=1).astype(np.int32)
    positions = np.arange(length, dtype=np.int32) - np.array([[np.argmax(row == i) for i in row] for row in ids])
    tokens = {"q": normal(2, length, H, C), "positions": positions.astype(np.int32), "segments": ids}
    tokens |= {"dout": normal(2, length, H, C), "dlse": normal(2, length, H)}
    if heads == "mla":
        weights = {"wk": normal(R, H, C - 2), "wv": normal(R, H, C)}
        return Case(tokens | {"latent": normal(2, length, R + 2)}, weights, mask, heads)
    return Case(tokens | {"k": normal(2, length, K, C), "v": normal(2, length, K, C)}, {}, mask, heads)


def program(case: Case, backend: Backend):
    """A jitted function of (tokens, shared): results and gradients, by name."""

    def results(floats, tokens):
        at, ids = tokens["positions"], tokens["segments"] if case.mask == "documents" else None
        where = {"q_positions": at, "k_positions": at, "q_segments": ids, "k_segments": ids}
        where |= {"mask": MASKS[case.mask], "backend": backend}
        if case.heads == "mla":
            weights = floats["wk"], floats["wv"]
            return attend_latent(floats["q"], floats["latent"], weights, scale=0.3, **where), None
        slopes = Alibi().slopes(floats["q"].shape[2]) if case.mask == "alibi" else None
        return attend_with_lse(floats["q"], floats["k"], floats["v"], alibi_slopes=slopes, **where)

    def objective(floats, tokens):
        out, lse = results(floats, tokens)
        total = (out * tokens["dout"]).sum()
        return total if lse is None else total + (lse * tokens["dlse"]).sum(), out

    def run(tokens, shared):
        floats = {name: x for name, x in tokens.items() if name in ("q", "k", "v", "latent")} | shared
        gradients, out = jax.grad(objective, has_aux=True)(floats, tokens)
        return {"out": out} | gradients

    return jax.jit(run)


def alone(case: Case) -> dict[str, np.ndarray]:
    """On one device, by dense attention."""
    return jax.tree.map(np.asarray, program(case, Backend("dense"))(*_arrays(case)))


def on_mesh(case: Case, mesh: str, strategy: str, layout: str, kernel: str = "blockwise") -> dict[str, np.ndarray]:
    """The same over the first devices, in the order of the text again."""
    devices, length = _count(mesh), _count(mesh, "seq", "ulysses")
    placed = case._replace(tokens={name: permute(x, layout, length) for name, x in case.tokens.items()})
    with jax.set_mesh(make_mesh(mesh, jax.devices()[:devices])):
        found = program(case, Backend(kernel, strategy, layout))(*_arrays(placed))
    back = lambda name, x: np.asarray(x) if name in case.shared else restore(np.asarray(x), layout, length)
    return {name: back(name, x) for name, x in found.items()}


def check(case: Case, mesh: str, strategy: str, layout: str, want: dict[str, np.ndarray], kernel: str = "blockwise"):
    """2e-6 forward and 2e-5 in gradients, relative to the largest entry."""
    got = on_mesh(case, mesh, strategy, layout, kernel)
    for name, x in want.items():
        error = np.abs(got[name] - x).max() / np.abs(x).max()
        assert error <= (2e-6 if name == "out" else 2e-5), f"{name}: {error:.1e}"


def collectives(text: str) -> dict[str, int]:
    """How many of each a compiled program contains, those that it contains."""
    found = {kind: len(re.findall(rf" {kind}(?:-start)?\(", text)) for kind in COLLECTIVES}
    return {kind: count for kind, count in found.items() if count}


def compiled(case: Case, mesh: str, strategy: str, layout: str = "contiguous", *, forward: bool = False) -> str:
    """The text of the compiled program, of which `forward` keeps the output alone."""
    fn = program(case, Backend("blockwise", strategy, layout))
    if forward:
        fn = jax.jit(lambda tokens, shared, fn=fn: fn(tokens, shared)["out"])
    with jax.set_mesh(make_mesh(mesh, jax.devices()[: _count(mesh)])):
        return fn.lower(*_arrays(case)).compile().as_text()


def _arrays(case: Case):
    return jax.tree.map(jnp.asarray, (case.tokens, case.shared))


def _count(mesh: str, *axes: str) -> int:
    sizes = dict(part.split("=") for part in mesh.split(","))
    return int(np.prod([int(n) for axis, n in sizes.items() if not axes or axis in axes]))
