"""The Kimi-Linear hybrid on `configs/small.py`: three layers of KDA to one of latent attention without positions.

python -m experiments.pretrain --config=configs/small_kimi.py --workdir=runs/small_kimi
"""

from configs.small import small
from jaxlong.config import Experiment
from jaxlong.core.position import NoPE
from jaxlong.layers.mlp import SwiGLU
from jaxlong.layers.moe import MoE
from jaxlong.mixers import KDA, MLA
from jaxlong.model import Layer

DELTA = KDA(heads=2, head_dim=32)
LATENT = MLA(heads=2, kv_rank=32, nope_dim=16, rope_dim=16, value_dim=32, position=NoPE())
EXPERTS = MoE(hidden=48, experts=4, top_k=2, shared=1, router="sigmoid", scale=2.446, bias_rate=0.001)


def config() -> Experiment:
    first = Layer(DELTA, SwiGLU(hidden=128))
    return small(first, DELTA, DELTA, LATENT, mlp=EXPERTS, depth=4)
