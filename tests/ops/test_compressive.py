"""The compressive memory against the paper's equations, segment by segment in float64 NumPy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlong.core.types import BadInput
from jaxlong.ops.compressive import compressive_memory, empty_memory

SHAPES = [(2, 4, 2, 5, 3, 4), (1, 3, 3, 4, 6, 7), (2, 4, 1, 2, 2, 64)]
"""B, H, K, C, V and the segment."""
run = jax.jit(compressive_memory, static_argnames=("segment", "update"))
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
updates = pytest.mark.parametrize("update", ["linear", "delta"])


def inputs(shape, length, seed=0):
    B, H, K, C, V, _ = shape
    random = np.random.default_rng(seed)
    normal = lambda *dims: jnp.asarray(random.standard_normal(dims), jnp.float32)
    return normal(B, length, H, C), normal(B, length, K, C), normal(B, length, K, V)


def places(lengths, batch):
    """Positions and segment ids of documents side by side."""
    positions = np.concatenate([np.arange(n) for n in lengths])
    ids = np.repeat(np.arange(len(lengths)), lengths)
    return tuple(jnp.asarray(np.tile(a, (batch, 1)), jnp.int32) for a in (positions, ids))


def memory_of_one(q, k, v, segment, update, xp=np):
    """One document [T H C], [T K C], [T K V]: the loop of section 2.1 over segments. Outputs, and (M, z) at the end
    of the last whole segment."""
    positive = lambda x: xp.where(x > 0, x + 1, xp.exp(xp.minimum(x, 0)))
    group = q.shape[1] // k.shape[1]
    outs, finals = [], []
    for head in range(q.shape[1]):
        sq, sk, vk = positive(q[:, head]), positive(k[:, head // group]), v[:, head // group]
        M, z = xp.zeros((k.shape[2], v.shape[2])), xp.zeros(k.shape[2])
        rows = []
        for start in range(0, len(q), segment):
            part = slice(start, start + segment)
            read = lambda x, M=M, z=z, start=start: (
                (x @ M) / (x @ z)[:, None] if start else xp.zeros((len(x), M.shape[1]))
            )
            rows.append(read(sq[part]))
            if start + segment <= len(q):
                new = vk[part] - read(sk[part]) if update == "delta" else vk[part]
                M, z = M + sk[part].T @ new, z + sk[part].sum(0)
        outs.append(xp.concatenate(rows))
        finals.append((M, z))
    kept = finals[::group]
    return xp.stack(outs, 1), xp.stack([M for M, _ in kept]), xp.stack([z for _, z in kept])


def oracle(q, k, v, documents, segment, update):
    """Rows of documents."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    ends = np.cumsum(documents)
    parts = [slice(end - n, end) for end, n in zip(ends, documents, strict=True)]
    row = lambda b: [memory_of_one(q[b, p], k[b, p], v[b, p], segment, update) for p in parts]
    rows = [row(b) for b in range(len(q))]
    return np.stack([np.concatenate([o for o, _, _ in r]) for r in rows]), rows


def close(got, want, tolerance=1e-5):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(1.0, np.abs(want).max()))


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("shape", "length"), [(SHAPES[1], 40), (SHAPES[0], 7), (SHAPES[2], 65), (SHAPES[2], 1)], ids=str
)
@updates
def test_equals_the_paper(shape, update, length):
    q, k, v = inputs(shape, length)
    positions, ids = places([length], len(q))
    out, state = compressive_memory(q, k, v, positions=positions, segment_ids=ids, segment=shape[-1], update=update)
    want, rows = oracle(q, k, v, [length], shape[-1], update)
    close(out, want)
    (M, z, dM, dz), ended = state.memory, length % shape[-1] == 0
    for b, documents in enumerate(rows):
        _, wanted_M, wanted_z = documents[-1]
        close(M[b] + ended * dM[b], wanted_M)
        close(z[b] + ended * dz[b], wanted_z)


@pytest.mark.thorough
@shapes
@updates
def test_documents_anywhere_in_a_row_and_a_state_between(shape, update):
    documents = [3, 1, 11, 8, 2, 14]
    q, k, v = inputs(shape, sum(documents))
    positions, ids = places(documents, len(q))
    want, _ = oracle(q, k, v, documents, shape[-1], update)
    call = lambda part, state: run(
        *(x[:, part] for x in (q, k, v)),
        positions=positions[:, part],
        segment_ids=ids[:, part],
        segment=shape[-1],
        update=update,
        state=state,
    )
    close(call(slice(None), None)[0], want)
    state, outs = empty_memory(len(q), *k.shape[2:], v.shape[-1]), []
    for start, end in [(0, 5), (5, 6), (6, 7), (7, 22), (22, 39)]:
        out, state = call(slice(start, end), state)
        outs.append(out)
    close(jnp.concatenate(outs, 1), want)


@pytest.mark.thorough
@updates
def test_gradients_equal_those_of_the_loop(update):
    shape = SHAPES[0]
    q, k, v = inputs(shape, 14)
    segment = shape[-1]
    weights = jnp.asarray(np.random.default_rng(1).standard_normal((2, 14, 4, 3)), jnp.float32)
    positions, ids = places([14], 2)
    naive = lambda q, k, v: jnp.stack(
        [memory_of_one(*row, segment, update, jnp)[0] for row in zip(q, k, v, strict=True)]
    )
    close(naive(q, k, v), oracle(q, k, v, [14], segment, update)[0])  # the loop under jax is the loop under NumPy
    ours = lambda q, k, v: compressive_memory(
        q, k, v, positions=positions, segment_ids=ids, segment=segment, update=update
    )[0]
    grads = lambda f: jax.jit(jax.grad(lambda *x: (f(*x) * weights).sum(), (0, 1, 2)))(q, k, v)
    for got, want in zip(grads(ours), grads(naive), strict=True):
        close(got, want)


@pytest.mark.thorough
@updates
def test_long_rows_with_large_keys_stay_finite(update):
    q, k, v = (30 * x for x in inputs((1, 2, 1, 4, 4, 32), 4096))
    positions, ids = places([4096], 1)
    call = lambda q, k, v: compressive_memory(q, k, v, positions=positions, segment_ids=ids, segment=32, update=update)[
        0
    ].sum()
    value, grads = jax.jit(jax.value_and_grad(call, (0, 1, 2)))(q, k, v)
    assert all(bool(jnp.isfinite(x).all()) for x in (value, *grads))


def test_unknown_update():
    q, k, v = inputs(SHAPES[0], 3)
    positions, ids = places([3], 2)
    with pytest.raises(BadInput, match="update: square: no such rule; one of linear, delta"):
        compressive_memory(q, k, v, positions=positions, segment_ids=ids, segment=4, update="square")
