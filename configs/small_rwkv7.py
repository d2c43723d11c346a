"""RWKV-7 on `configs/small.py`, its values drawn towards those of the first layer.

python -m experiments.pretrain --config=configs/small_rwkv7.py --workdir=runs/small_rwkv7
"""

from configs.small import small
from jaxlong.config import Experiment
from jaxlong.mixers import RWKV7, RWKVChannelMix


def config() -> Experiment:
    return small(
        RWKV7(heads=2, head_dim=32, decay_rank=8, rate_rank=8, value_rank=8, gate_rank=16, chunk=32),
        mlp=RWKVChannelMix(hidden=192, gate=False),
    )
