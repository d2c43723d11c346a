"""Mamba-2 on `configs/small.py`, twice as deep and without feed-forward layers.

python -m experiments.pretrain --config=configs/small_mamba2.py --workdir=runs/small_mamba2
"""

from configs.small import small
from jaxlong.config import Experiment
from jaxlong.mixers import Mamba2


def config() -> Experiment:
    return small(Mamba2(heads=4, head_dim=32, state_dim=32), mlp=None, depth=4)
