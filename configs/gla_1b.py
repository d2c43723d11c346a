"""Gated linear attention 1.3B (Yang et al., arXiv 2312.06635, section 5.1).

python -m experiments.pretrain --config=configs/gla_1b.py --workdir=runs/gla_1b --mesh=fsdp=64
"""

from configs.published import published
from jaxlong.config import Experiment
from jaxlong.layers.mlp import SwiGLU
from jaxlong.mixers import GLA
from jaxlong.model import LM

MODEL = LM(
    vocab=32000,
    width=2048,
    depth=24,
    pattern=(GLA(heads=4, head_dim=256, value_dim=512),),
    mlp=SwiGLU(hidden=5632),
    remat="full",
    dtype="bfloat16",
)


def config() -> Experiment:
    return published(MODEL, length=2048, batch=1024, mesh="fsdp=-1", peak=3e-4)
