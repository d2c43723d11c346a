"""The menu of sequence mixers: one file a mechanism, one line each."""

from jaxlong.mixers.base import SequenceMixer
from jaxlong.mixers.gqa import GQA

MIXERS = {"gqa": GQA}

__all__ = ["GQA", "MIXERS", "SequenceMixer"]
