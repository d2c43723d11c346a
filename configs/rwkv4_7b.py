"""RWKV-4 7B (Peng et al., arXiv 2305.13048, table 2): 7.4 B parameters.

python -m experiments.pretrain --config=configs/rwkv4_7b.py --workdir=runs/rwkv4 --mesh=fsdp=64
"""

from configs.published import published
from jaxlong.config import Experiment
from jaxlong.mixers import RWKV4, RWKVChannelMix
from jaxlong.model import LM

MODEL = LM(
    vocab=50277,
    width=4096,
    depth=32,
    pattern=(RWKV4(hidden=4096),),
    mlp=RWKVChannelMix(hidden=16384),
    remat="full",
    dtype="bfloat16",
)


def config() -> Experiment:
    return published(MODEL, length=1024, batch=128, mesh="fsdp=-1", peak=1.5e-4)
