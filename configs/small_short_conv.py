"""Gated short convolutions under one layer of attention on `configs/small.py`.

python -m experiments.pretrain --config=configs/small_short_conv.py --workdir=runs/small_short_conv
"""

from configs.small import ATTENTION, small
from jaxlong.config import Experiment
from jaxlong.mixers import ShortConv


def config() -> Experiment:
    return small(ShortConv(width=4), ATTENTION)
