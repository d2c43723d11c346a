"""Masks: which key position a query position may see.

A mask is a static, hashable value, a predicate on positions that one object serves everywhere: dense scores,
blocks of scores, kernels that skip tiles, rings in any layout, and caches sized by `reach`.

    mask = sliding(1024) | sinks(4)
    mask(q[:, None], k[None, :])            # [T, S] bool from int32 positions
    mask.tile(q0, q1, k0, k1)               # (maybe_any, surely_all) of all pairs of two inclusive ranges

Masks know nothing of segments (packed documents): those are arrays beside the mask. Constructors are predicates;
those that come from language models (`causal`, `sliding` without `right`, `sinks`, `strided`, `fixed`) look only back,
and any other becomes causal by `& causal()`.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Int

from jaxlong.core.types import BadInput

Positions = Int[Array, "..."] | Int[np.ndarray, "..."] | np.integer | int
"""Non-negative positions, any shape; arguments of one call broadcast against each other."""

Visible = Bool[Array, "..."] | Bool[np.ndarray, "..."] | np.bool_ | bool
"""Truth values of the same kind as the positions that went in: jax gives jax, NumPy and int give NumPy or bool."""


@dataclass(frozen=True)
class Mask(abc.ABC):
    """A predicate on (query position, key position, head). Equal fields make equal masks; usable as a static argument.

    Positions are non-negative and at most 2**31 - 1; every expression below stays inside int32 for them.
    """

    @abc.abstractmethod
    def __call__(self, q: Positions, k: Positions, h: Positions = 0) -> Visible:
        """True where query position `q` of head `h` may see key position `k`.

        The result has the broadcast shape of `q` and `k`; `h` joins it only if the mask differs between heads.
        """

    @abc.abstractmethod
    def tile(self, q0: Positions, q1: Positions, k0: Positions, k1: Positions) -> tuple[Visible, Visible]:
        """`(maybe_any, surely_all)` over queries q0..q1 and keys k0..k1, both ends included, q0 <= q1 and k0 <= k1.

        Conservative for every head: without `maybe_any` no head sees any pair; with `surely_all` every head sees all.
        """

    @abc.abstractmethod
    def reach(self) -> int | None:
        """The largest `q - k + 1` of a visible pair (a key at the query itself counts 1); None if unbounded.

        For composed masks an upper bound. It sizes ring-buffer caches.
        """

    def ahead(self) -> int | None:
        """The largest `k - q` of a visible pair, 0 if none is ahead; None if unbounded. An upper bound, as `reach`."""
        return None

    def __and__(self, other: Mask) -> Mask:
        return And(self, other)

    def __or__(self, other: Mask) -> Mask:
        return Or(self, other)

    def __invert__(self) -> Mask:
        return Not(self)


# ---------------------------------------------------------------------------------------------- algebra


@dataclass(frozen=True)
class And(Mask):
    """Visible in both."""

    a: Mask
    b: Mask

    def __post_init__(self):
        _masks(self, "a", "b")

    def __call__(self, q: Positions, k: Positions, h: Positions = 0) -> Visible:
        return self.a(q, k, h) & self.b(q, k, h)

    def tile(self, q0: Positions, q1: Positions, k0: Positions, k1: Positions) -> tuple[Visible, Visible]:
        any_a, all_a = self.a.tile(q0, q1, k0, k1)
        any_b, all_b = self.b.tile(q0, q1, k0, k1)
        return any_a & any_b, all_a & all_b

    def reach(self) -> int | None:
        return _least(self.a.reach(), self.b.reach())

    def ahead(self) -> int | None:
        return _least(self.a.ahead(), self.b.ahead())


@dataclass(frozen=True)
class Or(Mask):
    """Visible in either."""

    a: Mask
    b: Mask

    def __post_init__(self):
        _masks(self, "a", "b")

    def __call__(self, q: Positions, k: Positions, h: Positions = 0) -> Visible:
        return self.a(q, k, h) | self.b(q, k, h)

    def tile(self, q0: Positions, q1: Positions, k0: Positions, k1: Positions) -> tuple[Visible, Visible]:
        any_a, all_a = self.a.tile(q0, q1, k0, k1)
        any_b, all_b = self.b.tile(q0, q1, k0, k1)
        return any_a | any_b, all_a | all_b

    def reach(self) -> int | None:
        return _most(self.a.reach(), self.b.reach())

    def ahead(self) -> int | None:
        return _most(self.a.ahead(), self.b.ahead())


@dataclass(frozen=True)
class Not(Mask):
    """Visible where `mask` is not. Its reach counts as unbounded."""

    mask: Mask

    def __post_init__(self):
        _masks(self, "mask")

    def __call__(self, q: Positions, k: Positions, h: Positions = 0) -> Visible:
        return _not(self.mask(q, k, h))

    def tile(self, q0: Positions, q1: Positions, k0: Positions, k1: Positions) -> tuple[Visible, Visible]:
        maybe_any, surely_all = self.mask.tile(q0, q1, k0, k1)
        return _not(surely_all), _not(maybe_any)

    def reach(self) -> int | None:
        return None

    def __invert__(self) -> Mask:
        return self.mask


# ---------------------------------------------------------------------------------------------- library


@dataclass(frozen=True)
class Full(Mask):
    """Everything sees everything."""

    def __call__(self, q: Positions, k: Positions, h: Positions = 0) -> Visible:
        return (q == q) & (k == k)  # true, in the broadcast shape

    def tile(self, q0: Positions, q1: Positions, k0: Positions, k1: Positions) -> tuple[Visible, Visible]:
        return self(q0, k0), self(q0, k0)

    def reach(self) -> int | None:
        return None


@dataclass(frozen=True)
class Causal(Mask):
    """Key j <= query i."""

    def __call__(self, q: Positions, k: Positions, h: Positions = 0) -> Visible:
        return k <= q

    def tile(self, q0: Positions, q1: Positions, k0: Positions, k1: Positions) -> tuple[Visible, Visible]:
        return k0 <= q1, k1 <= q0

    def reach(self) -> int | None:
        return None

    def ahead(self) -> int | None:
        return 0


@dataclass(frozen=True)
class Sliding(Mask):
    """`left` keys back counting the query itself, and `right` keys ahead: i - left < j <= i + right.

    `sliding(W)` is the causal window of Mistral; `sliding(W // 2 + 1, W // 2)` the two-sided one of Longformer.
    """

    left: int
    right: int = 0

    def __post_init__(self):
        _whole("sliding.left", self.left, 1, "a window sees at least its own token")
        _whole("sliding.right", self.right, 0, "keys ahead are counted from none")

    def __call__(self, q: Positions, k: Positions, h: Positions = 0) -> Visible:
        back = q - k
        return (back < self.left) & (back >= -self.right)

    def tile(self, q0: Positions, q1: Positions, k0: Positions, k1: Positions) -> tuple[Visible, Visible]:
        nearest, farthest = q0 - k1, q1 - k0
        return (
            (nearest < self.left) & (farthest >= -self.right),
            (farthest < self.left) & (nearest >= -self.right),
        )

    def reach(self) -> int | None:
        return self.left

    def ahead(self) -> int | None:
        return self.right


@dataclass(frozen=True)
class Sinks(Mask):
    """The first `n` keys, looked back at: j < n and j <= i.

    `sliding(W) | sinks(n)` is the window with attention sinks of StreamingLLM (Xiao et al. 2023).
    """

    n: int

    def __post_init__(self):
        _whole("sinks.n", self.n, 1, "a sink holds at least one token")

    def __call__(self, q: Positions, k: Positions, h: Positions = 0) -> Visible:
        return (k < self.n) & (k <= q)

    def tile(self, q0: Positions, q1: Positions, k0: Positions, k1: Positions) -> tuple[Visible, Visible]:
        return (k0 < self.n) & (k0 <= q1), (k1 < self.n) & (k1 <= q0)

    def reach(self) -> int | None:
        return None

    def ahead(self) -> int | None:
        return 0


@dataclass(frozen=True)
class Prefix(Mask):
    """Prefix-LM (Raffel et al. 2020): causal, and the first `n` keys are seen by all: j <= i or j < n."""

    n: int

    def __post_init__(self):
        _whole("prefix.n", self.n, 0, "a prefix has no negative length")

    def __call__(self, q: Positions, k: Positions, h: Positions = 0) -> Visible:
        return (k <= q) | (k < self.n)

    def tile(self, q0: Positions, q1: Positions, k0: Positions, k1: Positions) -> tuple[Visible, Visible]:
        return (k0 <= q1) | (k0 < self.n), (k1 <= q0) | (k1 < self.n)

    def reach(self) -> int | None:
        return None

    def ahead(self) -> int | None:
        return max(self.n - 1, 0)


@dataclass(frozen=True)
class Dilated(Mask):
    """One branch (w, r) of LongNet (Ding et al. 2023, section 3.2), in both directions.

    Sequences are cut into segments of `segment` positions. Head h sees, from and to, the positions of a segment whose
    offset in it is `h mod rate` modulo `rate`. The other rows of a head are empty: branches are mixed by their lse.
    """

    segment: int
    rate: int

    def __post_init__(self):
        _whole("dilated.segment", self.segment, 1, "a segment holds at least one token")
        _whole("dilated.rate", self.rate, 1, "a rate of 1 keeps every token")
        if self.rate > self.segment:
            why = f"some heads would keep no token of a segment of {self.segment}"
            raise BadInput("dilated.rate", self.rate, why, f"1 to {self.segment}")

    def __call__(self, q: Positions, k: Positions, h: Positions = 0) -> Visible:
        kept = lambda position: position % self.segment % self.rate == h % self.rate
        return (q // self.segment == k // self.segment) & kept(q) & kept(k)

    def tile(self, q0: Positions, q1: Positions, k0: Positions, k1: Positions) -> tuple[Visible, Visible]:
        # Some head keeps a pair iff the distance is a multiple of the rate. One common segment decides: where two are
        # common, both ranges hold the last token of the first.
        xp = _numpy(q0, q1, k0, k1)
        common = xp.maximum(q0, k0) // self.segment
        start = common * self.segment
        clip = lambda position: xp.minimum(xp.maximum(position - start, 0), self.segment - 1)
        least, most = clip(q0) - clip(k1), clip(q1) - clip(k0)
        maybe_any = (common <= xp.minimum(q1, k1) // self.segment) & (most // self.rate * self.rate >= least)
        one_segment = xp.minimum(q0, k0) // self.segment == xp.maximum(q1, k1) // self.segment
        return maybe_any, one_segment & (self.rate == 1)

    def reach(self) -> int | None:
        return (self.segment - 1) // self.rate * self.rate + 1

    def ahead(self) -> int | None:
        return self.reach() - 1


@dataclass(frozen=True)
class Strided(Mask):
    """Sparse Transformer, strided (Child et al. 2019, section 4.3), both factors in one head.

    The last `step` keys and every `step`-th key before: 0 <= i - j < step, or j <= i and (i - j) mod step = 0.
    """

    step: int

    def __post_init__(self):
        _whole("strided.step", self.step, 1, "a step of 1 keeps every key")

    def __call__(self, q: Positions, k: Positions, h: Positions = 0) -> Visible:
        back = q - k
        return (back >= 0) & ((back < self.step) | (back % self.step == 0))

    def tile(self, q0: Positions, q1: Positions, k0: Positions, k1: Positions) -> tuple[Visible, Visible]:
        nearest, farthest = q0 - k1, q1 - k0
        maybe_any = (farthest >= 0) & ((nearest < self.step) | (farthest // self.step * self.step >= nearest))
        # distances 0..step are all visible; beyond, only a single one can be (or all of them with a step of 1)
        one_multiple = (nearest == farthest) & (nearest % self.step == 0)
        surely_all = (nearest >= 0) & ((farthest <= self.step) | one_multiple | (self.step == 1))
        return maybe_any, surely_all

    def reach(self) -> int | None:
        return None

    def ahead(self) -> int | None:
        return 0


@dataclass(frozen=True)
class Fixed(Mask):
    """Sparse Transformer, fixed (Child et al. 2019, section 4.3), both factors in one head.

    The query's own block of `step` positions and the last `summary` positions of every block, looking back:
    j <= i and (floor(j / step) = floor(i / step) or j mod step >= step - summary).
    """

    step: int
    summary: int

    def __post_init__(self):
        _whole("fixed.step", self.step, 1, "a block holds at least one token")
        _whole("fixed.summary", self.summary, 1, "a block is summarized by at least one token")
        if self.summary > self.step:
            why = f"more than the {self.step} positions of a block"
            raise BadInput("fixed.summary", self.summary, why, f"1 to {self.step}")

    def __call__(self, q: Positions, k: Positions, h: Positions = 0) -> Visible:
        own = q // self.step == k // self.step
        return (k <= q) & (own | (k % self.step >= self.step - self.summary))

    def tile(self, q0: Positions, q1: Positions, k0: Positions, k1: Positions) -> tuple[Visible, Visible]:
        xp = _numpy(q0, q1, k0, k1)
        own, inside = self.step - self.summary, k0 % self.step  # offsets below `own` are no summaries
        to_summary = xp.maximum(own - inside, 0)  # from k0 to the first summary key
        summary = to_summary <= xp.minimum(k1, q1) - k0
        # Where two blocks are common, both ranges hold the last token of the first; else compare inside the one.
        common = xp.maximum(q0, k0) // self.step
        first = xp.maximum(k0, common * self.step)
        last = xp.minimum(q1 - common * self.step, self.step - 1) + common * self.step
        own_block = (common <= xp.minimum(q1, k1) // self.step) & (first <= last)
        maybe_any = (k0 <= q1) & (summary | own_block)

        # All are visible iff keys that are no summaries lie in the block of all queries; the first one tells.
        to_plain = xp.where(inside >= own, self.step - inside, 0)
        plain_block = k0 // self.step + (to_plain > 0)
        no_plain = (to_plain > k1 - k0) | (own == 0)
        return maybe_any, (k1 <= q0) & (no_plain | (plain_block == q1 // self.step))

    def reach(self) -> int | None:
        return None

    def ahead(self) -> int | None:
        return 0


@dataclass(frozen=True)
class Longformer(Mask):
    """Window and global tokens (Beltagy et al. 2020): i - window < j <= i, or j < n_global, or i < n_global.

    Global tokens see and are seen in both directions; the window looks back. `longformer(...) & causal()` is the
    language model; `sliding(w // 2 + 1, w // 2) | longformer(1, n)` is the encoder, whose window has two sides.
    """

    window: int
    n_global: int

    def __post_init__(self):
        _whole("longformer.window", self.window, 1, "a window sees at least its own token")
        _whole("longformer.n_global", self.n_global, 0, "global tokens are counted from none")

    def __call__(self, q: Positions, k: Positions, h: Positions = 0) -> Visible:
        return Sliding(self.window)(q, k) | (k < self.n_global) | (q < self.n_global)

    def tile(self, q0: Positions, q1: Positions, k0: Positions, k1: Positions) -> tuple[Visible, Visible]:
        return _window_or_first(Sliding(self.window), self.n_global, q0, q1, k0, k1)

    def reach(self) -> int | None:
        return self.window if self.n_global == 0 else None

    def ahead(self) -> int | None:
        return 0 if self.n_global == 0 else None


@dataclass(frozen=True)
class BigBird(Mask):
    """Window, global and random blocks (Zaheer et al. 2020), all sizes in blocks of `block` positions.

    Query block I sees key block J if |I - J| <= window // 2, if either is among the first `n_global` blocks, or if
    the later of the two drew the earlier. Every block draws `n_random` distinct earlier blocks, neither global nor in
    its window (all of them where fewer exist): the eligible blocks are cut into `n_random` equal runs and a hash of
    (seed, block, run) picks one of each. So the pattern is a pure function of positions that holds at any length and
    does not change as a sequence grows; `bigbird(...) & causal()` keeps exactly the drawn blocks, and without
    `causal()` a block is also seen by those that drew it. Heads share the draw; give layers different seeds.

    Differs from the published code where that needs to know the length: the last block is not global.
    """

    window: int
    n_global: int
    n_random: int
    block: int
    seed: int

    def __post_init__(self):
        _whole("bigbird.window", self.window, 1, "a window holds at least its own block")
        if self.window % 2 == 0:
            raise BadInput("bigbird.window", self.window, "a window has equally many blocks on both sides", "odd")
        _whole("bigbird.n_global", self.n_global, 0, "global blocks are counted from none")
        _whole("bigbird.n_random", self.n_random, 0, "random blocks are counted from none")
        _whole("bigbird.block", self.block, 1, "a block holds at least one token")
        _whole("bigbird.seed", self.seed, 0, "seeds are not negative")

    def __call__(self, q: Positions, k: Positions, h: Positions = 0) -> Visible:
        q, k = q // self.block, k // self.block
        return self._near(q, k) | (k < self.n_global) | (q < self.n_global) | self._drawn(q, k)

    def tile(self, q0: Positions, q1: Positions, k0: Positions, k1: Positions) -> tuple[Visible, Visible]:
        q0, q1, k0, k1 = (position // self.block for position in (q0, q1, k0, k1))
        maybe_any, surely_all = _window_or_first(self._near, self.n_global, q0, q1, k0, k1)
        one_drawn = (q0 == q1) & (k0 == k1) & self._drawn(q0, k0)
        return maybe_any | self._draws(q0, q1, k0, k1) | self._draws(k0, k1, q0, q1), surely_all | one_drawn

    def reach(self) -> int | None:
        return (self.window // 2 + 1) * self.block if self.n_global == self.n_random == 0 else None

    def ahead(self) -> int | None:
        return None if self.reach() is None else self.reach() - 1

    @property
    def _near(self) -> Sliding:
        """The window, on block indices."""
        return Sliding(self.window // 2 + 1, self.window // 2)

    def _drawn(self, q: Positions, k: Positions) -> Visible:
        """Whether one of two blocks drew the other."""
        hit = q != q  # false, in the shape of q
        for run in range(self.n_random):
            hit = hit | (self._draw(q, run) == k) | (self._draw(k, run) == q)
        return hit

    def _draws(self, late0: Positions, late1: Positions, early0: Positions, early1: Positions) -> Visible:
        """Whether a block of late0..late1 drew one of early0..early1; true beyond `_TILE_BLOCKS` blocks."""
        ranges = late0, late1, early0, early1
        offsets = np.arange(_TILE_BLOCKS).reshape(-1, *[1] * max(map(np.ndim, ranges)))
        late = late0 + offsets
        hit = (late1 - late0 >= _TILE_BLOCKS) & (self.n_random > 0)
        for run in range(self.n_random):
            drawn = self._draw(late, run)
            hit = hit | ((late <= late1) & (early0 <= drawn) & (drawn <= early1)).any(0)
        return hit

    def _draw(self, block: Positions, run: int) -> Positions:
        """The block that `block` drew from its `run`-th run of eligible blocks; -1 if that run is empty."""
        xp = _numpy(block)
        eligible = xp.maximum(block - self.window // 2 - self.n_global, 0)
        shortest, longer = eligible // self.n_random, eligible % self.n_random
        length = shortest + (run < longer)
        start = self.n_global + run * shortest + xp.minimum(run, longer)
        return xp.where(length > 0, start + _mix(block, self.seed, run) % xp.maximum(length, 1), -1)


_TILE_BLOCKS = 9
"""Blocks whose draws a tile test evaluates: those of a tile of 8 blocks at any alignment."""


def _mix(block: Positions, seed: int, run: int) -> Positions:
    """A hash in 0..2**31-1 of three integers: the finalizer of MurmurHash3 over their weighted sum, modulo 2**32."""
    word = lambda value: np.uint32(value % 2**32)
    stream = word(seed * 0x85EBCA77 + run * 0xC2B2AE3D)
    with np.errstate(over="ignore"):  # NumPy scalars warn where the arithmetic is meant to wrap
        x = _numpy(block).asarray(block).astype(np.uint32) * word(0x9E3779B1) + stream
        x = (x ^ (x >> word(16))) * word(0x85EBCA6B)
        x = (x ^ (x >> word(13))) * word(0xC2B2AE35)
        return ((x ^ (x >> word(16))) >> word(1)).astype(np.int32)


def _window_or_first(
    window: Sliding, first: int, q0: Positions, q1: Positions, k0: Positions, k1: Positions
) -> tuple[Visible, Visible]:
    """The tile test of `window(q, k) | (q < first) | (k < first)`, exact."""
    xp = _numpy(q0, q1, k0, k1)
    near, _ = window.tile(q0, q1, k0, k1)
    # all: what is left without the first queries and keys must be in the window
    _, rest = window.tile(xp.maximum(q0, first), q1, xp.maximum(k0, first), k1)
    return near | (q0 < first) | (k0 < first), rest | (q1 < first) | (k1 < first)


def _least(a: int | None, b: int | None) -> int | None:
    """The smaller of two bounds, None for none."""
    return min((bound for bound in (a, b) if bound is not None), default=None)


def _most(a: int | None, b: int | None) -> int | None:
    return None if a is None or b is None else max(a, b)


def _whole(field: str, value: object, low: int, why: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise BadInput(field, value, "not a whole number", f"an int, {low} or more")
    if value < low:
        raise BadInput(field, value, why, f"{low} or more")


def _masks(composed: Mask, *fields: str) -> None:
    for field in fields:
        if not isinstance(getattr(composed, field), Mask):
            name = f"{type(composed).__name__}.{field}"
            raise BadInput(name, repr(getattr(composed, field)), "not a mask", "a mask such as causal()")


def _numpy(*values: Positions | Visible):
    """jax.numpy if any value is a jax array (traced ones are), otherwise numpy."""
    return jnp if any(isinstance(value, Array) for value in values) else np


def _not(value: Visible) -> Visible:
    return _numpy(value).logical_not(value)


full, causal, sliding, sinks, prefix = Full, Causal, Sliding, Sinks, Prefix
dilated, strided, fixed, longformer, bigbird = Dilated, Strided, Fixed, Longformer, BigBird
"""The constructors as they read in a model: `causal() & sliding(1024)`."""

MASKS: Mapping[str, type[Mask]] = {
    mask.__name__: mask
    for mask in (And, Or, Not, Full, Causal, Sliding, Sinks, Prefix, Dilated, Strided, Fixed, Longformer, BigBird)
}
"""Every class a mask can be made of, by the name that a stored configuration uses."""
