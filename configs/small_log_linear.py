"""Log-linear attention on `configs/small.py`.

python -m experiments.pretrain --config=configs/small_log_linear.py --workdir=runs/small_log_linear
"""

from configs.small import small
from jaxlong.config import Experiment
from jaxlong.mixers import LogLinear


def config() -> Experiment:
    return small(LogLinear(heads=2, key_dim=32, value_dim=32, levels=8))
