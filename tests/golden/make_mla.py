"""Make mla.npz: multi-head latent attention as Hugging Face transformers computes it.

    pip install torch==2.13.0 transformers==5.23.0
    python tests/golden/make_mla.py

Modules run in float64 but for what they force to float32 themselves (norms, softmax, rotations). Of each case the file
holds the fields of the mixer as JSON, x, positions, the cotangent g, the output y, all parameters and their gradients
of sum(y g), in the layout of `jaxlong.mixers.MLA`, stored as float32.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers.models.deepseek_v3 import configuration_deepseek_v3, modeling_deepseek_v3
from transformers.models.kimi_linear import configuration_kimi_linear, modeling_kimi_linear

YARN = {"factor": 4.0, "original_max_position_embeddings": 16, "mscale": 1.0, "mscale_all_dim": 0.8}
PLAIN, SCALED = {"rope_type": "default", "rope_theta": 100.0}, {"rope_type": "yarn", "rope_theta": 500.0, **YARN}
SIZES = ("heads", "kv_rank", "nope_dim", "rope_dim", "value_dim", "q_rank")


def sizes(*values: int | None) -> dict[str, int | None]:
    return dict(zip(SIZES, values, strict=True))


# name: model, length, width, fields of the mixer, rope
CASES = {
    "v3": ("deepseek_v3", 11, 24, sizes(3, 16, 8, 4, 6, 10), PLAIN),
    "v3_yarn": ("deepseek_v3", 37, 20, sizes(2, 12, 6, 8, 10, 14), SCALED),
    "v3_direct": ("deepseek_v3", 17, 16, sizes(4, 8, 4, 6, 4, None), PLAIN),
    "kimi": ("kimi_linear", 13, 16, sizes(2, 12, 6, 4, 8, None), None),
    "kimi_wide": ("kimi_linear", 20, 20, sizes(3, 8, 8, 2, 4, None), None),
}


def settings(width: int, fields: dict, rope: dict | None) -> dict:
    """Fields of a transformers configuration."""
    sizes = dict(
        hidden_size=width,
        num_attention_heads=fields["heads"],
        num_key_value_heads=fields["heads"],
        q_lora_rank=fields["q_rank"],
        kv_lora_rank=fields["kv_rank"],
        qk_nope_head_dim=fields["nope_dim"],
        qk_rope_head_dim=fields["rope_dim"],
        v_head_dim=fields["value_dim"],
        max_position_embeddings=64,
        attn_implementation="eager",
    )
    return sizes if rope is None else sizes | {"rope_parameters": dict(rope)}


def build(name: str, width: int, fields: dict, rope: dict | None):
    """(attention, its rotation or None)."""
    if name == "kimi_linear":
        config = configuration_kimi_linear.KimiLinearConfig(**settings(width, fields, rope))
        return modeling_kimi_linear.KimiLinearAttention(config, 0), None
    config = configuration_deepseek_v3.DeepseekV3Config(**settings(width, fields, rope))
    return modeling_deepseek_v3.DeepseekV3Attention(config, 0), modeling_deepseek_v3.DeepseekV3RotaryEmbedding(config)


def layout(fields: dict, get) -> dict[str, np.ndarray]:
    """What `get(name)` gives (a weight or its gradient), by the names and shapes of `jaxlong.mixers.MLA`."""
    heads, nope, value = fields["heads"], fields["nope_dim"], fields["value_dim"]
    up = get("kv_b_proj.weight").reshape(heads, nope + value, -1).transpose(2, 0, 1)
    queries = get("q_proj.weight" if fields["q_rank"] is None else "q_b_proj.weight").T
    arrays = {
        "wq": queries.reshape(queries.shape[0], heads, -1),
        "wkv_a": get("kv_a_proj_with_mqa.weight").T,
        "kv_norm": get("kv_a_layernorm.weight"),
        "wk": up[..., :nope],
        "wv": up[..., nope:],
        "wo": get("o_proj.weight").T.reshape(heads, value, -1),
    }
    if fields["q_rank"] is not None:
        arrays |= {"wq_a": get("q_a_proj.weight").T, "q_norm": get("q_a_layernorm.weight")}
    return arrays


def randomize(module: torch.nn.Module) -> None:
    """Double precision, and every parameter random."""
    module.double()
    for name, parameter in module.named_parameters():
        noise = torch.randn_like(parameter)
        parameter.data = 1 + 0.3 * noise if parameter.ndim == 1 else noise * 1.5 * parameter.shape[-1] ** -0.5
        if name.endswith("bias"):
            parameter.data -= 1


def inputs(length: int, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, its cotangent, positions that do not start at 0, and the causal mask."""
    x = torch.randn(2, length, width, dtype=torch.float64, requires_grad=True)
    g = torch.randn(2, length, width, dtype=torch.float64)
    positions = torch.arange(length)[None] + torch.tensor([[0], [5]])
    mask = torch.full((length, length), -torch.inf, dtype=torch.float64).triu(1)[None, None].expand(2, 1, -1, -1)
    return x, g, positions, mask


def fields_as_json(fields: dict, rope: dict | None) -> str:
    position = None if rope is None else {"base": rope["rope_theta"], "yarn": YARN if len(rope) > 2 else None}
    return json.dumps({"fields": fields, "rope": position})


def save(path: Path, arrays: dict) -> None:
    versions = json.dumps({"torch": torch.__version__, "transformers": transformers.__version__, "seed": 0})
    narrow = {k: a.astype(np.float32) if a.dtype == np.float64 else a for k, a in arrays.items()}
    np.savez_compressed(path, versions=np.array(versions), **narrow)


def attention(model: str, length: int, width: int, fields: dict, rope: dict | None) -> dict[str, np.ndarray]:
    """One case."""
    module, rotation = build(model, width, fields, rope)
    randomize(module)
    x, g, positions, mask = inputs(length, width)
    rotated = {} if rotation is None else {"position_embeddings": rotation(x, positions)}
    y, _ = module(x, attention_mask=mask, **rotated)
    (y * g).sum().backward()
    found = dict(module.named_parameters())
    arrays = {"fields": np.array(fields_as_json(fields, rope)), "positions": positions.numpy().astype(np.int32)}
    arrays |= {"x": x.detach().numpy(), "g": g.numpy(), "y": y.detach().numpy(), "dx": x.grad.numpy()}
    arrays |= {f"p/{k}": a for k, a in layout(fields, lambda n: found[n].detach().numpy()).items()}
    return arrays | {f"d/{k}": a for k, a in layout(fields, lambda n: found[n].grad.numpy()).items()}


def main() -> None:
    torch.manual_seed(0)
    cases = {case: attention(*what) for case, what in CASES.items()}
    arrays = {f"{case}/{name}": array for case, arrays in cases.items() for name, array in arrays.items()}
    save(Path(__file__).with_name("mla.npz"), arrays)


if __name__ == "__main__":
    main()
