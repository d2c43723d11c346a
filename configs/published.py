"""What configurations at published sizes share: how they are trained and where; the corpus is yours to put in.

Their models can be looked at as shapes on any machine (parameters, states, memory); training takes the accelerators
that the mesh names. `python -m experiments.pretrain --config=configs/llama3_8b.py --workdir=DIR --mesh=... \\
--config.data.mixture='(Packed(source=JsonLines(path="shards/*.jsonl")),)'` trains on your own text.
"""

from jaxlong.config import Experiment, Train
from jaxlong.data import Bytes, Data, Packed, Stdlib
from jaxlong.model import LM
from jaxlong.train.optim import AdamW, Cosine


def published(model: LM, *, length: int, batch: int, mesh: str, peak: float = 3e-4) -> Experiment:
    """An experiment with this model; bfloat16 activations, remat, blockwise feed-forward are the model's fields."""
    return Experiment(
        model=model,
        data=Data(length=length, batch=batch, tokenizer=Bytes(), mixture=(Packed(Stdlib("train")),)),
        train=Train(
            steps=100_000,
            optimizer=AdamW(weight_decay=0.1),
            schedule=Cosine(peak=peak, warmup=2000),
            loss_chunk=2048,
            save_every=1000,
        ),
        mesh=mesh,
    )
