"""Make rwkv6.npz: RWKV-6 as the `rwkv` package and flash-linear-attention compute it, values and gradients.

    pip install torch==2.13.0 rwkv==0.8.32 einops && pip install --no-deps fla-core==0.6.0
    python tests/golden/make_rwkv6.py

For each case `name/`: x, y and the parameters of the package's attention layer under the names of checkpoints, and the
gradient of sum(y * cotangent) with respect to x and each parameter (grad.*). The package's functions contain the layer
norm before them and the residual sum after them; its norm is replaced by the identity here, so y = x + layer(x).
op/*: fla's recurrence alone, with strong decays, split in two calls that hand over a state.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import types
from pathlib import Path

import numpy as np
import torch

os.environ |= {"RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0", "RWKV_V7_ON": "0"}
import rwkv.model

SEED = 6
CASES = {"even": (24, 16, 2, 8, 4, 6), "wide": (37, 12, 3, 4, 3, 5)}
"""Name -> length, width (heads * size in the package), heads, head size, rank of the shares, rank of the decay."""


def load(path: str):
    """A file of fla that needs nothing but torch."""
    file = importlib.metadata.distribution("fla-core").locate_file(path)
    spec = importlib.util.spec_from_file_location(Path(path).stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def with_gradients(record, name, y, inputs):
    cotangent = torch.randn(y.shape)
    gradients = torch.autograd.grad((y * cotangent).sum(), list(inputs.values()))
    record |= {f"{name}y": y, f"{name}cotangent": cotangent}
    for key, gradient in zip(inputs, gradients, strict=True):
        record |= {f"{name}{key}": inputs[key], f"{name}grad.{key}": gradient}


def layer(record, name, length, width, heads, size, mix_rank, decay_rank):
    draw = lambda *shape, scale=0.4, shift=0.0: (torch.randn(shape) * scale + shift).requires_grad_()
    inputs = {"x": draw(length, width, scale=1.0), "ln_x.weight": draw(width, shift=1.0), "ln_x.bias": draw(width)}
    inputs |= {f"time_maa_{n}": draw(width, shift=0.5) for n in "xwkvrg"}
    inputs |= {"time_maa_w1": draw(width, 5 * mix_rank), "time_maa_w2": draw(5, mix_rank, width)}
    inputs |= {"time_decay_w1": draw(width, decay_rank), "time_decay_w2": draw(decay_rank, width)}
    inputs |= {"time_decay": draw(heads, size, 1, scale=2.0), "time_faaaa": draw(heads, size, 1)}
    inputs |= {f"{n}.weight": draw(width, width) for n in ("key", "value", "receptance", "gate", "output")}
    scales = [torch.ones(1)] * 20  # of quantised weights, unused
    y, *_ = rwkv.model.RWKV.att_seq_v6_0(
        None, inputs["x"], torch.zeros(width), torch.zeros(heads, size, size), None, None,
        inputs["ln_x.weight"], inputs["ln_x.bias"],
        *[inputs[f"time_maa_{n}"] for n in "xwkvrg"],
        *[inputs[f"time_{n}"] for n in ("maa_w1", "maa_w2", "decay_w1", "decay_w2", "decay", "faaaa")],
        *[inputs[f"{n}.weight"] for n in ("key", "value", "receptance", "gate", "output")],
        *scales,
    )  # fmt: skip
    with_gradients(record, f"{name}/", y, inputs)


def op(record):
    heads, length, size, cut = 2, 30, 8, 13
    draw = lambda *shape: torch.randn(shape).requires_grad_()
    inputs = {n: draw(1, heads, length, size) for n in "rkv"}
    inputs |= {
        "log_decay": (-torch.exp(torch.randn(1, heads, length, size) * 2)).requires_grad_(),
        "u": draw(heads, size),
    }
    r, k, v, w, u = inputs.values()
    recurrence = load("fla/ops/rwkv6/recurrent_naive.py").naive_recurrent_rwkv6
    parts = lambda part: [x[:, :, part] for x in (r, k, v, w)]
    first, state = recurrence(*parts(slice(cut)), u, 1.0, output_final_state=True)
    rest, state = recurrence(*parts(slice(cut, None)), u, 1.0, initial_state=state, output_final_state=True)
    with_gradients(record, "op/", torch.cat([first, rest], dim=2), inputs)
    record["op/state"] = state


if __name__ == "__main__":
    torch.manual_seed(SEED)
    functions = {name: getattr(torch.nn.functional, name) for name in dir(torch.nn.functional)}
    rwkv.model.F = types.SimpleNamespace(**functions | {"layer_norm": lambda x, *_, **__: x})
    record = {}
    for name, sizes in CASES.items():
        layer(record, name, *sizes)
    op(record)
    arrays = {key: value.detach().numpy() for key, value in record.items()}
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "rwkv", "fla-core"))
    np.savez_compressed(Path(__file__).with_name("rwkv6.npz"), versions=np.array(f"{versions}, seed {SEED}"), **arrays)
