"""Dense and blockwise attention: isolation bit for bit, whole under every transformation, linear in memory."""

from __future__ import annotations

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import assert_same, case

from jaxlong.core.mask import causal, sliding
from jaxlong.ops.blockwise import blockwise
from jaxlong.ops.dense import dense

small = partial(blockwise, block_q=16, block_k=24)
ALL = ("bias", "alibi", "cap", "sinks", "segments")
BOTH = pytest.mark.parametrize("attention", [dense, small], ids=["dense", "blockwise"])

# ---------------------------------------------------------------------------------------------- isolation


@BOTH
def test_what_is_not_seen_changes_nothing(attention):
    """Keys in empty slots, and of the future, may hold anything: no bit of results or gradients changes."""
    inputs = case("causal", features=ALL)
    inputs.ints["q_segments"] = jnp.where(jnp.arange(63) < 40, inputs.ints["q_segments"], 8)  # the rest sees nothing
    unseen = (inputs.ints["k_segments"] < 0) | (jnp.arange(63) >= 40)
    clean, clean_gradients = inputs.run(attention)
    for junk in (jnp.nan, jnp.inf, 1e4):
        spoil = lambda x, junk=junk: jnp.where(unseen[:, :, None, None], junk, x)
        q = jnp.where(jnp.arange(63)[:, None, None] >= 40, junk, inputs.floats["q"])
        floats = inputs.floats | {"q": q, "k": spoil(inputs.floats["k"]), "v": spoil(inputs.floats["v"])}
        assert_bitwise(inputs.run(attention, floats), (clean, clean_gradients))


@BOTH
def test_what_is_seen_and_not_finite_is_not_hidden(attention):
    inputs = case("causal", features=ALL)
    inputs.ints["q_segments"] = inputs.ints["k_segments"] = jnp.ones((2, 63), jnp.int32)
    for name in ("q", "k", "v"):
        x = inputs.floats[name].at[0, 30, 1, 3].set(jnp.nan)
        (out, _), _ = inputs.run(attention, inputs.floats | {name: x})
        spoilt = ~np.isfinite(out).all(-1)
        expected = np.zeros_like(spoilt)
        if name == "q":
            expected[0, 30, 1] = True
        else:  # key head 1 serves query heads 2 and 3
            expected[0, 30:, 2:] = True
        np.testing.assert_array_equal(spoilt, expected)


@BOTH
def test_causality_bit_for_bit(attention):
    inputs = case("causal", features=ALL)
    inputs.ints["q_segments"] = inputs.ints["k_segments"]
    inputs.dout, inputs.dlse = inputs.dout.at[:, 40:].set(0), inputs.dlse.at[:, 40:].set(0)
    (out, lse), gradients = inputs.run(attention)
    later = {name: inputs.floats[name].at[:, 40:].add(3.0) for name in ("q", "k", "v")}
    moved = inputs.floats | later | {"bias": inputs.floats["bias"].at[..., 40:, :].add(3.0)}
    (moved_out, moved_lse), moved_gradients = inputs.run(attention, moved)
    assert_bitwise((moved_out[:, :40], moved_lse[:, :40]), (out[:, :40], lse[:, :40]))
    assert_bitwise(moved_gradients, gradients)
    assert all(not np.asarray(gradients[name])[:, 40:].any() for name in later)


@BOTH
def test_rows_without_keys(attention):
    """Exactly 0 with lse -inf; whatever their cotangent, nothing comes of it."""
    inputs = case("causal", features=ALL)
    inputs.floats["sinks"] = jnp.full(4, -jnp.inf, jnp.float32)
    inputs.ints["q_segments"] = inputs.ints["q_segments"].at[:, 20:30].set(77)
    (_, _), gradients = inputs.run(attention)
    inputs.dout = inputs.dout.at[:, 20:30].set(jnp.nan)
    (out, lse), nan_gradients = inputs.run(attention)
    assert not np.asarray(out[:, 20:30]).any()
    assert (np.asarray(lse[:, 20:30]) == -np.inf).all()
    assert_bitwise(nan_gradients, gradients)
    assert all(np.isfinite(x).all() for x in gradients.values())


