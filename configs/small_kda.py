"""Kimi Delta Attention on `configs/small.py`.

python -m experiments.pretrain --config=configs/small_kda.py --workdir=runs/small_kda
"""

from configs.small import small
from jaxlong.config import Experiment
from jaxlong.mixers import KDA


def config() -> Experiment:
    return small(KDA(heads=2, head_dim=32))
