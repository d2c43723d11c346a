"""Routing attention on `configs/small.py`: one head on a window, one on 8 clusters of 32 tokens.

python -m experiments.pretrain --config=configs/small_routing.py --workdir=runs/small_routing
"""

from configs.small import small
from jaxlong.config import Experiment
from jaxlong.mixers import Routing


def config() -> Experiment:
    return small(Routing(heads=2, head_dim=32, local=1, window=32, clusters=8, members=32))
