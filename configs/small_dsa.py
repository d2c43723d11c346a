"""DeepSeek Sparse Attention on `configs/small.py`: 32 of 128 keys, chosen by an indexer.

python -m experiments.pretrain --config=configs/small_dsa.py --workdir=runs/small_dsa
"""

from configs.small import small
from jaxlong.config import Experiment
from jaxlong.mixers import DSA


def config() -> Experiment:
    return small(
        DSA(
            heads=2,
            q_rank=48,
            kv_rank=32,
            nope_dim=16,
            rope_dim=16,
            value_dim=32,
            top_k=32,
            index_heads=4,
            index_dim=16,
        )
    )
