"""Mamba on `configs/small.py`, twice as deep and without feed-forward layers.

python -m experiments.pretrain --config=configs/small_mamba.py --workdir=runs/small_mamba
"""

from configs.small import small
from jaxlong.config import Experiment
from jaxlong.mixers import Mamba


def config() -> Experiment:
    return small(Mamba(inner=128), mlp=None, depth=4)
