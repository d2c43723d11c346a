"""Multi-head latent attention on `configs/small.py`.

python -m experiments.pretrain --config=configs/small_mla.py --workdir=runs/small_mla
"""

from configs.small import small
from jaxlong.config import Experiment
from jaxlong.mixers import MLA


def config() -> Experiment:
    return small(MLA(heads=2, kv_rank=32, nope_dim=16, rope_dim=16, value_dim=32))
