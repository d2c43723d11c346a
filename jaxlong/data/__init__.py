"""Data: sources of text, tokenizers, packing into rows, synthetic samples, weighted mixtures.

data = Data(length=128, batch=32, tokenizer=Bytes(), mixture=(Packed(Stdlib("train")), Samples(task, weight=9.0)))
stream = batches(data, seed=0)
batch = next(stream)                 # Batch of [B, T] NumPy arrays
state = stream.get_state()           # JSON; batches(data, seed=0).set_state(state) goes on exactly there
"""

from __future__ import annotations

from jaxlong.data.mixture import Batches, Data, Part, batches, describe
from jaxlong.data.packing import PACKINGS, Packed
from jaxlong.data.recall import MQAR, Ids
from jaxlong.data.records import ArrayRecord, Jsonl, Parquet
from jaxlong.data.sources import Source, Stdlib, TextFolder
from jaxlong.data.synthetic import Samples, Task
from jaxlong.data.tokenizers import Ascii, Bytes, HuggingFace, Tokenizer

SOURCES: dict[str, type[Source]] = {
    "stdlib": Stdlib,
    "text_folder": TextFolder,
    "jsonl": Jsonl,
    "parquet": Parquet,
    "array_record": ArrayRecord,
}
TOKENIZERS: dict[str, type] = {"bytes": Bytes, "ascii": Ascii, "huggingface": HuggingFace, "ids": Ids}

__all__ = [
    "MQAR",
    "PACKINGS",
    "SOURCES",
    "TOKENIZERS",
    "ArrayRecord",
    "Ascii",
    "Batches",
    "Bytes",
    "Data",
    "HuggingFace",
    "Ids",
    "Jsonl",
    "Packed",
    "Parquet",
    "Part",
    "Samples",
    "Source",
    "Stdlib",
    "Task",
    "TextFolder",
    "Tokenizer",
    "batches",
    "describe",
]
