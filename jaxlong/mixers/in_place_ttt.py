"""In-place test-time training: a feed-forward layer whose down projection learns while it reads."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jaxlong.core.state import Recurrent
from jaxlong.core.types import BadInput
from jaxlong.mixers.base import check_state, projection, require, require_spans, vector
from jaxlong.ops.attend import Backend
from jaxlong.ops.chunk_memory import ChunkMemory, chunk_conv, chunk_memory, marks, taught
from jaxlong.ops.chunks import starts

InPlaceState = tuple[Recurrent, Array, Array]
"""What the document has added to the down projection, and the x and z of its last tokens."""


class InPlaceTTT(nn.Module):
    """A gated feed-forward layer; each finished chunk of the document adds to its down projection.

        z = silu(x W_gate) * (x W_up),   y = z W_n in chunk n
        W_(n + 1) = W_n + eta sum_(t in chunk n) z_t^T v_t,   v = conv(x) W_target,   W_0 = W_down

    This is a step of gradient descent on -sum <v_t, z_t W>. The depthwise convolution looks both ways inside a chunk
    and begins at zero: the layer then is the feed-forward layer with the same weights. It takes the place of one, and
    its gate, up and down are a trained layer's. Documents begin with W_0; their unfinished chunk is never added.
    Paper: arXiv 2604.06169, which takes embeddings for x in v; here, as in its code's default, x is the layer's input.
    Training cost: (6 D F + 2 D^2 + 4 D F) T flops; the memory of a pass does not grow with the number of chunks.
    State: 2 D F float32 numbers, what chunks added and what the unfinished one will have added too, and the last
    conv // 2 tokens' x and z, whose targets the next tokens complete.

    Fields:
        width: D, that of the residual stream.    hidden: F.
        chunk: tokens of a document between updates. The paper trains from scratch with 512 to 1024, and from a
            checkpoint with 4096.
        eta: step size.
        conv: width of the convolution, odd.
    """

    width: int
    hidden: int
    chunk: int = 1024
    eta: float = 0.3
    conv: int = 5
    backend: Backend = Backend()

    def __post_init__(self):
        require(self, 1, "width", "hidden", "chunk", "conv")
        if self.conv % 2 == 0:
            raise BadInput("conv", self.conv, "has no middle", "an odd width")
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
        if x.shape[-1] != self.width:
            raise BadInput("width", self.width, f"the input has {x.shape[-1]} channels", "the input's width")
        if state is not None:
            check_state(self, state, x)
        weight = lambda name, m, n, axes: projection(self, name, (m, n), axes, inputs=1, dtype=x.dtype)
        gate = weight("gate", self.width, self.hidden, ("embed", "mlp"))
        up = weight("up", self.width, self.hidden, ("embed", "mlp"))
        down = weight("down", self.hidden, self.width, ("mlp", "embed"))
        z = jax.nn.silu(x @ gate) * (x @ up)
        kernel = vector(self, "conv_kernel", (self.conv, self.width), (None, "embed"))
        target = vector(self, "target", (self.width, self.width), ("embed", None), _diagonal)
        added, state = self._learned(x, z, kernel, self.eta * target, positions, segment_ids, state)
        return ((z @ down).astype(jnp.float32) + added).astype(x.dtype), state

    def _learned(
        self,
        x: Array,
        z: Array,
        kernel: Array,
        target: Array,
        positions: Array,
        segment_ids: Array | None,
        state: InPlaceState | None,
    ) -> tuple[Array, InPlaceState | None]:
        """What finished chunks have added to y, in float32, and the state after these tokens."""
        wide = x.astype(jnp.float32)
        if state is None:
            if segment_ids is None and x.shape[1] <= self.chunk:
                return jnp.zeros_like(wide), None
            where = {"positions": positions, "segment_ids": segment_ids}
            return taught(wide, z, kernel, target, chunk=self.chunk, **where, backend=self.backend), None

        segments = jnp.zeros_like(positions) if segment_ids is None else segment_ids
        where = marks(positions, None if segment_ids is None else starts(segment_ids, segment_ids[:, 0]), self.chunk)
        known = state[0].segment_ids == segments[:, 0]
        memory, last_x, last_z = jax.tree.map(
            lambda a: jnp.where(known[:, None, None], a, 0), (state[0].memory, *state[1:])
        )
        reach = last_x.shape[1]
        before = (positions[:, :1] - reach + jnp.arange(reach)) // self.chunk
        document = jnp.pad(where.document, [(0, 0), (reach, 0)])
        places = jnp.concatenate([before, where.chunk], axis=1)
        near = jnp.concatenate([last_x.astype(jnp.float32), wide], axis=1)
        v = chunk_conv(near, kernel, document, places)[:, reach:] @ target
        # the last tokens' targets, as far as these tokens complete them
        news = chunk_conv(near.at[:, :reach].set(0), kernel, document, places)[:, :reach] @ target
        later = memory.later + jnp.einsum("btf,btd->bfd", last_z.astype(jnp.float32), news)
        o, memory = chunk_memory(z, z, v, chunk=self.chunk, where=where, state=memory._replace(later=later))
        recent = lambda old, new: jnp.concatenate([old, new], axis=1)[:, new.shape[1] :]
        return o, (Recurrent(memory, segments[:, -1]), recent(last_x, x), recent(last_z, z))

    def init_state(self, batch: int, max_len: int, *, width: int, max_chunk: int, dtype: Any) -> InPlaceState:
        reach, shape = self.conv // 2, (self.hidden, width)
        empty = Recurrent.empty(batch, shape, shape)
        tails = (jnp.zeros((batch, reach, n), dtype) for n in (width, self.hidden))
        return empty._replace(memory=ChunkMemory(*empty.memory)), *tails

    def state_bytes(self, batch: int, max_len: int, *, width: int, max_chunk: int, itemsize: int) -> int:
        """Bytes of the state by the formula above (segments are int32)."""
        return batch * (8 * width * self.hidden + 4 + self.conv // 2 * (width + self.hidden) * itemsize)

    def mixing_flops(self, length: int) -> float:
        """Forward flops a token beyond 2 a parameter: to read what was added and to add, where a chunk ends."""
        return 4.0 * self.width * self.hidden if length > self.chunk else 0.0

    @classmethod
    def examples(cls) -> dict[str, InPlaceTTT]:
        """Small settings that cover the fields; the laws and the benchmark run on each."""
        return {
            "chunks": cls(width=12, hidden=16, chunk=4),
            "narrow": cls(width=12, hidden=10, chunk=3, eta=0.1, conv=3),
        }


def _diagonal(key: Array, shape: tuple[int, int], dtype: Any) -> Array:
    """Normal of deviation 0.02 on the diagonal."""
    return jnp.diag(0.02 * jax.random.normal(key, shape[:1], dtype))
