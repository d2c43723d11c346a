"""DeltaNet: linear attention that overwrites what its state holds under a key."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jaxlong.core.state import ConvTail, Recurrent
from jaxlong.mixers.base import (
    check_state,
    from_heads,
    projection,
    require,
    require_divides,
    require_spans,
    rms_norm,
    to_heads,
    vector,
)
from jaxlong.mixers.scan_parts import convolve, entry
from jaxlong.ops.attend import Backend
from jaxlong.ops.delta import delta_rule


class DeltaNet(nn.Module):
    """Each head learns by gradient steps, of size beta, to map its keys to its values.

        q, k, v = silu(conv(x Wq, x Wk, x Wv));   q, k = q / |q|, k / |k|;   beta = sigmoid(x Wb)
        S_t = (I - beta_t k_t k_t^T) S_(t-1) + beta_t k_t v_t^T;   o_t = S_t^T q_t / sqrt(K)
        y = rmsnorm_head(o) Wo

    Paper: Schlag et al., arXiv 2102.11174; this layer and its chunks: Yang et al., arXiv 2406.06484. The other delta
    networks are this one with a decay of S and a gate on o.
    Training cost: 2 D (2 Hk K + 2 H V + H) T flops, and `mixing_flops` T for the rule.
    State: H K V float32 and 4 bytes, and (W - 1)(2 Hk K + H V) elements with their segments.

    Fields:
        heads: H, of values and states.    head_dim: K.
        value_dim: V; None is K.    key_heads: Hk, of q and k, shared by H / Hk heads each; None is H.
        conv: W, width of the convolution.
        negative_eigenvalues: beta in (0, 2) instead of (0, 1), so that a step may also flip what S holds under a
            key (Grazzi et al., arXiv 2411.12537).
        norm_eps: of the norm of o.    chunk: tokens a chunk; the result does not depend on it.
    """

    heads: int
    head_dim: int = 128
    value_dim: int | None = None
    key_heads: int | None = None
    conv: int = 4
    negative_eigenvalues: bool = False
    norm_eps: float = 1e-6
    chunk: int = 64
    backend: Backend = Backend()

    def __post_init__(self):
        sizes = (name for name in ("value_dim", "key_heads") if getattr(self, name) is not None)
        require(self, 1, "heads", "head_dim", "chunk", *sizes)
        require(self, 2, "conv")
        if self.key_heads is not None:
            require_divides(self, "key_heads", "heads")
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
        memory, tail = (None, None) if state is None else state
        segments, s0, resets = entry(positions, segment_ids, memory, self.backend)
        q, k, v, tail = self._project(x, segments, tail)
        beta = jax.nn.sigmoid(by_head(self, "w_beta", x, self.heads))
        beta = 2 * beta if self.negative_eigenvalues else beta
        o, s = delta_rule(
            q, k, v, self._log_decay(x), beta, s0=s0, resets=resets, chunk=self.chunk, backend=self.backend
        )
        scale = vector(self, "norm", (self._value_dim,), ("head_dim",), nn.initializers.ones)
        o = self._gate(rms_norm(o, scale, self.norm_eps), x)
        y = from_heads(self, "wo", o.astype(x.dtype), x.shape[-1])
        return y, None if state is None else (Recurrent(s, segments[:, -1]), tail)

    def _project(
        self, x: Float[Array, "B T D"], segments: Int[Array, "B T"], tail: ConvTail | None
    ) -> tuple[Float[Array, "B T H K"], Float[Array, "B T H K"], Float[Array, "B T H V"], ConvTail]:
        """q, scaled, k and v, float32, and the convolution's new tail."""
        key_axis = "heads" if self._key_heads == self.heads else "kv_heads"
        parts = (
            to_heads(self, "wq", x, self._key_heads, self.head_dim, key_axis),
            to_heads(self, "wk", x, self._key_heads, self.head_dim, key_axis),
            to_heads(self, "wv", x, self.heads, self._value_dim),
        )
        parts, tail = convolve(self, parts, segments, tail, width=self.conv, backend=self.backend, bias=False)
        q, k, v = (jax.nn.silu(part.astype(jnp.float32)) for part in parts)
        share = lambda a: jnp.repeat(a, self.heads // self._key_heads, axis=2)
        return share(_unit(q) * self.head_dim**-0.5), share(_unit(k)), v, tail

    def _log_decay(self, x: Float[Array, "B T D"]) -> Float[Array, "B T H"] | Float[Array, "B T H K"] | None:
        """Log decays of the state, float32, a head or a channel; None is no decay."""
        return None

    def _gate(self, o: Float[Array, "B T H V"], x: Float[Array, "B T D"]) -> Float[Array, "B T H V"]:
        """What the heads hand on, float32."""
        return o

    @property
    def _value_dim(self) -> int:
        return self.head_dim if self.value_dim is None else self.value_dim

    @property
    def _key_heads(self) -> int:
        return self.heads if self.key_heads is None else self.key_heads

    @property
    def _channels(self) -> int:
        return 2 * self._key_heads * self.head_dim + self.heads * self._value_dim

    def init_state(self, batch: int, max_len: int, *, width: int, max_chunk: int, dtype: Any) -> Any:
        memory = Recurrent.empty(batch, (self.heads, self.head_dim, self._value_dim))
        return memory, ConvTail.empty(batch, self.conv, self._channels, dtype)

    def state_bytes(self, batch: int, max_len: int, *, width: int, max_chunk: int, itemsize: int) -> int:
        """Bytes of the state by the formula above (segments are int32)."""
        memory = self.heads * self.head_dim * self._value_dim * 4 + 4
        return batch * (memory + (self.conv - 1) * (self._channels * itemsize + 4))

    def mixing_flops(self, length: int) -> float:
        """Forward flops a token beyond 2 a parameter: products within a chunk, and those with its state."""
        key, value, chunk = self.head_dim, self._value_dim, min(self.chunk, length)
        return self.heads * (chunk * (6 * key + 4 * value + 2 * chunk / 3) + 6 * key * value)

    @classmethod
    def examples(cls) -> dict[str, DeltaNet]:
        """Small settings that cover the fields; the laws and the benchmark run on each."""
        return {
            "plain": cls(heads=2, head_dim=4, chunk=4),
            "shared_keys": cls(
                heads=4, head_dim=3, value_dim=5, key_heads=2, conv=2, negative_eigenvalues=True, chunk=4
            ),
        }


def by_head(module: nn.Module, name: str, x: Float[Array, "B T D"], heads: int) -> Float[Array, "B T H"]:
    """A number a head, float32."""
    w = projection(module, name, (x.shape[-1], heads), ("embed", "heads"), inputs=1, dtype=x.dtype)
    return (x @ w).astype(jnp.float32)


def _unit(x: Float[Array, "B T H K"]) -> Float[Array, "B T H K"]:
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)
