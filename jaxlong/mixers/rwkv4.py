"""RWKV-4: an average over the past, weighted by exp of keys and by a decay a channel."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jaxlong.core.state import ConvTail, Recurrent
from jaxlong.mixers.base import check_state, projection, require, require_spans, vector
from jaxlong.mixers.rwkv_parts import share, toward
from jaxlong.ops.attend import Backend
from jaxlong.ops.chunks import starts
from jaxlong.ops.token_shift import token_shift
from jaxlong.ops.wkv import wkv


class RWKV4(nn.Module):
    """Time mixing of RWKV-4: each channel is attention over all its past with one scalar key a token.

        k, v, r = lerp(x, x', mu_k) W_k, lerp(x, x', mu_v) W_v, lerp(x, x', mu_r) W_r,   x' the token before x
        o_t = (sum_(i<t) e^(k_i - (t-1-i) e^d) v_i + e^(k_t + u) v_t) / (the same sum without v)
        y = (sigmoid(r) * o) W_o

    lerp(x, x', mu) is x + (x' - x) mu. Paper: Peng et al., arXiv 2305.13048. `decay` is the d of checkpoints
    (time_decay), `bonus` their time_first, and mu is 1 - time_mix.
    Training cost: 8 D F T flops and O(F T) of elementwise work.
    State: 3 F float32, D elements and 8 bytes.

    Fields:
        hidden: F, channels of the average.    chunk: tokens a scan; the result does not depend on it.
    """

    hidden: int
    chunk: int = 64
    backend: Backend = Backend()

    def __post_init__(self):
        require(self, 1, "hidden", "chunk")
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
        tail, memory = (None, None) if state is None else state
        segments = jnp.zeros_like(positions) if segment_ids is None else segment_ids
        previous, tail = token_shift(x, segments, tail, backend=self.backend)
        k = self._project(x, previous, "k", 0.5)
        v = self._project(x, previous, "v", 0.5, 0.15)
        r = self._project(x, previous, "r", 0.25)

        o, sums = wkv(
            k.astype(jnp.float32),
            v.astype(jnp.float32),
            -jnp.exp(vector(self, "decay", (self.hidden,), ("mlp",), _decays)),
            vector(self, "bonus", (self.hidden,), ("mlp",), _bonuses),
            s0=None if memory is None else memory.memory,
            resets=starts(segments, None if memory is None else memory.segment_ids, backend=self.backend),
            chunk=self.chunk,
            backend=self.backend,
        )
        wo = projection(self, "wo", (self.hidden, x.shape[-1]), ("mlp", "embed"), inputs=1, dtype=x.dtype)
        y = (jax.nn.sigmoid(r) * o.astype(x.dtype)) @ wo
        return y, None if state is None else (tail, Recurrent(sums, segments[:, -1]))

    def _project(self, x: Array, previous: Array, name: str, power: float, less: float = 0.0) -> Array:
        width = x.shape[-1]
        weight = projection(self, f"w{name}", (width, self.hidden), ("embed", "mlp"), inputs=1, dtype=x.dtype)
        return toward(x, previous, share(self, f"mu_{name}", width, power, less)) @ weight

    def init_state(self, batch: int, max_len: int, *, width: int, max_chunk: int, dtype: Any) -> Any:
        return ConvTail.empty(batch, 2, width, dtype), Recurrent.empty(batch, *[(self.hidden,)] * 3)

    def state_bytes(self, batch: int, max_len: int, *, width: int, max_chunk: int, itemsize: int) -> int:
        """Bytes of the state by the formula above (two segments are int32)."""
        return batch * (3 * self.hidden * 4 + width * itemsize + 8)

    def mixing_flops(self, length: int) -> float:
        """Forward flops a token beyond 2 a parameter: two weighted sums for the output, two for the state."""
        return 16 * self.hidden

    @classmethod
    def examples(cls) -> dict[str, RWKV4]:
        """Wider than the residual stream, in chunks that do not divide a row."""
        return {"rwkv4": cls(hidden=20, chunk=4)}


def _decays(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """From slow to fast by channel, -5 to 3."""
    return (-5 + 8 * jnp.linspace(0, 1, shape[0]) ** 1.35).astype(dtype)


def _bonuses(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """log 0.3, and a half more, less or the same in turn."""
    return (jnp.log(0.3) + 0.5 * ((jnp.arange(shape[0]) + 1) % 3 - 1)).astype(dtype)
