"""The Sparse Transformer of enwik8: 30 layers, width 512, fixed patterns of stride 128 with 8 summary columns
(Child et al., arXiv 1904.10509, section 6).

    python -m experiments.pretrain --config=configs/sparse_transformer.py --workdir=runs/sparse --mesh=fsdp=16
"""

from configs.published import published
from jaxlong.config import Experiment
from jaxlong.core.mask import fixed
from jaxlong.layers.mlp import Gelu
from jaxlong.mixers import GQA
from jaxlong.model import LM

MODEL = LM(
    vocab=256,
    width=512,
    depth=30,
    pattern=(GQA(heads=8, kv_heads=8, head_dim=64, mask=fixed(128, 8)),),
    mlp=Gelu(hidden=2048),
    remat="full",
    dtype="bfloat16",
)


def config() -> Experiment:
    return published(MODEL, length=12288, batch=64, mesh="fsdp=-1", peak=3.5e-4)
