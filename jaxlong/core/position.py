"""How positions enter attention: rotations and their scalings to longer contexts, linear biases, or nothing.

    rope = Rope(base=500000.0, scaling=Yarn(factor=8.0, original=8192))
    freqs = rope.frequencies(128)                       # host, float64: one table for all layers and lengths
    q = apply_rope(q, positions, freqs)                 # [B T H C], exact at any int32 position

Positions and scalings are values: the same parameters run under any of them.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Float32, Float64, Int

from jaxlong.core.types import BadInput

Number = float | int


class Frequencies(NamedTuple):
    """Rotation speeds of the pairs of a head, on the host.

    inv_freq: radians per position, [pairs] float64.
    mscale: factor on cosine and sine, so attention logits of rotated parts grow by its square.
    """

    inv_freq: Float64[np.ndarray, " pairs"]
    mscale: float = 1.0


# ---------------------------------------------------------------------------------------------- positions


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding (Su et al. 2021): pair i turns by `position * base ** (-2 i / rotary_dim)` radians.

    base: the lowest frequency is close to 1 / base; above 1.
    scaling: how frequencies change for contexts beyond those trained on; None keeps them.
    rotary_dim: how many leading dimensions of a head rotate, even; None for all.
    interleaved: pairs are (0, 1), (2, 3), ... (GPT-J, DeepSeek) rather than (0, half), (1, half + 1), ... (Llama).
        Neither changes speeds: it says how the weights of a checkpoint are laid out.
    """

    base: Number = 10000.0
    scaling: Scaling | None = None
    rotary_dim: int | None = None
    interleaved: bool = False

    def __post_init__(self):
        _number("Rope.base", self.base)
        if self.base <= 1:
            raise BadInput("Rope.base", self.base, "frequencies must fall from pair to pair", "above 1")
        if not isinstance(self.scaling, Scaling | None):
            raise BadInput("Rope.scaling", repr(self.scaling), "not a scaling", f"None, {', '.join(SCALINGS)}")
        if self.rotary_dim is not None:
            _even("Rope.rotary_dim", self.rotary_dim)

    def frequencies(self, dim: int) -> Frequencies:
        """The frequencies of a head of `dim` dimensions, [rotary_dim / 2]. Raises BadInput if they do not fit."""
        rotary_dim = dim if self.rotary_dim is None else self.rotary_dim
        _even("Rope.frequencies.dim", rotary_dim)
        if rotary_dim > dim:
            raise BadInput("Rope.rotary_dim", rotary_dim, f"more than the {dim} dimensions of a head", f"at most {dim}")
        if self.scaling is None:
            return Frequencies(_inv_freq(self.base, rotary_dim))
        return self.scaling.frequencies(self.base, rotary_dim)

    @property
    def softmax_scale(self) -> float:
        """Factor on the scale of all attention logits, rotated or not: 1 but for `Yarn` with `mscale_all_dim`."""
        return self.scaling.softmax_scale if isinstance(self.scaling, Yarn) else 1.0


@dataclass(frozen=True)
class NoPE:
    """No positions: order is known from the causal mask or from other layers alone (Kazemnejad et al. 2023)."""


@dataclass(frozen=True)
class Alibi:
    """Attention with linear biases (Press et al. 2022): logits of head h lose `slope_h * (i - j)`."""

    def slopes(self, heads: int) -> Float32[Array, " H"]:
        """The slopes of `heads` heads, [H], positive.

        A power of two gives 2^(-8 h / H), h = 1..H. Otherwise those of the power p below, then of those of 2p every
        second one, as the authors' code has it.
        """
        if heads < 1:
            raise BadInput("Alibi.slopes.heads", heads, "attention has at least one head", "1 or more")
        power = 1 << (heads.bit_length() - 1)
        regular = -8.0 / power * np.arange(1, power + 1)
        between = -4.0 / power * np.arange(1, 2 * (heads - power), 2)
        return jnp.asarray(2.0 ** np.concatenate([regular, between]), jnp.float32)


# ---------------------------------------------------------------------------------------------- scalings


class Scaling(abc.ABC):
    """A change of RoPE frequencies that lets a model read contexts longer than the `original` one it was trained on."""

    @abc.abstractmethod
    def frequencies(self, base: Number, dim: int) -> Frequencies:
        """Scaled frequencies of `dim` rotated dimensions, [dim / 2]."""


@dataclass(frozen=True)
class PI(Scaling):
    """Position interpolation (Chen et al. 2023): positions count 1 / factor."""

    factor: Number

    def __post_init__(self):
        _factor(self)

    def frequencies(self, base: Number, dim: int) -> Frequencies:
        return Frequencies(_inv_freq(base, dim) / self.factor)


