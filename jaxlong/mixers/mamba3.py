"""Mamba-3: a state space model with the trapezoidal rule and rotating states, without a convolution."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from jaxlong.core.state import Recurrent
from jaxlong.core.types import BadInput
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
from jaxlong.mixers.scan_parts import entry, step_bias
from jaxlong.ops.attend import Backend
from jaxlong.ops.scan import linear_attention, phase_scan
from jaxlong.ops.token_shift import next_token


class Mamba3(nn.Module):
    """The layer of Mamba-3 with one input and one output (SISO), which expands the width and gates the result itself.

        dt = softplus(x Wdt + b);   a = exp(-dt max(f(x Wa), 1e-4));   l = sigmoid(x Wl)
        theta_t = theta_(t-1) + pi tanh(x Wt) dt
        k = R(theta) (rmsnorm(x Wb) + b_k);   q = R(theta) (rmsnorm(x Wc) + b_q);   v, z = x Wv, x Wz
        S_t = a_t S_(t-1) + (1 - l_t) dt_t a_t k_(t-1) v_(t-1)^T + l_t dt_t k_t v_t^T
        y = ((S_t^T q_t + D_h v_t) * silu(z)) Wo

    f(x) is 1 + x for x >= 0 and 1 / (1 - x) below; R turns pairs (2i, 2i + 1) of the first dimensions. Paper:
    arXiv 2603.15569; code: mamba_ssm/modules/mamba3.py of github.com/state-spaces/mamba.
    Training cost: 2 D (3 H P + 2 G N + 3 H + R) T flops, and 2 H (chunk (N + P) + 2 N P) T for the scan.
    State: H (N P + N + P + R) float32 and 4 bytes: S, the last k and v, and R phases.

    Fields:
        head_dim: P.    state_dim: N.    groups: G, of the maps Wb and Wc.
        rotary_fraction: share of N that turns, R = N rotary_fraction / 2 angles.
        chunk: tokens a chunk; the result does not depend on it.
    """

    heads: int
    head_dim: int = 64
    state_dim: int = 128
    groups: int = 1
    rotary_fraction: float = 0.5
    chunk: int = 64
    backend: Backend = Backend()

    def __post_init__(self):
        require(self, 1, "heads", "head_dim", "state_dim", "groups", "chunk")
        require_divides(self, "groups", "heads")
        if not 0 < self.rotary_fraction <= 1 or self._angles < 1:
            why = f"turns no pair of {self.state_dim} dimensions"
            raise BadInput("rotary_fraction", self.rotary_fraction, why, "more than 0, at most 1")
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
        segments, memory, resets = entry(positions, segment_ids, state, self.backend)
        step = jax.nn.softplus(self._scalars("w_step", x) + self._by_head("step_bias", step_bias))
        log_decay = -step * jnp.maximum(_heavy_tail(self._scalars("wa", x)), 1e-4)
        now = step * jax.nn.sigmoid(self._scalars("wl", x))  # the rule's weight of k_t v_t^T; k_(t-1) has the rest
        q, k, phase = self._turned(x, step, memory, resets)
        v = to_heads(self, "wv", x, self.heads, self.head_dim).astype(jnp.float32)
        o, s = _trapezoid(q, k, v, log_decay, now, step - now, memory, resets, self.chunk, self.backend)
        o += self._by_head("d", nn.initializers.ones)[:, None] * v
        o = o.astype(x.dtype) * jax.nn.silu(to_heads(self, "wz", x, self.heads, self.head_dim))
        y = from_heads(self, "wo", o, x.shape[-1])
        return y, None if state is None else Recurrent((s, k[:, -1], v[:, -1], phase), segments[:, -1])

    def _by_head(self, name: str, init: Any) -> Float[Array, "H"]:
        return vector(self, name, (self.heads,), ("heads",), init)

    def _scalars(self, name: str, x: Float[Array, "B T D"]) -> Float[Array, "B T H"]:
        """One float32 number a head."""
        weight = projection(self, name, (x.shape[-1], self.heads), ("embed", "heads"), inputs=1, dtype=x.dtype)
        return (x @ weight).astype(jnp.float32)

    def _turned(
        self, x: Array, step: Array, memory: Any, resets: Array | None
    ) -> tuple[Float[Array, "B T H N"], Float[Array, "B T H N"], Float[Array, "B H R"]]:
        """Queries and keys, turned by the phases, and the last phases."""
        weight = projection(self, "wt", (x.shape[-1], self._angles), ("embed", None), inputs=1, dtype=x.dtype)
        turn = math.pi * jnp.tanh((x @ weight).astype(jnp.float32))[:, :, None] * step[..., None]
        phase0 = None if memory is None else memory[3]
        phases, last = phase_scan(turn, phase0=phase0, resets=resets, chunk=self.chunk, backend=self.backend)
        return _turn(self._vectors("wc", x, "q"), phases), _turn(self._vectors("wb", x, "k"), phases), last

    def _vectors(self, name: str, x: Float[Array, "B T D"], role: str) -> Float[Array, "B T H N"]:
        """rmsnorm(x W) + b: the maps of a group serve its heads, each with a bias of its own."""
        shape, axes = (x.shape[-1], self.groups, self.state_dim), ("embed", None, None)
        mapped = jnp.einsum("btd,dgn->btgn", x, projection(self, name, shape, axes, inputs=1, dtype=x.dtype))
        scale = vector(self, f"{role}_norm", (self.state_dim,), (None,), nn.initializers.ones)
        bias = vector(self, f"{role}_bias", (self.heads, self.state_dim), ("heads", None), nn.initializers.ones)
        return jnp.repeat(rms_norm(mapped.astype(jnp.float32), scale), self.heads // self.groups, axis=2) + bias

    @property
    def _angles(self) -> int:
        return int(self.state_dim * self.rotary_fraction) // 2

    def init_state(self, batch: int, max_len: int, *, width: int, max_chunk: int, dtype: Any) -> Any:
        inner = ((self.state_dim, self.head_dim), (self.state_dim,), (self.head_dim,), (self._angles,))
        return Recurrent.empty(batch, *((self.heads, *shape) for shape in inner))

    def state_bytes(self, batch: int, max_len: int, *, width: int, max_chunk: int, itemsize: int) -> int:
        """Bytes of the state by the formula above (segments are int32)."""
        a_head = self.state_dim * self.head_dim + self.state_dim + self.head_dim + self._angles
        return batch * (self.heads * a_head * 4 + 4)

    def mixing_flops(self, length: int) -> float:
        """Forward flops a token in rows of `length` tokens, beyond 2 a parameter."""
        chunk, states, width = min(self.chunk, length), self.state_dim, self.head_dim
        return 2 * self.heads * (chunk * (states + width) + 2 * states * width)

    @classmethod
    def examples(cls) -> dict[str, Mamba3]:
        """Small settings that cover the fields."""
        return {
            "mamba3": cls(heads=2, head_dim=6, state_dim=8, chunk=4),
            "groups": cls(heads=4, head_dim=3, state_dim=6, groups=2, rotary_fraction=1.0, chunk=8),
        }


def _heavy_tail(x: Array) -> Array:
    """1 + x above zero, 1 / (1 - x) below."""
    return jnp.where(x >= 0, 1 + x, 1 / (1 - jnp.minimum(x, 0.0)))


def _turn(x: Float[Array, "B T H N"], phase: Float[Array, "B T H R"]) -> Float[Array, "B T H N"]:
    """Pairs (2i, 2i + 1) turned by phase i; dimensions beyond 2 R as they are."""
    angles = phase.shape[-1]
    a, b = x[..., 0 : 2 * angles : 2], x[..., 1 : 2 * angles : 2]
    cos, sin = jnp.cos(phase), jnp.sin(phase)
    turned = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(*x.shape[:-1], 2 * angles)
    return jnp.concatenate([turned, x[..., 2 * angles :]], axis=-1)


def _trapezoid(
    q: Float[Array, "B T H N"],
    k: Float[Array, "B T H N"],
    v: Float[Array, "B T H P"],
    log_decay: Float[Array, "B T H"],
    now: Float[Array, "B T H"],
    late: Float[Array, "B T H"],
    memory: Any,
    resets: Bool[Array, "B T"] | None,
    chunk: int,
    backend: Backend,
) -> tuple[Float[Array, "B T H P"], Float[Array, "B H N P"]]:
    """S_t^T q_t and the last S of S_t = a_t S_(t-1) + late_t a_t k_(t-1) v_(t-1)^T + now_t k_t v_t^T.

    With M_t = S_t + late_(t+1) k_t v_t^T it is M_t = a_t M_(t-1) + (now_t + late_(t+1)) k_t v_t^T and
    S_t = a_t M_(t-1) + now_t k_t v_t^T: a decayed sum that is read before its update, and the token's own part,
    kept out of it so that no output depends on late_(t+1). The last token awaits its late part: M ends as S.
    """
    kept = late if resets is None else jnp.where(resets[..., None], 0.0, late)
    following = next_token(kept, backend=backend if memory is None else Backend())  # with a state: text, in order
    m0 = None
    if memory is not None:
        s, last_k, last_v, _ = memory
        m0 = s + jnp.einsum("bh,bhn,bhp->bhnp", late[:, 0], last_k, last_v)
    before, s = linear_attention(
        q * jnp.exp(log_decay)[..., None],
        k * (now + following)[..., None],
        v,
        log_decay,
        bonus=jnp.zeros(k.shape[2:]),
        s0=m0,
        resets=resets,
        chunk=chunk,
        backend=backend,
    )
    return before + (now * jnp.einsum("bthn,bthn->bth", q, k))[..., None] * v, s
