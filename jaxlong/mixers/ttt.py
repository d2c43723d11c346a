"""Test-time training layers: the hidden state is a network that learns while it reads."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jaxlong.core.position import NoPE, Rope
from jaxlong.core.state import EMPTY, ConvTail, Recurrent
from jaxlong.core.types import BadInput
from jaxlong.mixers.base import (
    check_state,
    from_heads,
    require,
    require_conv,
    require_rotation,
    require_spans,
    to_heads,
    vector,
)
from jaxlong.ops.attend import Backend
from jaxlong.ops.chunks import starts
from jaxlong.ops.rotate import rotate
from jaxlong.ops.short_conv import short_conv
from jaxlong.ops.ttt import FastWeights, Layer, layer_norm, ttt


class TTTLinear(nn.Module):
    """A linear map a head, trained by gradient descent on the tokens as they come, is the memory.

        q, k, v = x Wq, x Wk, x Wv        [conv]  [rotation by position mod N]
        f(x; W, b) = x + LN(x W + b),   loss_j = |LN(k_j W + b) - (v_j - k_j)|^2 / 2
        eta_ij = max(1 / (i + 1) + c_i, 0) base_lr sigmoid(x_j w + u) / C,   i, j: places in the mini-batch
        o_i = f(q_i; W, b minus sum_(j <= i) eta_ij grad loss_j at the W, b with which the mini-batch began)
        y = (LN(o) * gelu(x Wg)) Wo        [gate]

    Paper: Sun et al., arXiv 2407.04620, whose layer on a Transformer backbone is the default and on a Mamba backbone
    has conv=4 and gate. The first weights of each document, c and both norms are learned.
    Training cost: 8 D C H T + 6 H C^2 T + 4 N H C T flops. Mini-batches follow one another: updates are no
    associative scan, so a sequence split over devices hands its state on.
    State: 2 H (C^2 + C) float32 numbers, the weights and the unfinished mini-batch's sum of gradients; the
    convolutions add (W - 1) H C elements.

    Fields:
        mini_batch: N, tokens whose gradients are taken at the same weights; counted from each document's start.
        base_lr: step size of the memory. A schedule of it is a sequence of modules with the same parameters.
        conv: width of two causal depthwise convolutions that make q and k from one projection; 0: two projections.
        gate: multiplies the output, as in the Mamba backbone.
        position: rotation of q and k by their place in the mini-batch, or none.
    """

    heads: int
    head_dim: int
    mini_batch: int = 16
    base_lr: float = 1.0
    conv: int = 0
    gate: bool = False
    position: Rope | NoPE = Rope(interleaved=True)
    backend: Backend = Backend()

    def __post_init__(self):
        require(self, 1, "heads", "head_dim", "mini_batch")
        require_conv(self)
        if not self.base_lr > 0:
            raise BadInput("base_lr", self.base_lr, "a memory that does not learn", "above 0")
        require_rotation(self.position, self.head_dim)
        require_spans(self)
        super().__post_init__()

    def _shapes(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns of the network's weights, layer by layer."""
        return ((self.head_dim, self.head_dim),)

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
        segments = jnp.zeros_like(positions) if segment_ids is None else segment_ids
        memory, tail = (state if self.conv else (state, None)) if state is not None else (None, None)
        q, k, v, tail = self._project(x, positions % self.mini_batch, segments, tail)
        o, learned = self._learn(x, q, k, v, positions, segments, segment_ids is None, memory)
        y = self._out(x, o)
        if state is None:
            return y, None
        memory = Recurrent(learned, segments[:, -1])
        return y, (memory, tail) if self.conv else memory

    def _project(
        self, x: Array, places: Array, segments: Array, tail: ConvTail | None
    ) -> tuple[Array, Array, Array, ConvTail | None]:
        """q, k and v `[B T H C]`, and the convolutions' new tail: both read the same inputs."""
        project = lambda name: to_heads(self, name, x, self.heads, self.head_dim)
        q, v = project("wq"), project("wv")
        if self.conv:
            shared = q.reshape(*q.shape[:2], -1)
            q, after = self._convolve("conv_q", shared, segments, tail)
            k, after = self._convolve("conv_k", shared, segments, tail)
            q, k, tail = q.reshape(v.shape), k.reshape(v.shape), after
        else:
            k = project("wk")
        q, k = (rotate(self.position, a, places) for a in (q, k))
        return q, k, v, tail

    def _convolve(self, name: str, x: Array, segments: Array, tail: ConvTail | None) -> tuple[Array, ConvTail]:
        init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=0, out_axis=1)
        kernel = vector(self, name, (self.conv, x.shape[-1]), (None, "heads"), init)
        bias = vector(self, f"{name}_bias", (x.shape[-1],), ("heads",))
        y, tail = short_conv(x, kernel, segments, tail, backend=self.backend)
        return y + bias.astype(x.dtype), tail

    def _learn(
        self,
        x: Array,
        q: Array,
        k: Array,
        v: Array,
        positions: Array,
        segments: Array,
        one_document: bool,
        memory: Recurrent | None,
    ) -> tuple[Array, FastWeights | None]:
        heads, size = (self.heads, self.head_dim), self.mini_batch
        weight = vector(self, "lr", (x.shape[-1], self.heads), ("embed", "heads"), nn.initializers.normal(0.02))
        bias = vector(self, "lr_bias", (self.heads,), ("heads",))
        lr = jax.nn.sigmoid(x.astype(jnp.float32) @ weight + bias) * (self.base_lr / self.head_dim)
        coef = 1 / jnp.arange(1, size + 1, dtype=jnp.float32) + vector(self, "coef", (size,), (None,))
        norm = (
            vector(self, "norm_scale", heads, ("heads", "head_dim"), nn.initializers.ones),
            vector(self, "norm_shift", heads, ("heads", "head_dim")),
        )
        layers = self._layers()
        learned = before = None
        if memory is not None:
            before = segments[:, 0]
            known = memory.segment_ids == before
            pick = lambda a, b: jnp.where(known.reshape(-1, *[1] * (a.ndim - 1)), a, b)
            learned = jax.tree.map(pick, memory.memory, FastWeights.fresh(layers, x.shape[0]))
        return ttt(
            q,
            k,
            v,
            lr,
            coef=jnp.maximum(coef, 0.0),
            norm=norm,
            layers=layers,
            positions=None if one_document and memory is None else positions,
            resets=None if one_document else starts(segments, before, backend=self.backend),
            state=learned,
            backend=self.backend,
        )

    def _layers(self) -> tuple[Layer, ...]:
        """The weights with which a document begins."""
        layers = []
        for n, (rows, columns) in enumerate(self._shapes(), start=1):
            shape, axes = (self.heads, rows, columns), ("heads", "head_dim", None)
            w = vector(self, f"w{n}", shape, axes, nn.initializers.normal(0.02))
            layers.append(Layer(w, vector(self, f"b{n}", (self.heads, columns), ("heads", None))))
        return tuple(layers)

    def _out(self, x: Array, o: Array) -> Array:
        """Norm over all heads together, gate and projection back to the width."""
        inner = (self.heads * self.head_dim,)
        scale = vector(self, "post_scale", inner, ("heads",), nn.initializers.ones)
        o = layer_norm(o.reshape(*o.shape[:2], -1), scale, vector(self, "post_shift", inner, ("heads",)))
        o = o.reshape(*o.shape[:2], self.heads, self.head_dim).astype(x.dtype)
        if self.gate:
            o *= jax.nn.gelu(to_heads(self, "wg", x, self.heads, self.head_dim), approximate=True)
        return from_heads(self, "wo", o, x.shape[-1])

    def init_state(self, batch: int, max_len: int, *, width: int, max_chunk: int, dtype: Any) -> Any:
        zeros = tuple(
            Layer(jnp.zeros((batch, self.heads, m, n), jnp.float32), jnp.zeros((batch, self.heads, n), jnp.float32))
            for m, n in self._shapes()
        )
        memory = Recurrent(FastWeights(zeros, jax.tree.map(jnp.copy, zeros)), jnp.full((batch,), EMPTY, jnp.int32))
        if not self.conv:
            return memory
        return memory, ConvTail.empty(batch, self.conv, self.heads * self.head_dim, dtype)

    def state_bytes(self, batch: int, max_len: int, *, width: int, max_chunk: int, itemsize: int) -> int:
        """Bytes of the state by the formula above (segments are int32)."""
        numbers = sum((m + 1) * n for m, n in self._shapes())
        tail = (self.conv - 1) * (self.heads * self.head_dim * itemsize + 4) if self.conv else 0
        return batch * (8 * self.heads * numbers + 4 + tail)

    def mixing_flops(self, length: int) -> float:
        """Forward flops a token beyond 2 a parameter.

        Each layer is applied to key and query, its gradient summed and (but for the first) passed back; in a
        mini-batch, tokens see one another through two matrices a layer. One application is counted with the weights.
        """
        size, flops = min(self.mini_batch, length), 0
        for n, (rows, columns) in enumerate(self._shapes()):
            flops += (6 if n else 4) * rows * columns + 2 * size * (rows + columns)
        return self.heads * flops

    @classmethod
    def examples(cls) -> dict[str, TTTLinear]:
        """Small settings that cover the fields; the laws and the benchmark run on each."""
        small = cls(heads=2, head_dim=8, mini_batch=4)
        return {"linear": small, "mamba": small.clone(mini_batch=5, conv=3, gate=True, position=NoPE())}


class TTTMLP(TTTLinear):
    """A network with one hidden layer a head, trained on the tokens as they come, is the memory.

        f(x; W1, b1, W2, b2) = x + LN(gelu(x W1 + b1) W2 + b2)

    All else is as in `TTTLinear`. Paper: Sun et al., arXiv 2407.04620, which warms base_lr up from 0.01 to 0.1.
    Training cost: 8 D C H T + 14 H C F T + 4 N H (C + F) T flops for a hidden layer of F = expansion C.
    State: 2 H (2 C F + F + C) float32 numbers; the convolutions add (W - 1) H C elements.

    Fields:
        expansion: width of the hidden layer over that of a head.
    """

    base_lr: float = 0.1
    expansion: int = 4

    def __post_init__(self):
        require(self, 1, "expansion")
        super().__post_init__()

    def _shapes(self) -> tuple[tuple[int, int], ...]:
        hidden = self.expansion * self.head_dim
        return (self.head_dim, hidden), (hidden, self.head_dim)

    @classmethod
    def examples(cls) -> dict[str, TTTMLP]:
        """Small settings that cover the fields; the laws and the benchmark run on each."""
        return {"mlp": cls(heads=2, head_dim=8, mini_batch=4, conv=3, gate=True, expansion=2)}
