"""The memory that shows a chunk only earlier ones equals attention with that mask, values, gradients and state."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlong.ops import chunk_memory as module
from jaxlong.ops.chunk_memory import ChunkMemory, chunk_conv, chunk_memory, marks
from jaxlong.ops.chunks import starts

T, F, D, CHUNK = 23, 5, 4, 4


def inputs(length: int = T):
    rng = np.random.default_rng(0)
    single = lambda *shape: jnp.asarray(rng.normal(size=(2, *shape)), jnp.float32)
    return single(length, F), single(length, F), single(length, D), ChunkMemory(single(F, D), single(F, D))


def places(lengths, first: int = 0):
    """Marks of documents side by side; the first has had `first` tokens before."""
    segments = np.tile(np.repeat(np.arange(len(lengths)), lengths), (2, 1))
    positions = np.concatenate([np.arange(n) + (first if i == 0 else 0) for i, n in enumerate(lengths)])
    positions = jnp.asarray(np.tile(positions, (2, 1)), jnp.int32)
    return marks(positions, starts(jnp.asarray(segments)), CHUNK)


def by_mask(q, k, v, state, where):
    """Quadratic in T: every pair, and the state as if it were tokens of the first document."""
    document, chunk, end = where
    earlier = (document[:, :, None] == document[:, None]) & (chunk[:, :, None] > chunk[:, None])
    o = jnp.einsum("btf,bsf,bts,bsd->btd", q, k, earlier, v)
    first, turned = (document == 0), chunk != chunk[:, :1]
    old = jnp.where(turned[..., None, None], state.later[:, None], state.seen[:, None])
    o += jnp.einsum("btf,btfd->btd", q * first[..., None], old)
    last = document == document[:, -1:]
    write = lambda mask: jnp.einsum("btf,bt,btd->bfd", k, mask, v)
    whole = document[:, -1, None, None] == 0
    kept = jnp.where((end != chunk[:, 0])[:, None, None], state.later, state.seen)
    seen = jnp.where(whole, kept, 0) + write(last & (chunk != end[:, None]))
    return o, ChunkMemory(seen, jnp.where(whole, state.later, 0) + write(last))


def grads(f, *args):
    """Values, and gradients of a weighted sum of all outputs."""

    def loss(*args):
        out = f(*args)
        rng = np.random.default_rng(1)
        leaves = jax.tree.leaves(out)
        return sum((leaf * rng.normal(size=leaf.shape).astype(np.float32)).sum() for leaf in leaves), out

    return jax.jit(jax.grad(loss, tuple(range(len(args))), has_aux=True))(*args)


def close(got, want, tolerance=1e-5):
    compare = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1.0, float(abs(b).max())))
    jax.tree.map(compare, got, want)


@pytest.mark.thorough
@pytest.mark.parametrize("cell", [3, 512])
@pytest.mark.parametrize("lengths,first", [((5, 1, 9, 4, 4), 2), ((T,), 0), ((T,), 3), ((1, 2, 20), 7)])
def test_any_documents_and_state(monkeypatch, cell, lengths, first):
    monkeypatch.setattr(module, "CELL", cell)
    where = places(lengths, first)
    run = lambda q, k, v, state: chunk_memory(q, k, v, chunk=CHUNK, where=where, state=state)
    close(grads(run, *inputs()), grads(lambda *args: by_mask(*args, where), *inputs()))


@pytest.mark.parametrize("length", [1, 4, 23])
def test_whole_documents(length):
    q, k, v, state = inputs(length)
    where = jax.tree.map(lambda a: a[:, :length] if a.ndim == 2 else a, places((length,)))
    empty = jax.tree.map(jnp.zeros_like, state)
    run = lambda q, k, v: chunk_memory(q, k, v, chunk=CHUNK)[0]
    close(grads(run, q, k, v), grads(lambda q, k, v: by_mask(q, k, v, empty, where)[0], q, k, v))


@pytest.mark.usefixtures("compile_well")
@pytest.mark.parametrize("marked", [False, True])
def test_no_copy_of_the_memory_a_chunk(marked):
    """The compiler's temporary buffers for forward and backward, against a copy a chunk."""
    length, size = 256, 128
    shape = jax.ShapeDtypeStruct((1, length, size), jnp.float32)
    positions = jnp.arange(length, dtype=jnp.int32)[None]
    where = marks(positions, None, CHUNK) if marked else None
    loss = lambda q, k, v: (chunk_memory(q, k, v, chunk=CHUNK, where=where)[0] ** 2).sum()
    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(shape, shape, shape).compile()
    copies = length // CHUNK * size * size * 4
    assert compiled.memory_analysis().temp_size_in_bytes < copies / 2


def test_convolution_stays_in_its_chunk():
    """Against a loop over tokens; width 5 in chunks of 4, documents of 1, 2 and 9 tokens."""
    x, kernel = np.random.default_rng(2).normal(size=(2, 12, D)), np.random.default_rng(3).normal(size=(5, D))
    document, chunk, _ = (np.asarray(a) for a in places((1, 2, 9)))
    want = np.zeros_like(x)
    for b, t in np.ndindex(2, 12):
        for s in range(max(0, t - 2), min(12, t + 3)):
            if document[b, s] == document[b, t] and chunk[b, s] == chunk[b, t]:
                want[b, t] += kernel[s - t + 2] * x[b, s]
    got = chunk_conv(
        jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32), *map(jnp.asarray, (document, chunk))
    )
    close(got, want.astype(np.float32), 1e-6)
