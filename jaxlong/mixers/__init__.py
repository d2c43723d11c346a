"""The menu of sequence mixers: one file a mechanism, one line each."""

from jaxlong.mixers.base import SequenceMixer
from jaxlong.mixers.gqa import GQA
from jaxlong.mixers.moba import MoBA
from jaxlong.mixers.nsa import NSA
from jaxlong.mixers.routing import Routing

MIXERS = {"gqa": GQA, "moba": MoBA, "nsa": NSA, "routing": Routing}

__all__ = ["GQA", "MIXERS", "NSA", "MoBA", "Routing", "SequenceMixer"]
