"""jaxlong: long-context language models in JAX.

    from jaxlong import LM, GQA, SwiGLU, Rope, Yarn, attend, causal, extend

Every name below is imported when it is first used, so `import jaxlong` costs next to nothing.
"""

from __future__ import annotations

import importlib

_HOME = {
    "jaxlong.core.mask": "Mask causal sliding sinks dilated strided fixed prefix longformer bigbird",
    "jaxlong.core.position": "Rope NoPE Alibi PI NTK DynamicNTK Yarn LongRope Llama3 apply_rope",
    "jaxlong.core.state": "KVCache LatentCache Recurrent nbytes",
    "jaxlong.core.types": "BadInput Batch",
    "jaxlong.ops.attend": "Backend attend attend_with_lse merge",
    "jaxlong.ops.loss": "cross_entropy",
    "jaxlong.ops.delta": "delta_rule generalized_delta_rule",
    "jaxlong.ops.scan": "linear_attention linear_scan selective_scan",
    "jaxlong.ops.select": "Selection attend_selected straight_through_top_k top_k",
    "jaxlong.mixers": (
        "MIXERS GQA MLA LongformerAttention LongNet NSA MoBA DSA Routing Hierarchical InfiniAttention "
        "LinearAttention GLA LogLinear DeltaNet GatedDeltaNet KDA Mamba Mamba2 Mamba3 RWKV4 RWKV6 RWKV7 "
        "RWKVChannelMix TTTLinear TTTMLP InPlaceTTT ShortConv"
    ),
    "jaxlong.layers.mlp": "SwiGLU Gelu",
    "jaxlong.layers.moe": "MoE",
    "jaxlong.model": "LM Layer distributed extend init_params",
    "jaxlong.parallel.mesh": "make_mesh",
    "jaxlong.parallel.layout": "permute restore",
    "jaxlong.parallel.partial": "Meta",
    "jaxlong.parallel.ring": "ring",
    "jaxlong.parallel.ulysses": "ulysses",
    "jaxlong.parallel.allgather": "all_gather",
    "jaxlong.parallel.flags": "recommended_flags",
    "jaxlong.parallel.processes": "init_distributed",
    "jaxlong.data": "Data batches",
    "jaxlong.train.grads": "next_token_loss",
    "jaxlong.train.chunked": "seco spaco",
    "jaxlong.train.step": "make_step",
    "jaxlong.train.loop": "fit",
    "jaxlong.evals": "evaluate",
    "jaxlong.inference": "Runner generate",
    "jaxlong.config": "Experiment load",
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names.split()}

__version__ = "0.1.0"
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'jaxlong' has no attribute '{name}'")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return __all__
