"""Language models: a pattern of mixers, repeated in depth and scanned."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jaxlong.core.position import Rope, Scaling
from jaxlong.core.state import KeysOnly
from jaxlong.core.types import BadInput, State
from jaxlong.layers.mtp import MultiToken
from jaxlong.layers.norm import RMSNorm
from jaxlong.mixers.base import ReadsKeys, SequenceMixer, SharesFirstValues
from jaxlong.ops.attend import Backend
from jaxlong.ops.feed_forward import by_queries, feed_forward
from jaxlong.ops.lookup import lookup
from jaxlong.parallel.layout import parts as layout_parts
from jaxlong.parallel.memory import named, policy
from jaxlong.parallel.mesh import shard

DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Layer:
    """A mixer with a feed-forward layer of its own, where a pattern should not take the model's."""

    mixer: nn.Module
    mlp: nn.Module | None


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)); the latter in blocks of tokens unless `mlp_block` is 0.

    With a `query_block`, a row whose mixer allows it is computed in blocks of queries (blockwise parallel transformer):
    keys and values first, then all else of a block of tokens before the next; `remat` says what is kept of a block.

    The feed-forward layer may be a sequence mixer too (one that looks back, or learns as it reads): then the
    state is a pair. None is no feed-forward layer. `first` are the values of the model's first layer, for mixers that
    share them.
    """

    mixer: nn.Module
    mlp: nn.Module | None
    mlp_block: int
    query_block: int = 0
    remat: str = "none"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None,
        state: State,
        first: Any = None,
    ) -> tuple[Float[Array, "B T D"], State, Any]:
        # Ties positions to the layer: otherwise XLA hoists every mask out of the scan over layers and stores them all.
        # Behind the name, since what comes before a named value is not kept to have it again.
        x, positions = jax.lax.optimization_barrier((named(x, "block_in"), positions))
        where = {"positions": positions, "segment_ids": segment_ids}
        if self.query_block and state is None and self._by_queries_works():
            return shard(self._by_queries(x, **where), "batch", "seq", None), None, first
        of_mixer, of_mlp = state if state is not None and looks_back(self.mlp) else (state, None)
        normed = RMSNorm(name="mixer_norm")(x)
        if shares_values(self.mixer):
            y, of_mixer, first = self.mixer.mix(normed, first, **where, state=of_mixer)
        else:
            y, of_mixer = self.mixer(normed, **where, state=of_mixer)
        x = shard(x + named(y, "mixer_out"), "batch", "seq", None)
        if self.mlp is None:
            return x, of_mixer, first
        normed = RMSNorm(name="mlp_norm")(x)
        if looks_back(self.mlp):
            y, of_mlp = self.mlp(normed, **where, state=of_mlp)
        elif self.mlp_block and not self.is_initializing():
            y = self._blockwise(normed)
        else:
            y = self.mlp(normed)
        state = (of_mixer, of_mlp) if looks_back(self.mlp) else of_mixer
        return shard(x + y, "batch", "seq", None), state, first

    def _blockwise(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        token = jax.ShapeDtypeStruct((1, 1, x.shape[-1]), x.dtype)
        boxed = jax.eval_shape(_fresh(self.mlp).init, jax.random.key(0), token)["params"]
        apply = lambda weights, tokens: _fresh(self.mlp).apply({"params": weights}, tokens)
        weights = self.variables["params"]["mlp"]
        return feed_forward(apply, weights, x, block=self.mlp_block, names=nn.get_partition_spec(boxed))

    def _by_queries_works(self) -> bool:
        """Devices that share a sequence would fetch each other's keys again for every block."""
        mesh = jax.sharding.get_abstract_mesh()
        shared = any(mesh.shape.get(axis, 1) > 1 for axis in ("seq", "ulysses"))
        return by_queries_fits(self.mixer, self.mlp) and not shared and not self.is_initializing()

    def _by_queries(
        self, x: Float[Array, "B T D"], *, positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"] | None
    ) -> Float[Array, "B T D"]:
        mixer_norm, mlp_norm = (self._pure(RMSNorm(parent=None), name) for name in ("mixer_norm", "mlp_norm"))
        mix = self._pure(self.mixer, "mixer")
        mlp = None if self.mlp is None else self._pure(self.mlp, "mlp")
        segments = jnp.zeros_like(positions) if segment_ids is None else segment_ids
        where = {"positions": positions, "segment_ids": segments}
        _, keys = mix(mixer_norm(x), **where, state=KeysOnly())

        def of_block(tokens: dict[str, Array]) -> Array:
            x = tokens.pop("x")
            y, _ = mix(mixer_norm(x), **tokens, state=keys)
            x = x + named(y, "mixer_out")
            return x if mlp is None else x + mlp(mlp_norm(x))

        return by_queries(of_block, {"x": x, **where}, block=self.query_block, policy=policy(self.remat))

    def _pure(self, module: nn.Module, name: str) -> Any:
        """A part of the block as a function of arrays, which loops may call."""
        return partial(module.clone(parent=None, name=None).apply, {"params": self.variables["params"].get(name, {})})


