"""The menu of sequence mixers: one file a mechanism, one line each."""

from jaxlong.mixers.base import SequenceMixer
from jaxlong.mixers.gqa import GQA
from jaxlong.mixers.short_conv import ShortConv

MIXERS = {"gqa": GQA, "short_conv": ShortConv}

__all__ = ["GQA", "MIXERS", "SequenceMixer", "ShortConv"]
