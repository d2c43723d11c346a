"""Every mixer of the registry at one size: times, memory, states, and what chunks gain over single tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from experiments.benchmarks.recurrences import rivals
from experiments.benchmarks.timing import medians, temporary, write
from jaxlong.core.types import BadInput

WIDTH = 256
QUADRATIC_LIMIT = 4096
"""Longest length at which mixers that are not linear in time are run."""
STATES = {"4K": 4096, "128K": 131072, "1M": 1048576}
HEADS = {"heads": 4, "head_dim": 64}
ATTENTION = HEADS | {"kv_heads": 4}
LATENT = {"heads": 4, "kv_rank": 128, "nope_dim": 64, "rope_dim": 32, "value_dim": 64, "q_rank": None}
EXPANDING = {"heads": 8, "head_dim": 64, "state_dim": 64}
SIZES: Mapping[str, Mapping[str, Any]] = {
    "gqa": ATTENTION,
    "mla": LATENT,
    "dsa": LATENT | {"top_k": 512, "index_heads": 4, "index_dim": 32},
    "nsa": ATTENTION | {"kv_heads": 1, "hidden": 64},
    "moba": ATTENTION | {"block": 256},
    "routing": HEADS | {"local": 2},
    "longnet": ATTENTION,
    "longformer": ATTENTION,
    "infini": ATTENTION | {"segment": 512},
    "hierarchical": ATTENTION,
    "log_linear": {"heads": 4, "key_dim": 64, "value_dim": 64},
    "linear": HEADS,
    "gla": HEADS,
    "mamba": {},
    "mamba2": EXPANDING,
    "mamba3": EXPANDING,
    "delta_net": HEADS,
    "gated_delta_net": HEADS,
    "kda": HEADS,
    "rwkv4": {"hidden": WIDTH},
    "rwkv6": HEADS,
    "rwkv7": HEADS | {"value_residual": False},
    "rwkv_channel_mix": {"hidden": 4 * WIDTH},
    "ttt_linear": HEADS,
    "ttt_mlp": HEADS,
    "in_place_ttt": {"width": WIDTH, "hidden": 4 * WIDTH},
    "short_conv": {},
}
"""Fields of each mixer at width 256 with heads of 64 (expanding ones: twice the width); all others are defaults."""
LINEAR = frozenset(
    "linear gla mamba mamba2 mamba3 delta_net gated_delta_net kda rwkv4 rwkv6 rwkv7 rwkv_channel_mix ttt_linear"
    " ttt_mlp in_place_ttt short_conv infini longnet longformer".split()
)
"""Mixers whose time is linear in the length."""


def run(out: Path, lengths: Sequence[int], names: Sequence[str], repeats: int) -> str:
    """Measure, write mixers.json and mixers.md, and return the tables."""
    from jaxlong.mixers import MIXERS

    unknown = sorted(set(names) - set(MIXERS))
    if unknown:
        raise BadInput("mixers", ",".join(unknown), "no such mixer", f"some of {', '.join(MIXERS)}")
    names = list(names) or list(MIXERS)
    rows = [measure(name, lengths, repeats) for name in names]
    against = [compare(name, rival, lengths[0], repeats) for name, rival in rivals().items() if name in names]
    text = tables(rows, against, lengths)
    write(out, "mixers", {"width": WIDTH, "rows": rows, "tokens": against}, text)
    return text


def sized(name: str) -> Any:
    """The mixer of that name at the stated size; as its first example where no size is stated."""
    from jaxlong.mixers import MIXERS

    return MIXERS[name](**SIZES[name]) if name in SIZES else next(iter(MIXERS[name].examples().values()))


def measure(name: str, lengths: Sequence[int], repeats: int) -> dict[str, Any]:
    """All figures of one mixer, in float32: times by length, decoding, states, temporary memory."""
    import jax

    mixer = sized(name)
    width = getattr(mixer, "width", WIDTH) if name == "in_place_ttt" else WIDTH
    params = init(mixer, width)
    sizes = {"width": width, "max_chunk": 1, "itemsize": 4}
    row: dict[str, Any] = {"mixer": name, "module": repr_of(mixer), "linear": name in LINEAR}
    row["parameters"] = sum(leaf.size for leaf in jax.tree.leaves(params))
    row["state_bytes"] = {label: mixer.state_bytes(1, n, **sizes) for label, n in STATES.items()}
    programs: dict[Any, Any] = {}
    for length in lengths:
        if length > QUADRATIC_LIMIT and not row["linear"]:
            continue
        for kind, fn in (("forward", forward), ("both", both)):
            arguments = (params, inputs(length, width))
            compiled = jax.jit(partial(fn, mixer)).lower(*arguments).compile()
            row[f"{kind}_MiB_{length}"] = temporary(compiled)
            programs[f"{kind}_ms_{length}"] = partial(compiled, *arguments)
    programs["decode_ms"] = decoding(mixer, params, width, lengths[0])
    return row | medians(programs, repeats) | {"repeats": repeats}
