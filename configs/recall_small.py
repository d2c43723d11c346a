"""Recall against state, small: 2 CPU cores, at most 10 minutes.

Each model is a short convolution and one mixer (Based, arXiv 2402.18668, sets its mixers side by side in the same
way). Expected: attention answers at least 99 % of the queries; a window what it reaches, computed from the data,
within 3 points.

    python -m experiments.recall --config=configs/recall_small.py --out=runs/recall
"""

from jaxlong.config import Train
from jaxlong.core.mask import sliding
from jaxlong.core.position import NoPE
from jaxlong.data import MQAR, Data, Ids
from jaxlong.mixers import GQA, ShortConv
from jaxlong.model import LM
from jaxlong.recall import Contender, Recall
from jaxlong.train.optim import AdamW, Cosine

VOCAB, LENGTH, PAIRS, WIDTH = 128, 64, 12, 64


def with_mixer(mixer) -> LM:
    return LM(vocab=VOCAB, width=WIDTH, depth=2, pattern=(ShortConv(width=2, bias=True), mixer), mlp=Gelu(hidden=WIDTH))


def config() -> Recall:
    attention = GQA(heads=2, kv_heads=2, head_dim=32, position=NoPE())
    windows = [
        Contender(f"window-{n}", "sliding window", with_mixer(attention.clone(mask=sliding(n))), rates=(4e-3,))
        for n in (16, 32)
    ]
    return Recall(
        contenders=(Contender("attention", "attention", with_mixer(attention), rates=(4e-3,)), *windows),
        data=Data(length=LENGTH, batch=64, tokenizer=Ids(VOCAB), mixture=(MQAR(vocab=VOCAB, pairs=PAIRS),)),
        tests=(MQAR(vocab=VOCAB, pairs=PAIRS, length=LENGTH, split="test"),),
        train=Train(steps=200, optimizer=AdamW(weight_decay=0.1), schedule=Cosine(peak=4e-3, warmup=10)),
    )
