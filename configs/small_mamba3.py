"""Mamba-3 on `configs/small.py`.

python -m experiments.pretrain --config=configs/small_mamba3.py --workdir=runs/small_mamba3
"""

from configs.small import small
from jaxlong.config import Experiment
from jaxlong.mixers import Mamba3


def config() -> Experiment:
    return small(Mamba3(heads=4, head_dim=32, state_dim=32))
