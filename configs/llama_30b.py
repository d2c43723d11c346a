"""LLaMA 30B: multi-head attention, 32.53 B parameters (Touvron et al., arXiv 2302.13971, table 2).

One of table 3 of Ring Attention (Liu et al., arXiv 2310.01889), whose longest rows `experiments.scaling` compares.

    python -m experiments.scaling --config=configs/llama_30b.py --topology=v4:8x8x16 --meshes="seq=512,ulysses=2" \\
        --lengths=8388608 --longest --out=runs/llama_30b
"""

from configs.llama_7b import llama
from configs.published import published
from jaxlong.config import Experiment

MODEL = llama(width=6656, depth=60, heads=52, hidden=17920)


def config() -> Experiment:
    return published(MODEL, length=2048, batch=2048, mesh="fsdp=-1")