@dataclass(frozen=True)
class NTK(Scaling):
    """NTK-aware scaling: a base at which the lowest frequency is divided by the factor and the highest stays.

    base' = base * factor ** (dim / (dim - 2))
    """

    factor: Number

    def __post_init__(self):
        _factor(self)

    def frequencies(self, base: Number, dim: int) -> Frequencies:
        return Frequencies(_inv_freq(base * _spread(self.factor, dim), dim))


@dataclass(frozen=True)
class DynamicNTK(Scaling):
    """NTK-aware scaling by as much as a length needs: by factor * length / original - (factor - 1).

    `factor` is how fast scaling grows with the length beyond `original`; 1 scales by length / original.

    length: the sequence length, in tokens, that the table serves; None, or less than `original`, changes nothing.
        It is part of the value and not read from the input because cached keys are stored rotated: all of a sequence
        must be rotated at one length. To grow past it, replace the field and run the sequence again.
    """

    factor: Number
    original: int
    length: int | None = None

    def __post_init__(self):
        _factor(self)
        _length("DynamicNTK.original", self.original)
        if self.length is not None:
            _length("DynamicNTK.length", self.length)

    def frequencies(self, base: Number, dim: int) -> Frequencies:
        length = max(self.length or self.original, self.original)
        factor = self.factor * length / self.original - (self.factor - 1)
        return Frequencies(_inv_freq(base * _spread(factor, dim), dim))


