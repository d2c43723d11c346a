"""Kimi Linear 48B-A3B: three layers of KDA to one of latent attention without positions, 256 experts
(arXiv 2510.26692, section 5). Latent attention is in layers 4, 8, 12, 16, 20, 24 and 27; the first layer is dense.

    python -m experiments.pretrain --config=configs/kimi_linear_48b.py --workdir=runs/kimi --mesh=fsdp=64,expert=4
"""

from configs.published import published
from jaxlong.config import Experiment
from jaxlong.core.position import NoPE
from jaxlong.layers.mlp import SwiGLU
from jaxlong.layers.moe import MoE
from jaxlong.mixers import KDA, MLA
from jaxlong.model import LM, Layer

DELTA = KDA(heads=32, head_dim=128)
LATENT = MLA(heads=32, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128, position=NoPE())
MODEL = LM(
    vocab=163840,
    width=2304,
    depth=27,
    before=(Layer(DELTA, SwiGLU(hidden=9216)),),
    pattern=(DELTA, DELTA, LATENT, DELTA),
    after=(DELTA, LATENT),
    mlp=MoE(hidden=1024, experts=256, top_k=8, shared=1, router="sigmoid", scale=2.446, bias_rate=0.001),
    remat="full",
    dtype="bfloat16",
)


def config() -> Experiment:
    return published(MODEL, length=4096, batch=8192, mesh="fsdp=-1", peak=1.1e-3)
