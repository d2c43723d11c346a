"""The shape of BigBird-base (Zaheer et al., arXiv 2007.14062), as a causal language model: blocks of 64, a window of
three, the first one global, three at random.

    python -m experiments.pretrain --config=configs/bigbird_base.py --workdir=runs/bigbird_base --mesh=fsdp=16
"""

from configs.published import published
from jaxlong.config import Experiment
from jaxlong.core.mask import bigbird, causal
from jaxlong.layers.mlp import Gelu
from jaxlong.mixers import GQA
from jaxlong.model import LM

MASK = bigbird(window=3, n_global=1, n_random=3, block=64, seed=0) & causal()

MODEL = LM(
    vocab=50358,
    width=768,
    depth=12,
    pattern=(GQA(heads=12, kv_heads=12, head_dim=64, bias=True, mask=MASK),),
    mlp=Gelu(hidden=3072),
    tied=True,
    remat="full",
    dtype="bfloat16",
)


def config() -> Experiment:
    return published(MODEL, length=4096, batch=64, mesh="fsdp=-1", peak=1e-4)
