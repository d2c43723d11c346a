"""Bytes of a training step by counting, without compiling: of any experiment, on any mesh.

    parameters, gradients, optimizer    exact: shapes, logical axes and the sharding rules
    kept                                what the backward pass keeps under the remat policy, as JAX's own trace says
    loss, layer, table                  formulas: what exists for a while beside all that; the largest counts

                        head                  its gradient                  logits of a chunk, their gradient
    loss      V D e / tensor + V D 4 / tensor + b m V (4 + 4 + e) / tensor
    layer     what the largest block keeps without remat, its weights in e bytes, their gradients in 4,
              keys and their gradients by the strategy's model in `jaxlong.parallel.cost`, and two residual streams
    table     V D (4 + e) / tensor, the embedding's gradient

b rows and m = `loss_chunk` tokens a device, e bytes an element of activations. What the compiler adds (padding, copies,
fragmentation) or saves (fusion) is not counted: `benchmarks/scaling` has both figures side by side.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Literal
from jax.sharding import AbstractMesh, AxisType

from jaxlong.config import Experiment
from jaxlong.core.types import Batch
from jaxlong.model import LM, Layer, init_params
from jaxlong.parallel import cost
from jaxlong.parallel.manual import SEQUENCE, sequence_devices
from jaxlong.parallel.mesh import AXES, parse_mesh
from jaxlong.plan.exchange import at, attention_shape, strategy_of
from jaxlong.run import count_params, sharded_state
from jaxlong.train.grads import next_token_loss


class Bytes(NamedTuple):
    """Of the chip that holds most, and of all chips together, copies counted."""

    chip: int
    total: int


@dataclass(frozen=True)
class Account:
    """Where the bytes of a training step go; `host` are those that the remat policy moves to the host's memory."""

    parameters: Bytes
    gradients: Bytes
    optimizer: Bytes
    batch: Bytes
    kept: Bytes
    loss: Bytes
    layer: Bytes
    table: Bytes
    host: Bytes

    @property
    def peak(self) -> int:
        """The most that a chip holds at once."""
        always = self.parameters.chip + self.optimizer.chip + self.batch.chip
        return always + max(
            self.kept.chip + self.loss.chip,
            self.kept.chip + self.gradients.chip + self.layer.chip,
            self.gradients.chip + self.table.chip,
        )


