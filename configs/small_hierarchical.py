"""Hierarchical attention on `configs/small.py`: segments of 16 tokens, 4 summaries each, 3 levels.

python -m experiments.pretrain --config=configs/small_hierarchical.py --workdir=runs/small_hierarchical
"""

from configs.small import small
from jaxlong.config import Experiment
from jaxlong.mixers import Hierarchical


def config() -> Experiment:
    return small(Hierarchical(heads=2, kv_heads=1, head_dim=32, segment=16, summaries=4, levels=3))
