"""RWKV-6 "Finch" 7B (Peng et al., arXiv 2404.05892, table 2): 7.6 B parameters.

python -m experiments.pretrain --config=configs/rwkv6_7b.py --workdir=runs/rwkv6 --mesh=fsdp=64
"""

from configs.published import published
from jaxlong.config import Experiment
from jaxlong.mixers import RWKV6, RWKVChannelMix
from jaxlong.model import LM

MODEL = LM(
    vocab=65536,
    width=4096,
    depth=32,
    pattern=(RWKV6(heads=64, head_dim=64, mix_rank=64, decay_rank=128),),
    mlp=RWKVChannelMix(hidden=14336),
    remat="full",
    dtype="bfloat16",
)


def config() -> Experiment:
    return published(MODEL, length=4096, batch=256, mesh="fsdp=-1")
