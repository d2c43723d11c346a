"""Qwen3-Next 80B-A3B: three layers of Gated DeltaNet to one of gated attention, 512 experts (published weights).

The shared expert has no gate here.

    python -m experiments.pretrain --config=configs/qwen3_next_80b.py --workdir=runs/qwen3_next --mesh=fsdp=64,expert=8
"""

from configs.published import published
from jaxlong.config import Experiment
from jaxlong.core.position import Rope
from jaxlong.layers.moe import MoE
from jaxlong.mixers import GQA, GatedDeltaNet
from jaxlong.model import LM

DELTA = GatedDeltaNet(heads=32, key_heads=16, head_dim=128)
ATTENTION = GQA(heads=16, kv_heads=2, head_dim=256, qk_norm=True, gate=True, position=Rope(base=1e7, rotary_dim=64))
MODEL = LM(
    vocab=151936,
    width=2048,
    depth=48,
    pattern=(DELTA, DELTA, DELTA, ATTENTION),
    mlp=MoE(hidden=512, experts=512, top_k=10, shared=1, balance=1e-3),
    remat="full",
    dtype="bfloat16",
)


def config() -> Experiment:
    return published(MODEL, length=4096, batch=4096, mesh="fsdp=-1")
