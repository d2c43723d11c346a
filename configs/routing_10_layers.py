"""Routing Transformer with 10 layers and 16 heads, as its WikiText-103 model has (Roy et al., arXiv 2003.05997); width,
window and clusters chosen here.

    python -m experiments.pretrain --config=configs/routing_10_layers.py --workdir=runs/routing_10_layers --mesh=fsdp=16
"""

from configs.published import published
from jaxlong.config import Experiment
from jaxlong.layers.mlp import Gelu
from jaxlong.mixers import Routing
from jaxlong.model import LM

MODEL = LM(
    vocab=50304,
    width=1024,
    depth=10,
    pattern=(Routing(heads=16, head_dim=64, local=8, window=256, clusters=64, members=64),),
    mlp=Gelu(hidden=4096),
    tied=True,
    remat="full",
    dtype="bfloat16",
)


def config() -> Experiment:
    return published(MODEL, length=4096, batch=128, mesh="fsdp=-1", peak=2e-4)
