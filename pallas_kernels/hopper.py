"""Where kernels for Hopper GPUs run."""

from __future__ import annotations

import jax

from pallas_kernels import machine

OLDEST_JAX = (0, 11, 2)
"""The first release whose Mosaic GPU has all that the kernels use."""


def refusal() -> str | None:
    """Why this machine and release of JAX do not run the kernels; None if they do."""
    if jax.__version_info__ < OLDEST_JAX:
        return f"jax {jax.__version__} is older than {'.'.join(map(str, OLDEST_JAX))}"
    if (platform := machine.platform()) not in ("gpu", "cuda"):
        return f"the default device is no Hopper GPU but {platform}"
    capability = getattr(jax.local_devices(backend="gpu")[0], "compute_capability", "unknown")
    return None if capability == "9.0" else f"the GPU has compute capability {capability}, not Hopper's 9.0"
