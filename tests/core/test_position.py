"""Positions: frequencies against golden fixtures, rotations against exact arithmetic, and laws of both."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from decimal import Decimal, localcontext
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from jaxlong.core import position
from jaxlong.core.position import (
    NTK,
    PI,
    POSITIONS,
    SCALINGS,
    Alibi,
    DynamicNTK,
    Frequencies,
    Llama3,
    LongRope,
    NoPE,
    Rope,
    Yarn,
    apply_rope,
    rotation,
)
from jaxlong.core.types import BadInput

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "rope.json").read_text())["cases"]
FARTHEST = 2**31 - 1

SCALED = {
    "plain": Rope(),
    "PI": Rope(500000.0, PI(8.0)),
    "NTK": Rope(10000.0, NTK(4.0)),
    "DynamicNTK": Rope(10000.0, DynamicNTK(2.0, 4096, 32768)),
    "Yarn": Rope(1000000.0, Yarn(32.0, 8192)),
    "LongRope": Rope(10000.0, LongRope(32.0, (1.0,) * 32, tuple(np.linspace(1.05, 60.0, 32).tolist()), 4096, 65536)),
    "Llama3": Rope(500000.0, Llama3(8.0, 8192)),
}


# ------------------------------------------------------------------------------------------------ oracles


def two_pi() -> Decimal:
    """2 pi to 60 digits by Machin's formula, in the current decimal context."""

    def arctan_of_inverse(n: int) -> Decimal:
        term = total = Decimal(1) / n
        k = 1
        while abs(term) > Decimal(10) ** -70:
            term, k = -term / (n * n), k + 2
            total += term / k
        return total

    return 2 * (16 * arctan_of_inverse(5) - 4 * arctan_of_inverse(239))


def exact_rotation(positions, inv_freq):
    """cos and sin of position * inv_freq, the angle reduced exactly before float64 takes over."""
    with localcontext() as context:
        context.prec = 80
        turn = two_pi()
        angles = [[float(Decimal(int(p)) * Decimal(float(f)) % turn) for f in inv_freq] for p in positions]
    return np.cos(angles), np.sin(angles)


def rotated_by_loop(x, positions, freqs, interleaved):
    """apply_rope element by element, in float64."""
    out = np.array(x, np.float64)
    pairs = len(freqs.inv_freq)
    for b, t, h in np.ndindex(x.shape[:3]):
        for i, speed in enumerate(freqs.inv_freq):
            first, second = (2 * i, 2 * i + 1) if interleaved else (i, i + pairs)
            angle = float(positions[b, t]) * float(speed)
            cos, sin = freqs.mscale * math.cos(angle), freqs.mscale * math.sin(angle)
            u, v = float(x[b, t, h, first]), float(x[b, t, h, second])
            out[b, t, h, first], out[b, t, h, second] = u * cos - v * sin, v * cos + u * sin
    return out


def ours(case):
    """The Rope of a golden case: what an importer of Hugging Face configurations does."""
    given = case["rope_parameters"]
    original, factor = given.get("original_max_position_embeddings"), given.get("factor")
    optional = lambda *names: {name: given[name] for name in names if name in given}
    match given["rope_type"]:
        case "default":
            scaling = None
        case "linear":
            scaling = PI(factor)
        case "dynamic":
            scaling = DynamicNTK(factor, case["max_position_embeddings"], case["seq_len"])
        case "yarn":
            names = ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate")
            scaling = Yarn(factor, original, **optional(*names))
        case "longrope":
            short, long = tuple(given["short_factor"]), tuple(given["long_factor"])
            scaling = LongRope(factor, short, long, original, case["seq_len"], **optional("attention_factor"))
        case "llama3":
            scaling = Llama3(factor, original, given["low_freq_factor"], given["high_freq_factor"])
    return Rope(given["rope_theta"], scaling)


