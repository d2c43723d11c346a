"""Pretrain 116K parameters at 128 tokens, extend four times with YaRN, find needles at 512.

The model learns text and retrieval together: in nine of ten rows a line such as `# key fox=482` hides in
real source text, and a question at the end asks for it. Paper of the extension: Peng et al., arXiv
2309.00071. Expected: needles beyond the trained length are found by at most 10 % of plain RoPE's answers
and at least 85 % of YaRN's.

    python -m experiments.quickstart
"""

from jaxlong.config import Evaluation, Experiment, Train
from jaxlong.core.position import Rope
from jaxlong.data import Ascii, Data, Packed, Samples, Stdlib
from jaxlong.evals import Needle, needle_grid
from jaxlong.layers.mlp import SwiGLU
from jaxlong.mixers import GQA
from jaxlong.model import LM, extend
from jaxlong.train.optim import WSD, AdamW

LENGTH = 128


def config() -> Experiment:
    text, heldout = Stdlib("train"), Stdlib("heldout")
    retrieval = Needle(text, needles=(1, 3), questions=(1, 3), split="train")
    return Experiment(
        model=LM(
            vocab=128,
            width=64,
            depth=2,
            pattern=(GQA(heads=2, kv_heads=1, head_dim=32, qk_norm=True, conv=5, position=Rope(base=500.0)),),
            mlp=SwiGLU(hidden=192),
        ),
        data=Data(
            length=LENGTH,
            batch=32,
            tokenizer=Ascii(),
            mixture=(Packed(text), Samples(retrieval, weight=9.0, answer_weight=20.0)),
        ),
        train=Train(
            steps=500,
            optimizer=AdamW(b2=0.98, weight_decay=0.05),
            schedule=WSD(peak=3e-3, warmup=30, decay=150),
            save_every=250,
        ),
        evaluation=Evaluation(
            tasks=needle_grid(Needle(heldout, split="heldout"), [depth / 10 for depth in range(11)]),
            lengths=(LENGTH, 2 * LENGTH, 4 * LENGTH),
            samples=14,
            text=heldout,
            stride=LENGTH,
        ),
    )


def tuning(scaling) -> Experiment:
    """The short fine-tune at four times the length, under one scaling: three long rows to two rows of short samples."""
    base = config()
    text = Stdlib("train")
    long = Needle(text, needles=(1, 8), questions=(1, 3), split="train")
    short = Needle(text, needles=(1, 3), questions=(1, 3), split="train")
    return Experiment(
        model=base.model if scaling is None else extend(base.model, scaling),
        data=Data(
            length=4 * LENGTH,
            batch=8,
            tokenizer=Ascii(),
            mixture=(
                Samples(long, weight=3.0, answer_weight=20.0),
                Samples(short, length=LENGTH, weight=2.0, answer_weight=20.0),
            ),
        ),
        train=Train(
            steps=20,
            optimizer=AdamW(b2=0.98, weight_decay=0.05),
            schedule=WSD(peak=5e-4, warmup=1, decay=19),
            save_every=20,
            log_every=1,
        ),
        evaluation=base.evaluation,
        seed=1,
    )
