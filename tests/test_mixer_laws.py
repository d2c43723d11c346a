"""The laws that every mixer obeys. The suite runs over the registry: a new entry needs no line here."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlong.core.state import nbytes
from jaxlong.mixers import MIXERS

pytestmark = pytest.mark.usefixtures("compile_fast")

WIDTH, BATCH = 12, 2
CASES = {f"{name}-{case}": mixer for name, cls in MIXERS.items() for case, mixer in cls.examples().items()}
every_mixer = pytest.mark.parametrize("name", CASES)
every_dtype = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])

# bfloat16 keeps 8 bits: sums in another order differ by a few units of 2**-8 of the largest value
TOLERANCE = {"float32": 3e-6, "bfloat16": 4e-2}


@pytest.fixture(autouse=True)
def declared_exceptions(request):
    """Skips a law that a mechanism breaks by construction: its class says which, and why."""
    case = CASES.get(getattr(request.node, "callspec", None) and request.node.callspec.params.get("name"))
    reason = getattr(case, "exceptions", {}).get(request.function.__name__)
    if reason:
        pytest.skip(reason)


@functools.cache
def params_of(name: str):
    mixer = CASES[name]
    x = jnp.zeros((1, 3, WIDTH))
    params = nn.unbox(mixer.init(jax.random.key(0), x, positions=jnp.zeros((1, 3), jnp.int32)))["params"]
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))  # no parameter may hide behind its initial zero
    noise = [leaf + 0.2 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, noise)


def inputs(length: int, dtype: str = "float32", seed: int = 2):
    return jax.random.normal(jax.random.key(seed), (BATCH, length, WIDTH), dtype)


@functools.partial(jax.jit, static_argnums=0)
def apply(name, params, x, positions, segment_ids, state):
    return CASES[name].apply({"params": params}, x, positions=positions, segment_ids=segment_ids, state=state)


def run(name, x, positions=None, segment_ids=None, state=None, params=None):
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
    return apply(name, params_of(name) if params is None else params, x, positions, segment_ids, state)


def in_chunks(name, x, sizes, segment_ids=None, positions=None, params=None):
    """The outputs of feeding x in chunks of those sizes through the state."""
    length = x.shape[1]
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), x.shape[:2])
    state = CASES[name].init_state(BATCH, length, width=WIDTH, max_chunk=max(sizes), dtype=x.dtype)
    outs, start = [], 0
    for size in sizes:
        part = slice(start, start + size)
        segments = None if segment_ids is None else segment_ids[:, part]
        out, state = run(name, x[:, part], positions[:, part], segments, state, params)
        outs.append(out)
        start += size
    assert start == length
    return jnp.concatenate(outs, axis=1)


def close(got, want, dtype):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE[dtype] * max(1.0, np.abs(want).max()))


@every_mixer
@every_dtype
def test_shapes_and_types(name, dtype):
    y, state = run(name, inputs(1, dtype))
    assert y.shape == (BATCH, 1, WIDTH) and y.dtype == dtype and state is None
    assert jnp.isfinite(y).all()


@every_mixer
@every_dtype
def test_causality_bit_for_bit(name, dtype):
    """Another future does not change a bit of the past."""
    x, other = inputs(13, dtype), inputs(13, dtype, seed=3)
    for cut in (1, 6, 12):
        changed = jnp.concatenate([x[:, :cut], other[:, cut:]], axis=1)
        a, b = run(name, x)[0], run(name, changed)[0]
        np.testing.assert_array_equal(np.asarray(a[:, :cut], np.float32), np.asarray(b[:, :cut], np.float32))
        assert not np.array_equal(np.asarray(a[:, cut:], np.float32), np.asarray(b[:, cut:], np.float32))


@every_mixer
@every_dtype
@pytest.mark.parametrize("sizes", [(13,), (1,) * 13, (5, 1, 7)], ids=str)
def test_chunks_equal_the_whole(name, dtype, sizes):
    x = inputs(13, dtype)
    close(in_chunks(name, x, sizes), run(name, x)[0], dtype)


@every_mixer
def test_gradients_of_chunks_equal_those_of_the_whole(name):
    x, weights = inputs(9), jax.random.normal(jax.random.key(4), (BATCH, 9, WIDTH))
    loss = lambda outputs: lambda p, x: (outputs(p, x) * weights).sum()
    grads = lambda outputs: jax.jit(jax.grad(loss(outputs), (0, 1)))(params_of(name), x)
    whole = grads(lambda p, x: run(name, x, params=p)[0])
    split = grads(lambda p, x: in_chunks(name, x, (4, 1, 4), params=p))
    jax.tree.map(lambda a, b: close(b, a, "float32"), whole, split)


def packed(lengths):
    """Segment ids and positions of documents side by side, the same in each row."""
    segments = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    positions = np.concatenate([np.arange(n) for n in lengths])
    tile = lambda a: jnp.asarray(np.tile(a, (BATCH, 1)), jnp.int32)
    return tile(segments), tile(positions)


@every_mixer
@every_dtype
@pytest.mark.parametrize("lengths", [(5, 1, 5), (1, 2, 1, 2)], ids=str)
def test_packed_documents_equal_separate_runs(name, dtype, lengths):
    """Documents shorter than a window or a convolution too; nothing leaks over an edge."""
    segments, positions = packed(lengths)
    x = inputs(sum(lengths), dtype)
    together = run(name, x, positions, segments)[0]
    ends = np.cumsum(lengths)
    for start, end in zip(ends - np.array(lengths), ends, strict=True):
        close(together[:, start:end], run(name, x[:, start:end])[0], dtype)
    first = in_chunks(name, x, (3, *[1] * (x.shape[1] - 3)), segments, positions)
    close(first, together, dtype)


@every_mixer
def test_gradients_of_packed_documents(name):
    segments, positions = packed((5, 1, 5))
    x, weights = inputs(11), jax.random.normal(jax.random.key(4), (BATCH, 11, WIDTH))
    part = slice(6, 11)
    together = jax.jit(jax.grad(lambda x: (run(name, x, positions, segments)[0] * weights)[:, part].sum()))(x)
    alone = jax.jit(jax.grad(lambda x: (run(name, x)[0] * weights[:, part]).sum()))(x[:, part])
    close(together[:, part], alone, "float32")
    assert not np.asarray(together[:, :6]).any()


@every_mixer
@pytest.mark.parametrize("max_len,max_chunk", [(64, 1), (64, 16), (3, 2)])
def test_state_bytes_equal_the_formula(name, max_len, max_chunk):
    mixer = CASES[name]
    for dtype, itemsize in (("float32", 4), ("bfloat16", 2)):
        sizes = dict(width=WIDTH, max_chunk=max_chunk)
        state = jax.eval_shape(lambda s=sizes, d=dtype: mixer.init_state(3, max_len, dtype=d, **s))
        assert nbytes(state) == mixer.state_bytes(3, max_len, itemsize=itemsize, **sizes)


@every_mixer
def test_state_stays_finite_in_a_ring(name):
    """A state made for the window goes on for ever: 40 single tokens, compared with one parallel run."""
    mixer, x = CASES[name], inputs(40)
    state = mixer.init_state(BATCH, 40, width=WIDTH, max_chunk=1, dtype=x.dtype)
    step = lambda s, t: tuple(reversed(run(name, x[:, t][:, None], jnp.full((BATCH, 1), t, jnp.int32), None, s)))
    _, ys = jax.jit(lambda state: jax.lax.scan(step, state, jnp.arange(40)))(state)
    close(jnp.moveaxis(ys[:, :, 0], 0, 1), run(name, x)[0], "float32")


@every_mixer
def test_under_vmap_and_jit(name):
    x = inputs(6)
    once = run(name, x)[0]
    mapped = jax.jit(jax.vmap(lambda row: run(name, jnp.stack([row, row]))[0][0]))(x)
    close(mapped, once, "float32")


@every_mixer
def test_module_is_its_configuration(name):
    mixer = CASES[name]
    assert hash(mixer) == hash(mixer.clone()) and mixer == mixer.clone()
    boxed = jax.eval_shape(
        lambda: mixer.init(jax.random.key(0), jnp.zeros((1, 2, WIDTH)), positions=jnp.zeros((1, 2), jnp.int32))
    )
    for leaf in jax.tree.leaves(boxed, is_leaf=lambda a: isinstance(a, nn.LogicallyPartitioned)):
        assert isinstance(leaf, nn.LogicallyPartitioned) and len(leaf.names) == leaf.value.ndim


def test_every_entry_has_examples():
    assert all(cls.examples() for cls in MIXERS.values())
