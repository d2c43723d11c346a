"""A small version of a model on simulated devices, beside the same on one: errors of the loss and of gradients."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from jaxlong.config import Experiment, resolved
from jaxlong.core.types import BadInput, Batch
from jaxlong.model import LM, Layer
from jaxlong.parallel.layout import parts
from jaxlong.parallel.manual import sequence_devices
from jaxlong.parallel.mesh import parse_mesh

TOKENS = 16
"""Tokens of a row on each device, at most: a simulation of many devices shares few cores."""

SMALL: Mapping[str, int] = {
    "head_dim": 16,
    "value_dim": 16,
    "kv_rank": 32,
    "q_rank": 32,
    "nope_dim": 16,
    "rope_dim": 8,
    "hidden": 64,
    "experts": 8,
    "top_k": 2,
}
"""Largest sizes in the small version, by the name of a field."""


def devices_of(mesh: str) -> int:
    """Devices that a mesh without a -1 asks for.

    Raises:
        BadInput: there is a -1.
    """
    sizes = [part.partition("=")[2] for part in mesh.replace(" ", "").split(",")]
    if "-1" in sizes:
        raise BadInput("meshes", mesh, "of how many devices?", "sizes, or -1 with --topology")
    return math.prod(int(size) for size in sizes if size.isdigit())


def small(model: LM, sizes: Mapping[str, int]) -> LM:
    """The same model in all but size, in float32: pattern, masks, groups of heads, remat."""
    shrink = lambda layers: tuple(_small_layer(layer, sizes) for layer in layers)
    around = len(model.before) + len(model.after)
    return model.clone(
        vocab=min(model.vocab, 256 * sizes["tensor"]),
        width=64,
        depth=around + min(model.groups, 2) * len(model.pattern),
        pattern=shrink(model.pattern),
        before=shrink(model.before),
        after=shrink(model.after),
        mlp=_small_part(model.mlp, sizes),
        mlp_block=min(model.mlp_block, 8),
        dtype="float32",
    )


def _small_layer(layer: Any, sizes: Mapping[str, int]) -> Any:
    if isinstance(layer, Layer):
        return Layer(_small_part(layer.mixer, sizes), _small_part(layer.mlp, sizes))
    return _small_part(layer, sizes)


def _small_part(part: Any, sizes: Mapping[str, int]) -> Any:
    """A mixer or feed-forward layer with smaller numbers, or as it is if those do not go together."""
    if part is None:
        return None
    fields = {name: getattr(part, name, None) for name in ("heads", "kv_heads", *SMALL)}
    new = {name: min(value, SMALL[name]) for name, value in fields.items() if name in SMALL and isinstance(value, int)}
    heads, keys = fields["heads"], fields["kv_heads"]
    if isinstance(keys, int):
        new["kv_heads"] = 1 if keys == 1 else sizes["tensor"] * 2
        new["heads"] = new["kv_heads"] * min(heads // keys, 2 * sizes["tensor"] if keys == 1 else 2)
    elif isinstance(heads, int):
        new["heads"] = 2 * sizes["tensor"]
    try:
        return part.clone(**new)
    except BadInput:
        return part


def compare(experiment: Experiment, mesh: str, length: int) -> dict[str, Any]:
    """Errors against one device, relative to the largest value, and milliseconds of both; a row's part."""
    import jax

    from experiments.benchmarks.timing import medians
    from jaxlong.model import init_params
    from jaxlong.parallel.mesh import make_mesh, shard_batch
    from jaxlong.run import laid_out, param_shardings
    from jaxlong.train.grads import full, next_token_loss

    sizes = parse_mesh(mesh, jax.device_count())
    devices = sequence_devices(sizes)
    unit = parts(experiment.layout, devices)
    length = max(unit, min(length, TOKENS * devices) // unit * unit)
    model = resolved(dataclasses.replace(experiment, model=small(experiment.model, sizes)), sizes).model
    grad = jax.jit(full(next_token_loss(model, chunk=8)))
    params = jax.jit(lambda key: init_params(model, key))(jax.random.key(0))
    rows = sizes["data"] * sizes["fsdp"]
    text = _batch(model.vocab, rows, length)
    placed = make_mesh(mesh)
    with jax.set_mesh(placed):
        here = jax.device_put(params, param_shardings(model, placed))
        batch = shard_batch(laid_out(text, experiment.layout, sizes), placed)
        sharded = grad.lower(here, batch).compile()
        got = jax.device_get(sharded(here, batch))
    alone = grad.lower(params, text).compile()
    want = jax.device_get(alone(params, text))
    times = medians({"mesh": lambda: sharded(here, batch), "one": lambda: alone(params, text)}, 3)
    relative = lambda x, y: float(abs(x - y).max() / max(abs(y).max(), 1e-30))
    return {
        "status": "ok",
        "simulated": {
            "length": length,
            "batch": rows,
            "loss_error": relative(got[1]["loss"], want[1]["loss"]),
            "gradient_error": max(jax.tree.leaves(jax.tree.map(relative, got[0], want[0]))),
            "mesh_ms": times["mesh"],
            "one_ms": times["one"],
        },
    }


def _batch(vocab: int, rows: int, length: int) -> Batch:
    """Two documents a row, of random tokens."""
    import numpy as np

    random = np.random.default_rng(0)
    tokens = random.integers(0, vocab, (rows, length + 1)).astype(np.int32)
    cut = max(1, length * 3 // 5)
    places = np.arange(length)
    positions = np.where(places < cut, places, places - cut).astype(np.int32)
    segments = np.where(places < cut, 1, 2).astype(np.int32)
    whole = lambda x: np.broadcast_to(x, (rows, length)).copy()
    weights = np.where(places == cut - 1, 0.0, 1.0).astype(np.float32)
    return Batch(tokens[:, :-1], tokens[:, 1:].copy(), whole(positions), whole(segments), whole(weights))
