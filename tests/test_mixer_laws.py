"""The laws that every mixer obeys. The suite runs over the registry: a new entry needs no line here.

What a law compares is run through few programs of equal shapes, since compiling them is what takes the time: a document
"alone" is a row of the full length whose rest is noise, which may not matter (causality, bit for bit, is a law too).
A mixer that breaks a law by construction names it, with the reason, in its `exceptions`. The first example of each
mixer obeys every law in the default run; what has to be compiled for the others is marked slow.
"""

from __future__ import annotations

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlong.core.state import nbytes
from jaxlong.core.types import BadInput
from jaxlong.mixers import MIXERS
from jaxlong.parallel.mesh import make_mesh, shard

WIDTH, BATCH, LENGTH = 12, 2, 12
CASES = {f"{name}-{case}": mixer for name, cls in MIXERS.items() for case, mixer in cls.examples().items()}
FIRST = {name: next(case for case in CASES if case.startswith(f"{name}-")) for name in MIXERS}
thorough = lambda case, *values: pytest.param(*values, marks=() if case in FIRST.values() else pytest.mark.slow)
every_mixer = pytest.mark.parametrize("name", CASES)
every_mixer_thoroughly = pytest.mark.parametrize("name", [thorough(case, case) for case in CASES])
every_mixer_and_dtype = pytest.mark.parametrize(
    "dtype,name",
    [
        pytest.param(dtype, case, marks=() if case in FIRST.values() and dtype == "float32" else pytest.mark.slow)
        for dtype in ("float32", "bfloat16")
        for case in CASES
    ],
)

# bfloat16 keeps 8 bits: sums in another order differ by a few units of 2**-8 of the largest value
TOLERANCE = {"float32": 3e-6, "bfloat16": 4e-2}


@pytest.fixture(autouse=True)
def named_exceptions(request):
    """Skips a law that the mixer says it breaks."""
    name = request.node.callspec.params.get("name") if hasattr(request.node, "callspec") else None
    reasons = getattr(CASES.get(name), "exceptions", {})
    law = request.node.originalname
    if law in reasons:
        pytest.skip(reasons[law])


@functools.cache
def params_of(name: str):
    mixer = CASES[name]
    init = lambda key: mixer.init(key, jnp.zeros((1, 3, WIDTH)), positions=jnp.zeros((1, 3), jnp.int32))
    params = nn.unbox(jax.jit(init)(jax.random.key(0)))["params"]
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(1)  # no parameter may hide behind its initial zero
    noise = [jnp.asarray(leaf + 0.2 * rng.normal(size=leaf.shape), leaf.dtype) for leaf in leaves]
    return jax.tree.unflatten(tree, noise)


def inputs(length: int = LENGTH, dtype: str = "float32", seed: int = 2):
    return np.random.default_rng(seed).normal(size=(BATCH, length, WIDTH)).astype(dtype)


def count(length: int = LENGTH):
    return np.tile(np.arange(length, dtype=np.int32), (BATCH, 1))


@functools.partial(jax.jit, static_argnums=0)
def apply(name, params, x, positions, segment_ids, state):
    return CASES[name].apply({"params": params}, x, positions=positions, segment_ids=segment_ids, state=state)


def run(name, x, positions=None, segment_ids=None):
    positions = count(x.shape[1]) if positions is None else positions
    y, state = apply(name, params_of(name), x, positions, segment_ids, None)
    assert state is None
    return y


def types(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


def in_chunks(name, x, sizes, segment_ids=None, positions=None):
    """The outputs of feeding x in chunks of those sizes through the state."""
    params = params_of(name)
    positions = count() if positions is None else positions
    segment_ids = np.zeros_like(positions) if segment_ids is None else segment_ids
    state = CASES[name].init_state(BATCH, LENGTH, width=WIDTH, max_chunk=max(sizes), dtype=x.dtype)
    outs, start = [], 0
    for size in sizes:
        part = slice(start, start + size)
        before = types(state)
        out, state = apply(name, params, x[:, part], positions[:, part], segment_ids[:, part], state)
        assert types(state) == before
        outs.append(out)
        start += size
    assert start == x.shape[1]
    return np.concatenate(outs, axis=1)


def close(got, want, dtype):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE[dtype] * max(1.0, np.abs(want).max()))