class Group(nn.Module):
    """Blocks one after another: one round of the pattern, the body of the scan over depth if it is `scanned`.

    Each is computed again by itself in the backward pass, where `remat` says so.
    """

    layers: tuple[nn.Module | Layer, ...]
    mlp: nn.Module | None
    mlp_block: int
    query_block: int = 0
    remat: str = "none"
    scanned: bool = False

    @nn.compact
    def __call__(
        self,
        carry: tuple[Array, Any],
        positions: Array,
        segment_ids: Array | None,
        states: tuple[State, ...] | None,
    ) -> tuple[tuple[Array, Any], tuple[State, ...]]:
        x, first = carry
        out = []
        kind = Block
        if self.remat != "none":  # forward and backward passes of a scan are apart: nothing there is common to both
            kind = nn.remat(Block, policy=policy(self.remat), prevent_cse=not self.scanned)
        for i, layer in enumerate(self.layers):
            mixer, mlp = map(_fresh, parts(layer, self.mlp))
            block = kind(mixer, mlp, self.mlp_block, self.query_block, self.remat, name=f"block_{i}")
            x, state, first = block(x, positions, segment_ids, None if states is None else states[i], first)
            out.append(state)
        return (x, first), tuple(out)


def parts(layer: nn.Module | Layer, mlp: nn.Module | None) -> tuple[nn.Module, nn.Module | None]:
    """The mixer and the feed-forward layer of an entry of a pattern."""
    return (layer.mixer, layer.mlp) if isinstance(layer, Layer) else (layer, mlp)


def looks_back(mlp: nn.Module | None) -> bool:
    """Whether a feed-forward layer is a sequence mixer."""
    return isinstance(mlp, SequenceMixer)


def by_queries_fits(mixer: nn.Module, mlp: nn.Module | None) -> bool:
    """Whether a block can be computed a block of queries at a time, once all keys are there."""
    return reads_keys(mixer) and not looks_back(mlp) and getattr(mlp, "blockwise", True)


def reads_keys(mixer: nn.Module) -> bool:
    """Whether a mixer looks at other tokens through their keys and values alone."""
    return isinstance(mixer, ReadsKeys) and mixer.reads_keys


def shares_values(mixer: nn.Module) -> bool:
    """Whether a mixer takes the values of the model's first layer."""
    return isinstance(mixer, SharesFirstValues) and mixer.value_residual


def _fresh(module: nn.Module | None) -> nn.Module | None:
    """The module as no part of another, so that a scan may own it."""
    return None if module is None else module.clone(parent=None, name=None)


