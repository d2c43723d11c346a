"""Alternating timed runs, and what stands beside every figure."""

from __future__ import annotations

import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def environment() -> dict[str, str]:
    import jax

    device = jax.devices()[0]
    return {
        "device": f"{device.platform} {device.device_kind}",
        "jax": jax.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def write(out: Path, name: str, results: Mapping[str, Any], text: str) -> None:
    """Write name.json, the figures, and name.md, a view of them, with the environment in both."""
    facts = environment()
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps({"environment": facts, **results}, indent=1) + "\n")
    (out / f"{name}.md").write_text(f"{', '.join(f'{k} {v}' for k, v in facts.items())}\n\n{text}")


def medians(programs: Mapping[Any, Callable[[], Any]], repeats: int, seconds: float = math.inf) -> dict[Any, float]:
    """Milliseconds of each program: the median of `repeats` runs, which take turns; one more of each goes first.

    A program has no further turn once its runs have taken so many seconds; of one that needs more, the first counts.
    """
    import jax

    times: dict[Any, list[float]] = {name: [] for name in programs}
    for _ in range(repeats + 1):
        for name, run in programs.items():
            if sum(times[name]) < 1000 * seconds:
                start = time.perf_counter()
                jax.block_until_ready(run())
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(found[1:] or found) for name, found in times.items()}


def amortised(programs: Mapping[Any, Callable[[], Any]], repeats: int, seconds: float = 0.05) -> dict[Any, float]:
    """Milliseconds of each program on a device that runs behind its host: `seconds` of launches at a time, in turns.

    The median of `repeats` turns; one more of each goes first.
    """
    import jax

    launches = {}
    for name, run in programs.items():
        jax.block_until_ready(run())
        start = time.perf_counter()
        jax.block_until_ready(run())
        launches[name] = max(3, round(seconds / (time.perf_counter() - start)))
    times: dict[Any, list[float]] = {name: [] for name in programs}
    for _ in range(repeats + 1):
        for name, run in programs.items():
            start = time.perf_counter()
            for _ in range(launches[name]):
                last = run()
            jax.block_until_ready(last)
            times[name].append(1000 * (time.perf_counter() - start) / launches[name])
    return {name: statistics.median(found[1:]) for name, found in times.items()}


def temporary(compiled: Any) -> float:
    """MiB of a compiled program's temporary buffers at once."""
    return compiled.memory_analysis().temp_size_in_bytes / 2**20
