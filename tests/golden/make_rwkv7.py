"""Make rwkv7.npz: a model of RWKV-7 as the `rwkv` package runs it, its layers' gradients, and fla's recurrence.

    pip install torch==2.13.0 rwkv==0.8.32 einops && pip install --no-deps fla-core==0.6.0
    python tests/golden/make_rwkv7.py

model/*: a checkpoint of two layers with random weights under its own names, tokens, and the logits that the package
gives after each of them. time/* and channel/*: the package's functions of one token, applied token after token to both
layers' time mixing and to a channel mixing: inputs, outputs, and the gradient of sum(y * cotangent) with respect to
inputs and parameters (grad.*). op/*: fla's recurrence with strong decays, split in two calls that hand over a state.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import tempfile
from pathlib import Path

import numpy as np
import torch

os.environ |= {"RWKV_JIT_ON": "1", "RWKV_CUDA_ON": "0", "RWKV_V7_ON": "1"}
import rwkv.model

SEED = 7
VOCAB, WIDTH, HEADS, SIZE, HIDDEN, LENGTH = 11, 16, 2, 8, 24, 26
RANKS = {"w": 5, "a": 4, "v": 3, "g": 6}
PROJECTIONS = ("receptance", "key", "value", "output")


def load(path: str):
    """A file of fla that needs nothing but torch and einops."""
    file = importlib.metadata.distribution("fla-core").locate_file(path)
    spec = importlib.util.spec_from_file_location(Path(path).stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def draw(*shape, scale=0.4, shift=0.0):
    return torch.randn(shape) * scale + shift


def time_mixing():
    """Weights of one layer under the names of checkpoints; projections transposed, as the functions take them."""
    weights = {f"x_{n}": draw(WIDTH, shift=0.5) for n in "rwkvag"}
    for n, rank in RANKS.items():
        weights |= {f"{n}1": draw(WIDTH, rank), f"{n}2": draw(rank, WIDTH)}
    weights |= {f"{n}0": draw(WIDTH) for n in "wav"}
    weights |= {"k_k": draw(WIDTH, shift=0.7), "k_a": draw(WIDTH, shift=1.0), "r_k": draw(HEADS, SIZE)}
    weights |= {f"{n}.weight": draw(WIDTH, WIDTH) for n in PROJECTIONS}
    return weights | {"ln_x.weight": draw(WIDTH, shift=1.0), "ln_x.bias": draw(WIDTH)}


def channel_mixing():
    return {"x_k": draw(WIDTH, shift=0.5), "key.weight": draw(WIDTH, HIDDEN), "value.weight": draw(HIDDEN, WIDTH)}


def run_time(layer, x, first, p):
    """One layer over the tokens of x [T D] by the package's function of one token; also the first layer's values."""
    order = [*(f"x_{n}" for n in "rwkvag"), *(f"{n}{i}" for n in "wav" for i in range(3)), "g1", "g2", "k_k", "k_a"]
    weights = [p[n] for n in order] + [p["r_k"].flatten()] + [p[f"{n}.weight"] for n in PROJECTIONS]
    previous, state, ys, values = torch.zeros(WIDTH), torch.zeros(HEADS, SIZE, SIZE), [], []
    for t in range(len(x)):
        y, previous, state, v = rwkv.model.RWKV_x070_TMix_one(
            layer, HEADS, SIZE, x[t], previous, first[t], state, *weights, p["ln_x.weight"], p["ln_x.bias"]
        )
        ys.append(y)
        values.append(v)
    return torch.stack(ys), torch.stack(values)


def run_channel(x, p):
    previous, ys = torch.zeros(WIDTH), []
    for token in x:
        y, previous = rwkv.model.RWKV_x070_CMix_one(token, previous, p["x_k"], p["key.weight"], p["value.weight"])
        ys.append(y)
    return torch.stack(ys)


def with_gradients(record, name, y, inputs):
    inputs = {key: value for key, value in inputs.items() if value.requires_grad}
    cotangent = torch.randn(y.shape)
    gradients = torch.autograd.grad((y * cotangent).sum(), list(inputs.values()))
    record |= {f"{name}y": y, f"{name}cotangent": cotangent}
    for key, gradient in zip(inputs, gradients, strict=True):
        record |= {f"{name}{key}": inputs[key], f"{name}grad.{key}": gradient}


def layers(record):
    """Two layers of time mixing, the second on other inputs but with the values of the first."""
    ask = lambda weights: {key: value.requires_grad_() for key, value in weights.items()}
    x, both = ask({"0.x": draw(LENGTH, WIDTH, scale=1.0), "1.x": draw(LENGTH, WIDTH, scale=1.0)}), []
    for layer in range(2):
        weights = ask(time_mixing())
        x |= {f"{layer}.{key}": value for key, value in weights.items() if layer or key not in ("v0", "v1", "v2")}
        both.append(weights)
    y0, first = run_time(0, x["0.x"], torch.zeros(LENGTH, WIDTH), both[0])
    y1, _ = run_time(1, x["1.x"], first, both[1])
    with_gradients(record, "time/", torch.stack([y0, y1]), x)
    weights = ask(channel_mixing() | {"x": draw(LENGTH, WIDTH, scale=1.0)})
    with_gradients(record, "channel/", run_channel(weights["x"], weights), weights)


def model(record):
    norm = lambda name: {f"{name}.weight": draw(WIDTH, shift=1.0), f"{name}.bias": draw(WIDTH)}
    checkpoint = {"emb.weight": draw(VOCAB, WIDTH, scale=1.0), "head.weight": draw(VOCAB, WIDTH), **norm("ln_out")}
    checkpoint |= norm("blocks.0.ln0")
    for i in range(2):
        checkpoint |= norm(f"blocks.{i}.ln1") | norm(f"blocks.{i}.ln2")
        for kind, weights in (("att", time_mixing()), ("ffn", channel_mixing())):
            for key, value in weights.items():
                turned = value.T.contiguous() if key.removesuffix(".weight") in PROJECTIONS else value
                checkpoint[f"blocks.{i}.{kind}.{key}"] = turned
    tokens = torch.randint(VOCAB, (LENGTH,)).tolist()
    with tempfile.TemporaryDirectory() as folder:
        torch.save(checkpoint, f"{folder}/model.pth")
        logits, _ = rwkv.model.RWKV(f"{folder}/model", "cpu fp32").forward(tokens, None, full_output=True)
    record |= {f"model/{key}": value for key, value in checkpoint.items()}
    record |= {"model/tokens": torch.tensor(tokens), "model/logits": logits}


def op(record):
    shape, cut = (1, HEADS, 30, SIZE), 13
    inputs = {n: torch.randn(shape).requires_grad_() for n in ("r", "k", "v")}
    unit = torch.nn.functional.normalize(torch.randn(shape), dim=-1)
    inputs |= {"a": (-unit).requires_grad_(), "b": (unit * torch.rand(shape)).requires_grad_()}
    inputs["log_decay"] = (-torch.exp(torch.randn(shape) * 2)).requires_grad_()
    recurrence = load("fla/ops/generalized_delta_rule/dplr/naive.py").dplr_recurrence
    parts = lambda part: [
        inputs[n][:, :, part] * (SIZE**0.5 if n == "r" else 1.0) for n in ("r", "k", "v", "a", "b", "log_decay")
    ]
    first, state = recurrence(*parts(slice(cut)))
    rest, state = recurrence(*parts(slice(cut, None)), initial_state=state)
    with_gradients(record, "op/", torch.cat([first, rest], dim=2), inputs)
    record["op/state"] = state


if __name__ == "__main__":
    torch.manual_seed(SEED)
    record = {}
    model(record)
    layers(record)
    op(record)
    arrays = {key: value.detach().numpy() for key, value in record.items()}
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "rwkv", "fla-core"))
    np.savez_compressed(Path(__file__).with_name("rwkv7.npz"), versions=np.array(f"{versions}, seed {SEED}"), **arrays)
