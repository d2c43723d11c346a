"""Log-linear attention with width 1536 and 21 layers, 0.8 B parameters (Guo et al., arXiv 2506.04761, section 4).

python -m experiments.pretrain --config=configs/log_linear_800m.py --workdir=runs/log_linear_800m --mesh=fsdp=16
"""

from configs.published import published
from jaxlong.config import Experiment
from jaxlong.layers.mlp import SwiGLU
from jaxlong.mixers import LogLinear
from jaxlong.model import LM

MODEL = LM(
    vocab=32000,
    width=1536,
    depth=21,
    pattern=(LogLinear(heads=12, key_dim=128, value_dim=256),),
    mlp=SwiGLU(hidden=4096),
    remat="full",
    dtype="bfloat16",
)


def config() -> Experiment:
    return published(MODEL, length=16384, batch=32, mesh="fsdp=32,seq=-1", peak=4e-4)
