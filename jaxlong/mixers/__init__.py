"""The menu of sequence mixers: one file a mechanism, one line each."""

from jaxlong.mixers.base import SequenceMixer
from jaxlong.mixers.gqa import GQA
from jaxlong.mixers.moba import MoBA

MIXERS = {"gqa": GQA, "moba": MoBA}

__all__ = ["GQA", "MIXERS", "MoBA", "SequenceMixer"]
