"""In-place test-time training on `configs/small.py`: feed-forward layers that learn in chunks of 32 tokens.

python -m experiments.pretrain --config=configs/small_in_place_ttt.py --workdir=runs/small_in_place_ttt
"""

from configs.small import ATTENTION, WIDTH, small
from jaxlong.config import Experiment
from jaxlong.mixers import InPlaceTTT


def config() -> Experiment:
    return small(ATTENTION, mlp=InPlaceTTT(width=WIDTH, hidden=128, chunk=32))
