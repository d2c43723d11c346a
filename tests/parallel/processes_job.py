"""One process of a job, which its environment describes.

python processes_job.py experiment WORKDIR MESH    trains EXPERIMENT on a mesh
python processes_job.py toy STEPS WORKDIR ...      trains the toy of tests/train in each folder, slowly
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent.parent.parent), str(Path(__file__).parent.parent / "train")]

import jax

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

if __name__ == "__main__":
    init_distributed(heartbeat=HEARTBEAT)
    what, first, *rest = sys.argv[1:]
    if what == "experiment":
        run.train(replace(EXPERIMENT, mesh=rest[0]), first)
    else:
        import train_toy as toy

        for workdir in rest:
            toy.run(workdir, int(first), pause=0.05, devices=jax.device_count())