def assert_bitwise(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


# ---------------------------------------------------------------------------------------------- transformations


def self_attention(x, positions, segments, slopes, attention=small):
    out, lse = attention(
        x,
        x[:, :, :2],
        x[:, :, 2:],
        mask=sliding(20),
        q_positions=positions,
        k_positions=positions,
        q_segments=segments,
        k_segments=segments,
        alibi_slopes=slopes,
    )
    return out * lse[..., None]


@pytest.fixture(scope="module")
def tokens():
    random = np.random.default_rng(0)
    x = jnp.asarray(random.standard_normal((8, 63, 4, 16)), jnp.float32)
    positions = jnp.asarray(np.arange(63) + random.integers(0, 9, (8, 1)), jnp.int32)
    segments = jnp.asarray(np.tile(np.sort(random.integers(0, 3, (2, 63)), axis=1), (4, 1)), jnp.int32)
    slopes = jnp.asarray(random.uniform(0.1, 0.5, 4), jnp.float32)
    loss = lambda x, slopes: (self_attention(x, positions, segments, slopes) ** 2).sum()
    return x, positions, segments, slopes, jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(x, slopes)


def test_vmap(tokens):
    """Every array mapped, positions included: rows take different numbers of steps."""
    x, positions, segments, slopes, want = tokens
    one = lambda x, positions, segments, slopes: self_attention(x[None], positions[None], segments[None], slopes)
    loss = lambda x, slopes: (jax.vmap(one, (0, 0, 0, None))(x, positions, segments, slopes) ** 2).sum()
    assert_same(jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(x, slopes), want, 2e-6)


def test_scan_and_checkpoint(tokens):
    x, positions, segments, slopes, want = tokens
    rows = jax.tree.map(lambda a: a.reshape(4, 2, *a.shape[1:]), (x, positions, segments))

    def loss(x, slopes):
        step = jax.checkpoint(lambda total, row: (total + (self_attention(*row, slopes) ** 2).sum(), None))
        return jax.lax.scan(step, 0.0, (x, *rows[1:]))[0]

    value, (dx, dslopes) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(rows[0], slopes)
    assert_same((value, (dx.reshape(x.shape), dslopes)), want, 2e-6)


def test_inside_the_users_shard_map(tokens):
    """With varying-axes checks on: slopes and segments replicated, the rest by row, an axis that nothing uses."""
    x, positions, segments, slopes, want = tokens
    mesh = jax.make_mesh((4, 2), ("rows", "unused"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    P = jax.sharding.PartitionSpec
    sharded = jax.shard_map(
        self_attention, mesh=mesh, in_specs=(P("rows"), P("rows"), P(), P()), out_specs=P("rows"), check_vma=True
    )
    loss = lambda x, slopes: (sharded(x, positions, segments[:2], slopes) ** 2).sum()
    assert_same(jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(x, slopes), want, 2e-6)


# ---------------------------------------------------------------------------------------------- memory


def temporary_bytes(attention, T, H=8, C=64):
    """Compiled temporary memory of forward and backward. Nothing runs."""
    x = jax.ShapeDtypeStruct((1, T, H, C), jnp.float32)
    positions = jax.ShapeDtypeStruct((1, T), jnp.int32)

    def loss(q, k, v, positions):
        return attention(q, k, v, mask=causal(), q_positions=positions, k_positions=positions)[0].sum()

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x, positions).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.usefixtures("compile_well")
def test_memory_is_a_sixteenth_of_dense_and_linear():
    half, whole = temporary_bytes(blockwise, 16384), temporary_bytes(blockwise, 32768)
    assert 16 * whole <= temporary_bytes(dense, 32768)
    assert whole <= 2.1 * half


@pytest.mark.parametrize("remat", [False, True], ids=["kept", "remat"])
def test_masks_of_scanned_layers_stay_tiles(remat):
    """Positions are the same in every layer, so scanning could hoist and stack what is made from them alone."""

    def sizes(T):
        positions = jnp.arange(T, dtype=jnp.int32)[None]

        def layer(x, w):
            return self_attention(x @ w, positions, positions // 50, jnp.ones(4)), None

        def loss(ws, x):
            return jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, ws)[0].sum()

        jaxpr = str(jax.make_jaxpr(jax.grad(loss))(jnp.ones((3, 16, 16)), jnp.ones((1, T, 4, 16))))
        largest = lambda kind: max(
            math.prod(map(int, shape.split(","))) for shape in re.findall(kind + r"\[([\d,]+)\]", jaxpr)
        )
        return largest("bool"), largest("i32")

    masks, integers = sizes(768)
    assert masks == 4 * 16 * 24
    assert integers == 768  # a table of which block sees which would hold 48 * 32


def test_saved_by_name_the_forward_loop_runs_once():
    x, positions = jnp.ones((1, 63, 4, 16)), jnp.arange(63, dtype=jnp.int32)[None]
    layer = lambda x: self_attention(x, positions, positions, jnp.ones(4))

    def loops(policy):
        loss = lambda x: jax.checkpoint(layer, policy=policy)(x).sum()
        return len(re.findall(r"\bwhile\[", str(jax.make_jaxpr(jax.grad(loss))(x))))

    names = jax.checkpoint_policies.save_only_these_names("attend_out", "attend_lse")
    assert loops(names) == 2
    assert loops(None) == 3