@dataclass(frozen=True)
class Yarn(Scaling):
    """YaRN (Peng et al. 2023): slow pairs are interpolated, fast ones kept, and logits sharpened.

    Pair i is kept by 1 - ramp_i, the ramp rising from 0 to 1 between the pairs that turn `beta_fast` and `beta_slow`
    times in `original` positions. It is linear in i, as in the authors' code and all checkpoints; the paper has it
    linear in turns.

    attention_factor: `mscale` of the result; None derives it: 0.1 ln(factor) + 1, or DeepSeek's ratio
        m(mscale) / m(mscale_all_dim) with m(a) = 0.1 a ln(factor) + 1 where both are given and not 0.
    truncate: whether the ends of the ramp are widened to whole pairs (gpt-oss does not).
    """

    factor: Number
    original: int
    beta_fast: Number = 32.0
    beta_slow: Number = 1.0
    attention_factor: Number | None = None
    mscale: Number | None = None
    mscale_all_dim: Number | None = None
    truncate: bool = True

    def __post_init__(self):
        _factor(self)
        _length("Yarn.original", self.original)
        _above_zero("Yarn.beta_slow", self.beta_slow)
        _number("Yarn.beta_fast", self.beta_fast)
        if self.beta_fast < self.beta_slow:
            why = "kept pairs turn more often than interpolated ones"
            raise BadInput("Yarn.beta_fast", self.beta_fast, why, f"beta_slow ({self.beta_slow}) or more")
        if self.attention_factor is not None:
            _above_zero("Yarn.attention_factor", self.attention_factor)
        for field in ("mscale", "mscale_all_dim"):
            value = getattr(self, field)
            if value is not None and _number(f"Yarn.{field}", value) < 0:
                raise BadInput(f"Yarn.{field}", value, "would flatten attention", "0 or more")

    def frequencies(self, base: Number, dim: int) -> Frequencies:
        low, high = self._pair(self.beta_fast, base, dim), self._pair(self.beta_slow, base, dim)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        if high <= low:
            high = low + 0.001  # a step instead of a ramp
        ramp = np.clip((np.arange(dim // 2) - low) / (high - low), 0.0, 1.0)
        kept = _inv_freq(base, dim)
        mscale = self._mscale() if self.attention_factor is None else float(self.attention_factor)
        return Frequencies(kept / self.factor * ramp + kept * (1.0 - ramp), mscale)

    @property
    def softmax_scale(self) -> float:
        """DeepSeek's factor on the softmax scale, m(mscale_all_dim)^2; 1 where that is not given."""
        return self._m(self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0

    def _pair(self, turns: Number, base: Number, dim: int) -> float:
        """The (fractional) pair that turns so often in `original` positions."""
        return dim * math.log(self.original / (turns * 2 * math.pi)) / (2 * math.log(base))

    def _mscale(self) -> float:
        if self.mscale and self.mscale_all_dim:
            return self._m(self.mscale) / self._m(self.mscale_all_dim)
        return self._m(1.0)

    def _m(self, weight: Number) -> float:
        return 0.1 * weight * math.log(self.factor) + 1.0


@dataclass(frozen=True)
class LongRope(Scaling):
    """LongRoPE (Ding et al. 2024): a searched factor for every pair, in two sets.

    factor: how much longer the extended context is than `original`; sets the attention factor
        sqrt(1 + ln(factor) / ln(original)) of both sets where that is None.
    short, long: divisors of the frequencies, dim / 2 each, for lengths up to `original` and beyond; kept as tuples.
    length: the sequence length, in tokens, that the table serves; None for `original`. It is part of the value and not
        read from the input because cached keys are stored rotated: a sequence that grows past `original` must be run
        again under the long set.
    """

    factor: Number
    short: Sequence[Number]
    long: Sequence[Number]
    original: int
    length: int | None = None
    attention_factor: Number | None = None

    def __post_init__(self):
        _factor(self)
        for field in ("short", "long"):
            factors = tuple(getattr(self, field))  # a stored configuration gives lists; values must hash
            object.__setattr__(self, field, factors)
            for i, factor in enumerate(factors):
                _above_zero(f"LongRope.{field}[{i}]", factor)
        _length("LongRope.original", self.original)
        if self.original == 1:
            raise BadInput("LongRope.original", 1, "the attention factor divides by its logarithm", "2 or more")
        if self.length is not None:
            _length("LongRope.length", self.length)
        if self.attention_factor is not None:
            _above_zero("LongRope.attention_factor", self.attention_factor)

    def frequencies(self, base: Number, dim: int) -> Frequencies:
        field = "long" if (self.length or self.original) > self.original else "short"
        factors = np.asarray(getattr(self, field), np.float64)
        if factors.size != dim // 2:
            raise BadInput(f"LongRope.{field}", f"{factors.size} factors", f"{dim} dimensions rotate", f"{dim // 2}")
        mscale = self.attention_factor or math.sqrt(1 + math.log(self.factor) / math.log(self.original))
        return Frequencies(_inv_freq(base, dim) / factors, float(mscale))


@dataclass(frozen=True)
class Llama3(Scaling):
    """Llama 3.1: pairs are kept or divided by the factor by how often they turn in `original` positions.

    `high_freq_factor` turns or more keep a pair, `low_freq_factor` or fewer divide it, linear in turns between.
    """

    factor: Number
    original: int
    low_freq_factor: Number = 1.0
    high_freq_factor: Number = 4.0

    def __post_init__(self):
        _factor(self)
        _length("Llama3.original", self.original)
        _above_zero("Llama3.low_freq_factor", self.low_freq_factor)
        if _number("Llama3.high_freq_factor", self.high_freq_factor) <= self.low_freq_factor:
            why = "kept pairs turn more often than divided ones"
            raise BadInput("Llama3.high_freq_factor", self.high_freq_factor, why, f"above {self.low_freq_factor}")

    def frequencies(self, base: Number, dim: int) -> Frequencies:
        inv_freq = _inv_freq(base, dim)
        turns = self.original * inv_freq / (2 * math.pi)
        kept = np.clip((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0.0, 1.0)
        return Frequencies((1.0 - kept) * inv_freq / self.factor + kept * inv_freq)


def _inv_freq(base: Number, dim: int) -> Float64[np.ndarray, " pairs"]:
    return 1.0 / base ** (np.arange(0, dim, 2, dtype=np.float64) / dim)


def _spread(factor: Number, dim: int) -> float:
    """What to multiply a base by so that the lowest of dim / 2 frequencies is divided by `factor`."""
    if dim == 2:
        raise BadInput("Rope.rotary_dim", dim, "a single pair has no lower frequency to stretch", "4 or more")
    return factor ** (dim / (dim - 2))


# ---------------------------------------------------------------------------------------------- rotation


def apply_rope(
    x: Float[Array, "B T H C"], positions: Int[Array, "B T"], freqs: Frequencies, *, interleaved: bool = False
) -> Float[Array, "B T H C"]:
    """Rotate the leading `2 * len(freqs.inv_freq)` dimensions of every head; the others pass unchanged.

    Computed in float32 (float64 for float64 input), returned in the dtype of `x`.

    Args:
        x: queries or keys. positions: 0 to 2**31 - 1. freqs: from `Rope.frequencies(C)`.
        interleaved: the layout of pairs, see `Rope`.

    Raises:
        BadInput: more dimensions rotate than a head has.
    """
    pairs = len(freqs.inv_freq)
    if 2 * pairs > x.shape[-1]:
        raise BadInput("apply_rope.freqs", f"{pairs} pairs", f"a head has {x.shape[-1]} dimensions", "C / 2 at most")
    cos, sin = (table[:, :, None, :] for table in rotation(positions, freqs))
    turned, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
    turned = turned.astype(jnp.promote_types(x.dtype, jnp.float32))
    split, axis = ((pairs, 2), -1) if interleaved else ((2, pairs), -2)
    a, b = jnp.unstack(turned.reshape(*x.shape[:-1], *split), axis=axis)
    turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis).reshape(turned.shape).astype(x.dtype)
    return jnp.concatenate([turned, rest], -1) if rest.shape[-1] else turned


def rotation(
    positions: Int[Array, "*shape"], freqs: Frequencies
) -> tuple[Float32[Array, "*shape pairs"], Float32[Array, "*shape pairs"]]:
    """`(cos, sin)` of `position * inv_freq`, times `freqs.mscale`, for positions 0 to 2**31 - 1.

    Within 2e-7 (of mscale) of the real values at every position. A float32 product would lose the angle (wrong by 0.06
    at a million), so angles are kept in turns as fixed-point fractions, which wrap as angles do: frequencies have 64
    bits, rounded on the host from exact integers, and 32 bits of position * frequency modulo 1 are computed in uint32.
    Elementwise, without tables: usable in any transformation and on any device.
    """
    high, low = _turn_words(freqs.inv_freq)
    position = positions.astype(jnp.uint32)[..., None]
    phase = position * high + _upper_product(position, low)
    quarter = (phase + np.uint32(1 << 29)) >> np.uint32(30)  # the nearest quarter turn, 4 wraps to 0
    eighths = lax.bitcast_convert_type(phase - (quarter << np.uint32(30)), jnp.int32).astype(jnp.float32) * 2.0**-29
    cos, sin = _taylor(eighths, freqs.mscale, first=0), _taylor(eighths, freqs.mscale, first=1)
    odd = (quarter & np.uint32(1)) == 1
    cos, sin = jnp.where(odd, sin, cos), jnp.where(odd, cos, sin)
    cos = jnp.where((quarter == 1) | (quarter == 2), -cos, cos)
    return cos, jnp.where(quarter >= 2, -sin, sin)


_TURNS_PER_RADIAN = 0x28BE60DB9391054A7F09D5F47D4D377036D8A5664F10E410
"""1 / (2 pi), times 2**192, rounded down."""


def _turn_words(inv_freq: Float64[np.ndarray, " pairs"]) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies in turns per position modulo 1, as 64-bit fractions: the high and the low uint32 words."""
    words = []
    for frequency in inv_freq.tolist():
        numerator, denominator = frequency.as_integer_ratio()
        fraction = ((numerator * _TURNS_PER_RADIAN // denominator >> 127) + 1 >> 1) % 2**64
        words.append((fraction >> 32, fraction % 2**32))
    high, low = np.array(words, np.uint32).reshape(-1, 2).T
    return high, low


def _upper_product(a: Array, b: np.ndarray) -> Array:
    """The upper 32 bits of a product of two uint32, at most 2 too small (3e-9 radians as a phase)."""
    bits, mask = np.uint32(16), np.uint32(0xFFFF)
    a1, a0, b1, b0 = a >> bits, a & mask, b >> bits, b & mask
    return a1 * b1 + (a1 * b0 >> bits) + (a0 * b1 >> bits)


def _taylor(x: Float32[Array, "*shape"], scale: Number, first: int) -> Float32[Array, "*shape"]:
    """scale * cos (first=0) or sin (first=1) of x * pi / 4 for x in [-1, 1]: six terms, the rest is below 2e-10."""
    powers = range(first, 12, 2)
    coefficients = [scale * (-1) ** (n // 2) * (math.pi / 4) ** n / math.factorial(n) for n in powers]
    square, value = x * x, jnp.zeros_like(x)
    for coefficient in reversed(coefficients):
        value = value * square + np.float32(coefficient)
    return value * x if first else value


# ---------------------------------------------------------------------------------------------- validation


def _number(field: str, value: object) -> Number:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise BadInput(field, value, "not a finite number", "a number")
    return value


def _above_zero(field: str, value: object) -> None:
    if _number(field, value) <= 0:
        raise BadInput(field, value, "must be positive", "above 0")


def _factor(scaling: Scaling) -> None:
    field, value = f"{type(scaling).__name__}.factor", scaling.factor
    if _number(field, value) < 1:
        raise BadInput(field, value, "a context cannot be extended by less than 1", "1 or more")


def _length(field: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise BadInput(field, value, "a length in tokens", "an int, 1 or more")


def _even(field: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 2 or value % 2:
        raise BadInput(field, value, "dimensions rotate in pairs", "an even int, 2 or more")


POSITIONS: Mapping[str, type] = {position.__name__: position for position in (Rope, NoPE, Alibi)}
"""Every way of knowing positions, by the name that a stored configuration uses."""

SCALINGS: Mapping[str, type[Scaling]] = {s.__name__: s for s in (PI, NTK, DynamicNTK, Yarn, LongRope, Llama3)}
"""Every scaling, by the name that a stored configuration uses."""
