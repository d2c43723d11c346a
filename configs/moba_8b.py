"""Llama 3.1 8B continued with mixture of block attention: blocks of 4096, top 12, full attention in the last three
layers (Lu et al., arXiv 2502.13189, section 3.3).

    python -m experiments.pretrain --config=configs/moba_8b.py --workdir=runs/moba --mesh=fsdp=16,seq=16
"""

from configs.llama3_8b import ATTENTION
from configs.llama3_8b import MODEL as LLAMA
from configs.published import published
from jaxlong.config import Experiment
from jaxlong.core.position import Llama3, Rope
from jaxlong.mixers import MoBA

POSITION = Rope(base=500000.0, scaling=Llama3(factor=8.0, original=8192))
FULL = ATTENTION.clone(position=POSITION)
MODEL = LLAMA.clone(
    pattern=(MoBA(heads=32, kv_heads=8, head_dim=128, block=4096, top_k=12, position=POSITION),), after=(FULL,) * 3
)


def config() -> Experiment:
    return published(MODEL, length=1048576, batch=4, mesh="fsdp=4,seq=-1", peak=1e-5)
