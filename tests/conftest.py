"""Eight simulated CPU devices, and every jaxtyping annotation of the library executed."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")

import jax
import pytest
from jaxtyping import install_import_hook

install_import_hook(["jaxlong", "pallas_kernels"], "typecheck.checked")


@pytest.fixture(scope="module")
def compile_fast():
    """For modules of many small programs, each run once: compiling them is what takes the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
