"""Eight simulated CPU devices, and every jaxtyping annotation of the library executed."""

import gc
import os
from pathlib import Path

# Eight devices share the machine's cores: a collective may wait long for its last participant on a busy one.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_cpu_collective_call_terminate_timeout_seconds=600",
    ]
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most programs are small and run once: compiling them is what takes the time
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

# What one worker, process or run of the tests has compiled, the others read: a bound on its size makes that safe
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".pytest_cache" / "programs"))
os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(2 * 2**30))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_cpu_enable_async_dispatch", False)
install_import_hook(["jaxlong", "pallas_kernels"], "typecheck.checked")
gc.set_threshold(100_000, 20, 50)  # traced programs are millions of objects that stay
MAPS = Path("/proc/self/maps")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """The first case of a `thorough` test is a quick one. Tests that share compiled programs run in one worker."""
    seen = set()
    for item in items:
        if item.get_closest_marker("thorough"):
            function = (item.path, item.originalname)
            if function in seen:
                item.add_marker(pytest.mark.slow)
            seen.add(function)
    laws = [item for item in items if item.path.stem == "test_mixer_laws"]
    mixer = lambda item: item.callspec.params.get("name", "") if hasattr(item, "callspec") else ""
    for item in items:
        group = f"{item.path.stem}-{mixer(item)}" if item.path.stem == "test_mixer_laws" else item.path.stem
        item.add_marker(pytest.mark.xdist_group(group))
    places = [i for i, item in enumerate(items) if item.path.stem == "test_mixer_laws"]
    for place, item in zip(places, sorted(laws, key=mixer), strict=True):
        items[place] = item


def pytest_runtest_teardown(item, nextitem):
    """Drops compiled programs before they are too many: each takes a few of the memory maps that Linux grants."""
    _tests.append(item.nodeid)
    if len(_tests) % 16 == 0 and MAPS.exists() and MAPS.read_bytes().count(b"\n") > 12_000:
        jax.clear_caches()
        gc.collect()


_tests = []


@pytest.fixture
def compile_well():
    """For what depends on how well programs are compiled: the memory that they need."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
