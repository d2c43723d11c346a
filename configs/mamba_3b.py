"""Mamba 2.8B (Gu and Dao, arXiv 2312.00752, table 12): 64 blocks without feed-forward layers.

python -m experiments.pretrain --config=configs/mamba_3b.py --workdir=runs/mamba_3b --mesh=fsdp=64
"""

from configs.published import published
from jaxlong.config import Experiment
from jaxlong.mixers import Mamba
from jaxlong.model import LM

MODEL = LM(
    vocab=50280,
    width=2560,
    depth=64,
    pattern=(Mamba(inner=5120),),
    mlp=None,
    tied=True,
    remat="full",
    dtype="bfloat16",
)


def config() -> Experiment:
    return published(MODEL, length=2048, batch=256, mesh="fsdp=-1", peak=8e-4)
