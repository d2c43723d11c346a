"""RetNet 6.7B (Sun et al., arXiv 2307.08621): values and feed-forward layers of width 6912.

python -m experiments.pretrain --config=configs/retnet_7b.py --workdir=runs/retnet_7b --mesh=fsdp=64
"""

from configs.published import published
from jaxlong.config import Experiment
from jaxlong.core.position import Rope
from jaxlong.layers.mlp import SwiGLU
from jaxlong.mixers import LinearAttention
from jaxlong.model import LM

MODEL = LM(
    vocab=50304,
    width=4096,
    depth=32,
    pattern=(
        LinearAttention(
            heads=16,
            head_dim=256,
            value_dim=432,
            feature="identity",
            decay="retnet",
            norm="head",
            gate="silu",
            position=Rope(),
        ),
    ),
    mlp=SwiGLU(hidden=6912),
    tied=True,
    remat="full",
    dtype="bfloat16",
)


def config() -> Experiment:
    return published(MODEL, length=2048, batch=2048, mesh="fsdp=-1", peak=3e-4)
