"""Recall against state on the published grid (Based, Arora et al., arXiv 2402.18668, figure 2); for a GPU.

Documents of 64 to 256 tokens with 4 to 64 pairs, asked at 64 to 1,024 tokens; vocabulary 8,192; as many documents as
32 epochs of 180,000, drawn fresh instead of repeated and packed into rows of 256; best of four learning rates. Each
model is a short convolution of width 3 and one mixer, without feed-forward layers. Expected: attention at least 99 %;
windows of 8 to 1,024 tokens what they reach (6, 15, 31, 51, 65, 80, 94 and 100 %), within 3 points.

    python -m experiments.recall --config=configs/recall_full.py --out=runs/recall-full
"""

from jaxlong.config import Train
from jaxlong.core.mask import sliding
from jaxlong.core.position import NoPE
from jaxlong.data import MQAR, Data, Ids
from jaxlong.mixers import GLA, GQA, KDA, RWKV7, DeltaNet, GatedDeltaNet, LinearAttention, Mamba2, ShortConv
from jaxlong.model import LM
from jaxlong.recall import Contender, Recall
from jaxlong.train.optim import AdamW, Cosine

VOCAB, LENGTH, WIDTH = 8192, 256, 128
RATES = (1e-3, 10**-2.5, 1e-2, 10**-1.5)
TRAINED = ((64, 4, 25.0), (128, 8, 10.0), (256, 16, 20.0), (256, 32, 20.0), (256, 64, 20.0))
"""(length, pairs, rows of 256 in proportion to 100,000, 20,000, 20,000, 20,000 and 20,000 documents)"""
TESTED = ((64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256))

RECURRENT = {
    "linear": ("linear attention", lambda dim: LinearAttention(heads=2, head_dim=dim, conv=4)),
    "gla": ("GLA", lambda dim: GLA(heads=2, head_dim=dim, conv=4)),
    "mamba2": ("Mamba-2", lambda dim: Mamba2(heads=2, head_dim=dim, state_dim=dim, step_limit=(0.0, 10.0))),
    "rwkv7": ("RWKV-7", lambda dim: RWKV7(heads=2, head_dim=dim, value_residual=False)),
    "delta_net": ("DeltaNet", lambda dim: DeltaNet(heads=2, head_dim=dim)),
    "gated_delta_net": ("Gated DeltaNet", lambda dim: GatedDeltaNet(heads=2, head_dim=dim)),
    "kda": ("KDA", lambda dim: KDA(heads=2, head_dim=dim)),
}
"""name -> (family, mixer with two heads of that size): states of 2 to 128 KiB."""


def task(length: int, pairs: int, split: str, weight: float = 1.0) -> MQAR:
    return MQAR(vocab=VOCAB, pairs=pairs, length=length, filler="random", split=split, weight=weight)


def contender(name: str, family: str, mixer) -> Contender:
    pattern = (ShortConv(width=3, bias=True), mixer)
    model = LM(vocab=VOCAB, width=WIDTH, depth=2, pattern=pattern, mlp=None)
    return Contender(name, family, model, rates=RATES)


def config() -> Recall:
    attention = GQA(heads=1, kv_heads=1, head_dim=WIDTH, position=NoPE())
    windows = [contender(f"window-{2**n}", "sliding window", attention.clone(mask=sliding(2**n))) for n in range(3, 11)]
    recurrent = [
        contender(f"{name}-{dim}", family, make(dim))
        for name, (family, make) in RECURRENT.items()
        for dim in (16, 32, 64, 128)
    ]
    return Recall(
        contenders=(contender("attention", "attention", attention), *windows, *recurrent),
        data=Data(
            length=LENGTH,
            batch=128,
            tokenizer=Ids(VOCAB),
            mixture=tuple(task(length, pairs, "train", weight) for length, pairs, weight in TRAINED),
            threads=8,
        ),
        tests=tuple(task(length, pairs, "test") for length, pairs in TESTED),
        train=Train(
            steps=23_800,
            optimizer=AdamW(weight_decay=0.1),
            schedule=Cosine(peak=1e-2, warmup=1000),
            log_every=100,
            save_every=10_000,
            keep=1,
        ),
        rows=1000,
    )
