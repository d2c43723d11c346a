"""Every mixer of the registry at one size: times, memory, states, and what chunks gain over single tokens.

Figures are written as soon as a mixer has them, and kept: the same command goes on where it stopped, and tries again
what failed.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from experiments.benchmarks.recurrences import DIM, Rival, rivals
from experiments.benchmarks.recurrences import HEADS as HEADS_TIMED
from experiments.benchmarks.timing import environment, medians, temporary, write
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
    "mamba": {"inner": 2 * WIDTH},
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
SECONDS = 6.0
"""A program that has run for so long is not run again, though fewer times than `repeats`."""
DECODED = 64
"""Tokens of a decoding run, one at a time; their mean is what one costs."""


def run(out: Path, lengths: Sequence[int], names: Sequence[str], repeats: int) -> str:
    """Measure what mixers.json does not hold, write it and mixers.md, and return the tables."""
    from jaxlong.mixers import MIXERS

    unknown = sorted(set(names) - set(MIXERS))
    if unknown:
        raise BadInput("mixers", ",".join(unknown), "no such mixer", f"some of {', '.join(MIXERS)}")
    settings = {"width": WIDTH, "lengths": list(lengths), "repeats": repeats}
    rows, against = found(out, settings)
    tasks = [(rows, name, partial(measure, name, lengths, repeats)) for name in names or MIXERS]
    tasks += [
        (against, name, partial(compare, rival, lengths[0], repeats))
        for name, rival in rivals().items()
        if name in (names or MIXERS)
    ]
    for kept, name, figures in tasks:
        if "failed" in kept.get(name, {"failed": ""}):
            kept[name] = attempt(name, figures)
            results = [[held[n] for n in MIXERS if n in held] for held in (rows, against)]
            write(out, "mixers", {**settings, "rows": results[0], "tokens": results[1]}, tables(*results, lengths))
    return tables([rows[n] for n in MIXERS if n in rows], [against[n] for n in MIXERS if n in against], lengths)


def found(out: Path, settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The rows and the comparisons of an earlier run, by mixer.

    Raises:
        BadInput: they are of other settings, or of another machine.
    """
    path = out / "mixers.json"
    if not path.exists():
        return {}, {}
    results = json.loads(path.read_text())
    here, there = dict(settings, **environment()), dict(results, **results["environment"])
    for key in sorted(here.keys() - {"date"}):
        if there.get(key) != here[key]:
            raise BadInput("out", out, f"its mixers.json has {key} {there.get(key)}, not {here[key]}", "another folder")
    return tuple({row["mixer"]: row for row in results[key]} for key in ("rows", "tokens"))


