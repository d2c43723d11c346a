"""Mixture of block attention on `configs/small.py`: 3 of 8 blocks.

python -m experiments.pretrain --config=configs/small_moba.py --workdir=runs/small_moba
"""

from configs.small import small
from jaxlong.config import Experiment
from jaxlong.mixers import MoBA


def config() -> Experiment:
    return small(MoBA(heads=2, kv_heads=1, head_dim=32, block=16, top_k=3))
