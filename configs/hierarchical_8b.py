"""Llama 3 8B in which attention sees the past through three levels of summaries; no such model is published.

python -m experiments.pretrain --config=configs/hierarchical_8b.py --workdir=runs/hierarchical --mesh=fsdp=64
"""

from configs.llama3_8b import MODEL as LLAMA
from configs.published import published
from jaxlong.config import Experiment
from jaxlong.core.position import Rope
from jaxlong.mixers import Hierarchical

ATTENTION = Hierarchical(
    heads=32, kv_heads=8, head_dim=128, segment=512, summaries=16, levels=4, position=Rope(base=500000.0)
)
MODEL = LLAMA.clone(pattern=(ATTENTION,))


def config() -> Experiment:
    return published(MODEL, length=131072, batch=64, mesh="fsdp=-1", peak=1e-5)
