"""LongNet with 12 layers, width 768 and segments of 2048 to 32768 tokens (Ding et al., arXiv 2307.02486, section 4.1).

python -m experiments.pretrain --config=configs/longnet_12_layers.py --workdir=runs/longnet_12_layers --mesh=fsdp=16
"""

from configs.published import published
from jaxlong.config import Experiment
from jaxlong.layers.mlp import Gelu
from jaxlong.mixers import LongNet
from jaxlong.model import LM

MODEL = LM(
    vocab=64000,
    width=768,
    depth=12,
    pattern=(LongNet(heads=12, kv_heads=12, head_dim=64),),
    mlp=Gelu(hidden=3072),
    tied=True,
    remat="full",
    dtype="bfloat16",
)


def config() -> Experiment:
    return published(MODEL, length=32768, batch=16, mesh="fsdp=16,seq=-1", peak=6e-4)
