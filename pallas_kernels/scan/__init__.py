"""The selective scan of Mamba-1 on TPUs: a diagonal recurrence whose decays, inputs and outputs depend on the token.

`selective_scan` is the entry. It computes what `ref.reference` computes, in blocks of tokens (`twin`), forward and
backward, and runs where `refusal` returns None.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from pallas_kernels import machine
from pallas_kernels.scan.config import Config

MOST_STATES = 64
"""The largest N that is taken: a block's states are in VMEM at once."""


def refusal(x: Array, dt: Array, a: Array, b: Array, c: Array) -> str | None:
    """Why the kernels do not take these arguments on this machine; None if they do."""
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"x of {x.dtype}, not bfloat16 or float32"
    if a.shape[1] > MOST_STATES:
        return f"{a.shape[1]} states a channel, more than {MOST_STATES}"
    if not x.size or not a.size:
        return "nothing to do"
    if (platform := machine.platform()) != "tpu":
        return f"the default device is no TPU but {platform}"
    return None


def selective_scan(
    x: Array,
    dt: Array,
    a: Array,
    b: Array,
    c: Array,
    d: Array,
    *,
    h0: Array | None = None,
    resets: Array | None = None,
    config: Config | None = None,
) -> tuple[Array, Array]:
    """`ref.reference` by the kernels, in float32, differentiable in all but resets.

        h_t = exp(dt_t a) h_(t-1) + (dt_t x_t) b_t^T        y_t = h_t c_t + d x_t

    Args:
        x: [B T D] bfloat16 or float32.    dt: [B T D] step sizes.    a: [D N] negative rates.
        b, c: [B T N].    d: [D].    h0: [B D N] before the first token; None is 0.
        resets: [B T], tokens before which the state becomes 0.

    Returns:
        y [B T D] of x's type and the state after the last token [B D N] float32.

    Raises:
        NotImplementedError: with what `refusal` says.
    """
    if reason := refusal(x, dt, a, b, c):
        raise NotImplementedError(reason)
    from pallas_kernels.scan.tpu import scan

    config = Config.of(x.shape[-1], a.shape[1]) if config is None else config
    return scan(config, x, dt, a, b, c, d, h0, resets)
