"""RWKV-6 on `configs/small.py`.

python -m experiments.pretrain --config=configs/small_rwkv6.py --workdir=runs/small_rwkv6
"""

from configs.small import small
from jaxlong.config import Experiment
from jaxlong.mixers import RWKV6, RWKVChannelMix


def config() -> Experiment:
    return small(RWKV6(heads=2, head_dim=32, mix_rank=8, decay_rank=8, chunk=32), mlp=RWKVChannelMix(hidden=192))
