"""Llama 3 8B: grouped-query attention, 8.03 B parameters (Grattafiori et al., arXiv 2407.21783, table 3).

python -m experiments.pretrain --config=configs/llama3_8b.py --workdir=runs/llama3 --mesh=fsdp=16,seq=16
"""

from configs.published import published
from jaxlong.config import Experiment
from jaxlong.core.position import Rope
from jaxlong.layers.mlp import SwiGLU
from jaxlong.mixers import GQA
from jaxlong.model import LM

ATTENTION = GQA(heads=32, kv_heads=8, head_dim=128, position=Rope(base=500000.0))
MODEL = LM(
    vocab=128256,
    width=4096,
    depth=32,
    pattern=(ATTENTION,),
    mlp=SwiGLU(hidden=14336),
    remat="attn_out",
    mlp_block=4096,
    dtype="bfloat16",
)


def config() -> Experiment:
    return published(MODEL, length=8192, batch=512, mesh="fsdp=-1")
