"""Make rope.json: frequencies of rotary embeddings as Hugging Face transformers computes them, in float64.

    pip install torch==2.13.0 transformers==5.23.0
    python tests/golden/make_rope.py

transformers computes frequencies in float32. To record them to float64, its own functions are run unchanged except for
the names of types they use: while they run, `torch.float` and `torch.float32` in their modules, and the method
`Tensor.float`, mean float64. Every case is also run without that change, and the two must agree to float32.
"""

from __future__ import annotations

import contextlib
import json
import math
import types
from pathlib import Path

import torch
import transformers
from transformers import LlamaConfig, modeling_rope_utils
from transformers.models.llama import modeling_llama


def phi3_like(dim: int, first: float, last: float) -> list[float]:
    """Rising factors for half of `dim` pairs, two decimals as a search gives them."""
    pairs = dim // 2
    return [round(first * (last / first) ** (i / (pairs - 1)), 2) for i in range(pairs)]


def cases():
    """(dim, rope_parameters, max_position_embeddings, sequence length or None)."""
    for dim, base in ((64, 10000.0), (96, 10000.0), (128, 500000.0), (256, 1000000.0)):
        yield dim, {"rope_type": "default", "rope_theta": base}, 4096, None
    for dim, base, factor in ((64, 10000.0, 2.0), (128, 500000.0, 8.0), (128, 1000000.0, 7.5)):
        yield dim, {"rope_type": "linear", "rope_theta": base, "factor": factor}, 4096, None
        for length in (None, 1000, 4097, 32768):
            yield dim, {"rope_type": "dynamic", "rope_theta": base, "factor": factor}, 4096, length

    yarn = {"rope_type": "yarn"}
    yield 128, {**yarn, "rope_theta": 10000.0, "factor": 16.0, "original_max_position_embeddings": 4096}, 65536, None
    yield 96, {**yarn, "rope_theta": 500000.0, "factor": 4.0, "original_max_position_embeddings": 8192}, 32768, None
    yield 64, {**yarn, "rope_theta": 10000.0, "factor": 1.0, "original_max_position_embeddings": 4096}, 4096, None
    other = {"factor": 8.0, "beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.25}
    yield 128, {**yarn, **other, "rope_theta": 1e6, "original_max_position_embeddings": 32768}, 262144, None
    gpt_oss = {"factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
    yield 64, {**yarn, **gpt_oss, "rope_theta": 150000.0, "original_max_position_embeddings": 4096}, 131072, None
    for mscale, all_dim in ((1.0, 1.0), (0.707, 0.707), (1.0, 0.5)):
        deepseek = {"factor": 40.0, "mscale": mscale, "mscale_all_dim": all_dim}
        yield 64, {**yarn, **deepseek, "rope_theta": 10000.0, "original_max_position_embeddings": 4096}, 163840, None

    for dim, base in ((96, 10000.0), (128, 500000.0)):
        factors = {"short_factor": phi3_like(dim, 1.0, 1.6), "long_factor": phi3_like(dim, 1.05, 64.0)}
        common = {"rope_type": "longrope", "rope_theta": base, "original_max_position_embeddings": 4096}
        for length in (None, 4096, 4097, 131072):
            yield dim, {**common, **factors, "factor": 32.0}, 131072, length
    yield dim, {**common, **factors, "factor": 32.0, "attention_factor": 1.1}, 131072, None

    for dim, factor in ((128, 8.0), (64, 32.0)):
        turns = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        yield dim, {"rope_type": "llama3", "rope_theta": 500000.0, "factor": factor, **turns}, 131072, None


@contextlib.contextmanager
def float64_names():
    wide = types.SimpleNamespace(**{name: getattr(torch, name) for name in dir(torch)})
    wide.float = wide.float32 = torch.float64
    narrow_method = torch.Tensor.float
    modeling_rope_utils.torch = modeling_llama.torch = wide
    torch.Tensor.float = torch.Tensor.double
    try:
        yield
    finally:
        modeling_rope_utils.torch = modeling_llama.torch = torch
        torch.Tensor.float = narrow_method


def frequencies(dim, parameters, longest, length):
    config = LlamaConfig(
        hidden_size=2 * dim,
        num_attention_heads=2,
        head_dim=dim,
        max_position_embeddings=longest,
        rope_parameters=dict(parameters),
    )
    if parameters["rope_type"] == "default":
        return modeling_llama.LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    return modeling_rope_utils.ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, seq_len=length)


def record(dim, parameters, longest, length):
    narrow, _ = frequencies(dim, parameters, longest, length)
    with float64_names():
        wide, attention_factor = frequencies(dim, parameters, longest, length)
    assert narrow.dtype == torch.float32 and wide.dtype == torch.float64
    torch.testing.assert_close(narrow.double(), wide, rtol=1e-5, atol=0.0)
    assert math.isfinite(attention_factor)
    return {
        "dim": dim,
        "rope_parameters": parameters,
        "max_position_embeddings": longest,
        "seq_len": length,
        "inv_freq": wide.tolist(),
        "attention_factor": attention_factor,
    }


if __name__ == "__main__":
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    lines = ",\n".join(json.dumps(record(*case)) for case in cases())
    path = Path(__file__).with_name("rope.json")
    path.write_text(f'{{"versions": {json.dumps(versions)}, "cases": [\n{lines}\n]}}\n')
