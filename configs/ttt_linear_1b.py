"""TTT-Linear 1.3B with the Mamba backbone (Sun et al., arXiv 2407.04620, appendix C).

python -m experiments.pretrain --config=configs/ttt_linear_1b.py --workdir=runs/ttt --mesh=fsdp=64
"""

from configs.published import published
from jaxlong.config import Experiment
from jaxlong.layers.mlp import SwiGLU
from jaxlong.mixers import TTTLinear
from jaxlong.model import LM

MODEL = LM(
    vocab=32000,
    width=2048,
    depth=24,
    pattern=(TTTLinear(heads=32, head_dim=64, conv=4, gate=True),),
    mlp=SwiGLU(hidden=5504),
    remat="full",
    dtype="bfloat16",
)


def config() -> Experiment:
    return published(MODEL, length=2048, batch=256, mesh="fsdp=-1", peak=1e-3)