def same(a, b) -> bool:
    return np.array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@every_mixer_and_dtype
def test_one_token_alone(name, dtype):
    y = run(name, inputs(dtype=dtype)[:, :1])
    assert y.shape == (BATCH, 1, WIDTH) and y.dtype == dtype and jnp.isfinite(y).all()
    close(y, run(name, inputs(dtype=dtype))[:, :1], dtype)


@every_mixer_and_dtype
def test_causality_bit_for_bit(name, dtype):
    """Another future does not change a bit of the past."""
    x, other = inputs(dtype=dtype), inputs(dtype=dtype, seed=3)
    for cut in (1, 6, LENGTH - 1):
        a, b = run(name, x), run(name, np.concatenate([x[:, :cut], other[:, cut:]], axis=1))
        assert same(a[:, :cut], b[:, :cut]) and not same(a[:, cut:], b[:, cut:])


@every_mixer_and_dtype
@pytest.mark.parametrize("sizes", [(5, 1, 5, 1), pytest.param((1,) * LENGTH, marks=pytest.mark.slow)], ids=str)
def test_chunks_equal_the_whole(name, dtype, sizes):
    """One token at a time too, through a state made for no more: rings go round."""
    x = inputs(dtype=dtype)
    close(in_chunks(name, x, sizes), run(name, x), dtype)


def packed(lengths):
    """Segment ids and positions of documents side by side, the same in each row."""
    assert sum(lengths) == LENGTH
    segments = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    positions = np.concatenate([np.arange(n) for n in lengths])
    tile = lambda a: np.tile(a, (BATCH, 1)).astype(np.int32)
    return tile(segments), tile(positions)


def alone(x, start, end):
    """The document x[:, start:end], and noise behind it."""
    return np.concatenate([x[:, start:end], inputs(dtype=x.dtype, seed=5)], axis=1)[:, :LENGTH]


@every_mixer_and_dtype
@pytest.mark.parametrize("lengths", [(5, 1, 6), (1, 2, 1, 2, 3, 3)], ids=str)
def test_packed_documents_equal_separate_runs(name, dtype, lengths):
    """Documents shorter than a window, a chunk or a convolution too; nothing leaks over an edge."""
    segments, positions = packed(lengths)
    x = inputs(dtype=dtype)
    together = run(name, x, positions, segments)
    ends = np.cumsum(lengths)
    for start, end in zip(ends - np.array(lengths), ends, strict=True):
        close(together[:, start:end], run(name, alone(x, start, end))[:, : end - start], dtype)
    close(in_chunks(name, x, (5, 1, 5, 1), segments, positions), together, dtype)


@functools.partial(jax.jit, static_argnums=0)
def slopes(name, params, x, weights, positions, segment_ids):
    """Gradients of a weighted sum of outputs with respect to parameters and inputs."""
    loss = lambda p, x: (apply(name, p, x, positions, segment_ids, None)[0] * weights).sum()
    return jax.grad(loss, (0, 1))(params, x)


