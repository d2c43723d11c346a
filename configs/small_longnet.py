"""Dilated attention on `configs/small.py`.

python -m experiments.pretrain --config=configs/small_longnet.py --workdir=runs/small_longnet
"""

from configs.small import small
from jaxlong.config import Experiment
from jaxlong.mixers import LongNet


def config() -> Experiment:
    return small(LongNet(heads=2, kv_heads=1, head_dim=32, branches=((32, 1), (64, 2), (128, 4))))
