"""Make delta.npz: delta rules as flash-linear-attention's naive files compute them, layers as transformers does.

    pip install torch==2.13.0 transformers==5.23.0 einops && pip install --no-deps fla-core==0.6.0
    python tests/golden/make_delta.py

op/RULE/CASE/*: arguments [B T H ...], entry state, outputs, exit state. layer/NAME/CASE/*: input, weights under their
names in checkpoints, output. Each with the gradients (grad.*) of sum(y * cotangent), and of sum(state^2) for rules.
Rules run in float32. Layers run in float64, since their chunks lose digits of decays in float32: the name float32 is
given that meaning in their modules. All is saved in float32; the seed and the versions are in the file.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from transformers.models.glm5_next.modeling_glm5_next import Glm5NextTextForgetGate
from transformers.models.kimi_linear import modeling_kimi_linear as kimi_linear
from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next

wide = ModuleType("torch")
wide.__dict__.update(torch.__dict__, float32=torch.float64, float=torch.float64)
kimi_linear.torch = qwen3_next.torch = wide

SEED = 5
SHAPES = {"small": (2, 19, 2, 6, 5), "long": (1, 70, 1, 8, 8)}  # B T H K V


def load(op: str):
    """A naive file of fla, which needs nothing but torch and einops."""
    file = importlib.metadata.distribution("fla-core").locate_file(f"fla/ops/{op}/naive.py")
    spec = importlib.util.spec_from_file_location("naive", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def heads_first(run):
    """A function of [B H T ...] as one of [B T H ...]."""

    def of(**arguments):
        s0 = arguments.pop("initial_state")
        o, s = run(**{name: x.transpose(1, 2) for name, x in arguments.items()}, initial_state=s0)
        return o.transpose(1, 2), s

    return of


def rules() -> dict:
    """For each rule a function of (q, scaled; k, v, decay, rest) and the names of its arguments."""
    delta = heads_first(load("delta_rule").delta_rule_recurrence)
    gated = load("gated_delta_rule").naive_recurrent_gated_delta_rule
    kda = load("kda").naive_recurrent_kda
    dplr = heads_first(load("generalized_delta_rule/dplr").dplr_recurrence)
    full = {"scale": 1.0, "output_final_state": True}
    return {
        "delta": lambda q, k, v, beta, s0: delta(q=q * q.shape[-1] ** 0.5, k=k, v=v, beta=beta, initial_state=s0),
        "gated": lambda q, k, v, beta, decay, s0: gated(q, k, v, beta=beta, g=decay, initial_state=s0, **full),
        "kda": lambda q, k, v, beta, decay, s0: kda(q, k, v, g=decay, beta=beta, initial_state=s0, **full),
        "generalized": lambda q, k, v, decay, a, b, s0: dplr(
            q=q * q.shape[-1] ** 0.5, k=k, v=v, alpha=a, beta=b, gk=decay, initial_state=s0
        ),
    }


def arguments(rule: str, shape: tuple) -> dict:
    batch, length, heads, key, value = shape
    rows = (batch, length, heads)
    unit = lambda: F.normalize(torch.randn(*rows, key), dim=-1)
    given = {"q": unit(), "k": unit(), "v": torch.randn(*rows, value)}
    if rule == "generalized":
        a = unit()
        given |= {"a": -a, "b": a * torch.rand(*rows, key)}
    else:
        given["beta"] = torch.rand(rows)
    if rule != "delta":
        given["decay"] = -3 * torch.rand(rows if rule == "gated" else (*rows, key)) ** 4
    return given | {"s0": torch.randn(batch, heads, key, value)}


def save(out: dict, prefix: str, arrays: dict) -> None:
    out |= {f"{prefix}/{name}": x.detach().numpy().astype(np.float32) for name, x in arrays.items()}


def run_rules(out: dict) -> None:
    for rule, run in rules().items():
        for case, shape in SHAPES.items():
            given = {name: x.requires_grad_() for name, x in arguments(rule, shape).items()}
            o, s = run(**given)
            cotangent = torch.randn_like(o)
            ((o * cotangent).sum() + (s * s).sum()).backward()
            grads = {f"grad.{name}": x.grad for name, x in given.items()}
            save(out, f"op/{rule}/{case}", given | grads | {"o": o, "s": s, "cotangent": cotangent})


def gated_delta_net(width, key_heads, heads, key, value):
    sizes = {"linear_num_key_heads": key_heads, "linear_num_value_heads": heads}
    sizes |= {"linear_key_head_dim": key, "linear_value_head_dim": value, "linear_conv_kernel_dim": 4}
    common = {"hidden_size": width, "hidden_act": "silu", "rms_norm_eps": 1e-6, "layer_types": ["linear_attention"]}
    return qwen3_next.Qwen3NextGatedDeltaNet(SimpleNamespace(**sizes, **common), 0)


def kda(width, heads, size, bound=None):
    sizes = {"linear_num_heads": heads, "linear_head_dim": size, "linear_conv_kernel_dim": 4, "hidden_size": width}
    common = {"hidden_act": "silu", "rms_norm_eps": 1e-5, "layer_types": ["linear_attention"]}
    config = SimpleNamespace(**sizes, **common, linear_lower_bound=bound)
    layer = kimi_linear.KimiLinearDeltaAttention(config, 0)
    if bound is not None:  # the gate of the later models of this kind
        layer.forget_gate = Glm5NextTextForgetGate(config)
    return layer


LAYERS = {
    "gated_delta_net/small": (lambda: gated_delta_net(12, 2, 4, 4, 6), (2, 9, 12)),
    "gated_delta_net/long": (lambda: gated_delta_net(16, 1, 3, 8, 4), (1, 70, 16)),
    "kda/small": (lambda: kda(12, 2, 4), (2, 9, 12)),
    "kda/long": (lambda: kda(16, 3, 6), (1, 70, 16)),
    "kda/bounded": (lambda: kda(12, 2, 5, bound=-5.0), (2, 19, 12)),
}


def run_layers(out: dict) -> None:
    for name, (make, shape) in LAYERS.items():
        layer = make().double()
        weights = dict(layer.named_parameters())
        for key, weight in weights.items():
            shift = 1.0 if key.endswith("norm.weight") else 0.0
            scale = 0.3 if weight.ndim < 2 or "conv" in key else weight.shape[-1] ** -0.5
            weight.data = torch.randn(weight.shape).double() * scale + shift
        x = torch.randn(shape).double().requires_grad_()
        y = layer(x)
        cotangent = torch.randn_like(y)
        (y * cotangent).sum().backward()
        grads = {f"grad.{key}": weight.grad for key, weight in weights.items()}
        save(out, f"layer/{name}", weights | grads | {"x": x, "grad.x": x.grad, "y": y, "cotangent": cotangent})


if __name__ == "__main__":
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "fla-core")]
    golden = {"versions": np.array(versions), "seed": np.array(SEED)}
    run_rules(golden)
    run_layers(golden)
    np.savez_compressed(Path(__file__).parent / "delta.npz", **golden)
