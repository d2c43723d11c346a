"""The shape of Longformer-base (Beltagy et al., arXiv 2004.05150), as a causal language model; the paper's
masked one has `direction="both"`.

    python -m experiments.pretrain --config=configs/longformer_base.py --workdir=runs/longformer_base --mesh=fsdp=16
"""

from configs.published import published
from jaxlong.config import Experiment
from jaxlong.layers.mlp import Gelu
from jaxlong.mixers import LongformerAttention
from jaxlong.model import LM

MODEL = LM(
    vocab=50265,
    width=768,
    depth=12,
    pattern=(LongformerAttention(heads=12, kv_heads=12, head_dim=64, window=512, bias=True),),
    mlp=Gelu(hidden=3072),
    tied=True,
    remat="full",
    dtype="bfloat16",
)


def config() -> Experiment:
    return published(MODEL, length=4096, batch=64, mesh="fsdp=-1", peak=3e-4)