# -------------------------------------------------------------------------------------------- frequencies


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"{case['rope_parameters']['rope_type']}-{case['dim']}")
def test_frequencies_equal_transformers(case):
    freqs = ours(case).frequencies(case["dim"])
    assert freqs.inv_freq.dtype == np.float64
    np.testing.assert_allclose(freqs.inv_freq, case["inv_freq"], rtol=1e-12, atol=0)
    assert freqs.mscale == pytest.approx(case["attention_factor"], rel=1e-12)


def test_golden_cases_cover_every_scaling():
    kinds = {type(ours(case).scaling) for case in GOLDEN}
    assert kinds == {type(None), *SCALINGS.values()} - {NTK}  # transformers has no static NTK: see the next test


def test_ntk_stretches_the_lowest_frequency_alone_by_the_factor():
    plain, scaled = Rope().frequencies(64), Rope(scaling=NTK(8.0)).frequencies(64)
    ratio = plain.inv_freq / scaled.inv_freq
    assert ratio[0] == 1.0
    np.testing.assert_allclose(ratio, 8.0 ** (2 * np.arange(32) / 62), rtol=1e-12)


@pytest.mark.parametrize(
    "scaling",
    [
        PI(1.0),
        NTK(1.0),
        DynamicNTK(4.0, 4096),
        DynamicNTK(4.0, 4096, 4096),
        DynamicNTK(4.0, 4096, 100),
        Yarn(1.0, 4096),
        Yarn(1.0, 4),
        LongRope(1.0, (1.0,) * 32, (2.0,) * 32, 4096),
        LongRope(1.0, (1.0,) * 32, (2.0,) * 32, 4096, 4096),
        LongRope(1.0, (2.0,) * 32, (1.0,) * 32, 4096, 4097),
        Llama3(1.0, 8192),
    ],
    ids=repr,
)
def test_scalings_that_extend_by_nothing_change_nothing(scaling):
    plain, scaled = Rope().frequencies(64), Rope(scaling=scaling).frequencies(64)
    np.testing.assert_allclose(scaled.inv_freq, plain.inv_freq, rtol=1e-15)
    assert scaled.mscale == plain.mscale == 1.0


