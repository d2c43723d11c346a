"""Infini-attention over segments of 2048, at the size of the paper's language-modelling study (Munkhdalai et al.,
arXiv 2404.07143, section 4.1: 12 layers, 8 heads of 128, feed-forward 4096).

    python -m experiments.pretrain --config=configs/infini_12_layers.py --workdir=runs/infini --mesh=fsdp=64
"""

from configs.published import published
from jaxlong.config import Experiment
from jaxlong.layers.mlp import Gelu
from jaxlong.mixers import InfiniAttention
from jaxlong.model import LM

MODEL = LM(
    vocab=32000,
    width=1024,
    depth=12,
    pattern=(InfiniAttention(heads=8, kv_heads=8, head_dim=128, segment=2048, update="delta"),),
    mlp=Gelu(hidden=4096),
    remat="full",
    dtype="bfloat16",
)


def config() -> Experiment:
    return published(MODEL, length=32768, batch=64, mesh="fsdp=-1", peak=1e-2)
