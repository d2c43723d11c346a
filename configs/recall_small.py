"""Recall against state, small: nine models in at most 10 minutes on 2 CPU cores.

Each model is a short convolution and one mixer, without feed-forward layers, as in Based (arXiv 2402.18668). It learns
documents of 2 to 16 pairs in 8 to 64 tokens, and is asked for 16 pairs in 64 tokens: with 16 keys (plain MQAR), and
with 8 keys that are written twice, where the later value is the answer.

The recurrent models are trained alike and have one head with keys of 32 and values of 8: a state of 1 KiB and the
convolution's tail. A delta rule can keep 16 of such keys apart exactly; linear attention reads each value through the
others, and 8 numbers leave it little to tell them by. KDA starts from decays of at least exp(-0.2) a token: its usual
first ones are drawn for many heads, and where one head drew, most channels forgot within a few tokens, and 1,000 steps
led to 47 % only.

Expected of 16 keys: attention answers at least 99 %, a window what it reaches, computed from the data, within 3 points;
Gated DeltaNet and KDA at least 20 points more than linear attention, which has no less state (128 bytes more). Of 8
keys: more still, since it adds the second value to the first. Attention without positions cannot tell which of two
values came later either, with ALiBi it can.

    python -m experiments.recall --config=configs/recall_small.py --out=runs/recall
"""

from jaxlong.config import Train
from jaxlong.core.mask import sliding
from jaxlong.core.position import Alibi, NoPE
from jaxlong.data import MQAR, Data, Ids
from jaxlong.mixers import GQA, KDA, DeltaNet, GatedDeltaNet, LinearAttention, ShortConv
from jaxlong.model import LM
from jaxlong.recall import Contender, Recall
from jaxlong.train.optim import AdamW, Cosine

VOCAB, LENGTH, PAIRS, WIDTH = 128, 64, 16, 64


def task(pairs: int, length: int, writes: int = 1, split: str = "train") -> MQAR:
    return MQAR(vocab=VOCAB, pairs=pairs, writes=writes, length=length, split=split)


def contender(name: str, family: str, mixer, rate: float) -> Contender:
    pattern = (ShortConv(width=2, bias=True), mixer)
    return Contender(name, family, LM(vocab=VOCAB, width=WIDTH, depth=2, pattern=pattern, mlp=None), rates=(rate,))


def config() -> Recall:
    attention = GQA(heads=2, kv_heads=2, head_dim=32, position=NoPE())
    same = {"heads": 1, "head_dim": 32, "value_dim": 8, "conv": 2, "chunk": 16}
    return Recall(
        contenders=(
            contender("attention", "attention", attention, 6e-3),
            *(contender(f"window-{n}", "sliding window", attention.clone(mask=sliding(n)), 6e-3) for n in (16, 32, 48)),
            contender("alibi", "attention, ALiBi", attention.clone(position=Alibi()), 6e-3),
            contender("linear", "linear attention", LinearAttention(**same), 1e-2),
            contender("delta_net", "DeltaNet", DeltaNet(**same), 1e-2),
            contender("gated_delta_net", "Gated DeltaNet", GatedDeltaNet(**same), 1e-2),
            contender("kda", "KDA", KDA(**same, lower_bound=-0.2), 1e-2),
        ),
        data=Data(
            length=LENGTH,
            batch=32,
            tokenizer=Ids(VOCAB),
            mixture=(
                task(pairs=2, length=8),
                task(pairs=4, length=16),
                task(pairs=4, length=16, writes=2),
                task(pairs=8, length=32),
                task(pairs=PAIRS, length=LENGTH),
                task(pairs=PAIRS, length=LENGTH, writes=2),
            ),
        ),
        tests=tuple(task(pairs=PAIRS, length=LENGTH, writes=writes, split="test") for writes in (1, 2)),
        train=Train(steps=800, optimizer=AdamW(weight_decay=0.1), schedule=Cosine(peak=1e-2, warmup=30), log_every=50),
    )
