"""LLaMA 3B: multi-head attention, 3.43 B parameters (OpenLLaMA's, of LLaMA's shape).

One of table 3 of Ring Attention (Liu et al., arXiv 2310.01889), whose longest rows `experiments.scaling` compares.

    python -m experiments.scaling --config=configs/llama_3b.py --topology=v5e:16x16 --meshes="seq=128,ulysses=2" \\
        --lengths=8388608 --longest --out=runs/llama_3b
"""

from configs.llama_7b import llama
from configs.published import published
from jaxlong.config import Experiment

MODEL = llama(width=3200, depth=26, heads=32, hidden=8640)


def config() -> Experiment:
    return published(MODEL, length=2048, batch=2048, mesh="fsdp=-1")
