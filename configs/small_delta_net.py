"""DeltaNet on `configs/small.py`.

python -m experiments.pretrain --config=configs/small_delta_net.py --workdir=runs/small_delta_net
"""

from configs.small import small
from jaxlong.config import Experiment
from jaxlong.mixers import DeltaNet


def config() -> Experiment:
    return small(DeltaNet(heads=2, head_dim=32))
