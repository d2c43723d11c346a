"""Log-linear attention against a float64 loop over tokens that keeps a Fenwick tree of states."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlong.core.state import Recurrent
from jaxlong.core.types import BadInput
from jaxlong.ops.log_linear import log_linear, slots_for

GOLDEN = np.load(Path(__file__).parent.parent / "golden" / "log_linear.npz")
run = jax.jit(log_linear, static_argnames="chunk")


def inputs(length, B=2, H=2, C=3, V=4, L=9, decay=0.3, seed=0):
    random = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(random.standard_normal(shape), jnp.float32)
    log_decay = -decay * jnp.abs(normal(B, length, H))
    return normal(B, length, H, C), normal(B, length, H, C), normal(B, length, H, V), log_decay, normal(B, length, H, L)


def places(lengths, batch=2):
    positions = np.concatenate([np.arange(n) for n in lengths])
    ids = np.repeat(np.arange(len(lengths)), lengths)
    return tuple(jnp.asarray(np.tile(a, (batch, 1)), jnp.int32) for a in (positions, ids))


def loop(q, k, v, log_decay, scales):
    """One document and head: after token t, merge as a binary counter of t + 1 carries. Outputs and the pieces."""
    pieces, outs, L = {}, [], scales.shape[1]
    for t in range(len(q)):
        pieces = {bit: np.exp(log_decay[t]) * S for bit, S in pieces.items()}
        own = np.outer(k[t], v[t])
        seen = scales[t, 0] * own + sum(scales[t, min(bit + 1, L - 1)] * S for bit, S in pieces.items())
        outs.append(q[t] @ seen)
        bit, carried = 0, own
        while bit in pieces:
            carried, bit = carried + pieces.pop(bit), bit + 1
        pieces[bit] = carried
    return np.stack(outs), pieces


def oracle(arrays, documents):
    """Rows of documents: outputs [B T H V], and pieces[b][h] of each row's last document."""
    arrays = [np.asarray(x, np.float64) for x in arrays]
    B, T, H, V = arrays[2].shape
    out, pieces = np.zeros((B, T, H, V)), [[None] * H for _ in range(B)]
    ends = np.cumsum(documents)
    for b, h in np.ndindex(B, H):
        for end, n in zip(ends, documents, strict=True):
            part = slice(end - n, end)
            out[b, part, h], pieces[b][h] = loop(*(x[b, part, h] for x in arrays))
    return out, pieces


def close(got, want, tolerance=1e-5):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(1.0, np.abs(want).max()))


def close_pieces(memory, pieces, slots):
    for b, row in enumerate(pieces):
        for h, held in enumerate(row):
            want = np.zeros(memory.shape[1:2] + memory.shape[3:])
            for bit, S in held.items():
                want[min(bit, slots - 1)] += S
            close(memory[b, :, h], want)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("length", "chunk", "levels"), [(40, 8, 9), (1, 4, 5), (7, 4, 9), (65, 16, 4), (65, 1, 2)], ids=str
)
def test_equals_the_loop(length, chunk, levels):
    arrays = inputs(length, L=levels)
    positions, ids = places([length])
    want, pieces = oracle(arrays, [length])
    close(run(*arrays, positions=positions, chunk=chunk)[0], want)
    slots = slots_for(levels, length)
    state = Recurrent.empty(2, (slots, 2, 3, 4))
    out, state = run(*arrays, positions=positions, segment_ids=ids, chunk=chunk, state=state)
    close(out, want)
    close_pieces(state.memory, pieces, slots)


@pytest.mark.thorough
@pytest.mark.parametrize(("chunk", "levels"), [(8, 9), (16, 3)], ids=str)
def test_documents_anywhere_in_a_row_and_a_state_between(chunk, levels):
    documents = [3, 1, 21, 8, 2, 14]
    arrays = inputs(sum(documents), L=levels)
    positions, ids = places(documents)
    want, pieces = oracle(arrays, documents)
    close(run(*arrays, positions=positions, segment_ids=ids, chunk=chunk)[0], want)
    slots = slots_for(levels, 21)
    state, outs = Recurrent.empty(2, (slots, 2, 3, 4)), []
    for start, end in [(0, 5), (5, 6), (6, 7), (7, 20), (20, 49)]:
        part = [x[:, start:end] for x in (*arrays, positions, ids)]
        out, state = run(*part[:5], positions=part[5], segment_ids=part[6], chunk=chunk, state=state)
        outs.append(out)
    close(jnp.concatenate(outs, 1), want)
    close_pieces(state.memory, pieces, slots)


@pytest.mark.thorough
@pytest.mark.parametrize("chunk", [4, 64])
@pytest.mark.parametrize("packed", [True, False], ids=["ids", "row"])
@pytest.mark.parametrize("name", ["own", "grouped"])
def test_equals_the_public_reference(name, packed, chunk):
    """Values and gradients of flash-linear-attention's quadratic form."""
    data = {key.split("/")[1]: GOLDEN[key] for key in GOLDEN.files if key.startswith(name + "/")}
    arrays = [jnp.asarray(data[key], jnp.float32) for key in ("q", "k", "v", "g", "scales")]
    weights, shared = data["weights"], data["v"].shape[2] // data["q"].shape[2]
    positions, ids = places([data["q"].shape[1]], len(weights))

    def loss(q, k, *rest):
        q, k = (jnp.repeat(x, shared, axis=2) for x in (q, k))
        out = log_linear(q, k, *rest, positions=positions, segment_ids=ids if packed else None, chunk=chunk)[0]
        return (out * weights).sum(), out

    grads, out = jax.jit(jax.grad(loss, range(5), has_aux=True))(*arrays)
    close(out, data["o"])
    for key, got in zip(("q", "k", "v", "g", "scales"), grads, strict=True):
        close(got, data[f"d_{key}"])


def test_one_scale_for_all_levels_is_linear_attention():
    q, k, v, g, scales = inputs(40)
    out = run(q, k, v, g, jnp.ones_like(scales), positions=places([40])[0], chunk=8)[0]
    b = np.cumsum(np.asarray(g, np.float64), axis=1)
    scores = np.einsum("bihc,bjhc->bhij", q, k) * np.exp(np.minimum(np.moveaxis(b[:, :, None] - b[:, None], 3, 1), 0))
    close(out, np.einsum("bhij,bjhv->bihv", np.tril(scores), v))


def test_strong_decay_stays_finite():
    arrays = inputs(4096, B=1, H=1, decay=40.0)
    loss = lambda *arrays: log_linear(*arrays, positions=places([4096], 1)[0], chunk=64)[0].sum()
    value, grads = jax.jit(jax.value_and_grad(loss, range(5)))(*arrays)
    assert all(bool(jnp.isfinite(x).all()) for x in (value, *grads))


def test_bad_input():
    arrays, (positions, _) = inputs(3), places([3])
    with pytest.raises(BadInput, match="chunk: 12: the levels halve it; a power of 2"):
        log_linear(*arrays, positions=positions, chunk=12)
    with pytest.raises(BadInput, match="levels: 1: a token itself and what is before it; 2 or more"):
        log_linear(*arrays[:4], arrays[4][..., :1], positions=positions)