class LM(nn.Module):
    """Decoder of `depth` blocks whose mixers repeat `pattern`: `LM(pattern=(KDA(), KDA(), KDA(), MLA()))`.

    The module is its own configuration: it holds no arrays, and replacing a field that owns no
    parameters (a position scaling, a mask, the remat policy, a backend) keeps the same parameters.

    Fields:
        vocab: size of the vocabulary.    width: D, the residual stream.    depth: number of blocks.
        pattern: mixers, or `Layer`s with a feed-forward layer of their own, repeated under one scan.
        mlp: the feed-forward layer: token-wise, or a sequence mixer (RWKV's channel mixing, In-Place TTT), or
            None, which leaves it out.
        before, after: layers around the repeated ones, which count towards `depth`.
        tied: the head is the embedding, transposed.
        remat: what the backward pass keeps, from the menu of `jaxlong.parallel.memory`.
        mlp_block: tokens a feed-forward block, on one device; 0 takes all at once.
        query_block: tokens whose attention, residual and feed-forward layer are computed before the next ones are
            (blockwise parallel transformer); 0 takes all at once. For layers whose mixer `reads_keys`, on rows that
            lie whole on a device; the others go by `mlp_block`.
        dtype: of activations; parameters, norms' statistics and logits are float32.
        soft_cap: bound of the logits, c tanh(logits / c).
        mtp: tokens beyond the next that training predicts too (multi-token prediction, `layers.mtp`).
    """

    vocab: int
    width: int
    depth: int
    pattern: tuple[Any, ...]
    mlp: nn.Module | None
    before: tuple[Any, ...] = ()
    after: tuple[Any, ...] = ()
    tied: bool = False
    remat: str = "none"
    mlp_block: int = 0
    query_block: int = 0
    dtype: str = "float32"
    soft_cap: float | None = None
    mtp: int = 0

    def __post_init__(self):
        for name in ("vocab", "width", "depth"):
            if getattr(self, name) < 1:
                raise BadInput(f"model.{name}", getattr(self, name), "must be positive", "1 or more")
        for name in ("mlp_block", "query_block", "mtp"):
            if getattr(self, name) < 0:
                raise BadInput(f"model.{name}", getattr(self, name), "is no number of tokens", "0 or more")
        if not self.pattern:
            raise BadInput("model.pattern", self.pattern, "has no mixer", "one mixer or more")
        period, around = len(self.pattern), len(self.before) + len(self.after)
        if (self.depth - around) % period or self.depth < around:
            near = around + max(period, round((self.depth - around) / period) * period)
            beside = f" beside {around} before and after" if around else ""
            why = f"no multiple of the pattern's length {period}{beside}"
            raise BadInput("model.depth", self.depth, why, f"nearest: {near}")
        if self.dtype not in DTYPES:
            raise BadInput("model.dtype", self.dtype, "no floating type of activations", f"one of {', '.join(DTYPES)}")
        for layer in self.layers_once:
            mlp = parts(layer, self.mlp)[1]
            if self.mlp_block and not looks_back(mlp) and not getattr(mlp, "blockwise", True):
                why = f"{type(mlp).__name__} looks at all tokens of a batch at once"
                raise BadInput("model.mlp_block", self.mlp_block, why, "0")
        layers = [parts(layer, self.mlp) for layer in self.layers_once]
        if self.query_block and not any(by_queries_fits(*layer) for layer in layers):
            names = " and ".join(
                sorted({type(part).__name__ for layer in layers for part in layer if part is not None})
            )
            why = f"no layer of {names} looks at other tokens through their keys and values alone"
            raise BadInput("model.query_block", self.query_block, why, "0, or mlp_block")
        policy(self.remat)
        super().__post_init__()

    @property
    def layers_once(self) -> tuple[Any, ...]:
        """The different entries: before, one round of the pattern, after."""
        return (*self.before, *self.pattern, *self.after)

    @property
    def blocks(self) -> list[tuple[nn.Module, nn.Module | None]]:
        """Mixer and feed-forward layer of every block, in order of depth."""
        entries = (*self.before, *self.pattern * self.groups, *self.after)
        return [parts(layer, self.mlp) for layer in entries]

    @property
    def layout(self) -> str:
        """The order in which rows hold their tokens on a mesh, as all mixers take it (`distributed`)."""
        backends = [getattr(mixer, "backend", None) for mixer, _ in self.blocks]
        return next((backend.layout for backend in backends if backend is not None), "contiguous")

    @property
    def groups(self) -> int:
        """Length of the scan over depth."""
        return (self.depth - len(self.before) - len(self.after)) // len(self.pattern)

    def setup(self):
        table = nn.with_logical_partitioning(nn.initializers.normal(self.width**-0.5), ("vocab", "embed"))
        self.table = self.param("embed", table, (self.vocab, self.width), jnp.float32)
        mlp = _fresh(self.mlp)
        how = (mlp, self.mlp_block, self.query_block, self.remat)
        self.first_layers = Group(self.before, *how) if self.before else None
        self.layers = nn.scan(
            Group,
            variable_axes={"params": 0, "losses": 0, "metrics": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast, 0),
            out_axes=0,
            length=self.groups,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(self.pattern, *how, scanned=True)
        self.last_layers = Group(self.after, *how) if self.after else None
        self.norm = RMSNorm()
        if self.mtp:
            last = parts(self.pattern[-1], self.mlp)
            self.ahead = [MultiToken(Group((Layer(*last),), *how, parent=None)) for _ in range(self.mtp)]
        if not self.tied:
            kernel = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "vocab"))
            self.kernel = self.param("head", kernel, (self.width, self.vocab), jnp.float32)

    def features(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        state: State | None = None,
    ) -> tuple[Float[Array, "B T D"], State | None]:
        """The normalised residual stream before the head. Arguments as in `__call__`."""
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        x = shard(self._embed(tokens), "batch", "seq", None)
        carry, states = (x, self._no_values(x)), []
        for group, given in zip((self.first_layers, self.layers, self.last_layers), state or (None,) * 3, strict=True):
            after = ()
            if group is not None:
                carry, after = group(carry, positions, segment_ids, given)
            states.append(after)
        return self.norm(carry[0]), None if state is None else tuple(states)

    def features_ahead(
        self,
        hidden: Float[Array, "B T D"],
        following: Int[Array, "M B T"],
        *,
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "M B T D"]:
        """Features from which each token after the next is predicted, by multi-token prediction.

        Args:
            hidden: what `features` gave.
            following: `following[m, b, t]` is the token m + 1 after `tokens[b, t]`; M = `mtp`.
        """
        out = []
        for module, tokens in zip(self.ahead, following, strict=True):
            hidden = module(hidden, self._embed(tokens), positions, segment_ids, self._no_values(hidden))
            out.append(self.norm(hidden))
        return jnp.stack(out)

    def _embed(self, tokens: Array) -> Array:
        return lookup(self.table, tokens, self.dtype) * self.width**0.5

    def _no_values(self, x: Array) -> Any:
        """The carry of mixers that share the first layer's values, before that layer."""
        for mixer, _ in self.blocks:
            if shares_values(mixer):
                return mixer.no_values(x)
        return None

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        state: State | None = None,
    ) -> tuple[Float[Array, "B T V"], State | None]:
        """Logits in float32, and the new state.

        Args:
            tokens: ids below `vocab`.
            positions: of each token in its document; None counts from 0.
            segment_ids: equal for tokens of one document; None is one document a row.
            state: from `init_state` or an earlier call, which these tokens continue; None keeps nothing.
        """
        hidden, state = self.features(tokens, positions=positions, segment_ids=segment_ids, state=state)
        if self.mtp and self.is_initializing():
            at = jnp.zeros_like(tokens)
            self.features_ahead(hidden, jnp.broadcast_to(at, (self.mtp, *at.shape)), positions=at)
        kernel = self.table.T if self.tied else self.kernel
        logits = jnp.einsum("btd,dv->btv", hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)
        return (logits if self.soft_cap is None else self.soft_cap * jnp.tanh(logits / self.soft_cap)), state

    def head(self, params: Any) -> Float[Array, "D V"]:
        """The head's matrix among `params`, for losses that never form all logits."""
        return params["embed"].T if self.tied else params["head"]

    def init_state(self, batch: int, max_len: int, *, max_chunk: int, dtype: Any = None) -> State:
        """Empty states of all layers for `max_len` tokens: before, scanned (stacked over groups), after."""
        sizes = {"width": self.width, "max_chunk": max_chunk, "dtype": dtype or self.dtype}

        def of_layer(layer: Any) -> State:
            mixer, mlp = parts(layer, self.mlp)
            state = mixer.init_state(batch, max_len, **sizes)
            return (state, mlp.init_state(batch, max_len, **sizes)) if looks_back(mlp) else state

        stack = lambda leaf: jnp.broadcast_to(leaf, (self.groups, *leaf.shape))
        scanned = tuple(jax.tree.map(stack, of_layer(layer)) for layer in self.pattern)
        return tuple(map(of_layer, self.before)), scanned, tuple(map(of_layer, self.after))


