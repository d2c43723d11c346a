"""The menu of sequence mixers: one file a mechanism, one line each."""

from jaxlong.mixers.base import SequenceMixer
from jaxlong.mixers.gqa import GQA
from jaxlong.mixers.ttt import TTTMLP, TTTLinear

MIXERS = {
    "gqa": GQA,
    "ttt_linear": TTTLinear,
    "ttt_mlp": TTTMLP,
}

__all__ = ["GQA", "MIXERS", "TTTMLP", "SequenceMixer", "TTTLinear"]
