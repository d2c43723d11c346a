"""The menu of sequence mixers: one file a mechanism, one line each."""

from jaxlong.mixers.base import SequenceMixer
from jaxlong.mixers.gqa import GQA
from jaxlong.mixers.infini import InfiniAttention

MIXERS = {
    "gqa": GQA,
    "infini": InfiniAttention,
}

__all__ = [
    "GQA",
    "MIXERS",
    "InfiniAttention",
    "SequenceMixer",
]
