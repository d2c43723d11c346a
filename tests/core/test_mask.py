"""Masks: predicates against loops written from the papers, tile tests and reaches against brute force."""

from __future__ import annotations

import itertools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlong.core.mask import (
    MASKS,
    And,
    Causal,
    Mask,
    Not,
    Or,
    Sliding,
    bigbird,
    causal,
    dilated,
    fixed,
    full,
    longformer,
    prefix,
    sinks,
    sliding,
    strided,
)
from jaxlong.core.types import BadInput

HEADS = 4
FARTHEST = 2**31 - 1


# ----------------------------------------------- oracles: may head h at position i see j, from the definitions


def sees_window(left, right=0):
    return lambda i, j, h: j in range(i - left + 1, i + right + 1)


def sees_dilated(segment, rate):
    """LongNet: rows offset, offset + rate, ... of each segment attend to each other."""

    def sees(i, j, h):
        start = i - i % segment
        rows = range(start + h % rate, start + segment, rate)
        return i in rows and j in rows

    return sees


def sees_strided(step):
    """Sparse Transformer: A1 is the last `step` positions, A2 = {j: (i - j) mod step = 0}, both up to i."""
    return lambda i, j, h: j <= i and (j > i - step or (i - j) % step == 0)


def sees_fixed(step, summary):
    """Sparse Transformer: A1 = {j: floor(j / l) = floor(i / l)}, A2 = {j: j mod l in {l - c, ..., l - 1}}."""
    return lambda i, j, h: j <= i and (j // step == i // step or j % step in range(step - summary, step))


def sees_longformer(window, n_global):
    return lambda i, j, h: i - window < j <= i or i < n_global or j < n_global


def drawn_blocks(block, window, n_global, n_random, seed):
    """The earlier blocks that BigBird's `block` draws: one from each of n_random equal runs of those eligible."""
    eligible = list(range(n_global, block - window // 2))
    runs = np.array_split(np.array(eligible, int), n_random) if n_random else []
    drawn = []
    for run, candidates in enumerate(runs):
        x = (block * 0x9E3779B1 + seed * 0x85EBCA77 + run * 0xC2B2AE3D) % 2**32
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
            x = (x ^ x >> shift) * factor % 2**32
        if len(candidates):
            drawn.append(int(candidates[(x >> 1) % len(candidates)]))
    return drawn


def sees_bigbird(window, n_global, n_random, block, seed):
    def sees(i, j, h):
        i, j = i // block, j // block
        late, early = max(i, j), min(i, j)
        near = late - early <= window // 2
        return near or early < n_global or early in drawn_blocks(late, window, n_global, n_random, seed)

    return sees


LEAVES: list[tuple[Mask, object]] = [
    (full(), lambda i, j, h: True),
    (causal(), lambda i, j, h: j <= i),
    (sliding(1), sees_window(1)),
    (sliding(4), sees_window(4)),
    (sliding(3, right=2), sees_window(3, 2)),
    (sliding(100), sees_window(100)),
    (sinks(1), lambda i, j, h: j < 1 and j <= i),
    (sinks(5), lambda i, j, h: j < 5 and j <= i),
    (prefix(0), lambda i, j, h: j <= i),
    (prefix(6), lambda i, j, h: j <= i or j < 6),
    (dilated(8, 1), sees_dilated(8, 1)),
    (dilated(8, 2), sees_dilated(8, 2)),
    (dilated(7, 3), sees_dilated(7, 3)),
    (dilated(4, 4), sees_dilated(4, 4)),
    (dilated(50, 4), sees_dilated(50, 4)),
    (strided(1), sees_strided(1)),
    (strided(4), sees_strided(4)),
    (strided(7), sees_strided(7)),
    (fixed(5, 1), sees_fixed(5, 1)),
    (fixed(6, 2), sees_fixed(6, 2)),
    (fixed(4, 4), sees_fixed(4, 4)),
    (fixed(1, 1), sees_fixed(1, 1)),
    (longformer(4, 0), sees_longformer(4, 0)),
    (longformer(4, 3), sees_longformer(4, 3)),
    (bigbird(1, 0, 0, 3, 0), sees_bigbird(1, 0, 0, 3, 0)),
    (bigbird(3, 1, 2, 1, 0), sees_bigbird(3, 1, 2, 1, 0)),
    (bigbird(3, 1, 1, 2, 7), sees_bigbird(3, 1, 1, 2, 7)),
    (bigbird(1, 0, 3, 2, 2**40 + 5), sees_bigbird(1, 0, 3, 2, 2**40 + 5)),
]
COMPOSED = [
    causal() & longformer(4, 3),
    (sliding(4) | sinks(2)) & causal(),
    causal() & bigbird(3, 1, 2, 2, 3),
    causal() & dilated(8, 2),
    ~sliding(4) & causal(),
    ~(strided(4) | prefix(3)),
    ~~fixed(5, 1) & ~full() | sliding(2, 2),
]
leaves = pytest.mark.parametrize(("mask", "sees"), LEAVES, ids=[repr(mask) for mask, _ in LEAVES])
every_mask = pytest.mark.parametrize("mask", [*(mask for mask, _ in LEAVES), *COMPOSED], ids=repr)


def dense(mask: Mask, n: int, heads: int = HEADS) -> np.ndarray:
    """[heads, n, n], by NumPy."""
    q, k = np.arange(n)[:, None], np.arange(n)[None, :]
    return np.stack([np.broadcast_to(mask(q, k, h), (n, n)) for h in range(heads)])


# --------------------------------------------------------------------------------------------- predicates


def test_every_registered_mask_is_tested():
    assert {type(mask) for mask, _ in LEAVES} | {And, Or, Not} == set(MASKS.values())


@leaves
def test_predicates_equal_their_definition(mask, sees):
    n = 30
    expected = np.zeros((HEADS, n, n), bool)
    for h, i, j in np.ndindex(expected.shape):
        expected[h, i, j] = sees(i, j, h)
    np.testing.assert_array_equal(dense(mask, n), expected)


@every_mask
def test_numpy_jax_and_int_agree(mask):
    n = 20
    expected = dense(mask, n)
    position = jnp.arange(n, dtype=jnp.int32)
    inside = jax.jit(lambda q, k, h: jnp.broadcast_to(mask(q, k, h), (HEADS, n, n)))
    found = inside(position[:, None], position, jnp.arange(HEADS, dtype=jnp.int32)[:, None, None])
    np.testing.assert_array_equal(found, expected)
    over_keys = jax.vmap(lambda q, k: mask(q, k), (None, 0))
    np.testing.assert_array_equal(jax.vmap(over_keys, (0, None))(position, position), expected[0])
    for h, i, j in [(0, 0, 0), (1, 7, 3), (3, 3, 7), (2, 19, 1), (1, 19, 17)]:
        assert mask(i, j, h) == expected[h, i, j]


@every_mask
def test_arithmetic_stays_inside_int32(mask):
    """Python integers do not overflow, so they are the oracle of int32, near the last position too."""
    rng = np.random.default_rng(0)
    edge = FARTHEST - rng.integers(0, 40, 200)
    positions = np.concatenate([edge, rng.integers(0, FARTHEST, 100), rng.integers(0, 40, 50), [0, FARTHEST]])
    q, k = rng.permutation(positions), rng.permutation(positions)
    far_q, far_k = np.maximum(q, rng.permutation(positions)), np.maximum(k, rng.permutation(positions))
    small = [jnp.asarray(x, jnp.int32) for x in (q, far_q, k, far_k)]
    rows = list(zip(*(x.tolist() for x in (q, far_q, k, far_k)), strict=True))
    np.testing.assert_array_equal(mask(small[0], small[2], 1), [mask(i, j, 1) for i, _, j, _ in rows])
    for found, expected in zip(mask.tile(*small), zip(*(mask.tile(*row) for row in rows), strict=True), strict=True):
        np.testing.assert_array_equal(found, expected)


# -------------------------------------------------------------------------------------------------- tiles


def truth(mask: Mask, n: int, heads: int):
    """All pairs of inclusive ranges of n positions; for each whether a head sees a pair, and whether all see all."""
    lo, hi = np.array([(a, b) for a in range(n) for b in range(a, n)]).T
    area = np.zeros((heads, n + 1, n + 1), int)
    area[:, 1:, 1:] = dense(mask, n, heads).cumsum(1).cumsum(2)
    q0, q1, k0, k1 = lo[:, None], hi[:, None], lo[None], hi[None]
    visible = area[:, q1 + 1, k1 + 1] - area[:, q0, k1 + 1] - area[:, q1 + 1, k0] + area[:, q0, k0]
    return (q0, q1, k0, k1), (visible > 0).any(0), (visible == (q1 + 1 - q0) * (k1 + 1 - k0)).all(0)


@every_mask
def test_tiles_are_sound_on_all_small_ranges(mask):
    ranges, any_seen, all_seen = truth(mask, 22, HEADS)
    maybe_any, surely_all = mask.tile(*ranges)
    assert not (any_seen & ~maybe_any).any()
    assert not (surely_all & ~all_seen).any()


@leaves
def test_tiles_of_leaves_are_exact(mask, sees):
    """Over all small ranges; of BigBird without what mixes window and draws, and beyond the draws it evaluates."""
    ranges, any_seen, all_seen = truth(mask, 22, HEADS)
    maybe_any, surely_all = mask.tile(*ranges)
    if isinstance(mask, type(bigbird(1, 0, 0, 1, 0))):
        q0, q1, k0, k1 = (x // mask.block for x in ranges)
        evaluated = (q1 - q0 < 9) & (k1 - k0 < 9)
        one_block = (q1 == q0) & (k1 == k0)
        np.testing.assert_array_equal(maybe_any & evaluated, any_seen & evaluated)
        np.testing.assert_array_equal(surely_all & one_block, all_seen & one_block)
    else:
        np.testing.assert_array_equal(maybe_any, any_seen)
        np.testing.assert_array_equal(surely_all, all_seen)


@pytest.mark.parametrize("seed", range(12))
def test_tiles_are_sound_on_random_masks_and_ranges(seed):
    rng = random.Random(seed)

    def some(depth: int) -> Mask:
        if depth == 0 or rng.random() < 0.2:
            window, block = rng.randint(1, 30), rng.randint(1, 20)
            return rng.choice(
                [
                    full(),
                    causal(),
                    sliding(window, rng.randint(0, 9)),
                    sinks(window),
                    prefix(window),
                    dilated(window + 4, rng.randint(1, 4)),
                    strided(block),
                    fixed(block, rng.randint(1, block)),
                    longformer(window, rng.randint(0, 5)),
                    bigbird(rng.choice([1, 3]), rng.randint(0, 2), rng.randint(0, 3), block, rng.randint(0, 99)),
                ]
            )
        a, b = some(depth - 1), some(depth - 1)
        return rng.choice([a & b, a | b, ~a, a & causal()])

    n = 160
    for mask in (some(3) for _ in range(6)):
        seen = dense(mask, n)
        for _ in range(60):
            (q0, q1), (k0, k1) = (sorted((rng.randrange(n), rng.randrange(n))) for _ in range(2))
            q1, k1 = min(q1, q0 + rng.randint(0, n)), min(k1, k0 + rng.randint(0, n))
            tile = seen[:, q0 : q1 + 1, k0 : k1 + 1]
            maybe_any, surely_all = mask.tile(q0, q1, k0, k1)
            assert maybe_any or not tile.any(), (mask, q0, q1, k0, k1)
            assert not surely_all or tile.all(), (mask, q0, q1, k0, k1)


@every_mask
def test_tiles_agree_between_numpy_jax_and_int(mask):
    n, block = 24, 4
    start = np.arange(0, n, block)
    ranges = start[:, None], start[:, None] + block - 1, start[None], start[None] + block - 1
    expected = mask.tile(*ranges)
    traced = jax.jit(mask.tile)(*(jnp.asarray(x, jnp.int32) for x in ranges))
    for i, (of_jax, of_numpy) in enumerate(zip(traced, expected, strict=True)):
        assert of_numpy.shape == of_jax.shape == (6, 6)
        np.testing.assert_array_equal(of_jax, of_numpy)
        for a, b in itertools.product(range(6), range(6)):
            q, k = int(start[a]), int(start[b])
            assert mask.tile(q, q + block - 1, k, k + block - 1)[i] == of_numpy[a, b]


# -------------------------------------------------------------------------------------------------- reach


def farthest_back(mask: Mask, n: int) -> int:
    _, q, k = np.nonzero(dense(mask, n))
    return int((q - k + 1).max(initial=-n))


@leaves
def test_reach_of_leaves_is_exact(mask, sees):
    near, far = farthest_back(mask, 120), farthest_back(mask, 240)
    if mask.reach() is None:
        assert far >= near + 60  # still growing
    else:
        assert mask.reach() == near == far


@pytest.mark.parametrize("mask", COMPOSED, ids=repr)
def test_reach_of_composed_masks_is_a_bound(mask):
    if mask.reach() is not None:
        assert farthest_back(mask, 200) <= mask.reach()


def farthest_ahead(mask: Mask, n: int) -> int:
    _, q, k = np.nonzero(dense(mask, n))
    return int((k - q).max(initial=0))


@leaves
def test_ahead_of_leaves_is_exact(mask, sees):
    near, far = farthest_ahead(mask, 120), farthest_ahead(mask, 240)
    if mask.ahead() is None:
        assert far > near  # still growing
    else:
        assert mask.ahead() == near == far


@pytest.mark.parametrize("mask", COMPOSED, ids=repr)
def test_ahead_of_composed_masks_is_a_bound(mask):
    if mask.ahead() is not None:
        assert farthest_ahead(mask, 200) <= mask.ahead()


def test_ahead_of_compositions():
    assert (causal() & longformer(4, 2)).ahead() == 0
    assert (sliding(3, 5) | causal()).ahead() == 5
    assert (~causal()).ahead() is None


def test_reach_of_compositions():
    assert (causal() & sliding(8)).reach() == 8
    assert (sliding(3) & sliding(8, 4)).reach() == 3
    assert (sliding(3) | sliding(8)).reach() == 8
    assert (sliding(8) | sinks(1)).reach() is None
    assert (causal() & dilated(64, 4)).reach() == 61
    assert bigbird(3, 0, 0, 16, 0).reach() == 32
    assert (~sliding(4)).reach() is None
    assert (~~sliding(4)).reach() == 4


# ------------------------------------------------------------------------------------------------ algebra


def test_boolean_algebra():
    n = 40
    a, b, c = sliding(7, 3), strided(5) & causal(), bigbird(3, 1, 2, 4, 1)
    same = lambda x, y: np.testing.assert_array_equal(dense(x, n), dense(y, n))
    np.testing.assert_array_equal(dense(a & b, n), dense(a, n) & dense(b, n))
    np.testing.assert_array_equal(dense(a | b, n), dense(a, n) | dense(b, n))
    np.testing.assert_array_equal(dense(~a, n), ~dense(a, n))
    same(~(a & b), ~a | ~b)
    same(~(a | b), ~a & ~b)
    same(a & (b | c), a & b | a & c)
    same(a | ~a, full())
    same(a & ~a, ~full())
    assert ~~a is a


def test_known_identities():
    n = 40
    same = lambda x, y: np.testing.assert_array_equal(dense(x, n), dense(y, n))
    same(sliding(n), causal())
    same(dilated(n, 1), full())
    same(dilated(n, 1) & causal(), causal())
    same(strided(1), causal())
    same(fixed(7, 7), causal())
    same(prefix(0), causal())
    same(prefix(n), full())
    same(longformer(5, 0), sliding(5))
    same(longformer(5, 2) & causal(), sliding(5) | sinks(2))
    same(bigbird(1, 0, n, 1, 0), full())
    same(bigbird(3, 0, 0, 1, 0), sliding(2, 1))


def test_values():
    mask = (causal() & sliding(1024)) | ~sinks(4)
    assert repr(mask) == "Or(a=And(a=Causal(), b=Sliding(left=1024, right=0)), b=Not(mask=Sinks(n=4)))"
    assert eval(repr(mask), dict(MASKS)) == mask
    assert hash(eval(repr(mask), dict(MASKS))) == hash(mask)
    assert mask != (causal() & sliding(1023)) | ~sinks(4)
    assert causal() != full()
    assert len({causal(), Causal(), sliding(4), Sliding(4, 0), prefix(4), sinks(4)}) == 4
    with pytest.raises(AttributeError):
        sliding(4).left = 5


def test_a_mask_is_a_static_argument():
    traces = []

    def scores(q, k, mask):
        traces.append(mask)
        return jnp.where(mask(q[:, None], k), 1.0, 0.0)

    compiled = jax.jit(scores, static_argnames="mask")
    q = jnp.arange(6, dtype=jnp.int32)
    for _ in range(2):
        np.testing.assert_array_equal(compiled(q, q, causal() & sliding(3)), np.tril(np.ones((6, 6))) - np.tri(6, k=-3))
        np.testing.assert_array_equal(compiled(q, q, mask=full()), np.ones((6, 6)))
    assert traces == [causal() & sliding(3), full()]


# ------------------------------------------------------------------------------------------------ bigbird


def test_bigbird_draws_distinct_earlier_blocks_everywhere():
    n_random, blocks = 3, 400
    random_only = bigbird(3, 1, n_random, 1, 11) & ~bigbird(3, 1, 0, 1, 11) & causal()
    seen = dense(random_only, blocks, heads=1)[0]
    eligible = np.maximum(np.arange(blocks) - 2, 0)
    np.testing.assert_array_equal(seen.sum(1), np.minimum(eligible, n_random))
    rows, columns = np.nonzero(seen[50:])
    where = (columns - 1) / eligible[50 + rows]
    assert abs(where.mean() - 0.5) < 0.05 and (np.histogram(where, 6, (0, 1))[0] > 100).all()  # near and far alike


def test_bigbird_does_not_change_as_a_sequence_grows_and_follows_its_seed():
    mask = bigbird(3, 1, 2, 2, 0)
    np.testing.assert_array_equal(dense(mask, 60), dense(mask, 90)[:, :60, :60])
    seen = dense(mask, 200)[0]
    np.testing.assert_array_equal(seen, seen.T)
    others = [dense(bigbird(3, 1, 2, 2, seed) & causal(), 200)[0] for seed in range(1, 4)]
    apart = [(a != b).mean() for a, b in itertools.combinations([seen & np.tri(200, dtype=bool), *others], 2)]
    assert min(apart) > 0.01


def test_bigbird_skips_most_tiles():
    n, block = 64 * 512, 64
    mask = bigbird(3, 1, 3, block, 5) & causal()
    start = np.arange(0, n, block)
    ranges = start[:, None], start[:, None] + block - 1, start[None], start[None] + block - 1
    maybe_any, surely_all = mask.tile(*ranges)
    assert maybe_any.sum(1).max() == 1 + 2 + 3
    assert (maybe_any & ~surely_all).sum(1).max() == 1  # the diagonal block alone is partly visible


# ---------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: sliding(0), "sliding.left: 0: a window sees at least its own token; 1 or more"),
        (lambda: sliding(True), "sliding.left: True: not a whole number; an int, 1 or more"),
        (lambda: sliding(4, right=-1), "sliding.right: -1: keys ahead are counted from none; 0 or more"),
        (lambda: sinks(0), "sinks.n: 0: a sink holds at least one token; 1 or more"),
        (lambda: prefix(-1), "prefix.n: -1: a prefix has no negative length; 0 or more"),
        (lambda: dilated(0, 1), "dilated.segment: 0: a segment holds at least one token; 1 or more"),
        (lambda: dilated(8, 0), "dilated.rate: 0: a rate of 1 keeps every token; 1 or more"),
        (lambda: dilated(4, 5), "dilated.rate: 5: some heads would keep no token of a segment of 4; 1 to 4"),
        (lambda: strided(0), "strided.step: 0: a step of 1 keeps every key; 1 or more"),
        (lambda: fixed(0, 1), "fixed.step: 0: a block holds at least one token; 1 or more"),
        (lambda: fixed(4, 0), "fixed.summary: 0: a block is summarized by at least one token; 1 or more"),
        (lambda: fixed(4, 5), "fixed.summary: 5: more than the 4 positions of a block; 1 to 4"),
        (lambda: longformer(0, 1), "longformer.window: 0: a window sees at least its own token; 1 or more"),
        (lambda: longformer(4, -1), "longformer.n_global: -1: global tokens are counted from none; 0 or more"),
        (lambda: bigbird(0, 1, 1, 4, 0), "bigbird.window: 0: a window holds at least its own block; 1 or more"),
        (
            lambda: bigbird(2, 1, 1, 4, 0),
            "bigbird.window: 2: a window has equally many blocks on both sides; odd",
        ),
        (lambda: bigbird(3, -1, 1, 4, 0), "bigbird.n_global: -1: global blocks are counted from none; 0 or more"),
        (lambda: bigbird(3, 1, -1, 4, 0), "bigbird.n_random: -1: random blocks are counted from none; 0 or more"),
        (lambda: bigbird(3, 1, 1, 0, 0), "bigbird.block: 0: a block holds at least one token; 1 or more"),
        (lambda: bigbird(3, 1, 1, 4, -1), "bigbird.seed: -1: seeds are not negative; 0 or more"),
    ],
)
def test_bad_input_is_told_in_one_line(make, line):
    with pytest.raises(BadInput) as told:
        make()
    assert str(told.value) == line
