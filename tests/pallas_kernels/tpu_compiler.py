"""Programs compiled for TPUs that are not here."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlong.parallel.mesh import make_mesh

SYSTEMS = ["v5e:1x1", "v5p:2x2x1", "v6e:1x1"]


def compiled_gradient(system, op, shapes, mesh="data=1", spec=None):
    """The gradients of all arguments of `op(*shapes)`, for as many chips of a TPU system as the mesh has.

    It stays out of the cache of programs: there is no device to load it from there.
    """
    pytest.importorskip("libtpu")
    from jaxlong.plan import topology

    mesh = make_mesh(mesh, topology.described(topology.parse(system))[: 1 if mesh == "data=1" else None])
    given = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec or P())) for x in shapes]
    loss = lambda *x: (op(*x)[0].astype(jnp.float32) ** 2).sum()
    least = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)
    try:
        with jax.set_mesh(mesh):
            return jax.jit(jax.grad(loss, range(len(shapes)))).lower(*given).compile()
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", least)


def kernel_calls(program) -> int:
    """Calls of Pallas kernels in a compiled program."""
    return program.as_text().count('custom_call_target="tpu_custom_call"')
