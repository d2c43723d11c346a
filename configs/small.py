"""What the small configurations of the families share: two layers, one hundred thousand parameters, 300 steps.

Grouped-query attention stands for itself; `configs/small_<family>.py` put other mixers in its place. A bigram model
fitted to the very bytes of the 300 steps reaches 2.41 nats a byte; every family is expected below it.

    python -m experiments.pretrain --config=configs/small.py --workdir=runs/small
"""

from typing import Any

from jaxlong.config import Experiment, Train
from jaxlong.data import Bytes, Data, Packed, Stdlib
from jaxlong.layers.mlp import SwiGLU
from jaxlong.mixers import GQA
from jaxlong.model import LM
from jaxlong.train.optim import WSD, AdamW

WIDTH = 64
FEED_FORWARD = SwiGLU(hidden=128)
ATTENTION = GQA(heads=2, kv_heads=1, head_dim=32, qk_norm=True)


def small(*pattern: Any, mlp: Any = FEED_FORWARD, peak: float = 4e-3, depth: int = 2) -> Experiment:
    """The shared experiment with this pattern of mixers."""
    return Experiment(
        model=LM(vocab=256, width=WIDTH, depth=depth, pattern=pattern, mlp=mlp),
        data=Data(length=128, batch=16, tokenizer=Bytes(), mixture=(Packed(Stdlib("train")),)),
        train=Train(
            steps=300, optimizer=AdamW(weight_decay=0.05), schedule=WSD(peak=peak, warmup=20, decay=100, final=0.05)
        ),
    )


def config() -> Experiment:
    return small(ATTENTION)
