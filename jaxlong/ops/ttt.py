"""Test-time training of a small network along a sequence, a mini-batch of tokens at a time, built of matmuls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from jaxlong.ops.attend import Backend
from jaxlong.ops.chunks import split
from jaxlong.parallel.manual import vary_alike
from jaxlong.parallel.prefix import Chain, final, hand_on
from jaxlong.parallel.rows import over_spans, spread

CELLS = 8
"""Cells that the backward pass computes again together: the weights are kept once in this many cells."""


class Layer(NamedTuple):
    """One layer x w + b of every head's network, or a change of one: w `[*B H C F]`, b `[*B H F]`."""

    w: Float[Array, "*B H C F"]
    b: Float[Array, "*B H F"]


class FastWeights(NamedTuple):
    """What a sequence has learned: the weights with which the next token's mini-batch began, and what its tokens add.

    Both are one float32 `Layer` a layer with a leading batch axis. `pending` is the sum over the tokens so far of
    lr_j dL_j/dW; weights take coef[-1] times it off at the mini-batch's last token, when it becomes 0 again.
    """

    weights: tuple[Layer, ...]
    pending: tuple[Layer, ...]

    @classmethod
    def fresh(cls, layers: tuple[Layer, ...], batch: int) -> FastWeights:
        """The state before the first token: the learned weights, without a batch axis, for each row."""
        weights = jax.tree.map(lambda w: jnp.broadcast_to(w.astype(jnp.float32), (batch, *w.shape)), layers)
        return cls(weights, jax.tree.map(jnp.zeros_like, weights))


def layer_norm(
    x: Float[Array, "*B C"], scale: Float[Array, "*S C"], shift: Float[Array, "*S C"]
) -> Float[Array, "*B C"]:
    """(x - mean) / sqrt(variance + 1e-6) * scale + shift over the last axis."""
    x = x - x.mean(-1, keepdims=True)
    return x * lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale + shift


