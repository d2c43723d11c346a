"""Gated DeltaNet on `configs/small.py`.

python -m experiments.pretrain --config=configs/small_gated_delta_net.py --workdir=runs/small_gated_delta_net
"""

from configs.small import small
from jaxlong.config import Experiment
from jaxlong.mixers import GatedDeltaNet


def config() -> Experiment:
    return small(GatedDeltaNet(heads=2, head_dim=32))
