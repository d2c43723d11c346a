"""Make rwkv4.npz: layers of RWKV-4 as Hugging Face transformers computes them, values and gradients.

    pip install torch==2.13.0 transformers==5.23.0 numpy
    python tests/golden/make_rwkv4.py

For each case `name/`: x; the parameters of the time mixing (att.*) and the channel mixing (ffn.*), both y; and the
gradient of sum(y * cotangent) with respect to x and each parameter (grad.*). wkv/*: the same for the function
`rwkv_linear_attention_cpu` alone, with keys of up to 60 and fast decays, in two calls that hand over a state.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import RwkvConfig
from transformers.models.rwkv.modeling_rwkv import RwkvFeedForward, RwkvSelfAttention, rwkv_linear_attention_cpu

SEED = 4
CASES = {"even": (2, 24, 16, 16, 32), "wide": (1, 37, 12, 20, 28)}
"""Name -> batch, length, width, attention width, hidden width."""


def draw(shape, scale=1.0, shift=0.0):
    return (torch.randn(shape) * scale + shift).requires_grad_()


def with_gradients(record, name, y, inputs):
    cotangent = torch.randn(y.shape)
    gradients = torch.autograd.grad((y * cotangent).sum(), list(inputs.values()))
    record |= {f"{name}y": y, f"{name}cotangent": cotangent}
    for key, gradient in zip(inputs, gradients, strict=True):
        record |= {f"{name}{key}": inputs[key], f"{name}grad.{key}": gradient}


def layers(record, name, batch, length, width, attention, hidden):
    config = RwkvConfig(
        hidden_size=width, attention_hidden_size=attention, intermediate_size=hidden, num_hidden_layers=2
    )
    for kind, module in (("att", RwkvSelfAttention(config)), ("ffn", RwkvFeedForward(config))):
        for key, value in module.named_parameters():
            spread = {"time_decay": 2.0, "time_first": 1.0}.get(key, 0.4)
            value.data = torch.randn(value.shape) * spread + (0.5 if "time_mix" in key else 0.0)
        x = draw((batch, length, width))
        y, _ = module(x)
        with_gradients(record, f"{name}/{kind}.", y, {"x": x, **dict(module.named_parameters())})


def averages(record):
    batch, length, width, cut = 2, 30, 8, 13
    inputs = {
        "decay": draw((width,), 1.5),
        "bonus": draw((width,)),
        "k": draw((batch, length, width), 20.0),
        "v": draw((batch, length, width)),
    }
    decay, bonus, k, v = inputs.values()
    first, state = rwkv_linear_attention_cpu(decay, bonus, k[:, :cut], v[:, :cut], return_state=True)
    rest, state = rwkv_linear_attention_cpu(decay, bonus, k[:, cut:], v[:, cut:], state=state)
    with_gradients(record, "wkv/", torch.cat([first, rest], dim=1), inputs)
    record |= {f"wkv/state.{i}": part for i, part in enumerate(state)}


if __name__ == "__main__":
    torch.manual_seed(SEED)
    record = {}
    for name, sizes in CASES.items():
        layers(record, name, *sizes)
    averages(record)
    arrays = {key: value.detach().numpy() for key, value in record.items()}
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, seed {SEED}"
    np.savez_compressed(Path(__file__).with_name("rwkv4.npz"), versions=np.array(versions), **arrays)
