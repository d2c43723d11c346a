"""Tokens a second, and the share of the devices' peak that they mean."""

from __future__ import annotations

import time
from collections import deque

import jax

PEAK_FLOPS: tuple[tuple[str, float], ...] = (
    ("TPU v2", 22.5e12),
    ("TPU v3", 61.5e12),
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),
    ("TPU v6", 918e12),
    ("TPU7x", 1153.5e12),
    ("V100", 125e12),
    ("Tesla T4", 65e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("NVIDIA L40", 181e12),
    ("NVIDIA L4", 121e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("H200", 989e12),
    ("GB200", 2500e12),
    ("B200", 2250e12),
)
"""Dense bfloat16 (V100, T4: float16) FLOP/s of one JAX device, from the makers' data sheets, by a part of
`device_kind`; the first that fits counts. TPU v2, v3 and 7x show two devices a chip."""

WINDOW = 20
"""Steps over which speed is averaged."""


def peak_flops(kind: str) -> float | None:
    """Peak FLOP/s of a device of this kind; None if it is not known (a CPU)."""
    return next((peak for part, peak in PEAK_FLOPS if part in kind), None)


class Throughput:
    """Speed over the last `WINDOW` steps, from the moments at which their results arrived.

    Time for compilation (it falls into the first step) is left out; that for saving and evaluating is not.

    Args:
        flops_per_token: floating-point operations of the model for one token, forward and backward.
    """

    def __init__(self, flops_per_token: float | None = None):
        self.moments: deque[tuple[float, int]] = deque(maxlen=WINDOW + 1)
        peak = peak_flops(jax.devices()[0].device_kind)
        known = flops_per_token is not None and peak is not None
        self.per_token = flops_per_token / (peak * jax.device_count()) if known else None

    def arrived(self, tokens: int, now: float | None = None) -> dict[str, float]:
        """Count a finished step; gives `tokens_per_second`, `seconds_per_step` and `mfu` as far as known.

        Args:
            tokens: of the step, over all processes.
            now: seconds on a monotonic clock.
        """
        self.moments.append((time.monotonic() if now is None else now, tokens))
        steps = len(self.moments) - 1
        if steps == 0:
            return {}
        seconds = self.moments[-1][0] - self.moments[0][0]
        rate = sum(count for _, count in list(self.moments)[1:]) / max(seconds, 1e-9)
        values = {"tokens_per_second": rate, "seconds_per_step": seconds / steps}
        return values | ({} if self.per_token is None else {"mfu": rate * self.per_token})