def test_pi_by_a_factor_is_positions_divided_by_it():
    positions = jnp.arange(0, 8 * 512, 8, dtype=jnp.int32)[None]
    x = jax.random.normal(jax.random.key(0), (1, 512, 2, 64))
    interpolated = apply_rope(x, positions, Rope(scaling=PI(8.0)).frequencies(64))
    np.testing.assert_allclose(interpolated, apply_rope(x, positions // 8, Rope().frequencies(64)), atol=1e-6)


def test_rotary_dim_takes_the_frequencies_of_a_narrower_head():
    rope = Rope(scaling=Yarn(4.0, 4096), rotary_dim=32)
    narrow, whole = rope.frequencies(128), replace(rope, rotary_dim=None).frequencies(32)
    np.testing.assert_array_equal(narrow.inv_freq, whole.inv_freq)


def test_deepseek_softmax_scale():
    published = Yarn(40.0, 4096, mscale=1.0, mscale_all_dim=1.0)  # DeepSeek-V3
    assert Rope(scaling=published).softmax_scale == pytest.approx((0.1 * math.log(40.0) + 1.0) ** 2)
    assert published.frequencies(10000.0, 64).mscale == 1.0
    assert Rope(scaling=Yarn(40.0, 4096)).softmax_scale == Rope().softmax_scale == 1.0


# ----------------------------------------------------------------------------------------------- rotation


def test_the_turn_constant_equals_an_independent_expansion():
    with localcontext() as context:
        context.prec = 80
        assert int(2**192 / two_pi()) == position._TURNS_PER_RADIAN


@pytest.mark.parametrize("name", SCALED)
def test_rotation_is_exact_at_any_position(name):
    rng = np.random.default_rng(0)
    near = np.concatenate([np.arange(64), np.arange(64, 4097, 61), [4096, 2**20, 2**24 + 5, 2**30]])
    far = np.concatenate([FARTHEST - np.arange(32), rng.integers(0, FARTHEST, 100, endpoint=True)])
    positions = np.concatenate([near, far])
    freqs = SCALED[name].frequencies(64)
    cos, sin = jax.jit(lambda p: rotation(p, freqs))(jnp.asarray(positions, jnp.int32))
    assert cos.dtype == sin.dtype == jnp.float32
    expected_cos, expected_sin = exact_rotation(positions, freqs.inv_freq)
    scale = np.float64(freqs.mscale)
    assert np.abs(np.float64(cos) / scale - expected_cos).max() < 2e-7
    assert np.abs(np.float64(sin) / scale - expected_sin).max() < 2e-7


@pytest.mark.parametrize("frequency", [1.0, 0.123456789, 3.0, 1e-9 * math.pi, 1e-300, 0.0])
def test_rotation_holds_where_quadrants_change_and_words_overflow(frequency):
    """At the positions, of millions, whose angles are nearest to a multiple of an eighth turn from either side."""
    positions = np.concatenate([np.arange(2_000_000), FARTHEST - np.arange(2_000_000)]).astype(np.uint64)
    with localcontext() as context:
        context.prec = 80
        fraction = int(Decimal(frequency) / two_pi() * 2**64) % 2**64
    order = np.argsort(positions * np.uint64(fraction) % np.uint64(2**61))  # wraps modulo a turn
    words = [0, 1, 2**16 - 1, 2**16, 2**16 + 1, 2**30, FARTHEST]
    hardest = np.concatenate([positions[order[:50]], positions[order[-50:]], np.array(words, np.uint64)])
    cos, sin = rotation(jnp.asarray(hardest.astype(np.int32)), Frequencies(np.array([frequency])))
    expected_cos, expected_sin = exact_rotation(hardest, [frequency])
    assert np.abs(np.float64(cos) - expected_cos).max() < 2e-7
    assert np.abs(np.float64(sin) - expected_sin).max() < 2e-7


def test_position_zero_does_not_turn():
    cos, sin = rotation(jnp.zeros(1, jnp.int32), Rope().frequencies(64))
    np.testing.assert_array_equal(cos, np.ones((1, 32)))
    np.testing.assert_array_equal(sin, np.zeros((1, 32)))


@pytest.mark.parametrize("name", SCALED)
def test_a_common_shift_changes_no_logit(name):
    freqs = SCALED[name].frequencies(64)
    keys = jax.random.split(jax.random.key(1))
    q, k = (jax.random.normal(key, (1, 64, 2, 64)) for key in keys)
    q, k = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    start = jnp.arange(64, dtype=jnp.int32)[None] * 37

    @jax.jit
    def logits(shift):
        turned = (apply_rope(x, start + shift, freqs) for x in (q, k))
        return jnp.einsum("bthc,bshc->bhts", *turned, precision="highest")

    expected = logits(0)
    for shift in (1, 4096, 1_000_003, 2**24 + 5, 2**31 - 64 * 37):
        np.testing.assert_allclose(logits(shift), expected, atol=1e-5)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [None, 2, 12])
def test_apply_rope_equals_a_loop(interleaved, rotary_dim):
    rng = np.random.default_rng(2)
    x = rng.normal(size=(2, 5, 3, 16)).astype(np.float32)
    positions = rng.integers(0, 1000, (2, 5)).astype(np.int32)
    freqs = Rope(100.0, Yarn(4.0, 512), rotary_dim=rotary_dim).frequencies(16)
    turned = apply_rope(jnp.asarray(x), jnp.asarray(positions), freqs, interleaved=interleaved)
    np.testing.assert_allclose(turned, rotated_by_loop(x, positions, freqs, interleaved), atol=2e-6)
    if rotary_dim is not None:
        np.testing.assert_array_equal(turned[..., rotary_dim:], x[..., rotary_dim:])


def test_interleaving_permutes_pairs():
    x = jax.random.normal(jax.random.key(3), (1, 7, 2, 8))
    positions = jnp.arange(7, dtype=jnp.int32)[None] * 1000
    freqs = Rope().frequencies(8)
    halves = jnp.concatenate([x[..., 0::2], x[..., 1::2]], -1)
    expected = apply_rope(halves, positions, freqs)
    turned = apply_rope(x, positions, freqs, interleaved=True)
    np.testing.assert_array_equal(jnp.concatenate([turned[..., 0::2], turned[..., 1::2]], -1), expected)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_is_rounded_once(dtype):
    x = jax.random.normal(jax.random.key(4), (1, 9, 2, 16)).astype(dtype)
    positions = jnp.arange(9, dtype=jnp.int32)[None] * 100_003
    freqs = Rope().frequencies(16)
    turned = apply_rope(x, positions, freqs)
    assert turned.dtype == dtype
    np.testing.assert_array_equal(turned, apply_rope(x.astype(jnp.float32), positions, freqs).astype(dtype))


def test_rotation_works_under_transformations():
    freqs = Rope().frequencies(8)
    x = jax.random.normal(jax.random.key(5), (8, 6, 2, 8))
    positions = jnp.arange(48, dtype=jnp.int32).reshape(8, 6) * 44_739_242
    expected = apply_rope(x, positions, freqs)
    one = lambda x, p: apply_rope(x[None], p[None], freqs)[0]
    same = lambda value: np.testing.assert_allclose(value, expected, atol=1e-6)  # compilers fuse products and sums
    same(jax.jit(jax.vmap(one))(x, positions))
    same(jax.lax.scan(lambda carry, row: (carry, one(*row)), None, (x, positions))[1])
    mesh, rows = Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data")
    sharded = jax.shard_map(lambda x, p: apply_rope(x, p, freqs), mesh=mesh, in_specs=(rows, rows), out_specs=rows)
    same(jax.jit(sharded)(x, positions))
    # the gradient of a rotation is the rotation back, so <x, grad> is the value that <f, c> had
    c = jax.random.normal(jax.random.key(6), x.shape)
    value, gradient = jax.value_and_grad(lambda x: jnp.vdot(apply_rope(x, positions, freqs), c))(x)
    np.testing.assert_allclose(jnp.vdot(x, gradient), value, rtol=1e-5)
    np.testing.assert_allclose(jnp.linalg.norm(gradient), jnp.linalg.norm(c), rtol=1e-6)


# ------------------------------------------------------------------------------------------ ALiBi and none


def test_alibi_slopes_of_a_power_of_two():
    np.testing.assert_array_equal(Alibi().slopes(8), [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256])
    np.testing.assert_allclose(Alibi().slopes(16), 2.0 ** (-np.arange(1, 17) / 2), rtol=1e-7)
    np.testing.assert_array_equal(Alibi().slopes(1), [1 / 256])


def test_alibi_slopes_between_powers_of_two():
    def published(n: int) -> list[float]:
        if math.log2(n).is_integer():
            first = 2 ** (-(2 ** -(math.log2(n) - 3)))
            return [first * first**i for i in range(n)]
        below = 2 ** math.floor(math.log2(n))
        return published(below) + published(2 * below)[0::2][: n - below]

    for heads in range(1, 70):
        np.testing.assert_allclose(Alibi().slopes(heads), published(heads), rtol=1e-6)


def test_values_hash_compare_and_repeat_themselves():
    longrope = LongRope(4.0, (1.0, 1.0), (1.0, 2.0), 16)
    values = [Rope(), Rope(scaling=longrope), NoPE(), Alibi(), *(rope.scaling for rope in SCALED.values())]
    names = {**SCALINGS, **POSITIONS}
    for value in values:
        if value is not None:
            assert eval(repr(value), {**names}) == value
            assert hash(value) == hash(eval(repr(value), {**names}))
    assert LongRope(4.0, [1.0, 1.0], [1.0, 2.0], 16) == longrope  # lists, as a stored configuration has them


# ---------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (
            lambda: Yarn(0.5, 4096),
            "Yarn.factor: 0.5: a context cannot be extended by less than 1; 1 or more",
        ),
        (lambda: PI(0), "PI.factor: 0: a context cannot be extended by less than 1; 1 or more"),
        (lambda: NTK(float("nan")), "NTK.factor: nan: not a finite number; a number"),
        (lambda: DynamicNTK(2.0, 0), "DynamicNTK.original: 0: a length in tokens; an int, 1 or more"),
        (lambda: DynamicNTK(2.0, 16, -1), "DynamicNTK.length: -1: a length in tokens; an int, 1 or more"),
        (lambda: Yarn(2.0, 16, beta_slow=0.0), "Yarn.beta_slow: 0.0: must be positive; above 0"),
        (
            lambda: Yarn(2.0, 16, beta_fast=1.0, beta_slow=2.0),
            "Yarn.beta_fast: 1.0: kept pairs turn more often than interpolated ones; beta_slow (2.0) or more",
        ),
        (lambda: Yarn(2.0, 16, attention_factor=0.0), "Yarn.attention_factor: 0.0: must be positive; above 0"),
        (lambda: Yarn(2.0, 16, mscale=-1.0), "Yarn.mscale: -1.0: would flatten attention; 0 or more"),
        (lambda: LongRope(2.0, (1.0, 0.0), (1.0,), 16), "LongRope.short[1]: 0.0: must be positive; above 0"),
        (
            lambda: LongRope(2.0, (1.0,), (1.0,), 1),
            "LongRope.original: 1: the attention factor divides by its logarithm; 2 or more",
        ),
        (
            lambda: Rope(scaling=LongRope(2.0, (1.0,), (1.0, 1.0, 1.0), 16, 17)).frequencies(64),
            "LongRope.long: 3 factors: 64 dimensions rotate; 32",
        ),
        (
            lambda: Llama3(8.0, 8192, 4.0, 4.0),
            "Llama3.high_freq_factor: 4.0: kept pairs turn more often than divided ones; above 4.0",
        ),
        (lambda: Rope(1.0), "Rope.base: 1.0: frequencies must fall from pair to pair; above 1"),
        (lambda: Rope(rotary_dim=3), "Rope.rotary_dim: 3: dimensions rotate in pairs; an even int, 2 or more"),
        (
            lambda: Rope(scaling="yarn"),
            "Rope.scaling: 'yarn': not a scaling; None, PI, NTK, DynamicNTK, Yarn, LongRope, Llama3",
        ),
        (
            lambda: Rope(rotary_dim=32).frequencies(16),
            "Rope.rotary_dim: 32: more than the 16 dimensions of a head; at most 16",
        ),
        (
            lambda: Rope().frequencies(15),
            "Rope.frequencies.dim: 15: dimensions rotate in pairs; an even int, 2 or more",
        ),
        (
            lambda: Rope(scaling=NTK(2.0)).frequencies(2),
            "Rope.rotary_dim: 2: a single pair has no lower frequency to stretch; 4 or more",
        ),
        (
            lambda: apply_rope(jnp.ones((1, 1, 1, 8)), jnp.zeros((1, 1), jnp.int32), Rope().frequencies(16)),
            "apply_rope.freqs: 8 pairs: a head has 8 dimensions; C / 2 at most",
        ),
        (lambda: Alibi().slopes(0), "Alibi.slopes.heads: 0: attention has at least one head; 1 or more"),
    ],
)
def test_bad_input_is_told_in_one_line(make, line):
    with pytest.raises(BadInput) as told:
        make()
    assert str(told.value) == line
