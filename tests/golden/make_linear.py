"""Make linear.npz: linear attention, values and gradients, from flash-linear-attention and transformers.

    pip install torch==2.13.0 transformers==5.23.0 einops && pip install --no-deps fla-core==0.6.0
    python tests/golden/make_linear.py

`kind/case/`: the naive functions linear_attn (normalised), retention, simple_gla and gla of flash-linear-attention:
inputs [B T H C], y, the state where there is one, and the gradient of sum(y * cotangent) with respect to each input
(grad.*). `lightning/case/`: MiniMaxLightningAttention of layer `layer` of four, its weights likewise.
"""

from __future__ import annotations

import importlib.util
from importlib.metadata import distribution, version
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import MiniMaxConfig
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

SEED = 5
CASES = {"even": (2, 20, 2, 4, 4), "odd": (1, 29, 3, 5, 7)}
"""Name -> batch, length, heads, key dim, value dim."""
LAYERS = {"first": (2, 21, 12, 3, 4, 0), "third": (1, 34, 16, 2, 6, 2)}
"""Name -> batch, length, width, heads, head dim, layer."""


def naive(op):
    """The naive references of flash-linear-attention, whose package does not import without triton."""
    path = distribution("fla-core").locate_file(f"fla/ops/{op}/naive.py")
    spec = importlib.util.spec_from_file_location(f"naive_{op}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def draw(*shape):
    return torch.randn(shape).requires_grad_()


def with_gradients(record, name, y, inputs):
    cotangent = torch.randn(y.shape)
    gradients = torch.autograd.grad((y * cotangent).sum(), list(inputs.values()))
    record |= {f"{name}y": y, f"{name}cotangent": cotangent}
    for key, gradient in zip(inputs, gradients, strict=True):
        record |= {f"{name}{key}": inputs[key], f"{name}grad.{key}": gradient}


def functions(record, name, batch, length, heads, keys, values):
    shapes = {"q": keys, "k": keys, "v": values}
    inputs = lambda: {key: draw(batch, length, heads, dim) for key, dim in shapes.items()}

    case = inputs()
    positive = [torch.nn.functional.elu(case[key]) + 1 for key in "qk"]
    y, _ = naive("linear_attn").naive_recurrent_linear_attn(*positive, case["v"], normalize=True)
    with_gradients(record, f"linear_attn/{name}/", y, case)

    case = inputs()
    y = naive("retention").naive_retention(*(x.transpose(1, 2) for x in case.values())).transpose(1, 2)
    with_gradients(record, f"retention/{name}/", y, case)

    for kind, shape in (("simple_gla", ()), ("gla", (keys,))):
        case = inputs() | {"g": (-torch.rand(batch, length, heads, *shape).exp()).requires_grad_()}
        case |= {"s0": draw(batch, heads, keys, values)}
        function = getattr(naive(kind), f"naive_recurrent_{kind}")
        y, state = function(*(case[key] for key in "qkvg"), initial_state=case["s0"] + 0, output_final_state=True)
        with_gradients(record, f"{kind}/{name}/", y, case)
        record[f"{kind}/{name}/state"] = state


def lightning(record, name, batch, length, width, heads, dim, layer):
    config = MiniMaxConfig(
        hidden_size=width, num_attention_heads=heads, head_dim=dim, num_hidden_layers=4, block_size=8
    )
    module = MiniMaxLightningAttention(config, layer).eval()
    for key, value in module.named_parameters():
        value.data = torch.randn(value.shape) * 0.4 + (1.0 if key == "norm.weight" else 0.0)
    x = draw(batch, length, width)
    y = module(x, None, None)[0]
    with_gradients(record, f"lightning/{name}/", y, {"x": x, **dict(module.named_parameters())})


if __name__ == "__main__":
    torch.manual_seed(SEED)
    record = {}
    for name, sizes in CASES.items():
        functions(record, name, *sizes)
    for name, sizes in LAYERS.items():
        lightning(record, name, *sizes)
    arrays = {key: value.detach().numpy() for key, value in record.items()}
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    versions += f", fla-core {version('fla-core')}, seed {SEED}"
    np.savez_compressed(Path(__file__).with_name("linear.npz"), versions=np.array(versions), **arrays)
