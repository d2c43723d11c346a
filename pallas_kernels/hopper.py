"""Where kernels for Hopper GPUs run."""

from __future__ import annotations

from typing import Any

import jax

from pallas_kernels import machine

OLDEST_JAX = (0, 11, 2)
"""The first release whose Mosaic GPU has all that the kernels use."""

PLATFORMS = ("gpu", "cuda")
"""What `machine.platform` calls them."""

NAMES = ("H100", "H200", "GH200")
"""In the names of kinds of devices."""


def told(estimate: Any) -> dict[str, Any]:
    """A `pl.CostEstimate` as `plgpu.kernel` takes it, from jax 0.12 on."""
    return {"cost_estimate": estimate} if jax.__version_info__ >= (0, 12) else {}


def refusal() -> str | None:
    """Why this machine and release of JAX do not run the kernels; None if they do."""
    if jax.__version_info__ < OLDEST_JAX:
        return f"jax {jax.__version__} is older than {'.'.join(map(str, OLDEST_JAX))}"
    if (platform := machine.platform()) not in PLATFORMS:
        return f"the default device is no Hopper GPU but {platform}"
    if any(name in machine.kind() for name in NAMES):  # of devices that are only described, the name is all there is
        return None
    capability = getattr(jax.local_devices(backend="gpu")[0], "compute_capability", "unknown")
    return None if capability == "9.0" else f"the GPU has compute capability {capability}, not Hopper's 9.0"


def varying(like: Any, results: Any) -> Any:
    """A kernel's results, whose types tell nothing of manual mesh axes, with the axes that `like` varies over.

    Adding a zero made from it does that on every version of JAX.
    """
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return results
    zero = jax.lax.full_like(like, 0, shape=())
    return jax.tree.map(lambda x: x + zero.astype(x.dtype), results)
