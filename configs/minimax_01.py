"""MiniMax-Text-01: seven layers of lightning attention to one of softmax, 32 experts; 456 B parameters
(arXiv 2501.08313, section 2). Decays are the same in every group of eight layers.

    python -m experiments.pretrain --config=configs/minimax_01.py --workdir=runs/minimax_01 --mesh=fsdp=256
"""

from configs.published import published
from jaxlong.config import Experiment
from jaxlong.core.position import Rope
from jaxlong.layers.moe import MoE
from jaxlong.mixers import GQA, LinearAttention
from jaxlong.model import LM

MODEL = LM(
    vocab=200064,
    width=6144,
    depth=80,
    pattern=(
        *[
            LinearAttention(
                heads=64,
                head_dim=128,
                feature="identity",
                decay="lightning",
                activation="silu",
                norm="all",
                gate="sigmoid",
                scale=1.0,
            )
        ]
        * 7,
        GQA(heads=64, kv_heads=8, head_dim=128, position=Rope(base=1e7, rotary_dim=64)),
    ),
    mlp=MoE(hidden=9216, experts=32, top_k=2, balance=1e-2),
    remat="full",
    dtype="bfloat16",
)


def config() -> Experiment:
    return published(MODEL, length=8192, batch=4096, mesh="fsdp=-1", peak=2e-4)
