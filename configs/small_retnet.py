"""RetNet's retention on `configs/small.py`: rotation, constant decay, norm and gate.

python -m experiments.pretrain --config=configs/small_retnet.py --workdir=runs/small_retnet
"""

from configs.small import small
from jaxlong.config import Experiment
from jaxlong.core.position import Rope
from jaxlong.mixers import LinearAttention


def config() -> Experiment:
    return small(
        LinearAttention(
            heads=2, head_dim=32, feature="identity", decay="retnet", norm="head", gate="silu", position=Rope()
        )
    )