def init_params(model: LM, key: Array) -> Any:
    """Parameters as a plain tree of float32 arrays."""
    return nn.unbox(_init(model, key))


def logical_axes(model: LM) -> Any:
    """The tree of logical axis names of the parameters, a PartitionSpec a leaf."""
    return nn.get_partition_spec(jax.eval_shape(lambda: _init(model, jax.random.key(0))))


def _init(model: LM, key: Array) -> Any:
    return model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]


def distributed(model: LM, *, sequence: str | None, layout: str) -> LM:
    """The same model, and parameters, with another strategy and layout of the sequence axis in all of its mixers.

    Args:
        sequence, layout: as in `jaxlong.ops.attend.Backend`; `sequence` None leaves to each mixer its own.

    Raises:
        BadInput: there is no such strategy or layout, or a mixer does not run on it.
    """

    def place(layer: Any) -> Any:
        if isinstance(layer, Layer):
            return Layer(place(layer.mixer), place(layer.mlp))
        backend = getattr(layer, "backend", None)
        return layer if backend is None else layer.clone(backend=replace(backend))

    replace = lambda old: dataclasses.replace(old, sequence=sequence or old.sequence, layout=layout)
    replace(Backend())  # refuses names, mixers or not
    groups = {name: tuple(map(place, getattr(model, name))) for name in ("pattern", "before", "after")}
    return model.clone(mlp=place(model.mlp), **groups)


