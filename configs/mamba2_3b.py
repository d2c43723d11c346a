"""Mamba-2 2.7B (Dao and Gu, arXiv 2405.21060, table 9): 64 blocks without feed-forward layers.

python -m experiments.pretrain --config=configs/mamba2_3b.py --workdir=runs/mamba2_3b --mesh=fsdp=64
"""

from configs.published import published
from jaxlong.config import Experiment
from jaxlong.mixers import Mamba2
from jaxlong.model import LM

MODEL = LM(
    vocab=50288,
    width=2560,
    depth=64,
    pattern=(Mamba2(heads=80, head_dim=64, state_dim=128),),
    mlp=None,
    tied=True,
    remat="full",
    dtype="bfloat16",
)


def config() -> Experiment:
    return published(MODEL, length=2048, batch=256, mesh="fsdp=-1", peak=8e-4)
