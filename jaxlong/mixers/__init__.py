"""The menu of sequence mixers: one file a mechanism, one line each."""

from jaxlong.mixers.base import SequenceMixer
from jaxlong.mixers.gqa import GQA
from jaxlong.mixers.mla import MLA

MIXERS = {"gqa": GQA, "mla": MLA}

__all__ = ["GQA", "MIXERS", "MLA", "SequenceMixer"]
