"""LFM2 1.2B: ten gated short convolutions and six layers of attention (Liquid AI, arXiv 2511.23404).

python -m experiments.pretrain --config=configs/lfm2_1b.py --workdir=runs/lfm2_1b --mesh=fsdp=16
"""

from configs.published import published
from jaxlong.config import Experiment
from jaxlong.core.position import Rope
from jaxlong.layers.mlp import SwiGLU
from jaxlong.mixers import GQA, ShortConv
from jaxlong.model import LM

CONV = ShortConv(width=3, channels=2048)
ATTENTION = GQA(heads=32, kv_heads=8, head_dim=64, qk_norm=True, position=Rope(base=1e6))

MODEL = LM(
    vocab=65536,
    width=2048,
    depth=16,
    before=(CONV, CONV, ATTENTION) * 3,
    pattern=(CONV, ATTENTION),
    after=(CONV,),
    mlp=SwiGLU(hidden=8192),
    tied=True,
    remat="full",
    dtype="bfloat16",
)


def config() -> Experiment:
    return published(MODEL, length=4096, batch=256, mesh="fsdp=-1", peak=3e-4)
