"""Reading the golden files of latent attention."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np

from jaxlong.core.position import NoPE, Rope, Yarn
from jaxlong.mixers import MLA


def latent_case(golden, case: str, mixer: type[MLA]) -> tuple[Callable, MLA, dict[str, np.ndarray]]:
    """Of a case of transformers: its arrays by name, the mixer, and the parameters."""
    get = lambda name: golden[f"{case}/{name}"]
    said, start = json.loads(str(get("fields"))), f"{case}/p/"
    params = {name.removeprefix(start): golden[name] for name in golden.files if name.startswith(start)}
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
