"""The menu of sequence mixers: one file a mechanism, one line each."""

from jaxlong.mixers.base import SequenceMixer
from jaxlong.mixers.dsa import DSA
from jaxlong.mixers.gqa import GQA
from jaxlong.mixers.mla import MLA

MIXERS = {"gqa": GQA, "mla": MLA, "dsa": DSA}

__all__ = ["DSA", "GQA", "MIXERS", "MLA", "SequenceMixer"]
