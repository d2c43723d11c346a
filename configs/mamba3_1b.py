"""Mamba-3 (arXiv 2603.15569) with a feed-forward layer in each block; width and depth chosen here to give 1.5 B.

python -m experiments.pretrain --config=configs/mamba3_1b.py --workdir=runs/mamba3_1b --mesh=fsdp=64
"""

from configs.published import published
from jaxlong.config import Experiment
from jaxlong.layers.mlp import SwiGLU
from jaxlong.mixers import Mamba3
from jaxlong.model import LM

MODEL = LM(
    vocab=128256,
    width=2048,
    depth=24,
    pattern=(Mamba3(heads=64, head_dim=64, state_dim=128),),
    mlp=SwiGLU(hidden=4096),
    tied=True,
    remat="full",
    dtype="bfloat16",
)


def config() -> Experiment:
    return published(MODEL, length=2048, batch=256, mesh="fsdp=-1", peak=6e-4)
