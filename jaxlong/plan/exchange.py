"""An experiment at a size and on a mesh, and what its mixers exchange there, as attention's cost model takes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jaxlong.config import Experiment, resolved
from jaxlong.model import LM
from jaxlong.parallel import cost
from jaxlong.parallel.manual import SEQUENCE
from jaxlong.parallel.mesh import parse_mesh


def at(experiment: Experiment, mesh: str, *, devices: int, batch: int, length: int) -> Experiment:
    """The experiment with `batch` rows of `length` tokens, as it runs on another mesh of so many devices.

    Raises:
        BadInput: the mesh does not fit the devices.
    """
    data = dataclasses.replace(experiment.data, batch=batch, length=length)
    return resolved(dataclasses.replace(experiment, mesh=mesh, data=data), parse_mesh(mesh, devices))


def attention_shape(mixer: Any, model: LM, sizes: Mapping[str, int], batch: int, length: int) -> cost.Shape | None:
    """A layer's attention over the devices that share a row; None for a mixer that sends no keys round.

    Latent attention (a mixer with `kv_rank`) moves one latent of a token, which is key and value of all heads; a mask
    that reaches back less than the row counts as a row of that reach.
    """
    if not hasattr(mixer, "mask") or not hasattr(mixer, "heads"):
        return None
    rows, tensor = sizes["data"] * sizes["fsdp"], sizes["tensor"]
    reach = mixer.mask.reach()
    latent = hasattr(mixer, "kv_rank")
    dims = (
        {"head_dim": mixer.nope_dim + mixer.rope_dim, "key_dim": mixer.kv_rank + mixer.rope_dim, "value_dim": 0}
        if latent
        else {"head_dim": mixer.head_dim}
    )
    backend = getattr(mixer, "backend", None)
    return cost.Shape(
        batch=max(1, batch // rows),
        length=length if reach is None else min(length, reach),
        heads=max(1, mixer.heads // tensor),
        kv_heads=1 if latent else max(1, mixer.kv_heads // tensor),
        itemsize=jnp.dtype(model.dtype).itemsize,
        causal=mixer.mask.ahead() == 0,
        layout=getattr(backend, "layout", "contiguous"),
        **dims,
    )


def strategy_of(mixer: Any, shape: cost.Shape, sizes: Mapping[str, int], device: cost.Device) -> str:
    """The strategy that a mixer's backend names, or the quickest one where it leaves the choice."""
    ring, inner = (sizes[axis] for axis in SEQUENCE)
    name = getattr(getattr(mixer, "backend", None), "sequence", "auto")
    if name in ("auto", "none"):
        return cost.quickest(shape, device, ring=ring, ulysses=inner)
    if name == "usp" and min(ring, inner) == 1:
        return "ring" if inner == 1 else "ulysses"
    return name
