"""RWKV-7 "Goose" 2.9B (Peng et al., arXiv 2503.14456): 2.95 B parameters.

python -m experiments.pretrain --config=configs/rwkv7_3b.py --workdir=runs/rwkv7 --mesh=fsdp=64
"""

from configs.published import published
from jaxlong.config import Experiment
from jaxlong.mixers import RWKV7, RWKVChannelMix
from jaxlong.model import LM

MODEL = LM(
    vocab=65536,
    width=2560,
    depth=32,
    pattern=(RWKV7(heads=40, head_dim=64, decay_rank=96, rate_rank=96, value_rank=64, gate_rank=320),),
    mlp=RWKVChannelMix(hidden=10240, gate=False),
    remat="full",
    dtype="bfloat16",
)


def config() -> Experiment:
    return published(MODEL, length=4096, batch=256, mesh="fsdp=-1", peak=4e-4)
