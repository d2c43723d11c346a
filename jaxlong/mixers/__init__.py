"""The menu of sequence mixers: one file a mechanism, one line each."""

from jaxlong.mixers.base import SequenceMixer
from jaxlong.mixers.delta_net import DeltaNet
from jaxlong.mixers.dsa import DSA
from jaxlong.mixers.gated_delta_net import GatedDeltaNet
from jaxlong.mixers.gla import GLA
from jaxlong.mixers.gqa import GQA
from jaxlong.mixers.hierarchical import Hierarchical
from jaxlong.mixers.in_place_ttt import InPlaceTTT
from jaxlong.mixers.infini import InfiniAttention
from jaxlong.mixers.kda import KDA
from jaxlong.mixers.linear_attention import LinearAttention
from jaxlong.mixers.log_linear import LogLinear
from jaxlong.mixers.longformer import LongformerAttention
from jaxlong.mixers.longnet import LongNet
from jaxlong.mixers.mamba import Mamba
from jaxlong.mixers.mamba2 import Mamba2
from jaxlong.mixers.mamba3 import Mamba3
from jaxlong.mixers.mla import MLA
from jaxlong.mixers.moba import MoBA
from jaxlong.mixers.nsa import NSA
from jaxlong.mixers.routing import Routing
from jaxlong.mixers.rwkv4 import RWKV4
from jaxlong.mixers.rwkv6 import RWKV6
from jaxlong.mixers.rwkv7 import RWKV7
from jaxlong.mixers.rwkv_channel_mix import RWKVChannelMix
from jaxlong.mixers.short_conv import ShortConv
from jaxlong.mixers.ttt import TTTMLP, TTTLinear

MIXERS = {
    "gqa": GQA,
    "mla": MLA,
    "longformer": LongformerAttention,
    "longnet": LongNet,
    "nsa": NSA,
    "moba": MoBA,
    "dsa": DSA,
    "routing": Routing,
    "hierarchical": Hierarchical,
    "infini": InfiniAttention,
    "linear": LinearAttention,
    "gla": GLA,
    "log_linear": LogLinear,
    "delta_net": DeltaNet,
    "gated_delta_net": GatedDeltaNet,
    "kda": KDA,
    "mamba": Mamba,
    "mamba2": Mamba2,
    "mamba3": Mamba3,
    "rwkv4": RWKV4,
    "rwkv6": RWKV6,
    "rwkv7": RWKV7,
    "rwkv_channel_mix": RWKVChannelMix,
    "ttt_linear": TTTLinear,
    "ttt_mlp": TTTMLP,
    "in_place_ttt": InPlaceTTT,
    "short_conv": ShortConv,
}

__all__ = [
    "DSA",
    "GLA",
    "GQA",
    "KDA",
    "MIXERS",
    "MLA",
    "NSA",
    "RWKV4",
    "RWKV6",
    "RWKV7",
    "TTTMLP",
    "DeltaNet",
    "GatedDeltaNet",
    "Hierarchical",
    "InPlaceTTT",
    "InfiniAttention",
    "LinearAttention",
    "LogLinear",
    "LongNet",
    "LongformerAttention",
    "Mamba",
    "Mamba2",
    "Mamba3",
    "MoBA",
    "RWKVChannelMix",
    "Routing",
    "SequenceMixer",
    "ShortConv",
    "TTTLinear",
]
