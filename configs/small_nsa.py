"""Native sparse attention on `configs/small.py`: compressed blocks of 8, 4 of 8 blocks chosen, a window of 32.

python -m experiments.pretrain --config=configs/small_nsa.py --workdir=runs/small_nsa
"""

from configs.small import small
from jaxlong.config import Experiment
from jaxlong.mixers import NSA


def config() -> Experiment:
    return small(
        NSA(heads=2, kv_heads=1, head_dim=32, compress=8, stride=4, hidden=32, block=16, top_k=4, recent=2, window=32)
    )
