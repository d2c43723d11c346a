"""DeepSeek-V3.2: DeepSeek-V3 whose attention reads the 2048 keys that a lightning indexer chooses (arXiv 2512.02556).

The indexer is warmed up with `stage="dense"`; this is the stage that follows.

    python -m experiments.pretrain --config=configs/deepseek_v32.py --workdir=runs/deepseek32 --mesh=fsdp=64,expert=32
"""

from configs.deepseek_v3 import DENSE, POSITION
from configs.deepseek_v3 import MODEL as V3
from configs.published import published
from jaxlong.config import Experiment
from jaxlong.mixers import DSA
from jaxlong.model import Layer

ATTENTION = DSA(
    heads=128,
    q_rank=1536,
    kv_rank=512,
    nope_dim=128,
    rope_dim=64,
    value_dim=128,
    position=POSITION,
    top_k=2048,
    index_heads=64,
    index_dim=128,
)
MODEL = V3.clone(before=(Layer(ATTENTION, DENSE),) * 3, pattern=(ATTENTION,))


def config() -> Experiment:
    return published(MODEL, length=131072, batch=480, mesh="fsdp=32,seq=-1", peak=7.3e-6)
