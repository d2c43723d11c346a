"""RWKV-4 on `configs/small.py`.

python -m experiments.pretrain --config=configs/small_rwkv4.py --workdir=runs/small_rwkv4
"""

from configs.small import small
from jaxlong.config import Experiment
from jaxlong.mixers import RWKV4, RWKVChannelMix


def config() -> Experiment:
    return small(RWKV4(hidden=64), mlp=RWKVChannelMix(hidden=192))
