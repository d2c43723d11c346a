"""One process of a job, which its environment describes.

python processes_job.py experiment WORKDIR MESH    trains EXPERIMENT on a mesh
python processes_job.py toy WORKDIR NAME:STEPS ... trains the toy of tests/train in WORKDIR/NAME, for each
python processes_job.py sum WORKDIR                adds over all devices, again and again, and writes a line each
"""

from __future__ import annotations

import itertools
import sys
import time
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent.parent.parent), str(Path(__file__).parent.parent / "train")]

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlong import run
from jaxlong.config import Experiment, Train
from jaxlong.core.position import NoPE
from jaxlong.data import MQAR, Data, Ids
from jaxlong.layers.mlp import SwiGLU
from jaxlong.mixers import GQA
from jaxlong.model import LM
from jaxlong.parallel.processes import init_distributed
from jaxlong.train.optim import AdamW, Cosine

HEARTBEAT = 6
"""Seconds."""

EXPERIMENT = Experiment(
    model=LM(
        vocab=64,
        width=16,
        depth=1,
        pattern=(GQA(heads=2, kv_heads=1, head_dim=8, position=NoPE()),),
        mlp=SwiGLU(hidden=16),
    ),
    data=Data(length=32, batch=4, tokenizer=Ids(64), mixture=(MQAR(vocab=64, pairs=4, length=16),), threads=0),
    train=Train(steps=4, optimizer=AdamW(), schedule=Cosine(peak=1e-2, warmup=1), log_every=1, loss_chunk=8),
)


def add_forever(workdir: Path, failing: str = "") -> None:
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    x = jax.jit(lambda: jnp.arange(8.0), out_shardings=NamedSharding(mesh, P("data")))()
    add = jax.jit(lambda x: x + x.sum())
    workdir.mkdir(exist_ok=True)
    for turn in itertools.count():
        jax.block_until_ready(x := add(x))
        if turn == 3 and str(jax.process_index()) == failing:
            raise RuntimeError("a fault of its own")
        if jax.process_index() == 0:
            with (workdir / "metrics.jsonl").open("a") as file:
                file.write('{"loss": 0}\n')
        time.sleep(0.05)


if __name__ == "__main__":
    init_distributed(heartbeat=HEARTBEAT)
    what, workdir, *rest = sys.argv[1:]
    if what == "experiment":
        run.train(replace(EXPERIMENT, mesh=rest[0]), workdir)
    elif what == "sum":
        add_forever(Path(workdir), *rest)
    else:
        import train_toy as toy

        for name, steps in (each.split(":") for each in rest):
            toy.run(f"{workdir}/{name}", int(steps), pause=0.05, devices=jax.device_count())
