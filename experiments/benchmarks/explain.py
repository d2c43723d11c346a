"""Which implementation of each op a model runs, by kind of device, and why the ones before it do not: nothing runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import AbstractDevice

from jaxlong.model import LM

DEVICES: Mapping[str, AbstractDevice] = {
    "cpu": AbstractDevice(device_kind="cpu", num_cores=None, platform="cpu"),
    "gpu": AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu"),
    "tpu": AbstractDevice(device_kind="TPU v5", num_cores=1, platform="tpu"),
}


def run(model: LM, lengths: Sequence[int]) -> str:
    """Of rows of each length, forward, and of a token behind each: a block of lines for every kind of device."""
    lines = []
    for length in lengths:
        for title, tokens, held in ((f"a row of {length} tokens", length, 0), (f"a token after {length}", 1, length)):
            for platform, device in DEVICES.items():
                lines.append(f"{title}, {platform} {device.device_kind}".removesuffix(" cpu"))
                found = choices(model, tokens, held, device)
                for (layer, op, name), reasons in found.items():
                    lines += [f"  {layer} {op}: {name}", *(f"    {reason}" for reason in reasons)]
                lines += [] if found else ["  every op has one implementation"]
    return "\n".join(lines) + "\n"


def choices(model: LM, tokens: int, held: int, device: AbstractDevice) -> dict[tuple[str, str, str], tuple[str, ...]]:
    """(mixer, op, implementation) -> why those before it refused, of one device.

    Args:
        held: tokens that came before, in a state; 0 is no state.
    """
    import flax.linen as nn
    import jax
    import jax.numpy as jnp

    from jaxlong.mixers import MIXERS
    from jaxlong.model import init_params
    from jaxlong.ops.attend import telling
    from jaxlong.parallel.mesh import AXES

    layers, found = ["model"], {}

    def named(call: Any, arguments: tuple, options: dict, context: Any) -> Any:
        if not isinstance(context.module, tuple(MIXERS.values())):
            return call(*arguments, **options)
        layers.append(type(context.module).__name__)
        try:
            return call(*arguments, **options)
        finally:
            layers.pop()

    def note(op: str, name: str, reasons: tuple[str, ...]) -> None:
        found[layers[-1], op, name] = reasons

    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    state = jax.eval_shape(lambda: model.init_state(1, held + tokens, max_chunk=tokens)) if held else None
    row = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    types = (jax.sharding.AxisType.Auto,) * len(AXES)
    mesh = jax.sharding.AbstractMesh((1,) * len(AXES), AXES, types, abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh), telling(note), nn.intercept_methods(named):
        jax.eval_shape(lambda params, row, state: model.apply({"params": params}, row, state=state), params, row, state)
    return found
