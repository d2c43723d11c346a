"""The ring as the TPU compiler schedules it: every transfer passes behind attention."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlong.core.mask import causal
from jaxlong.ops import Backend, attend
from jaxlong.parallel.flags import compile_with, recommended_flags
from jaxlong.parallel.mesh import make_mesh

pytestmark = pytest.mark.slow
pytest.importorskip("libtpu")
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
}
ATTENTION = {"while", "conditional"}
OPERATION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = .*? ([a-z][a-z\-]*)\(")


def passed_behind(text: str) -> list[tuple[str, set[str]]]:
    """Of a scheduled program: each asynchronous permute's type, and the operations between its start and its end."""
    found, ops, pending = [], [], {}
    for line in text.splitlines():
        if line and not line[0].isspace() and line.rstrip().endswith("{"):
            ops, pending = [], {}
        match = OPERATION.match(line)
        if not match:
            continue
        name, op = match.groups()
        if op == "collective-permute-done":
            start = next(s for s in pending if re.search(rf"%?{re.escape(s)}[,)]", line))
            index, kind = pending.pop(start)
            found.append((kind, set(ops[index + 1 :])))
        ops.append(op)
        if op == "collective-permute-start":
            pending[name] = len(ops) - 1, line.split(" = ")[1][1:4]
    return found


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "gradient"])
@pytest.mark.parametrize(
    ("topology", "mesh"),
    [("v5e:4x4", "seq=16"), ("v5e:16x16", "fsdp=4,seq=64"), ("v5p:2x2x4", "seq=16"), ("v6e:4x4", "seq=16")],
)
def test_every_transfer_passes_behind_attention(monkeypatch, topology, mesh, backward):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    chips = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = make_mesh(mesh, chips)
    sharding = NamedSharding(mesh, P(None, "seq"))
    array = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct((1, 65536, *shape), dtype, sharding=sharding)

    def forward(q, k, v, at):
        return attend(q, k, v, mask=causal(), q_positions=at, k_positions=at, backend=Backend("blockwise", "ring"))

    loss = lambda *arrays: forward(*arrays).astype(jnp.float32).sum()
    fn = jax.grad(loss, (0, 1, 2)) if backward else forward
    with jax.set_mesh(mesh):
        lowered = jax.jit(fn).lower(array(8, 128), array(2, 128), array(2, 128), array(dtype=jnp.int32))
        text = compile_with(lowered, recommended_flags("tpu")).as_text()
    assert "is_scheduled=true" in text and " collective-permute(" not in text
    numbers = [between for kind, between in passed_behind(text) if kind != "s32"]
    assert len(numbers) == (5 if backward else 1)
    assert all(between & ATTENTION for between in numbers), numbers
