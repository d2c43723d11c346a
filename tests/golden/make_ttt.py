"""Writes ttt.npz: outputs and gradients of the authors' TTT layers in double precision.

python tests/golden/make_ttt.py PATH/ttt.py

ttt.py is that of github.com/test-time-training/ttt-lm-pytorch; it needs torch and transformers.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers

# name: (class, width, heads, mini-batch, length, step size, Mamba backbone)
CASES = {
    "linear": ("TTTLinear", 12, 2, 8, 21, 1.0, False),
    "linear_mamba": ("TTTLinear", 8, 2, 4, 13, 1.0, True),
    "mlp": ("TTTMLP", 8, 1, 16, 19, 0.1, False),
    "mlp_mamba": ("TTTMLP", 12, 3, 4, 14, 0.3, True),
}


def main(path: str) -> None:
    source = load(path)
    torch.set_default_dtype(torch.float64)
    arrays = {}
    for seed, (name, case) in enumerate(CASES.items()):
        arrays |= {f"{name}/{key}": np.asarray(value) for key, value in run(source, seed, *case).items()}
    versions = {
        "ttt.py sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "seeds": list(range(len(CASES))),
    }
    np.savez_compressed(Path(__file__).with_name("ttt.npz"), versions=json.dumps(versions), **arrays)


def load(path: str):
    spec = importlib.util.spec_from_file_location("ttt", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["ttt"] = module
    spec.loader.exec_module(module)
    return module


def run(source, seed, layer, width, heads, mini_batch, length, base_lr, mamba):
    torch.manual_seed(seed)
    config = source.TTTConfig(
        hidden_size=width,
        num_attention_heads=heads,
        mini_batch_size=mini_batch,
        ttt_base_lr=base_lr,
        share_qk=mamba,
        use_gate=mamba,
        conv_kernel=4,
    )
    module = getattr(source, layer)(config, layer_idx=0)
    with torch.no_grad():  # away from zeros and ones
        for p in module.parameters():
            p += 0.2 * torch.randn_like(p)
    x = torch.randn(2, length, width, requires_grad=True)
    weights = torch.randn(2, length, width)
    y = module(x, position_ids=torch.arange(length)[None])
    (y * weights).sum().backward()
    facts = {"x": x.detach(), "weights": weights, "y": y.detach(), "grad/x": x.grad}
    values = {name: p.detach() for name, p in module.named_parameters()}
    slopes = {name: p.grad for name, p in module.named_parameters()}
    facts |= {f"params/{name}": value for name, value in renamed(values, heads).items()}
    return facts | {f"grad/params/{name}": value for name, value in renamed(slopes, heads).items()}


def renamed(p, heads):
    """The authors' parameters under this library's names and shapes."""
    dim = p["ttt_norm_weight"].shape[1]
    inward = {"q_proj": "wq", "k_proj": "wk", "v_proj": "wv", "g_proj": "wg"}
    out = {new: p[f"{old}.weight"].T.reshape(-1, heads, dim) for old, new in inward.items() if f"{old}.weight" in p}
    out["wo"] = p["o_proj.weight"].T.reshape(heads, dim, -1)
    for name in ("conv_q", "conv_k"):
        if f"{name}.weight" in p:
            out |= {name: p[f"{name}.weight"][:, 0].T, f"{name}_bias": p[f"{name}.bias"]}
    for layer in ("1", "2"):
        if f"W{layer}" in p:
            out |= {f"w{layer}": p[f"W{layer}"], f"b{layer}": p[f"b{layer}"][:, 0]}
    return out | {
        "lr": p["learnable_ttt_lr_weight"][:, 0].T,
        "lr_bias": p["learnable_ttt_lr_bias"][:, 0],
        "coef": p["learnable_token_idx"],
        "norm_scale": p["ttt_norm_weight"],
        "norm_shift": p["ttt_norm_bias"],
        "post_scale": p["post_norm.weight"],
        "post_shift": p["post_norm.bias"],
    }


if __name__ == "__main__":
    main(sys.argv[1])
