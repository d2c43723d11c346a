"""Longformer on `configs/small.py`: a window of 32 and one global token with projections of its own.

python -m experiments.pretrain --config=configs/small_longformer.py --workdir=runs/small_longformer
"""

from configs.small import small
from jaxlong.config import Experiment
from jaxlong.mixers import LongformerAttention


def config() -> Experiment:
    return small(LongformerAttention(heads=2, kv_heads=1, head_dim=32, window=32, n_global=1))
