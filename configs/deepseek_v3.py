"""DeepSeek-V3: latent attention, 256 experts, multi-token prediction; 671 B parameters and the predictor's
(arXiv 2412.19437, section 4.2), at the YaRN scaling of its published weights.

    python -m experiments.pretrain --config=configs/deepseek_v3.py --workdir=runs/deepseek --mesh=fsdp=64,expert=32
"""

from configs.published import published
from jaxlong.config import Experiment
from jaxlong.core.position import Rope, Yarn
from jaxlong.layers.mlp import SwiGLU
from jaxlong.layers.moe import MoE
from jaxlong.mixers import MLA
from jaxlong.model import LM, Layer

POSITION = Rope(interleaved=True, scaling=Yarn(factor=40.0, original=4096, mscale=1.0, mscale_all_dim=1.0))
ATTENTION = MLA(heads=128, q_rank=1536, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128, position=POSITION)
EXPERTS = MoE(hidden=2048, experts=256, top_k=8, shared=1, router="sigmoid", scale=2.5, bias_rate=0.001, balance=1e-4)
DENSE = SwiGLU(hidden=18432)
MODEL = LM(
    vocab=129280,
    width=7168,
    depth=61,
    before=(Layer(ATTENTION, DENSE),) * 3,
    pattern=(ATTENTION,),
    mlp=EXPERTS,
    remat="full",
    dtype="bfloat16",
    mtp=1,
)


def config() -> Experiment:
    return published(MODEL, length=4096, batch=15360, mesh="fsdp=-1", peak=2.2e-4)
