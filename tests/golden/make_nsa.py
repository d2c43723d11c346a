"""Writes nsa.npz: native sparse attention by the naive functions of flash-linear-attention, values and gradients.

    python tests/golden/make_nsa.py        # needs torch, einops and fla-core (seen with 2.13.0, 0.8.2, 0.6.0)

Their file imports two helpers from modules that need triton; both are written here again.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import torch

CASES = {
    # name: (seed, B, T, D, H, K, C, block, blocks a query reads)
    "a": (0, 2, 26, 12, 16, 1, 4, 4, 4),
    "b": (1, 1, 41, 10, 32, 2, 3, 5, 5),
}


def mean_pooling(x: torch.Tensor, size: int, cu_seqlens: None) -> torch.Tensor:
    """Means of blocks; the last may be shorter (no query sees its mean, but it can be selected)."""
    return torch.stack([x[:, i : i + size].mean(1) for i in range(0, x.shape[1], size)], dim=1)


def reference() -> types.ModuleType:
    """The package's naive.py, executed by path."""
    utils, pooling = types.ModuleType("fla.ops.utils"), types.ModuleType("fla.ops.utils.pooling")
    utils.prepare_chunk_offsets, pooling.mean_pooling = None, mean_pooling
    for name, module in (("fla", types.ModuleType("fla")), ("fla.ops", types.ModuleType("fla.ops"))):
        sys.modules[name] = module
    sys.modules[utils.__name__], sys.modules[pooling.__name__] = utils, pooling
    path = importlib.metadata.distribution("fla-core").locate_file("fla/ops/nsa/naive.py")
    spec = importlib.util.spec_from_file_location("naive_nsa", path)
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no flash-attn: the local branch is not used
        spec.loader.exec_module(module)
    return module


def case(naive: types.ModuleType, seed, B, T, D, H, K, C, block, top_k) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"x": (B, T, D), "wq": (D, H, C), "wk": (D, K, C), "wv": (D, K, C), "wg": (D, H, 2), "wo": (H, C, D)}
    data = {name: rng.normal(size=shape).astype(np.float32) * 0.5 for name, shape in shapes.items()}
    x, wq, wk, wv, wg, wo = leaves = [torch.tensor(a, requires_grad=True) for a in data.values()]
    q, k, v = (torch.einsum("btd,dhc->bthc", x, w) for w in (wq, wk, wv))
    gates = torch.sigmoid(torch.einsum("btd,dhn->bthn", x, wg))
    o = naive.naive_nsa(q, k, v, gates[..., 0], gates[..., 1], block_counts=top_k, block_size=block)
    y = torch.einsum("bthc,hcd->btd", o, wo)
    weigh = rng.normal(size=shapes["x"]).astype(np.float32)
    (y * torch.tensor(weigh)).sum().backward()
    grads = {f"d{name}": leaf.grad.numpy() for name, leaf in zip(shapes, leaves, strict=True)}
    return data | grads | {"weigh": weigh, "y": y.detach().numpy(), "settings": np.array([block, top_k])}


def main() -> None:
    naive = reference()
    arrays = {f"{name}_{key}": a for name, sizes in CASES.items() for key, a in case(naive, *sizes).items()}
    versions = {name: importlib.metadata.version(name) for name in ("fla-core", "torch", "numpy")}
    made_by = f"fla/ops/nsa/naive.py naive_nsa; {versions}; seeds {[sizes[0] for sizes in CASES.values()]}"
    np.savez_compressed(Path(__file__).with_name("nsa.npz"), made_by=np.array(made_by), **arrays)


if __name__ == "__main__":
    main()
