"""Infini-attention on `configs/small.py`: segments of 32 and a compressive memory.

python -m experiments.pretrain --config=configs/small_infini.py --workdir=runs/small_infini
"""

from configs.small import small
from jaxlong.config import Experiment
from jaxlong.mixers import InfiniAttention


def config() -> Experiment:
    return small(InfiniAttention(heads=2, kv_heads=1, head_dim=32, segment=32))
