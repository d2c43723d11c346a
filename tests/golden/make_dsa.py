"""Make dsa.npz: DeepSeek Sparse Attention as transformers and flash-linear-attention compute it.

    pip install torch==2.13.0 transformers==5.23.0 einops
    pip install --no-deps fla-core==0.6.0
    python tests/golden/make_dsa.py

Cases "v32*" are transformers' DeepseekV32Attention as in make_mla.py, with the chosen keys as booleans [B T S] (its
indexer has no gradient). Cases "fla*" are the functions of fla/ops/dsa/naive.py, loaded by path: arrays of heads go in.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

import make_mla
import numpy as np
import torch
from transformers.models.deepseek_v32 import configuration_deepseek_v32, modeling_deepseek_v32

SIZES = (*make_mla.SIZES, "top_k", "index_heads", "index_dim")


def sizes(*values: int) -> dict[str, int]:
    return dict(zip(SIZES, values, strict=True))


# index heads enough that hardly a key scores exactly 0 with all of them: equal scores may be chosen in any order
CASES = {
    "v32": (15, 20, sizes(3, 12, 6, 4, 8, 10, 5, 8, 8), make_mla.PLAIN),
    "v32_yarn": (33, 16, sizes(2, 8, 4, 6, 4, 12, 9, 10, 6), make_mla.SCALED),
}
# name: length, heads, key dim, value dim, index heads, index dim, top_k
NAIVE = {"fla": (19, 4, 12, 8, 8, 8, 6), "fla_long": (70, 2, 6, 6, 10, 4, 12)}


def seen_and_chosen(indices: torch.Tensor, length: int) -> np.ndarray:
    """Booleans [B T S] of the named keys that lie in a query's past; -1 names none."""
    named = torch.zeros(*indices.shape[:2], length + 1, dtype=torch.bool)
    named.scatter_(-1, torch.where(indices < 0, length, indices).long(), True)
    return (named[..., :length] & torch.ones(length, length, dtype=torch.bool).tril()).numpy()


def layout(fields: dict, get) -> dict[str, np.ndarray]:
    """As in make_mla, and the indexer's weights where `get` has them."""
    arrays = make_mla.layout(fields, get)
    if get("indexer.wk.weight") is None:
        return arrays
    queries = get("indexer.wq_b.weight").T
    return arrays | {
        "index_wq": queries.reshape(queries.shape[0], fields["index_heads"], -1),
        "index_wk": get("indexer.wk.weight").T,
        "index_norm": get("indexer.k_norm.weight"),
        "index_bias": get("indexer.k_norm.bias"),
        "index_w": get("indexer.weights_proj.weight").T,
    }


def attention(length: int, width: int, fields: dict, rope: dict) -> dict[str, np.ndarray]:
    index = {"index_topk": fields["top_k"], "index_n_heads": fields["index_heads"]}
    index["index_head_dim"] = fields["index_dim"]
    config = configuration_deepseek_v32.DeepseekV32Config(**make_mla.settings(width, fields, rope), **index)
    module = modeling_deepseek_v32.DeepseekV32Attention(config, 0)
    rotation = modeling_deepseek_v32.DeepseekV32RotaryEmbedding(config)
    make_mla.randomize(module)
    chosen = []
    module.indexer.register_forward_hook(lambda module, args, out: chosen.append(out))
    x, g, positions, mask = make_mla.inputs(length, width)
    y, _ = module(x, attention_mask=mask, position_embeddings=rotation(x, positions), position_ids=positions)
    (y * g).sum().backward()
    found = dict(module.named_parameters())
    value = lambda name: found[name].detach().numpy()
    gradient = lambda name: None if found[name].grad is None else found[name].grad.numpy()
    arrays = {"fields": np.array(make_mla.fields_as_json(fields, rope)), "chosen": seen_and_chosen(chosen[0], length)}
    arrays |= {"x": x.detach().numpy(), "g": g.numpy(), "y": y.detach().numpy(), "dx": x.grad.numpy()}
    arrays |= {"positions": positions.numpy().astype(np.int32)}
    arrays |= {f"p/{k}": a for k, a in layout(fields, value).items()}
    return arrays | {f"d/{k}": a for k, a in layout(fields, gradient).items()}


def naive(module, length, heads, key, value, index_heads, index_dim, count) -> dict[str, np.ndarray]:
    shapes = dict(q=(heads, key), k=(1, key), v=(1, value), index_q=(index_heads, index_dim))
    x = {name: torch.randn(2, length, *shape).requires_grad_() for name, shape in shapes.items()}
    x |= {"index_k": torch.randn(2, length, index_dim), "index_w": torch.randn(2, length, index_heads)}
    o, indices = module.naive_dsa(
        x["q"], x["k"], x["v"], x["index_q"], x["index_k"], x["index_w"], topk=count, return_indices=True
    )
    g = torch.randn_like(o)
    (o * g).sum().backward()
    arrays = {name: a.detach().numpy() for name, a in x.items()} | {"g": g.numpy(), "o": o.detach().numpy()}
    arrays |= {f"d/{name}": x[name].grad.numpy() for name in ("q", "k", "v")}
    return arrays | {"chosen": seen_and_chosen(indices, length), "top_k": np.array(count)}


def main() -> None:
    torch.manual_seed(0)
    path = importlib.metadata.distribution("fla-core").locate_file("fla/ops/dsa/naive.py")
    spec = importlib.util.spec_from_file_location("naive", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    cases = {case: attention(*sizes) for case, sizes in CASES.items()}
    cases |= {case: naive(module, *sizes) for case, sizes in NAIVE.items()}
    arrays = {f"{case}/{name}": array for case, arrays in cases.items() for name, array in arrays.items()}
    arrays["fla_core"] = np.array(importlib.metadata.version("fla-core"))
    make_mla.save(Path(__file__).with_name("dsa.npz"), arrays)


if __name__ == "__main__":
    main()
