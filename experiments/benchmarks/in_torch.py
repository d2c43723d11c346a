"""PyTorch's attention, called with JAX's arrays, without copies, and what JAX's timers wait for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Ready:
    """Results in PyTorch, for `jax.block_until_ready` and `arrays`."""

    def __init__(self, *tensors: Any):
        self.tensors = tensors

    def block_until_ready(self) -> Ready:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return self


def arrays(found: Any) -> tuple:
    """JAX's arrays of a result, whosever it is."""
    import jax.numpy as jnp

    if isinstance(found, Ready):
        return tuple(jnp.from_dlpack(x.detach().contiguous()) for x in found.tensors)
    return found if isinstance(found, tuple) else (found,)


def program(fn: Callable, direction: str, leaves: int = 3) -> Callable:
    """fn of so many tensors, for arrays of which the last is the gradient of out; "both" has gradients, too."""
    import torch

    def forward(*xs: Any) -> Ready:
        with torch.no_grad():
            return Ready(fn(*map(torch.from_dlpack, xs[:leaves])))

    def both(*xs: Any) -> Ready:
        *given, dout = (torch.from_dlpack(x).detach().requires_grad_(i < leaves) for i, x in enumerate(xs))
        out = fn(*given)
        return Ready(out, *torch.autograd.grad(out, given, dout))

    return forward if direction == "forward" else both


def heads_first(fn: Callable) -> Callable:
    """Of [B T H C] arrays, for one that takes [B H T C]."""
    return lambda *xs: fn(*(x.transpose(1, 2) for x in xs)).transpose(1, 2)


def sdpa(shared_heads: bool) -> Callable:
    """Causal `scaled_dot_product_attention`, by whichever of its implementations PyTorch picks."""
    from torch.nn.functional import scaled_dot_product_attention as call

    return heads_first(lambda q, k, v: call(q, k, v, is_causal=True, enable_gqa=shared_heads))


def flex(visible: Callable, length: int, shared_heads: bool) -> Callable:
    """FlexAttention, compiled, its block mask made in advance; visible(query, key) of tensors of indices."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.compiler.reset()  # every case is a program of its own, and PyTorch gives up after some
    seen = lambda b, h, q, k: visible(q, k)
    blocks = torch.compile(create_block_mask)(seen, None, None, length, length, device=device)
    call = torch.compile(flex_attention, dynamic=False)
    return heads_first(lambda q, k, v: call(q, k, v, block_mask=blocks, enable_gqa=shared_heads))