def attempt(name: str, figures: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The figures of a mixer and the seconds that they took, or, as "failed", why there are none."""
    import jax

    started = time.monotonic()
    try:
        row = figures()
    except Exception as error:  # whatever it is: the other mixers have theirs
        row = {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
    jax.clear_caches()
    row = {"mixer": name, **row, "seconds": round(time.monotonic() - started, 1)}
    sys.stderr.write(f"{name}: {row.get('failed', 'measured')}, {row['seconds']:.0f} s\n")
    return row


def sized(name: str) -> Any:
    """The mixer of that name at the stated size; as its first example where no size is stated."""
    from jaxlong.mixers import MIXERS

    return MIXERS[name](**SIZES[name]) if name in SIZES else next(iter(MIXERS[name].examples().values()))


def measure(name: str, lengths: Sequence[int], repeats: int) -> dict[str, Any]:
    """All figures of one mixer in float32: times by length, decoding, states, temporary memory."""
    import jax

    from jaxlong.config import to_data

    mixer = sized(name)
    params = parameters(mixer)
    sizes = {"width": WIDTH, "max_chunk": 1, "itemsize": 4}
    programs: dict[Any, Any] = {}
    memory: dict[str, dict[str, float]] = {"forward_MiB": {}, "both_MiB": {}}
    for length in lengths:
        if length <= QUADRATIC_LIMIT or linear(mixer):
            for kind, fn in (("forward", forward), ("both", both)):
                arguments = (params, inputs(length))
                compiled = jax.jit(partial(fn, mixer)).lower(*arguments).compile()
                memory[f"{kind}_MiB"][str(length)] = temporary(compiled)
                programs[f"{kind}_ms", str(length)] = partial(compiled, *arguments)
    times: dict[str, dict[str, float]] = {"forward_ms": {}, "both_ms": {}}
    for (kind, length), ms in medians(programs, repeats, SECONDS).items():
        times[kind][length] = ms
    return {
        "module": to_data(mixer),
        "sized": name in SIZES,
        "linear": linear(mixer),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "state_bytes": {label: mixer.state_bytes(1, n, **sizes) for label, n in STATES.items()},
        "decode_ms": decoding(mixer, params, STATES["4K"], repeats),
        **times,
        **memory,
    }


def linear(mixer: Any) -> bool:
    """Whether a token costs about the same in rows of any length, by the mixer's own count of flops."""
    return mixer.mixing_flops(2**22) <= 1.5 * mixer.mixing_flops(2**18)


def parameters(mixer: Any) -> Any:
    import flax.linen as nn
    import jax
    import jax.numpy as jnp

    x = jnp.zeros((1, 1, WIDTH))
    return nn.unbox(mixer.init(jax.random.key(0), x, positions=jnp.zeros((1, 1), jnp.int32)))["params"]


def inputs(length: int) -> Any:
    import jax

    return jax.random.normal(jax.random.key(1), (1, length, WIDTH))


def forward(mixer: Any, params: Any, x: Any) -> Any:
    import jax.numpy as jnp

    positions = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
    return mixer.apply({"params": params}, x, positions=positions)[0]


def both(mixer: Any, params: Any, x: Any) -> Any:
    """Gradients of parameters and inputs."""
    import jax
    import jax.numpy as jnp

    return jax.grad(lambda p, x: jnp.square(forward(mixer, p, x)).sum(), (0, 1))(params, x)


def decoding(mixer: Any, params: Any, max_len: int, repeats: int) -> float:
    """Milliseconds a token of decoding one row with a state for `max_len` tokens."""
    import jax
    import jax.numpy as jnp

    def decode(params, x):
        def step(state, token):
            x, position = token
            y, state = mixer.apply({"params": params}, x[None, None], positions=position[None, None], state=state)
            return state, y[0, 0]

        state = mixer.init_state(1, max_len, width=WIDTH, max_chunk=1, dtype=x.dtype)
        return jax.lax.scan(step, state, (x[0], jnp.arange(DECODED, dtype=jnp.int32)))[1]

    arguments = (params, inputs(DECODED))
    compiled = jax.jit(decode).lower(*arguments).compile()
    return medians({"": partial(compiled, *arguments)}, repeats, SECONDS)[""] / DECODED


def compare(rival: Rival, length: int, repeats: int) -> dict[str, Any]:
    """The chunked form of a recurrence against a scan over its tokens, both differentiated by the compiler's rules."""
    import jax
    import jax.numpy as jnp

    arguments, programs = rival.inputs(length), {}
    for form, fn in (("tokens", rival.tokens), ("chunked", rival.chunked)):
        loss = lambda *xs, fn=fn: jnp.square(fn(*xs)).sum()
        for kind, run in (("forward", fn), ("both", jax.grad(loss, tuple(range(len(arguments)))))):
            programs[f"{form}_{kind}_ms"] = partial(jax.jit(run).lower(*arguments).compile(), *arguments)
    there, here = (programs[f"{form}_forward_ms"]() for form in ("tokens", "chunked"))
    error = float(jnp.abs(there - here).max() / jnp.abs(there).max())
    return {"length": length, "error": error} | medians(programs, repeats, SECONDS)


def tables(rows: Sequence[Mapping[str, Any]], against: Sequence[Mapping[str, Any]], lengths: Sequence[int]) -> str:
    """Times and memory, states, growth with length, chunks against tokens, and what failed."""
    from jaxlong.evals.report import markdown_table

    failed = [f"{row['mixer']} failed: {row['failed']}\n" for row in (*rows, *against) if "failed" in row]
    rows, against = ([row for row in part if "failed" not in row] for part in (rows, against))
    first = str(min(lengths))
    doubled = [(str(n), str(2 * n)) for n in lengths if 2 * n in lengths][-1:]
    star = lambda row: row["mixer"] if row["sized"] else f"{row['mixer']} (first example)"
    kinds = ("forward_ms", "both_ms", "forward_MiB", "both_MiB")
    figures = lambda row: [row[key].get(first, "") for key in kinds]
    times = [[star(r), r["parameters"], *figures(r), f"{r['decode_ms']:.3f}"] for r in rows]
    parts = [
        f"One layer of width {WIDTH}, one row, float32; times and temporary memory at {first} tokens, decoding with a"
        f" state for 4K.\n",
        markdown_table(
            ["mixer", "parameters", "forward ms", "fwd+bwd ms", "forward MiB", "fwd+bwd MiB", "decode ms a token"],
            times,
        ),
        "Bytes of state of one row after as many tokens.\n",
        markdown_table(["mixer", *STATES], [[star(r), *(f"{r['state_bytes'][n]:,}" for n in STATES)] for r in rows]),
    ]
    for short, long in doubled:
        grown = lambda r, key, short=short, long=long: f"{r[key][long] / r[key][short]:.2f}"
        told = [[star(r), grown(r, "forward_ms"), grown(r, "both_ms")] for r in rows if r["linear"]]
        parts += [
            f"Time at {long} tokens over time at {short}, of the mixers that are linear in time.\n",
            markdown_table(["mixer", "forward", "fwd+bwd"], told),
        ]
    if against:
        parts += [_against(against)]
    return "\n".join([*parts, *failed])


def _against(against: Sequence[Mapping[str, Any]]) -> str:
    from jaxlong.evals.report import markdown_table

    gain = lambda r, kind: f"{r[f'tokens_{kind}_ms'] / r[f'chunked_{kind}_ms']:.1f}x"
    told = []
    for r in against:
        times = [f"{r[f'{form}_{kind}_ms']:.1f}" for kind in ("forward", "both") for form in ("tokens", "chunked")]
        told.append([r["mixer"], *times[:2], gain(r, "forward"), *times[2:], gain(r, "both"), f"{r['error']:.0e}"])
    header = ["core of", "tokens, forward ms", "chunks", "gain", "tokens, fwd+bwd ms", "chunks", "gain", "difference"]
    return (
        f"Recurrence in chunks against a scan over tokens: {against[0]['length']} tokens, {HEADS_TIMED} heads, keys and"
        f" values of {DIM}.\n\n" + markdown_table(header, told)
    )
