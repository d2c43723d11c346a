"""The menu of sequence mixers: one file a mechanism, one line each."""

from jaxlong.mixers.base import SequenceMixer
from jaxlong.mixers.gqa import GQA
from jaxlong.mixers.hierarchical import Hierarchical
from jaxlong.mixers.infini import InfiniAttention
from jaxlong.mixers.log_linear import LogLinear
from jaxlong.mixers.longformer import Longformer
from jaxlong.mixers.longnet import LongNet

MIXERS = {
    "gqa": GQA,
    "hierarchical": Hierarchical,
    "infini": InfiniAttention,
    "log_linear": LogLinear,
    "longformer": Longformer,
    "longnet": LongNet,
}

__all__ = [
    "GQA",
    "MIXERS",
    "Hierarchical",
    "InfiniAttention",
    "LogLinear",
    "LongNet",
    "Longformer",
    "SequenceMixer",
]
