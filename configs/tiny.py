"""A 0.9M-parameter language model on the standard library's source; the place to start from.

Expected: 200 steps take a few minutes on 2 CPU cores and reach about 2.0 nats a byte.

    python -m experiments.pretrain --config=configs/tiny.py --workdir=runs/tiny --config.train.steps=200
"""

from jaxlong.config import Evaluation, Experiment, Train
from jaxlong.core.position import Rope
from jaxlong.data import Bytes, Data, Packed, Stdlib
from jaxlong.evals import RULER, Needle, Passkey
from jaxlong.layers.mlp import SwiGLU
from jaxlong.mixers import GQA
from jaxlong.model import LM
from jaxlong.train.optim import AdamW, Cosine


def config() -> Experiment:
    text = Stdlib("heldout")
    return Experiment(
        model=LM(
            vocab=256,
            width=128,
            depth=4,
            pattern=(GQA(heads=4, kv_heads=2, head_dim=32, qk_norm=True, position=Rope(base=10000.0)),),
            mlp=SwiGLU(hidden=384),
        ),
        data=Data(length=256, batch=16, tokenizer=Bytes(), mixture=(Packed(Stdlib("train")),)),
        train=Train(
            steps=1000, optimizer=AdamW(weight_decay=0.1), schedule=Cosine(peak=2e-3, warmup=50), save_every=100
        ),
        evaluation=Evaluation(
            tasks=(Needle(text), Passkey(), RULER["niah_single_1"]),
            lengths=(512, 1024),
            samples=20,
            text=text,
            stride=64,
        ),
    )
