"""Language models: a pattern of mixers, repeated in depth and scanned."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jaxlong.core.position import Rope, Scaling
from jaxlong.core.types import BadInput, State
from jaxlong.layers.norm import RMSNorm
from jaxlong.ops.feed_forward import feed_forward
from jaxlong.parallel.memory import policy
from jaxlong.parallel.mesh import shard

DTYPES = ("float32", "bfloat16", "float16")


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)); the latter in blocks of tokens unless `mlp_block` is 0."""

    mixer: nn.Module
    mlp: nn.Module
    mlp_block: int

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None,
        state: State,
    ) -> tuple[Float[Array, "B T D"], State]:
        normed = RMSNorm(name="mixer_norm")(x)
        y, state = self.mixer(normed, positions=positions, segment_ids=segment_ids, state=state)
        x = shard(x + y, "batch", "seq", None)
        normed = RMSNorm(name="mlp_norm")(x)
        if self.mlp_block and not self.is_initializing():
            weights = {"params": self.variables["params"]["mlp"]}
            mlp = self.mlp.clone(parent=None, name=None)
            y = feed_forward(lambda tokens: mlp.apply(weights, tokens), normed, block=self.mlp_block)
        else:
            y = self.mlp(normed)
        return shard(x + y, "batch", "seq", None), state


class Group(nn.Module):
    """One round of the pattern; the body of the scan over depth."""

    pattern: tuple[nn.Module, ...]
    mlp: nn.Module
    mlp_block: int

    @nn.compact
    def __call__(
        self, x: Array, positions: Array, segment_ids: Array | None, states: tuple[State, ...] | None
    ) -> tuple[Array, tuple[State, ...]]:
        # Ties positions to the layer: otherwise XLA hoists every mask out of the scan and stores them all.
        x, positions = jax.lax.optimization_barrier((x, positions))
        out = []
        for i, mixer in enumerate(self.pattern):
            fresh = (mixer.clone(parent=None, name=None), self.mlp.clone(parent=None, name=None))
            block = Block(*fresh, self.mlp_block, name=f"block_{i}")
            x, state = block(x, positions, segment_ids, None if states is None else states[i])
            out.append(state)
        return x, tuple(out)


class LM(nn.Module):
    """Decoder of `depth` blocks whose mixers repeat `pattern`: `LM(pattern=(KDA(), KDA(), KDA(), MLA()))`.

    The module is its own configuration: it holds no arrays, and replacing a field that owns no
    parameters (a position scaling, a mask, the remat policy, a backend) keeps the same parameters.

    Fields:
        vocab: size of the vocabulary.    width: D, the residual stream.    depth: number of blocks.
        pattern: mixers, repeated depth / len(pattern) times under one scan.    mlp: the feed-forward layer.
        tied: the head is the embedding, transposed.
        remat: a name in `jaxlong.parallel.memory.POLICIES`.
        mlp_block: tokens a feed-forward block (blockwise parallel transformer); 0 takes all at once.
        dtype: of activations; parameters, norms' statistics and logits are float32.
        soft_cap: bound of the logits, c tanh(logits / c).
    """

    vocab: int
    width: int
    depth: int
    pattern: tuple[nn.Module, ...]
    mlp: nn.Module
    tied: bool = False
    remat: str = "none"
    mlp_block: int = 0
    dtype: str = "float32"
    soft_cap: float | None = None

    def __post_init__(self):
        for name in ("vocab", "width", "depth"):
            if getattr(self, name) < 1:
                raise BadInput(f"model.{name}", getattr(self, name), "must be positive", "1 or more")
        if not self.pattern:
            raise BadInput("model.pattern", self.pattern, "has no mixer", "one mixer or more")
        if self.depth % len(self.pattern):
            period = len(self.pattern)
            near = max(period, round(self.depth / period) * period)
            raise BadInput(
                "model.depth", self.depth, f"no multiple of the pattern's length {period}", f"nearest: {near}"
            )
        if self.dtype not in DTYPES:
            raise BadInput("model.dtype", self.dtype, "no floating type of activations", f"one of {', '.join(DTYPES)}")
        if self.mlp_block < 0:
            raise BadInput("model.mlp_block", self.mlp_block, "is no number of tokens", "0 or more")
        policy(self.remat)
        super().__post_init__()

    @property
    def groups(self) -> int:
        """Length of the scan over depth."""
        return self.depth // len(self.pattern)

    def setup(self):
        table = nn.with_logical_partitioning(nn.initializers.normal(self.width**-0.5), ("vocab", "embed"))
        self.table = self.param("embed", table, (self.vocab, self.width), jnp.float32)
        group = Group if self.remat == "none" else nn.remat(Group, policy=policy(self.remat), prevent_cse=False)
        self.layers = nn.scan(
            group,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast, 0),
            out_axes=0,
            length=self.groups,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(
            tuple(m.clone(parent=None, name=None) for m in self.pattern),
            self.mlp.clone(parent=None, name=None),
            self.mlp_block,
        )
        self.norm = RMSNorm()
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
        x = self.table.astype(self.dtype)[tokens] * self.width**0.5
        x = shard(x, "batch", "seq", None)
        x, states = self.layers(x, positions, segment_ids, state)
        return self.norm(x), None if state is None else states

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
        kernel = self.table.T if self.tied else self.kernel
        logits = jnp.einsum("btd,dv->btv", hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)
        return (logits if self.soft_cap is None else self.soft_cap * jnp.tanh(logits / self.soft_cap)), state

    def head(self, params: Any) -> Float[Array, "D V"]:
        """The head's matrix among `params`, for losses that never form all logits."""
        return params["embed"].T if self.tied else params["head"]

    def init_state(self, batch: int, max_len: int, *, max_chunk: int, dtype: Any = None) -> State:
        """Empty states of all mixers for `max_len` tokens, each stacked over the scanned groups."""
        sizes = {"width": self.width, "max_chunk": max_chunk, "dtype": dtype or self.dtype}
        stack = lambda leaf: jnp.broadcast_to(leaf, (self.groups, *leaf.shape))
        return tuple(jax.tree.map(stack, mixer.init_state(batch, max_len, **sizes)) for mixer in self.pattern)


def init_params(model: LM, key: Array) -> Any:
    """Parameters as a plain tree of float32 arrays."""
    return nn.unbox(_init(model, key))


def logical_axes(model: LM) -> Any:
    """The tree of logical axis names of the parameters, a PartitionSpec a leaf."""
    return nn.get_partition_spec(jax.eval_shape(lambda: _init(model, jax.random.key(0))))


def _init(model: LM, key: Array) -> Any:
    return model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]


def extend(model: LM, scaling: Scaling) -> LM:
    """The same model, and parameters, under another rotary scaling: `extend(lm, Yarn(factor=8, original=4096))`.

    Raises:
        BadInput: no mixer of the pattern rotates.
    """
    if not any(isinstance(getattr(mixer, "position", None), Rope) for mixer in model.pattern):
        raise BadInput(
            "model.pattern", [type(m).__name__ for m in model.pattern], "no mixer rotates", "a mixer with Rope"
        )
    return model.clone(pattern=tuple(_rescale(mixer, scaling) for mixer in model.pattern))


def _rescale(mixer: nn.Module, scaling: Scaling) -> nn.Module:
    position = getattr(mixer, "position", None)
    if not isinstance(position, Rope):
        return mixer
    return mixer.clone(position=dataclasses.replace(position, scaling=scaling))
