"""Make mamba.npz: Mamba and Mamba-2 as Hugging Face transformers computes them, values and gradients.

    pip install torch==2.13.0 transformers==5.23.0 numpy
    python tests/golden/make_mamba.py

`mamba/case/` and `mamba2/case/`: x, the parameters of MambaMixer or Mamba2Mixer, y, and the gradient of
sum(y * cotangent) with respect to x and each parameter (grad.*). `selective/`, `chunked/`: the same for the functions
mamba_selective_scan and mamba2_chunk_scan alone, the latter from an initial state; `state` is the last one.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import Mamba2Config, MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer, mamba_selective_scan
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer, mamba2_chunk_scan

SEED = 6
MAMBA = {"even": (2, 24, 8, 2, 4, 4, 2), "odd": (1, 37, 6, 3, 5, 3, 3)}
"""Name -> batch, length, width, channels by width, states, convolution, step rank."""
MAMBA2 = {"even": (2, 24, 8, 2, 8, 4, 1, 4), "odd": (1, 37, 12, 4, 6, 5, 2, 3)}
"""Name -> batch, length, width, heads, head dim, states, groups, convolution."""


def draw(*shape):
    return torch.randn(shape).requires_grad_()


def with_gradients(record, name, y, inputs):
    cotangent = torch.randn(y.shape)
    gradients = torch.autograd.grad((y * cotangent).sum(), list(inputs.values()))
    record |= {f"{name}y": y, f"{name}cotangent": cotangent}
    for key, gradient in zip(inputs, gradients, strict=True):
        record |= {f"{name}{key}": inputs[key], f"{name}grad.{key}": gradient}


def layer(record, name, module, batch, length, width):
    for value in module.parameters():
        value.data += torch.randn(value.shape) * 0.3
    x = draw(batch, length, width)
    with_gradients(record, name, module.eval()(x), {"x": x, **dict(module.named_parameters())})


def functions(record, batch=2, length=19, heads=2, dim=3, states=4):
    width = heads * dim
    case = {"x": draw(batch, width, length), "dt": draw(batch, width, length), "a": draw(width, states)}
    case |= {"b": draw(batch, states, length), "c": draw(batch, states, length), "d": draw(width)}
    step, rate = torch.nn.functional.softplus(case["dt"]), -case["a"].exp()
    y, state = mamba_selective_scan(case["x"], step, rate, *(case[key] for key in "bcd"), return_last_state=True)
    with_gradients(record, "selective/", y, case)
    record["selective/state"] = state

    case = {"x": draw(batch, length, heads, dim), "dt": draw(batch, length, heads), "a": draw(heads)}
    case |= {"b": draw(batch, length, 1, states), "c": draw(batch, length, 1, states), "d": draw(heads)}
    case |= {"s0": draw(batch, heads, dim, states)}
    y, state = mamba2_chunk_scan(
        case["x"],
        case["dt"],
        -case["a"].exp(),
        case["b"],
        case["c"],
        8,
        D=case["d"],
        initial_states=case["s0"],
        dt_softplus=True,
        return_final_states=True,
    )
    with_gradients(record, "chunked/", y, case)
    record["chunked/state"] = state


if __name__ == "__main__":
    torch.manual_seed(SEED)
    record = {}
    for name, (batch, length, width, expand, states, conv, rank) in MAMBA.items():
        config = MambaConfig(hidden_size=width, state_size=states, conv_kernel=conv, time_step_rank=rank, expand=expand)
        layer(record, f"mamba/{name}/", MambaMixer(config, 0), batch, length, width)
    for name, (batch, length, width, heads, dim, states, groups, conv) in MAMBA2.items():
        config = Mamba2Config(
            hidden_size=width,
            num_heads=heads,
            head_dim=dim,
            expand=heads * dim // width,
            state_size=states,
            n_groups=groups,
            conv_kernel=conv,
            chunk_size=8,
            layer_norm_epsilon=1e-6,
        )
        layer(record, f"mamba2/{name}/", Mamba2Mixer(config, 0), batch, length, width)
    functions(record)
    arrays = {key: value.detach().numpy() for key, value in record.items()}
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, seed {SEED}"
    np.savez_compressed(Path(__file__).with_name("mamba.npz"), versions=np.array(versions), **arrays)