def balanced_layout(model: LM, length: int, devices: int) -> str:
    """The layout that shares a model's work evenly among devices of the sequence axis, for rows of `length` tokens.

    Zigzag where a mixer attends causally over the whole row and the length divides; else contiguous, which sends least.
    """
    masks = [getattr(mixer, "mask", None) for mixer, _ in model.blocks if reads_keys(mixer)]
    causal = any(mask.ahead() == 0 and mask.reach() is None for mask in masks if mask is not None)
    return "zigzag" if causal and devices > 1 and length % layout_parts("zigzag", devices) == 0 else "contiguous"


def extend(model: LM, scaling: Scaling) -> LM:
    """The same model, and parameters, under another rotary scaling: `extend(lm, Yarn(factor=8, original=4096))`.

    Raises:
        BadInput: no mixer of the pattern rotates.
    """
    mixers = [mixer for mixer, _ in model.blocks]
    if not any(isinstance(getattr(mixer, "position", None), Rope) for mixer in mixers):
        names = sorted({type(mixer).__name__ for mixer in mixers})
        raise BadInput("model.pattern", names, "no mixer rotates", "a mixer with Rope")
    rescaled = lambda layers: tuple(_rescale(layer, scaling) for layer in layers)
    return model.clone(pattern=rescaled(model.pattern), before=rescaled(model.before), after=rescaled(model.after))


def _rescale(layer: Any, scaling: Scaling) -> Any:
    if isinstance(layer, Layer):
        return dataclasses.replace(layer, mixer=_rescale(layer.mixer, scaling))
    position = getattr(layer, "position", None)
    if not isinstance(position, Rope):
        return layer
    return layer.clone(position=dataclasses.replace(position, scaling=scaling))