def ttt(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B T H C"],
    v: Float[Array, "B T H C"],
    lr: Float[Array, "B T H"],
    *,
    coef: Float[Array, "N"],
    norm: tuple[Float[Array, "H C"], Float[Array, "H C"]],
    layers: tuple[Layer, ...],
    positions: Int[Array, "B T"] | None = None,
    resets: Bool[Array, "B T"] | None = None,
    state: FastWeights | None = None,
    backend: Backend = Backend(),
) -> tuple[Float[Array, "B T H C"], FastWeights | None]:
    """Outputs of a network that learns to reconstruct v - k from k, read with q after each token's own step.

        f(x; W) = x + LN(net(x; W)),   L_j(W) = |LN(net(k_j; W)) - (v_j - k_j)|^2 / 2
        o_i = f(q_i; W - coef_i sum_(j <= i) lr_j dL_j/dW at W),   W: the weights with which i's mini-batch began

    net is affine layers with GELU between them. Mini-batches of N tokens are counted by positions, from each
    document's start; a document's last one may stay unfinished. Sun et al., arXiv 2407.04620, section 2.5, with the
    sum taken in the dual form: the gradients of a mini-batch are matrices of its tokens, and W_i is never made.

    Rows that lie in spans on several devices (`parallel.prefix`) begin with the text. A step is no affine function of
    the weights, so a span has no summary: the weights are handed from span to span, one device after the other, and all
    spans then make their outputs at once.

    Args:
        lr: step size of each token.    coef: factor on the sum by place in the mini-batch; N is its size.
        norm: scale and shift of LN.    layers: the learned weights with which a document begins, w `[H C F]`.
        positions: of the tokens in their documents; None: each row is one whole document, and no state is returned.
        resets: True where a document begins; None: nowhere, but for a row without a state.
        state: what the rows' first documents learned before these tokens; needs positions.
        backend: its layout says how rows lie on the devices of a mesh; with a state they are left to the compiler.

    Returns:
        o in float32, and the state after the last token.
    """
    batch, length, heads, _ = q.shape
    if state is None and spread(length, backend.layout):
        tokens = ((q, k, v, lr), positions, resets)
        o, after = over_spans(_on_spans, tokens, (coef, norm, layers), layout=backend.layout)
        return o, None if positions is None else after
    size = min(coef.shape[0], length)
    count = -(-length // size)
    groups = -(-count // CELLS)
    count = groups * -(-count // groups)  # whole groups: the cells added hold no tokens

    def cells(x: Array, mode: str = "constant") -> Array:
        rest = [(0, 0)] * (x.ndim - 2)
        x = split(jnp.pad(x, [(0, 0), (0, count * size - length), *rest], mode=mode), size)
        return x.reshape(groups, -1, *x.shape[1:])

    heads_first = lambda x: jnp.swapaxes(cells(x.astype(jnp.float32)), 3, 4)
    tokens = (heads_first(q), heads_first(k), heads_first(v), heads_first(lr))
    carry = vary_alike((q, FastWeights.fresh(layers, batch)))[1] if state is None else state
    if positions is None:
        step = lambda carry, cell: _aligned(carry, cell, coef[:size], norm)
        carry, o = _scan(step, carry.weights, tokens)
    else:
        # tokens added at the end stay in the last one's mini-batch, with lr 0
        marks = (cells(positions, "edge"), None if resets is None else cells(resets))
        step = lambda carry, cell: _general(carry, *cell, coef, norm, layers)
        carry, o = _scan(step, carry, (tokens, marks))
    o = jnp.moveaxis(o.reshape(count, batch, heads, size, -1), (0, 3), (1, 2))
    return o.reshape(batch, count * size, heads, -1)[:, :length], None if positions is None else carry


def _on_spans(tokens: tuple, shared: tuple, chain: Chain) -> tuple[Array, FastWeights]:
    (arrays, positions, resets), (coef, norm, layers) = tokens, shared
    rows, length = arrays[0].shape[:2]
    if positions is None:
        starts = jnp.tile(chain.numbers() * length, rows // chain.held)
        positions = starts[:, None] + jnp.arange(length)

    def run(tokens: tuple, state: FastWeights) -> tuple[Array, FastWeights]:
        arrays, positions, resets = tokens
        return ttt(*arrays, coef=coef, norm=norm, layers=layers, positions=positions, resets=resets, state=state)

    tokens = (arrays, positions, resets)
    entry = hand_on(lambda *span: run(*span)[1], tokens, FastWeights.fresh(layers, rows), chain)
    o, after = run(tokens, entry)
    return o, final(after, chain)


def _scan(step: Callable, carry: Any, cells: Any) -> tuple[Any, Array]:
    """Scan over cells `[groups, cells, ...]`, keeping the carries between groups for the backward pass."""
    if jax.tree.leaves(cells)[0].shape[:2] == (1, 1):  # a step of decoding
        carry, o = step(carry, jax.tree.map(lambda x: x[0, 0], cells))
        return carry, o[None, None]
    group = jax.checkpoint(lambda carry, cells: lax.scan(step, carry, cells), prevent_cse=False)
    return lax.scan(group, carry, cells)


# Within a cell, arrays are [B H c C] for c tokens. Weights that hold for some of the tokens come with a factor
# [B 1 c 1] on their outputs, 0 for the other tokens; None is 1.
Weighted = tuple[tuple[Layer, ...], Array | None]


def _aligned(weights: tuple[Layer, ...], cell: tuple, coef: Array, norm: tuple) -> tuple[tuple[Layer, ...], Array]:
    """One mini-batch of each row, from its first token on."""
    q, k, v, lr = cell
    xs, gs = _gradients(k, v - k, [(weights, None)], norm)
    scores = jnp.tril(coef[:, None] * lr[..., None, :])
    o = _read(q, xs, gs, scores, [(weights, None)], norm)
    return _step(weights, _sums(xs, gs, lr), coef[-1]), o


def _general(
    carry: FastWeights, cell: tuple, marks: tuple, coef: Array, norm: tuple, layers: tuple[Layer, ...]
) -> tuple[FastWeights, Array]:
    """Up to N tokens from anywhere.

    The document of the first one crosses at most one edge between mini-batches: its tokens are `before` or after
    it. Documents that begin later in the cell are in their first mini-batch.
    """
    q, k, v, lr = cell
    positions, resets = marks
    size, block = coef.shape[0], positions // coef.shape[0]
    document = jnp.zeros_like(positions)
    if resets is not None:
        fresh = FastWeights.fresh(layers, q.shape[0])
        carry = _choose(resets[:, 0], fresh, carry)
        document = jnp.cumsum(resets.at[:, 0].set(False), axis=1)
    column = lambda mask: mask[:, None, :, None].astype(jnp.float32)
    before = (document == 0) & (block == block[:, :1])

    xs, gs = _gradients(k, v - k, [(carry.weights, None)], norm)
    readers = [(carry.weights, column(before))]
    turned = carry.weights
    if positions.shape[1] > 1:
        mine = _sums(xs, gs, lr * before[:, None])
        turned = _step(carry.weights, _add(carry.pending, mine), coef[-1])
        others = [(turned, column((document == 0) & ~before))]
        if resets is not None:
            others.append((layers, column(document > 0)))
        late = _gradients(k, v - k, others, norm)
        xs, gs = jax.tree.map(lambda a, b: jnp.where(before[:, None, :, None], a, b), (xs, gs), late)
        readers += others

    together = (document[:, :, None] == document[:, None]) & (block[:, :, None] == block[:, None])
    rate = coef[positions % size]
    readers.append((carry.pending, column(before) * -rate[:, None, :, None]))
    scores = jnp.tril(rate[:, None, :, None] * lr[:, :, None] * together[:, None])
    o = _read(q, xs, gs, scores, readers, norm)

    last = lambda mask: mask[:, -1]
    entry = _choose(last(before), carry.weights, turned)
    if resets is not None:
        entry = _choose(last(document) > 0, fresh.weights, entry)
    pending = _add(
        _choose(last(before), carry.pending, jax.tree.map(jnp.zeros_like, carry.pending)),
        _sums(xs, gs, lr * together[:, None, -1]),
    )
    full = last(positions) % size == size - 1
    after = FastWeights(_step(entry, pending, coef[-1]), jax.tree.map(jnp.zeros_like, pending))
    return _choose(full, after, FastWeights(entry, pending)), o


def _gradients(k: Array, target: Array, sets: Sequence[Weighted], norm: tuple) -> tuple[list[Array], list[Array]]:
    """Inputs x_l of each layer for the keys, and the gradients g_l of each token's loss in x_l w_l + b_l."""
    xs, pulls = [k], []
    depth = len(sets[0][0])
    for layer in range(depth - 1):
        x, pull = jax.vjp(_gelu, _affine(xs[-1], sets, layer))
        xs.append(x)
        pulls.append(pull)
    guess, pull = jax.vjp(lambda z: _norm(z, norm), _affine(xs[-1], sets, depth - 1))
    gs = list(pull(guess - target))
    for layer in range(depth - 1, 0, -1):
        back = sum(_gated(gs[0] @ jnp.swapaxes(ws[layer].w, -1, -2), gate) for ws, gate in sets)
        gs = list(pulls[layer - 1](back)) + gs
    return xs, gs


def _read(q: Array, xs: list[Array], gs: list[Array], scores: Array, sets: Sequence[Weighted], norm: tuple) -> Array:
    """f(q_i; W_i) for W_i = W - sum_j scores_ij dL_j/dW, without W_i; a bias is a weight on an input of 1."""
    y = q
    for layer, (x, g) in enumerate(zip(xs, gs, strict=True)):
        y = y if layer == 0 else _gelu(y)
        y = _affine(y, sets, layer) - (scores * (y @ jnp.swapaxes(x, -1, -2) + 1)) @ g
    return q + _norm(y, norm)


def _sums(xs: list[Array], gs: list[Array], weight: Float[Array, "B H c"]) -> tuple[Layer, ...]:
    """sum_j weight_j dL_j/dW."""
    weighted = [g * weight[..., None] for g in gs]
    return tuple(Layer(jnp.swapaxes(x, -1, -2) @ g, g.sum(-2)) for x, g in zip(xs, weighted, strict=True))


def _affine(x: Array, sets: Sequence[Weighted], layer: int) -> Array:
    return sum(_gated(x @ ws[layer].w + ws[layer].b[..., None, :], gate) for ws, gate in sets)


def _gated(x: Array, gate: Array | None) -> Array:
    return x if gate is None else x * gate


def _gelu(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=True)


def _norm(x: Array, norm: tuple) -> Array:
    scale, shift = norm
    return layer_norm(x, scale[:, None], shift[:, None])


def _step(weights: tuple[Layer, ...], sums: tuple[Layer, ...], rate: Array) -> tuple[Layer, ...]:
    return jax.tree.map(lambda w, s: w - rate * s, weights, sums)


def _add(a: tuple[Layer, ...], b: tuple[Layer, ...]) -> tuple[Layer, ...]:
    return jax.tree.map(jnp.add, a, b)


def _choose(rows: Bool[Array, "B"], a: Any, b: Any) -> Any:
    """Leaves of `a` for the rows where true, of `b` for the others."""
    pick = lambda x, y: jnp.where(rows.reshape(-1, *[1] * (x.ndim - 1)), x, y)
    return jax.tree.map(pick, a, b)
