"""The menu of sequence mixers: one file a mechanism, one line each."""

from jaxlong.mixers.base import SequenceMixer
from jaxlong.mixers.delta_net import DeltaNet
from jaxlong.mixers.dsa import DSA
from jaxlong.mixers.gated_delta_net import GatedDeltaNet
from jaxlong.mixers.gqa import GQA
from jaxlong.mixers.infini import InfiniAttention
from jaxlong.mixers.kda import KDA
from jaxlong.mixers.mla import MLA
from jaxlong.mixers.moba import MoBA
from jaxlong.mixers.rwkv4 import RWKV4
from jaxlong.mixers.rwkv6 import RWKV6
from jaxlong.mixers.rwkv7 import RWKV7
from jaxlong.mixers.rwkv_channel_mix import RWKVChannelMix
from jaxlong.mixers.short_conv import ShortConv
from jaxlong.mixers.ttt import TTTMLP, TTTLinear

MIXERS = {
    "gqa": GQA,
    "rwkv4": RWKV4,
    "rwkv6": RWKV6,
    "rwkv7": RWKV7,
    "rwkv_channel_mix": RWKVChannelMix,
    "ttt_linear": TTTLinear,
    "ttt_mlp": TTTMLP,
    "mla": MLA,
    "dsa": DSA,
    "moba": MoBA,
    "infini": InfiniAttention,
    "short_conv": ShortConv,
    "delta_net": DeltaNet,
    "gated_delta_net": GatedDeltaNet,
    "kda": KDA,
}

__all__ = [
    "DSA",
    "GQA",
    "KDA",
    "MIXERS",
    "MLA",
    "RWKV4",
    "RWKV6",
    "RWKV7",
    "TTTMLP",
    "DeltaNet",
    "GatedDeltaNet",
    "InfiniAttention",
    "MoBA",
    "RWKVChannelMix",
    "SequenceMixer",
    "ShortConv",
    "TTTLinear",
]
