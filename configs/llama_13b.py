"""LLaMA 13B: multi-head attention, 13.02 B parameters (Touvron et al., arXiv 2302.13971, table 2).

One of table 3 of Ring Attention (Liu et al., arXiv 2310.01889), whose longest rows `experiments.scaling` compares.

    python -m experiments.scaling --config=configs/llama_13b.py --topology=v4:8x8x16 --meshes="seq=1024" \\
        --lengths=16777216 --longest --out=runs/llama_13b
"""

from configs.llama_7b import llama
from configs.published import published
from jaxlong.config import Experiment

MODEL = llama(width=5120, depth=40, heads=40, hidden=13824)


def config() -> Experiment:
    return published(MODEL, length=2048, batch=2048, mesh="fsdp=-1")
