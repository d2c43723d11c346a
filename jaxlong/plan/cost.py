"""Seconds of a training step by a model of a few lines: flops, bytes on the network, what hides behind what.

    flops       6 a parameter in use and 3 times what mixers add, a token (`jaxlong.run.flops_per_token`); with remat a
                forward pass more, less attention where its output is kept. MFU counts the former alone
    products    flops of parameters / (`PRODUCTS` of the chip's peak)
    attention   by `jaxlong.parallel.cost`, a layer after another; with remat="full" its forward pass twice
    weights     (n - 1)/n of each layer's, gathered in e bytes forward, and again backward with remat; gradients
                reduce-scattered, in 4 bytes; over a torus in both directions of one link at a time
    tensor      4 all-reduces of the residual stream a layer, twice as many with remat

A ring's transfers hide behind its attention, hop by hop; an exchange (Ulysses) and a gather of keys do not; weights do
not hide at all, as the compiler schedules them today. Nothing is counted for the optimizer, norms, or a slow host. It
is a prediction: no figure of it was measured on the hardware.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxlong.config import Experiment
from jaxlong.core.types import BadInput
from jaxlong.model import LM, init_params
from jaxlong.parallel import cost
from jaxlong.parallel.manual import SEQUENCE, sequence_devices
from jaxlong.parallel.mesh import parse_mesh
from jaxlong.plan.exchange import at, attention_shape, strategy_of
from jaxlong.run import count_params, flops_per_token
from jaxlong.train.throughput import peak_flops

PRODUCTS = 0.65
"""Share of the peak that large matrix products reach; attention's share is `jaxlong.parallel.cost`'s."""

KINDS: Mapping[str, str] = {
    # Peak bfloat16 FLOP/s: jaxlong.train.throughput. Links: jaxlong.parallel.cost, a tenth below what the makers print
    # for a direction: docs.cloud.google.com/tpu/docs/v5e has 400 GB/s a chip over 4 links both ways, /v5p 1200 over 6.
    "v4": "TPU v4",
    "v5e": "TPU v5 lite",
    "v5p": "TPU v5",
    "v6e": "TPU v6 lite",
    "tpu7x": "TPU7x",
    "h100": "NVIDIA H100",
    "h200": "NVIDIA H200",
}
"""`device_kind` by the name of a family."""


@dataclass(frozen=True)
class Step:
    """A training step of all devices together.

    Fields:
        flops: of the model, forward and backward.    hardware_flops: with what is computed again.
        sent: bytes that a device sends, by what for.    seconds: by the same, and "products".
    """

    flops: float
    hardware_flops: float
    sent: dict[str, float]
    seconds: dict[str, float]
    mfu: float

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return sum(self.seconds.values())


def step(experiment: Experiment, kind: str, *, mesh: str, devices: int, batch: int, length: int) -> Step:
    """What a training step of `batch` rows of `length` tokens costs on devices of a `device_kind`.

    Raises:
        BadInput: nothing is known of such devices, or the mesh does not fit them.
    """
    peak, sizes = peak_flops(kind), parse_mesh(mesh, devices)
    model = at(experiment, mesh, devices=devices, batch=batch, length=length).model
    if peak is None:
        raise BadInput("device", kind, "its peak is not known", f"one of {', '.join(KINDS.values())}")
    device = cost.device(kind)
    tokens = batch * length
    flops = tokens * flops_per_token(model, length)
    mixing = 3 * tokens * sum(mixer.mixing_flops(length) for mixer, _ in model.blocks if hasattr(mixer, "mixing_flops"))
    again = 0.0 if model.remat == "none" else 1 / 3
    attends_again = again if model.remat in ("full", "dots") or "attend_out" not in _kept(model.remat) else 0.0
    products = (flops - mixing) * (1 + again)

    keys = _attention(model, sizes, batch, length, device, attends_again)
    others = max(0.0, mixing * (1 + attends_again) - keys["flops"] * devices)  # recurrences, and the like
    gathered = _weights(model, sizes, again > 0)
    stream = batch * length / (devices // sizes["tensor"]) * model.width * jnp.dtype(model.dtype).itemsize
    reduced = 2 * (1 - 1 / sizes["tensor"]) * stream * model.depth * (4 + 4 * (again > 0))
    link = device.link * (2 if device.torus else 1)
    seconds = {
        "products": products / devices / (PRODUCTS * peak) + others / devices / device.flops,
        "attention": keys["seconds"],
        "weights": gathered / link,
        "tensor": reduced / link,
    }
    total = sum(seconds.values())
    sent = {"attention": keys["sent"], "weights": gathered, "tensor": reduced}
    return Step(flops, products + mixing * (1 + attends_again), sent, seconds, flops / (total * devices * peak))


def _kept(remat: str) -> str:
    return "attend_out" if remat == "attn_out" else remat


def _attention(
    model: LM, sizes: Mapping[str, int], batch: int, length: int, device: cost.Device, again: float
) -> dict[str, float]:
    """Seconds, bytes sent and flops of one device in all layers that attend, whose forward pass runs `again`."""
    ring, inner = (sizes[axis] for axis in SEQUENCE)
    total = {"seconds": 0.0, "sent": 0.0, "flops": 0.0}
    for mixer, _ in model.blocks:
        shape = attention_shape(mixer, model, sizes, batch, length)
        if shape is None:
            continue
        if sequence_devices(sizes) == 1:
            flops = cost.costs(shape, ring=1, device=device)["all_gather"].flops
            found = cost.Cost(0.0, flops, 0.0, flops / device.flops)
        else:
            found = cost.costs(shape, ring=ring, ulysses=inner, device=device)[strategy_of(mixer, shape, sizes, device)]
        share = 1 + (again > 0) / 3.5  # a forward pass is 1 of 3.5
        total["seconds"] += found.seconds * share
        total["sent"] += found.sent * share
        total["flops"] += found.flops * share
    return total


def _weights(model: LM, sizes: Mapping[str, int], again: bool) -> float:
    """Bytes of parameters and gradients that a device sends, along the axes that split tokens."""
    parts = sizes["fsdp"] * sequence_devices(sizes)
    copies = sizes["data"]
    e = jnp.dtype(model.dtype).itemsize
    share = lambda n: (n - 1) / n
    count = count_params(model) / sizes["tensor"] / sizes["expert"]
    ends = sum(leaf.size for leaf in _ends(model)) / sizes["tensor"]
    gathered = share(parts) * e * ((count - ends) * (2 if again else 1) + ends)
    return gathered + share(parts) * 4 * count + 2 * share(copies) * 4 * count / parts


def _ends(model: LM) -> list:
    """Embedding and head, which are used once."""
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    return [params[name] for name in ("embed", "head") if name in params]
