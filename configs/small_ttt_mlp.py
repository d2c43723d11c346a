"""TTT-MLP on `configs/small.py`.

python -m experiments.pretrain --config=configs/small_ttt_mlp.py --workdir=runs/small_ttt_mlp
"""

from configs.small import small
from jaxlong.config import Experiment
from jaxlong.mixers import TTTMLP


def config() -> Experiment:
    return small(TTTMLP(heads=2, head_dim=32, conv=4, gate=True))
