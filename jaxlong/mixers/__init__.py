"""The menu of sequence mixers: one file a mechanism, one line each."""

from jaxlong.mixers.base import SequenceMixer
from jaxlong.mixers.gqa import GQA
from jaxlong.mixers.in_place_ttt import InPlaceTTT
from jaxlong.mixers.ttt import TTTMLP, TTTLinear

MIXERS = {
    "gqa": GQA,
    "in_place_ttt": InPlaceTTT,
    "ttt_linear": TTTLinear,
    "ttt_mlp": TTTMLP,
}

__all__ = ["GQA", "MIXERS", "TTTMLP", "InPlaceTTT", "SequenceMixer", "TTTLinear"]
