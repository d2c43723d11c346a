"""Eight simulated CPU devices, and every jaxtyping annotation of the library executed."""

import os

# Eight devices share the machine's cores: a collective may wait long for its last participant on a busy one.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_cpu_collective_call_terminate_timeout_seconds=600",
    ]
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")

import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_cpu_enable_async_dispatch", False)
install_import_hook(["jaxlong", "pallas_kernels"], "typecheck.checked")


@pytest.fixture(scope="module")
def compile_fast():
    """For modules of many small programs, each run once: compiling them is what takes the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
