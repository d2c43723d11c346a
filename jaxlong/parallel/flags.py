"""Compiler options that let transfers pass behind computation, and a compile that survives unknown ones."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping

import jax
from jax.stages import Compiled, Lowered

_FLAGS: Mapping[str, Mapping[str, str]] = {
    "tpu": {
        "xla_tpu_enable_latency_hiding_scheduler": "true",
        "xla_enable_async_all_gather": "true",
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    },
    "gpu": {"xla_gpu_enable_latency_hiding_scheduler": "true"},
}

_log = logging.getLogger(__name__)


def recommended_flags(platform: str) -> dict[str, str]:
    """Compiler options by platform, for `compile_with` or `jax.jit(f, compiler_options=...)`; none for others.

    A ring needs none on TPU, if its chips follow each other from neighbour to neighbour, as `make_mesh` lays them:
    the options start the gathers of sharded weights early. On GPUs the ring's transfers need the scheduler.
    """
    return dict(_FLAGS.get({"cuda": "gpu", "rocm": "gpu"}.get(platform, platform), {}))


def compile_with(lowered: Lowered, options: Mapping[str, str]) -> Compiled:
    """`lowered.compile` with those options that the compiler knows; a warning names each of the others."""
    options = dict(options)
    while True:
        try:
            return lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            unknown = re.search(r"No such compile option: '(\w+)'", str(error))
            if unknown is None or unknown[1] not in options:
                raise
            _log.warning("%s: no such compiler option; left out", unknown[1])
            del options[unknown[1]]
