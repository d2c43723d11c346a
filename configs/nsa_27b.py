"""Native sparse attention, 27 B parameters (Yuan et al., arXiv 2502.11089, section 4.1): 30 layers, 64 heads in 4
groups, 72 experts of which 6 and 2 shared. Heads are 128 wide (the paper: 192 for keys).

    python -m experiments.pretrain --config=configs/nsa_27b.py --workdir=runs/nsa_27b --mesh=fsdp=128
"""

from configs.published import published
from jaxlong.config import Experiment
from jaxlong.layers.mlp import SwiGLU
from jaxlong.layers.moe import MoE
from jaxlong.mixers import NSA
from jaxlong.model import LM, Layer

ATTENTION = NSA(
    heads=64, kv_heads=4, head_dim=128, compress=32, stride=16, block=64, top_k=16, initial=1, recent=2, window=512
)

MODEL = LM(
    vocab=102400,
    width=2560,
    depth=30,
    before=(Layer(ATTENTION, SwiGLU(hidden=12288)),),
    pattern=(ATTENTION,),
    mlp=MoE(hidden=1536, experts=72, top_k=6, shared=2, router="sigmoid", bias_rate=0.001),
    remat="full",
    dtype="bfloat16",
)


def config() -> Experiment:
    return published(MODEL, length=8192, batch=1024, mesh="fsdp=-1", peak=4e-4)
