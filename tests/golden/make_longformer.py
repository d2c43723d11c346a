"""Writes longformer.npz: LongformerSelfAttention of transformers, values and gradients.

pip install torch transformers && python tests/golden/make_longformer.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import transformers
from transformers.models.longformer.modeling_longformer import LongformerConfig, LongformerSelfAttention

CASES = {
    # batch, length, width, heads, window, global tokens
    "local": (2, 16, 12, 3, 4, 0),
    "global": (2, 24, 16, 4, 8, 3),
    "one": (1, 20, 8, 2, 4, 1),
}
NAMES = {"query": "q", "key": "k", "value": "v"}


def run(name: str, batch: int, length: int, width: int, heads: int, window: int, n_global: int) -> dict:
    torch.manual_seed(sum(map(ord, name)))
    config = LongformerConfig(
        hidden_size=width, num_attention_heads=heads, attention_window=[window], attention_probs_dropout_prob=0.0
    )
    layer = LongformerSelfAttention(config, 0).double()
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.5)
    x = torch.randn(batch, length, width, dtype=torch.float64, requires_grad=True)
    wo = torch.randn(width, width, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(batch, length, width, dtype=torch.float64)
    mask = torch.zeros(batch, length, dtype=torch.float64)
    mask[:, :n_global] = 10000.0
    out = layer(x, mask, mask < 0, mask > 0, n_global > 0)[0]
    y = out @ wo
    (y * weights).sum().backward()

    arrays = {"x": x, "y": y, "weights": weights, "wo": wo, "d_x": x.grad, "d_wo": wo.grad}
    for linear, letter in NAMES.items():
        for suffix in ("", "_global") if n_global else ("",):
            module = getattr(layer, linear + suffix)
            arrays[f"w{letter}{suffix}"], arrays[f"d_w{letter}{suffix}"] = module.weight.T, module.weight.grad.T
            arrays[f"b{letter}{suffix}"], arrays[f"d_b{letter}{suffix}"] = module.bias, module.bias.grad
    arrays = {key: value.detach().numpy() for key, value in arrays.items()}
    return {f"{name}/{key}": value for key, value in arrays.items()} | {
        f"{name}/sizes": np.array([heads, window, n_global])
    }


if __name__ == "__main__":
    data = {}
    for case, sizes in CASES.items():
        data |= run(case, *sizes)
    data["versions"] = np.array(f"torch {torch.__version__}, transformers {transformers.__version__}")
    np.savez_compressed(Path(__file__).parent / "longformer.npz", **data)
