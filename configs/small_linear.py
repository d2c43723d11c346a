"""Linear attention with elu + 1 features on `configs/small.py`.

python -m experiments.pretrain --config=configs/small_linear.py --workdir=runs/small_linear
"""

from configs.small import small
from jaxlong.config import Experiment
from jaxlong.mixers import LinearAttention


def config() -> Experiment:
    return small(LinearAttention(heads=2, head_dim=32, conv=4))
