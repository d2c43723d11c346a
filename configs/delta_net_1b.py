"""DeltaNet 1.3B (Yang et al., arXiv 2406.06484, section 4.2).

python -m experiments.pretrain --config=configs/delta_net_1b.py --workdir=runs/delta_net --mesh=fsdp=64
"""

from configs.published import published
from jaxlong.config import Experiment
from jaxlong.layers.mlp import SwiGLU
from jaxlong.mixers import DeltaNet
from jaxlong.model import LM

MODEL = LM(
    vocab=32000,
    width=2048,
    depth=24,
    pattern=(DeltaNet(heads=16, head_dim=128),),
    mlp=SwiGLU(hidden=5632),
    remat="full",
    dtype="bfloat16",
)


def config() -> Experiment:
    return published(MODEL, length=2048, batch=1024, mesh="fsdp=-1")
