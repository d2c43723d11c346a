"""Ring attention over simulated devices, beside the `ringattention` package's path in plain JAX.

The package (`pip install -e '.[peers]'`) imports on current JAX with one name put back. Devices share
the cores of one host, so a time is the work of all of them; what a layout saves on real ones is in
`jaxlong.parallel.balance`.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from experiments.benchmarks.timing import medians, write

DEVICES, HEADS, HEAD_DIM, CHUNK = 8, 4, 64, 256


def run(out: Path, length: int, repeats: int) -> str:
    """Measure, write ring.json and ring.md, and return the table."""
    import jax

    from jaxlong.core.types import BadInput
    from jaxlong.parallel.mesh import make_mesh

    flag = f"--xla_force_host_platform_device_count={DEVICES}"
    if flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"
    if len(jax.devices()) < DEVICES:
        raise BadInput("devices", len(jax.devices()), "too few for the ring", f"{DEVICES}; on a CPU: XLA_FLAGS={flag}")
    q, k, v = (jax.random.normal(jax.random.key(i), (1, length, HEADS, HEAD_DIM)) for i in range(3))
    forwards = {f"jaxlong {layout}": ours(layout, length) for layout in ("contiguous", "zigzag")}
    forwards |= {"ringattention": theirs(length)}
    programs = {}
    for name, forward in forwards.items():
        both = jax.grad(lambda q, k, v, forward=forward: forward(q, k, v).sum(), (0, 1, 2))
        for key, fn in (("forward_ms", forward), ("both_ms", both)):
            with jax.set_mesh(make_mesh(f"seq={DEVICES}", jax.devices()[:DEVICES])):
                programs[name, key] = partial(jax.jit(fn).lower(q, k, v).compile(), q, k, v)
    times = medians(programs, repeats)
    rows = [{"case": name} | {key: times[name, key] for key in ("forward_ms", "both_ms")} for name in forwards]
    text = table(rows)
    write(out, "ring", {"length": length, "rows": rows}, text)
    return text


def ours(layout: str, length: int):
    """Causal attention of q, k, v, whose rows count as in the order of a layout."""
    import jax.numpy as jnp

    from jaxlong.core.mask import causal
    from jaxlong.ops.attend import Backend, attend
    from jaxlong.parallel.layout import order

    places = order(layout, length, DEVICES)[None]

    def forward(q, k, v):
        at = jnp.asarray(places)
        backend = Backend("blockwise", "ring", layout)
        return attend(q, k, v, mask=causal(), q_positions=at, k_positions=at, backend=backend)

    return forward


def theirs(length: int):
    """The same by `ringattention_jax`."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec as P

    jax.lib.xla_bridge = sys.modules["jax.lib.xla_bridge"] = SimpleNamespace(
        get_backend=lambda: SimpleNamespace(platform="cpu")
    )
    from ringattention import ringattention_jax

    settings = {
        "causal_block_size": 1,
        "deterministic": True,
        "dropout_rng": None,
        "attn_pdrop": 0.0,
        "query_chunk_size": CHUNK,
        "key_chunk_size": CHUNK,
        "policy": jax.checkpoint_policies.nothing_saveable,
        "dtype": jnp.float32,
        "precision": None,
        "prevent_cse": True,
    }

    def part(q, k, v):
        return ringattention_jax(q, k, v, None, None, None, "seq", True, settings)

    rows = P(None, "seq")
    return jax.shard_map(part, in_specs=rows, out_specs=rows, check_vma=False)


def table(rows: list[dict]) -> str:
    from jaxlong.evals.report import markdown_table

    last = rows[-1]
    told = [
        [row["case"], *(f"{row[key]:.0f}" for key in ("forward_ms", "both_ms")), *(_ratio(row, last))] for row in rows
    ]
    return markdown_table(["case", "forward ms", "fwd+bwd ms", "times faster, forward", "fwd+bwd"], told)


def _ratio(row: dict, last: dict) -> list[str]:
    return [f"{last[key] / row[key]:.2f}" for key in ("forward_ms", "both_ms")]
