"""LLaMA 7B: multi-head attention, 6.74 B parameters (Touvron et al., arXiv 2302.13971, table 2).

One of table 3 of Ring Attention (Liu et al., arXiv 2310.01889), whose longest rows `experiments.scaling` compares.

    python -m experiments.scaling --config=configs/llama_7b.py --topology=v5e:16x16 --meshes="seq=256" \\
        --lengths=4194304 --longest --out=runs/llama_7b
"""

from configs.published import published
from jaxlong.config import Experiment
from jaxlong.core.position import Rope
from jaxlong.layers.mlp import SwiGLU
from jaxlong.mixers import GQA
from jaxlong.model import LM


def llama(*, width: int, depth: int, heads: int, hidden: int) -> LM:
    """The first LLaMA at any of its sizes, kept small in memory: a layer's input is all that is kept of it."""
    return LM(
        vocab=32000,
        width=width,
        depth=depth,
        pattern=(GQA(heads=heads, kv_heads=heads, head_dim=width // heads, position=Rope(base=10000.0)),),
        mlp=SwiGLU(hidden=hidden),
        remat="full",
        mlp_block=2048,
        dtype="bfloat16",
    )


MODEL = llama(width=4096, depth=32, heads=32, hidden=11008)


def config() -> Experiment:
    return published(MODEL, length=2048, batch=2048, mesh="fsdp=-1")
