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


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Tests that share compiled programs run in one worker: those of a file, and the laws of one mixer."""
    laws = [item for item in items if item.path.stem == "test_mixer_laws"]
    mixer = lambda item: item.callspec.params.get("name", "") if hasattr(item, "callspec") else ""
    for item in items:
        group = f"{item.path.stem}-{mixer(item)}" if item.path.stem == "test_mixer_laws" else item.path.stem
        item.add_marker(pytest.mark.xdist_group(group))
    places = [i for i, item in enumerate(items) if item.path.stem == "test_mixer_laws"]
    for place, item in zip(places, sorted(laws, key=mixer), strict=True):
        items[place] = item


@pytest.fixture(autouse=True)
def forget_programs(request):
    """Drops compiled programs where another group of tests begins: a process can hold only so many."""
    group = next(request.node.iter_markers("xdist_group")).args[0]
    if group != _group[0]:
        jax.clear_caches()
    _group[0] = group


_group = [""]


@pytest.fixture(scope="module")
def compile_fast():
    """For modules of many small programs, each run once: compiling them is what takes the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
