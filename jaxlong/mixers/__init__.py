"""The menu of sequence mixers: one file a mechanism, one line each."""

from jaxlong.mixers.base import SequenceMixer
from jaxlong.mixers.gqa import GQA
from jaxlong.mixers.moba import MoBA
from jaxlong.mixers.nsa import NSA

MIXERS = {"gqa": GQA, "moba": MoBA, "nsa": NSA}

__all__ = ["GQA", "MIXERS", "NSA", "MoBA", "SequenceMixer"]
