"""How each mixer runs where devices share a row: the README's table, read off the programs themselves.

`python -m tests.parallel.test_support` prints it; that the programs are right is in `test_mixers_on_spans`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from jaxlong.core.types import BadInput
from jaxlong.mixers import MIXERS
from jaxlong.ops.attend import Backend
from jaxlong.parallel.layout import LAYOUTS
from jaxlong.parallel.mesh import make_mesh

README = (Path(__file__).parent.parent.parent / "README.md").read_text()
WIDTH, LENGTH = 12, 64


def trace(mixer: nn.Module, layout: str, sequence: str) -> str:
    """The program of a mixer for two rows on four devices."""
    x = jax.ShapeDtypeStruct((2, LENGTH, WIDTH), jnp.float32)
    at = jax.ShapeDtypeStruct((2, LENGTH), jnp.int32)
    placed = mixer.clone(backend=Backend(sequence=sequence, layout=layout))

    def run(x, at):
        params = mixer.init(jax.random.key(0), jnp.zeros((1, 3, WIDTH)), positions=jnp.zeros((1, 3), jnp.int32))
        return placed.apply(nn.unbox(params), x, positions=at, segment_ids=at, mutable=["losses"])

    with jax.set_mesh(make_mesh("seq=4", jax.devices()[:4])):
        return str(jax.make_jaxpr(run)(x, at))


def way(mixer: nn.Module, layout: str) -> str:
    """How a mixer's rows are shared by devices."""
    try:
        ring = trace(mixer, layout, "ring")
    except BadInput as error:
        return f"refused, {error.allowed}"
    if re.search(r"\bppermute\b", ring) and not re.search(r"\bppermute\b", trace(mixer, layout, "all_gather")):
        return "any strategy"
    if hasattr(type(mixer).__call__, "in_text_order"):
        return "by the compiler" if layout == "contiguous" else "in text order"
    assert "shard_map" in ring
    docs = (cls.__doc__ or "" for cls in type(mixer).__mro__)
    return "in turn" if any("hands its state on" in doc for doc in docs) else "summaries"


def table() -> str:
    rows = [f"| mixer | {' | '.join(LAYOUTS)} |", "|---|" + "---|" * len(LAYOUTS)]
    for cls in MIXERS.values():
        mixer = next(iter(cls.examples().values()))
        rows.append(f"| `{cls.__name__}` | {' | '.join(way(mixer, layout) for layout in LAYOUTS)} |")
    return "\n".join(rows)


def test_every_mixer_has_a_row():
    for cls in MIXERS.values():
        row = rf"\| `{cls.__name__}` \|.*\|.*\| (any strategy|refused, nearest: zigzag) \|"
        assert re.search(row, README), cls.__name__


@pytest.mark.slow
def test_the_table_is_what_programs_do():
    assert table() in README, f"the README's table is not\n\n{table()}"


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")
