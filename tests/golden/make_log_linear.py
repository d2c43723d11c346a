"""Writes log_linear.npz: flash-linear-attention's quadratic log-linear attention, values and gradients in float64.

pip install torch && pip install --no-deps fla-core && python tests/golden/make_log_linear.py
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

import numpy as np
import torch

CASES = {"own": (2, 37, 2, 2, 3, 4), "grouped": (1, 64, 1, 2, 4, 3)}
"""Batch, length, key heads, value heads, key and value dimensions."""


def reference():
    package = importlib.metadata.distribution("fla-core")
    path = package.locate_file("fla/ops/log_linear_attn/naive.py")
    spec = importlib.util.spec_from_file_location("naive", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.naive_log_linear_attn, package.version


def run(naive, name: str, batch: int, length: int, groups: int, heads: int, key_dim: int, value_dim: int) -> dict:
    torch.manual_seed(sum(map(ord, name)))
    levels = int(np.ceil(np.log2(length))) + 1
    random = lambda *shape: torch.randn(*shape, dtype=torch.float64)
    arrays = {
        "q": random(batch, length, groups, key_dim),
        "k": random(batch, length, groups, key_dim),
        "v": random(batch, length, heads, value_dim),
        "g": -0.3 * random(batch, length, heads).abs(),
        "scales": random(batch, length, heads, levels).abs(),
    }
    for array in arrays.values():
        array.requires_grad_()
    o, weights = naive(*arrays.values()), random(batch, length, heads, value_dim)
    (o * weights).sum().backward()
    arrays |= {f"d_{key}": array.grad for key, array in arrays.items()} | {"o": o, "weights": weights}
    return {f"{name}/{key}": array.detach().numpy() for key, array in arrays.items()}


if __name__ == "__main__":
    naive, version = reference()
    data = {}
    for case, sizes in CASES.items():
        data |= run(naive, case, *sizes)
    data["versions"] = np.array(f"torch {torch.__version__}, fla-core {version}")
    np.savez_compressed(Path(__file__).parent / "log_linear.npz", **data)
