"""TTT-Linear on `configs/small.py`.

python -m experiments.pretrain --config=configs/small_ttt_linear.py --workdir=runs/small_ttt_linear
"""

from configs.small import small
from jaxlong.config import Experiment
from jaxlong.mixers import TTTLinear


def config() -> Experiment:
    return small(TTTLinear(heads=2, head_dim=32, conv=4, gate=True))
