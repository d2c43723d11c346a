"""Gated linear attention on `configs/small.py`.

python -m experiments.pretrain --config=configs/small_gla.py --workdir=runs/small_gla
"""

from configs.small import small
from jaxlong.config import Experiment
from jaxlong.mixers import GLA


def config() -> Experiment:
    return small(GLA(heads=2, head_dim=32))
