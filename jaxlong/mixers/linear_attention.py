"""Linear attention: a feature map in place of the softmax; RetNet and Lightning attention are its settings."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jaxlong.core.position import NoPE, Rope
from jaxlong.core.state import ConvTail, Recurrent
from jaxlong.core.types import BadInput
from jaxlong.mixers.base import (
    check_state,
    from_heads,
    require,
    require_conv,
    require_one_of,
    require_rotation,
    require_spans,
    rms_norm,
    to_heads,
    vector,
)
from jaxlong.mixers.scan_parts import convolve, entry, pack, unpack
from jaxlong.ops.attend import Backend
from jaxlong.ops.rotate import rotate
from jaxlong.ops.scan import linear_attention

FEATURES = {"elu": lambda x: jax.nn.elu(x) + 1, "relu": jax.nn.relu, "identity": lambda x: x}
POSITIVE = ("elu", "relu")
ACTIVATIONS = {"none": lambda x: x, "silu": jax.nn.silu, "sigmoid": jax.nn.sigmoid}


class LinearAttention(nn.Module):
    """Attention with a feature map f in place of the softmax, as a recurrence with constant decay a_h.

        q, k, v = act(conv(x Wq, x Wk, x Wv))    [rotation]
        S_t = a_h S_(t-1) + f(k_t) v_t^T;   z_t = a_h z_(t-1) + f(k_t)
        o_t = S_t^T f(q_t) / (z_t . f(q_t))      f positive ("elu": elu + 1, "relu"); without the divisor otherwise
        y = (norm(o) * gate(x Wg)) Wo

    Papers: Katharopoulos et al., arXiv 2006.16236. RetNet (arXiv 2307.08621): feature="identity", decay="retnet",
    norm="head", gate="silu", position=Rope(). Lightning attention (MiniMax-01, arXiv 2501.08313): feature="identity",
    decay=lightning_decay(heads, layer, layers), activation="silu", norm="all", gate="sigmoid", scale=1.0.
    Training cost: 2 D H (2 C + 2 V) T flops, and 2 H (chunk (C + V) + 2 C V) T for the recurrence; the gate adds
    2 D H V T. V is one more where outputs are divided: a column of ones carries z.
    State: H C V float32 and 4 bytes, H (C V + C) where divided; the convolution adds (W - 1)(H (2 C + V)) elements.

    Fields:
        head_dim: C.    value_dim: V; None is C.
        feature: the map of q and k, "elu", "relu" or "identity".
        decay: "retnet" (a_h = 1 - 2 ** (-5 - h)), "lightning" (log a_h = -2 ** (-8 (h + 1) / H)), log a_h by head, or
            None (a_h = 1).
        activation: of q, k and v before the map, "none" or "silu".
        norm: RMS norm of o over each "head" or over "all" of them, or "none".
        gate: "none", "sigmoid" or "silu".
        conv: width of a causal depthwise convolution on q, k and v; 0 is none.
        scale: factor of q; None is C ** -0.5.
        chunk: tokens a chunk; the result does not depend on it.
    """

    heads: int
    head_dim: int
    value_dim: int | None = None
    feature: str = "elu"
    decay: str | tuple[float, ...] | None = None
    activation: str = "none"
    norm: str = "none"
    gate: str = "none"
    conv: int = 0
    position: Rope | NoPE = NoPE()
    scale: float | None = None
    chunk: int = 64
    backend: Backend = Backend()

    def __post_init__(self):
        require(self, 1, "heads", "head_dim", "chunk")
        if self.value_dim is not None:
            require(self, 1, "value_dim")
        require_one_of(self, "feature", *FEATURES)
        require_one_of(self, "activation", "none", "silu")
        require_one_of(self, "norm", "none", "head", "all")
        require_one_of(self, "gate", *ACTIVATIONS)
        require_conv(self)
        require_rotation(self.position, self.head_dim)
        if isinstance(self.position, Rope) and self.feature in POSITIVE:
            raise BadInput("position", "Rope", f"turns {self.feature} features negative", "feature='identity'")
        if isinstance(self.decay, str):
            require_one_of(self, "decay", "retnet", "lightning")
        elif self.decay is not None and (
            len(self.decay) != self.heads or not all(-math.inf < a <= 0 for a in self.decay)
        ):
            raise BadInput("decay", self.decay, "is no log decay a head", f"{self.heads} numbers, 0 or less")
        require_spans(self)
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        state: Any = None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        if state is not None:
            check_state(self, state, x)
        memory, tail = unpack(state)
        segments, s0, resets = entry(positions, segment_ids, memory, self.backend)
        parts = [to_heads(self, "wq", x, self.heads, self.head_dim), to_heads(self, "wk", x, self.heads, self.head_dim)]
        parts.append(to_heads(self, "wv", x, self.heads, self._value_dim))
        if self.conv:
            parts, tail = convolve(self, tuple(parts), segments, tail, width=self.conv, backend=self.backend)
        q, k, v = (ACTIVATIONS[self.activation](part).astype(jnp.float32) for part in parts)
        q, k = (FEATURES[self.feature](rotate(self.position, part, positions)) for part in (q, k))
        if self.feature in POSITIVE:
            v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
        decay = self._log_decay()
        o, s = linear_attention(
            q * (self.head_dim**-0.5 if self.scale is None else self.scale),
            k,
            v,
            None if decay is None else jnp.broadcast_to(jnp.asarray(decay, jnp.float32), v.shape[:3]),
            s0=s0,
            resets=resets,
            chunk=self.chunk,
            backend=self.backend,
        )
        if self.feature in POSITIVE:
            o = o[..., :-1] / (o[..., -1:] + 1e-6)
        o = self._norm(o).astype(x.dtype)
        if self.gate != "none":
            o *= ACTIVATIONS[self.gate](to_heads(self, "wg", x, self.heads, self._value_dim))
        y = from_heads(self, "wo", o, x.shape[-1])
        return y, None if state is None else pack(Recurrent(s, segments[:, -1]), tail)

    def _norm(self, o: Float[Array, "B T H V"]) -> Float[Array, "B T H V"]:
        if self.norm == "head":
            return rms_norm(o, vector(self, "norm_scale", o.shape[3:], ("head_dim",), nn.initializers.ones))
        if self.norm == "all":
            scale = vector(self, "norm_scale", o.shape[2:], ("heads", "head_dim"), nn.initializers.ones)
            return rms_norm(o.reshape(*o.shape[:2], -1), scale.reshape(-1)).reshape(o.shape)
        return o

    @property
    def _value_dim(self) -> int:
        return self.head_dim if self.value_dim is None else self.value_dim

    @property
    def _columns(self) -> int:
        """Columns of the state: the values, and the ones that sum up the divisor."""
        return self._value_dim + (self.feature in POSITIVE)

    def _log_decay(self) -> tuple[float, ...] | None:
        if self.decay == "retnet":
            return retnet_decay(self.heads)
        if self.decay == "lightning":
            return tuple(-(2.0 ** (-8 * (h + 1) / self.heads)) for h in range(self.heads))
        return self.decay

    def init_state(self, batch: int, max_len: int, *, width: int, max_chunk: int, dtype: Any) -> Any:
        memory = Recurrent.empty(batch, (self.heads, self.head_dim, self._columns))
        channels = self.heads * (2 * self.head_dim + self._value_dim)
        return pack(memory, ConvTail.empty(batch, self.conv, channels, dtype) if self.conv else None)

    def state_bytes(self, batch: int, max_len: int, *, width: int, max_chunk: int, itemsize: int) -> int:
        """Bytes of the state by the formula above (segments are int32)."""
        tail = (self.conv - 1) * (self.heads * (2 * self.head_dim + self._value_dim) * itemsize + 4) if self.conv else 0
        return batch * (self.heads * self.head_dim * self._columns * 4 + 4 + tail)

    def mixing_flops(self, length: int) -> float:
        """Forward flops a token in rows of `length` tokens, beyond 2 a parameter."""
        chunk, keys, values = min(self.chunk, length), self.head_dim, self._columns
        return 2 * self.heads * (chunk * (keys + values) + 2 * keys * values)

    @classmethod
    def examples(cls) -> dict[str, LinearAttention]:
        """The kernel form, RetNet, and Lightning attention behind a convolution."""
        small = cls(heads=2, head_dim=6, chunk=4)
        return {
            "elu": small.clone(value_dim=5, decay=(-0.1, -2.0)),
            "retnet": small.clone(feature="identity", decay="retnet", norm="head", gate="silu", position=Rope()),
            "lightning": small.clone(
                feature="identity", decay="lightning", activation="silu", norm="all", gate="sigmoid", conv=3, scale=1.0
            ),
        }


def retnet_decay(heads: int) -> tuple[float, ...]:
    """Log decays of RetNet, log(1 - 2 ** (-5 - h)): the higher a head, the longer it remembers."""
    return tuple(math.log1p(-(2.0 ** (-5 - h))) for h in range(heads))


def lightning_decay(heads: int, layer: int, layers: int) -> tuple[float, ...]:
    """Log decays of Lightning attention in layer `layer` (from 0) of a model of `layers`: weaker in later ones."""
    factor = 1 - layer / (layers - 1 + 1e-5) + 1e-5
    return tuple(-factor * 2.0 ** (-8 * (h + 1) / heads) for h in range(heads))
