"""Qwen3 4B whose every sixth feed-forward layer learns in place, chunks of 4096 (In-Place TTT, arXiv 2604.06169).

python -m experiments.pretrain --config=configs/in_place_ttt_4b.py --workdir=runs/in_place --mesh=fsdp=8,seq=8
"""

from configs.published import published
from jaxlong.config import Experiment
from jaxlong.core.position import Rope
from jaxlong.layers.mlp import SwiGLU
from jaxlong.mixers import GQA, InPlaceTTT
from jaxlong.model import LM, Layer

ATTENTION = GQA(heads=32, kv_heads=8, head_dim=128, qk_norm=True, position=Rope(base=1e6))

MODEL = LM(
    vocab=151936,
    width=2560,
    depth=36,
    pattern=(Layer(ATTENTION, InPlaceTTT(width=2560, hidden=9728, chunk=4096)), *[ATTENTION] * 5),
    mlp=SwiGLU(hidden=9728),
    tied=True,
    remat="full",
    dtype="bfloat16",
)


def config() -> Experiment:
    return published(MODEL, length=65536, batch=8, mesh="fsdp=8,seq=-1", peak=5e-6)
