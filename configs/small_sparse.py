"""Sparse attention on `configs/small.py`: the Sparse Transformer's strided and fixed patterns, layer by layer.

python -m experiments.pretrain --config=configs/small_sparse.py --workdir=runs/small_sparse
"""

from configs.small import ATTENTION, small
from jaxlong.config import Experiment
from jaxlong.core.mask import fixed, strided


def config() -> Experiment:
    return small(ATTENTION.clone(mask=strided(16)), ATTENTION.clone(mask=fixed(16, 4)))