@every_mixer_thoroughly
@pytest.mark.parametrize("size", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_gradients_of_chunks_equal_those_of_the_whole(name, size):
    """Through a scan whose carry is the state: what it hands on has gradients too."""
    x, weights = inputs(), inputs(seed=4)
    chunks = lambda a: a.reshape(BATCH, -1, size, *a.shape[2:]).swapaxes(0, 1)

    def loss(params, x):
        def step(state, chunk):
            x, positions, weights = chunk
            y, state = apply(name, params, x, positions, None, state)
            return state, (y * weights).sum()

        state = CASES[name].init_state(BATCH, LENGTH, width=WIDTH, max_chunk=size, dtype=x.dtype)
        return jax.lax.scan(step, state, (chunks(x), chunks(count()), chunks(weights)))[1].sum()

    split = jax.jit(jax.grad(loss, (0, 1)))(params_of(name), x)
    whole = slopes(name, params_of(name), x, weights, count(), None)
    jax.tree.map(lambda a, b: close(b, a, "float32"), whole, split)


@every_mixer_thoroughly
def test_gradients_of_packed_documents(name):
    segments, positions = packed((5, 1, 6))
    x, weights = inputs(), inputs(seed=4) * (np.arange(LENGTH) >= 6)[:, None].astype("float32")
    together = slopes(name, params_of(name), x, weights, positions, segments)
    shifted = np.roll(weights, -6, axis=1)
    single = slopes(name, params_of(name), alone(x, 6, LENGTH), shifted, count(), None)
    close(together[1][:, 6:], single[1][:, :6], "float32")
    assert not np.asarray(together[1][:, :6]).any()
    jax.tree.map(lambda a, b: close(b, a, "float32"), single[0], together[0])


@pytest.mark.parametrize("name", list(FIRST.values()))
def test_types_are_those_of_the_inputs(name):
    """In bfloat16, without running: what the mixer gives and keeps."""
    mixer, params, x = CASES[name], params_of(name), inputs(dtype="bfloat16")
    make = lambda: mixer.init_state(BATCH, LENGTH, width=WIDTH, max_chunk=LENGTH, dtype=x.dtype)
    for state in (None, jax.eval_shape(make)):
        y, after = jax.eval_shape(lambda s: apply(name, params, x, count(), None, s), state)
        assert y.dtype == x.dtype and types(after) == types(state)


@every_mixer
@pytest.mark.parametrize("max_len,max_chunk", [(64, 1), (64, 16), (3, 2)])
def test_state_bytes_equal_the_formula(name, max_len, max_chunk):
    mixer = CASES[name]
    for dtype, itemsize in (("float32", 4), ("bfloat16", 2)):
        sizes = dict(width=WIDTH, max_chunk=max_chunk)
        state = jax.eval_shape(lambda s=sizes, d=dtype: mixer.init_state(3, max_len, dtype=d, **s))
        assert nbytes(state) == mixer.state_bytes(3, max_len, itemsize=itemsize, **sizes)


@every_mixer_thoroughly
def test_states_of_other_inputs_are_refused(name):
    """In one line that names the array: another batch, another type, another kind."""
    mixer, params = CASES[name], params_of(name)
    make = lambda batch, dtype: mixer.init_state(batch, LENGTH, width=WIDTH, max_chunk=3, dtype=dtype)
    call = lambda state: jax.eval_shape(lambda s: apply(name, params, inputs(3), count(3), None, s), state)
    call(make(BATCH, "float32"))
    wrong = {"batch": make(BATCH + 1, "float32"), "kind": (make(BATCH, "float32"), jnp.zeros(()))}
    if any(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(make(1, "bfloat16"))):
        wrong["dtype"] = make(BATCH, "bfloat16")
    for state in wrong.values():
        with pytest.raises(BadInput, match=re.compile(r"^state.*: .*; ")):
            call(state)


@pytest.mark.parametrize("name", list(FIRST.values()))
def test_a_mesh_changes_no_value(name):
    """Rows and length split over 8 devices."""
    x = inputs()
    step = lambda params, x: slopes.__wrapped__(name, params, shard(x, "batch", "seq", None), x, count(), None)
    with jax.set_mesh(make_mesh("data=2,seq=4")):
        split = jax.jit(step)(params_of(name), x)
    jax.tree.map(lambda a, b: close(b, a, "float32"), slopes(name, params_of(name), x, x, count(), None), split)


@every_mixer_thoroughly
def test_under_vmap_and_jit(name):
    x, params = inputs(), params_of(name)
    mapped = jax.jit(jax.vmap(lambda row: apply(name, params, row[None], count()[:1], None, None)[0][0]))(x)
    close(mapped, run(name, x), "float32")


@every_mixer
def test_module_is_its_configuration(name):
    mixer = CASES[name]
    assert hash(mixer) == hash(mixer.clone()) and mixer == mixer.clone()
    boxed = jax.eval_shape(
        lambda: mixer.init(jax.random.key(0), jnp.zeros((1, 2, WIDTH)), positions=jnp.zeros((1, 2), jnp.int32))
    )
    for leaf in jax.tree.leaves(boxed, is_leaf=lambda a: isinstance(a, nn.LogicallyPartitioned)):
        assert isinstance(leaf, nn.LogicallyPartitioned) and len(leaf.names) == leaf.value.ndim
    assert mixer.mixing_flops(4096) >= 0


def test_every_entry_has_examples_and_exceptions_name_laws():
    assert all(cls.examples() for cls in MIXERS.values())
    assert all(law in globals() for cls in MIXERS.values() for law in getattr(cls, "exceptions", {}))
