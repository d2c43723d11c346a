"""The smallest experiment that attends, convolves and saves: what the jobs of `test_processes.py` train."""

from jaxlong.config import Experiment, Train
from jaxlong.data import MQAR, Data, Ids
from jaxlong.layers.mlp import SwiGLU
from jaxlong.mixers import GQA
from jaxlong.model import LM
from jaxlong.train.optim import AdamW, Cosine


def config() -> Experiment:
    attention = GQA(heads=2, kv_heads=1, head_dim=8, conv=3)
    return Experiment(
        model=LM(vocab=64, width=16, depth=1, pattern=(attention,), mlp=SwiGLU(hidden=16)),
        data=Data(length=32, batch=8, tokenizer=Ids(64), mixture=(MQAR(vocab=64, pairs=4, length=16),), threads=0),
        train=Train(
            steps=40, optimizer=AdamW(), schedule=Cosine(peak=3e-3, warmup=2), save_every=6, log_every=1, loss_chunk=8
        ),
        mesh="data=2,seq=2",
    )
