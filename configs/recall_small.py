"""Recall against state, small: nine models in at most 10 minutes on 2 CPU cores.

Each model is a short convolution and one mixer, without feed-forward layers, as in Based (arXiv 2402.18668). It learns
documents of 4 pairs in 16 tokens and 16 pairs in 64, and is asked the latter. Expected: attention answers at least
99 % of the queries; a window what it reaches, computed from the data, within 3 points; Gated DeltaNet and KDA at least
20 points more than linear attention, whose state has as many bytes as theirs (and 256 for its divisor).

    python -m experiments.recall --config=configs/recall_small.py --out=runs/recall
"""

from jaxlong.config import Train
from jaxlong.core.mask import sliding
from jaxlong.core.position import NoPE
from jaxlong.data import MQAR, Data, Ids
from jaxlong.mixers import GQA, KDA, DeltaNet, GatedDeltaNet, LinearAttention, Mamba2, ShortConv
from jaxlong.model import LM
from jaxlong.recall import Contender, Recall
from jaxlong.train.optim import AdamW, Cosine

VOCAB, LENGTH, PAIRS, WIDTH = 128, 64, 16, 64


def contender(name: str, family: str, mixer, rate: float) -> Contender:
    pattern = (ShortConv(width=2, bias=True), mixer)
    return Contender(name, family, LM(vocab=VOCAB, width=WIDTH, depth=2, pattern=pattern, mlp=None), rates=(rate,))


def config() -> Recall:
    attention = GQA(heads=2, kv_heads=2, head_dim=32, position=NoPE())
    same = {"heads": 2, "head_dim": 32, "conv": 2, "chunk": 32}
    return Recall(
        contenders=(
            contender("attention", "attention", attention, 6e-3),
            *(contender(f"window-{n}", "sliding window", attention.clone(mask=sliding(n)), 6e-3) for n in (16, 32, 48)),
            contender("linear", "linear attention", LinearAttention(**same), 1.5e-2),
            contender("mamba2", "Mamba-2", Mamba2(state_dim=32, step_limit=(0.0, 10.0), **same), 1.5e-2),
            contender("delta_net", "DeltaNet", DeltaNet(**same), 1.5e-2),
            contender("gated_delta_net", "Gated DeltaNet", GatedDeltaNet(**same), 1.5e-2),
            contender("kda", "KDA", KDA(**same), 1.5e-2),
        ),
        data=Data(
            length=LENGTH,
            batch=64,
            tokenizer=Ids(VOCAB),
            mixture=(MQAR(vocab=VOCAB, pairs=4, length=16), MQAR(vocab=VOCAB, pairs=PAIRS)),
        ),
        tests=(MQAR(vocab=VOCAB, pairs=PAIRS, length=LENGTH, split="test"),),
        train=Train(steps=250, optimizer=AdamW(weight_decay=0.1), schedule=Cosine(peak=1e-2, warmup=12), log_every=25),
    )
