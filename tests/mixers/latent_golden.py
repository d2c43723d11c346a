"""Reading the golden files of latent attention."""

from __future__ import annotations

import json
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxlong.core.position import NoPE, Rope, Yarn
from jaxlong.mixers import MLA


def latent_case(golden, case: str, mixer: type[MLA]) -> tuple[Callable, MLA, dict[str, jax.Array]]:
    """Of a case of transformers: its arrays by name, the mixer, and the parameters."""
    get = lambda name: jnp.asarray(golden[f"{case}/{name}"])
    said, start = json.loads(str(golden[f"{case}/fields"])), f"{case}/p/"
    names = [name.removeprefix(start) for name in golden.files if name.startswith(start)]
    params = {name: get(f"p/{name}") for name in names}
    return get, mixer(**said["fields"], position=position_of(said["rope"])), params


def position_of(rope: dict | None) -> Rope | NoPE:
    """The position scheme of a golden case."""
    if rope is None:
        return NoPE()
    if rope["yarn"] is None:
        return Rope(base=rope["base"], interleaved=True)
    yarn = dict(rope["yarn"])
    scaling = Yarn(original=yarn.pop("original_max_position_embeddings"), **yarn)
    return Rope(base=rope["base"], scaling=scaling, interleaved=True)


def near(got, want, what: str):
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max(), err_msg=what)


def made(mixer: MLA, length: int, dtype: str = "float32") -> tuple[dict[str, jax.Array], jax.Array, jax.Array]:
    """Parameters, x [2, length, 12] and its positions."""
    x = jax.random.normal(jax.random.key(0), (2, length, 12), dtype)
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (2, length))
    init = jax.jit(lambda x: nn.unbox(mixer.init(jax.random.key(1), x, positions=positions))["params"])
    return init(x), x, positions