def account(
    experiment: Experiment, mesh: str, *, devices: int, batch: int, length: int, kind: str = "TPU v5"
) -> Account:
    """The bytes of a training step of `batch` rows of `length` tokens.

    Args:
        mesh: sizes of axes, as in `parse_mesh`.
        devices: how many there are.
        kind: of the devices, for the strategy where a mixer's backend leaves the choice.

    Raises:
        BadInput: the mesh does not fit the devices.
    """
    sizes = parse_mesh(mesh, devices)
    experiment = at(experiment, mesh, devices=devices, batch=batch, length=length)
    model = experiment.model
    rows, seq, tensor = sizes["data"] * sizes["fsdp"], sequence_devices(sizes), sizes["tensor"]
    shards, e = rows * seq, jnp.dtype(model.dtype).itemsize
    everywhere = lambda chip: Bytes(int(chip), int(chip) * devices)

    state = sharded_state(experiment, abstract_mesh(sizes))
    parameters = _of_leaves(jax.tree.leaves(state.params), devices)
    keeps = kept(experiment, batch, length)
    stream = batch * length * model.width * e / shards
    blocks = _blocks(experiment, batch, length)
    layer = max(keeps.tokens / shards + count / tensor * (e + 4) + 2 * stream for keeps, count in blocks)
    layer += _held_keys(model, sizes, batch, length, cost.device(kind))
    table = model.vocab * model.width / tensor
    logits = max(1, batch // rows) * min(experiment.train.loss_chunk, length // seq) * model.vocab / tensor
    return Account(
        parameters=parameters,
        gradients=parameters,
        optimizer=_of_leaves(jax.tree.leaves(state.opt_state), devices),
        batch=everywhere(5 * 4 * batch * length / shards),
        kept=everywhere(keeps.tokens / shards + keeps.others / shards),
        loss=everywhere(table * (e + 4) + logits * (8 + e)),
        layer=everywhere(layer),
        table=everywhere(table * (e + 4)),
        host=everywhere(keeps.host / shards),
    )


def abstract_mesh(sizes: dict[str, int]) -> AbstractMesh:
    """A mesh of no devices at all."""
    return AbstractMesh(tuple(sizes[axis] for axis in AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _of_leaves(leaves: Sequence[Any], devices: int) -> Bytes:
    chip = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
    return Bytes(chip, chip * devices)


# What is kept -------------------------------------------------------------------------------------------


class Kept(NamedTuple):
    """Bytes that grow with the length, those that do not, and those that wait in the host's memory meanwhile."""

    tokens: int
    others: int
    host: int


def kept(experiment: Experiment, batch: int, length: int) -> Kept:
    """What the backward pass keeps of the forward pass over the whole batch, parameters aside.

    Traced at two lengths: what is twice as large at twice the length belongs to tokens.
    """
    once, twice = (_residuals(experiment, batch, n * length) for n in (1, 2))
    here = [(small.size, small.size != large.size) for small, large in zip(once, twice, strict=True) if not small.host]
    tokens = sum(size for size, grows in here if grows)
    return Kept(tokens, sum(size for size, _ in here) - tokens, sum(array.size for array in once if array.host))


class _Residual(NamedTuple):
    size: int
    host: bool


def _residuals(experiment: Experiment, batch: int, length: int) -> list[_Residual]:
    """Each array between the passes that is no argument of the loss."""
    model, recipe = experiment.model, experiment.train
    loss = next_token_loss(model, z_loss=recipe.z_loss, chunk=recipe.loss_chunk, mtp_weight=recipe.mtp_weight)
    shape = lambda dtype: jax.ShapeDtypeStruct((batch, length), dtype)
    rows = Batch(*(shape(jnp.int32) for _ in range(4)), shape(jnp.float32))
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))

    def between(params: Any, rows: Batch) -> list:
        _, backward, _ = jax.vjp(lambda params: loss(params, rows), params, has_aux=True)
        return jax.tree.leaves(backward)

    jaxpr = jax.make_jaxpr(between)(params, rows).jaxpr
    arguments = {id(var) for var in jaxpr.invars}
    made = lambda var: not isinstance(var, Literal) and id(var) not in arguments
    found = {id(var): var.aval for var in jaxpr.outvars if made(var)}
    size = lambda aval: math.prod(aval.shape) * aval.dtype.itemsize
    away = lambda aval: "host" in str(getattr(aval, "memory_space", "")).lower()
    return [_Residual(size(aval), away(aval)) for aval in found.values()]


def _blocks(experiment: Experiment, batch: int, length: int) -> list[tuple[Kept, int]]:
    """Of each different block: what it keeps, nothing computed again, as it is while it goes backward; parameters."""
    found = []
    for mixer, mlp in dict.fromkeys(experiment.model.blocks):
        alone = experiment.model.clone(before=(), after=(), pattern=(Layer(mixer, mlp),), mtp=0, remat="none")
        once, twice = (dataclasses.replace(experiment, model=alone.clone(depth=n)) for n in (1, 2))
        one, two = (kept(models, batch, length) for models in (once, twice))
        keeps = Kept(two.tokens - one.tokens, two.others - one.others, 0)
        found.append((keeps, count_params(twice.model) - count_params(once.model)))
    return found


def _held_keys(model: LM, sizes: Mapping[str, int], batch: int, length: int, device: cost.Device) -> float:
    """The most that a layer's strategy holds of others' keys and of gradients for them."""
    ring, inner = (sizes[axis] for axis in SEQUENCE)
    held = [0.0]
    for mixer in {mixer for mixer, _ in model.blocks}:
        shape = attention_shape(mixer, model, sizes, batch, length)
        if shape is not None and ring * inner > 1:
            found = cost.costs(shape, ring=ring, ulysses=inner, device=device)
            held.append(found[strategy_of(mixer, shape, sizes, device)].held)
    return max(held)


# States -------------------------------------------------------------------------------------------------


class Cache(NamedTuple):
    """Bytes of what is remembered while generating: numbers, and the positions and segments beside them."""

    values: int
    places: int


def cache(model: LM, *, batch: int, length: int, dtype: Any = None, max_chunk: int = 1) -> Cache:
    """The states of all layers for `batch` rows of `length` tokens; exact, by `eval_shape`."""
    state = jax.eval_shape(lambda: model.init_state(batch, length, max_chunk=max_chunk, dtype=dtype))
    size = lambda leaf: math.prod(leaf.shape) * leaf.dtype.itemsize
    leaves = jax.tree.leaves(state)
    values = sum(size(leaf) for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating))
    return Cache(values, sum(map(size, leaves)) - values)
