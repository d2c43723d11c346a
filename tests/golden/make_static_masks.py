"""Writes static_masks.npz: attention layers of transformers with static masks, values and gradients in float64.

BigBirdBlockSparseAttention in training mode (its draws are read out: in evaluation all random blocks are block 0),
and the sliding layers of Mistral and Gemma 2.

    pip install torch transformers && python tests/golden/make_static_masks.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import BigBirdConfig, Gemma2Config, MistralConfig
from transformers.masking_utils import create_sliding_window_causal_mask
from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention, BigBirdModel
from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention, Gemma2RotaryEmbedding
from transformers.models.mistral.modeling_mistral import MistralAttention, MistralRotaryEmbedding

BIGBIRD = {"bigbird1": (2, 48, 8, 2, 4, 1), "bigbird2": (1, 60, 12, 3, 5, 2)}
"""Batch, length, width, heads, block, random blocks."""
WINDOWS = {"mistral": (2, 17, 12, 4, 2, 4, 5), "gemma": (1, 20, 8, 2, 1, 6, 7)}
"""Batch, length, width, heads, key heads, head dimension, window."""


def start(name: str, batch: int, length: int, width: int, layer: torch.nn.Module):
    torch.manual_seed(sum(map(ord, name)))
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.4)
    x = torch.randn(batch, length, width, dtype=torch.float64, requires_grad=True)
    return x, torch.randn(batch, length, width, dtype=torch.float64)


def finish(name: str, x, y, weights, linears: dict) -> dict:
    (y * weights).sum().backward()
    arrays = {"x": x, "y": y, "weights": weights, "d_x": x.grad}
    for key, weight in linears.items():
        arrays |= {key: weight.T, f"d_{key}": weight.grad.T}
    return {f"{name}/{key}": array.detach().numpy() for key, array in arrays.items()}


def bigbird(name: str, batch: int, length: int, width: int, heads: int, block: int, random: int) -> dict:
    config = BigBirdConfig(
        hidden_size=width, num_attention_heads=heads, block_size=block, num_random_blocks=random, use_bias=False
    )
    layer = BigBirdBlockSparseAttention(config, seed=7).double().train()
    plans, draw = [], layer._bigbird_block_rand_mask_with_head
    layer._bigbird_block_rand_mask_with_head = lambda *args, **options: plans.append(draw(*args, **options)) or plans[0]
    x, weights = start(name, batch, length, width, layer)
    wo = torch.randn(width, width, dtype=torch.float64, requires_grad=True)
    blocked, band, rows, columns = BigBirdModel.create_masks_for_block_sparse_attn(
        torch.ones(batch, length).double(), block
    )
    out = layer(x, band, rows, columns, blocked, blocked)[0]
    plan, count = np.stack(plans[0]), length // block
    for h, row in np.ndindex(*plan.shape[:2]):
        own = {0, row, row + 1, row + 2, count - 1}
        assert len(own | set(plan[h, row].tolist())) == len(own) + random, "a block would count twice"
    linears = {"wq": layer.query.weight, "wk": layer.key.weight, "wv": layer.value.weight}
    data = finish(name, x, out @ wo, weights, linears)
    return data | {f"{name}/wo": wo.detach().numpy(), f"{name}/d_wo": wo.grad.numpy(), f"{name}/plan": plan}


def window(name: str, batch: int, length: int, width: int, heads: int, kept: int, size: int, reach: int) -> dict:
    kinds = {
        "mistral": (MistralConfig, MistralAttention, MistralRotaryEmbedding, {}),
        "gemma": (
            Gemma2Config,
            Gemma2Attention,
            Gemma2RotaryEmbedding,
            {"query_pre_attn_scalar": 9, "attn_logit_softcapping": 2.0},
        ),
    }
    make, attention, rotary, options = kinds[name]
    sizes = dict(hidden_size=width, num_attention_heads=heads, num_key_value_heads=kept, head_dim=size)
    config = make(**sizes, sliding_window=reach, num_hidden_layers=1, attention_dropout=0.0, **options)
    config._attn_implementation = "eager"
    layer = attention(config, 0).double().train()
    x, weights = start(name, batch, length, width, layer)
    positions = torch.arange(length)[None].expand(batch, -1)
    mask = create_sliding_window_causal_mask(config, x, None, None, positions)
    y = layer(x, rotary(config)(x, positions), mask)[0]
    linears = {f"w{key}": getattr(layer, f"{key}_proj").weight for key in "qkvo"}
    return finish(name, x, y, weights, linears) | {f"{name}/sizes": np.array([heads, kept, size, reach])}


if __name__ == "__main__":
    data = {}
    for case, sizes in BIGBIRD.items():
        data |= bigbird(case, *sizes)
    for case, sizes in WINDOWS.items():
        data |= window(case, *sizes)
    data["versions"] = np.array(f"torch {torch.__version__}, transformers {transformers.__version__}")
    np.savez_compressed(Path(__file__).parent / "static_masks.npz", **data)
