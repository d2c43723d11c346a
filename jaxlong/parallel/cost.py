"""How long each strategy of sequence-parallel attention takes, forward and backward: a model of a few lines.

    from jaxlong.parallel.cost import Shape, costs, device
    shape = Shape(batch=1, length=2**18, heads=32, kv_heads=8, head_dim=128)
    costs(shape, ring=16, ulysses=4, device=device("TPU v5"))

Of n devices each holds c = S / n tokens of B rows; e bytes an element, K' key heads after copies, w = C + V:

    bytes sent    all_gather   (n - 1) B c K w (2 e + 4)           keys twice, float32 gradients once
                  ring         the same, and one float32 hop more
                  ulysses      2 (n - 1)/n B c (H + K') w e        there and back, twice
                  usp          ulysses over U, then a ring of R = n/U over U c tokens and K'/U heads
    flops         3.5 * 2 B H w S^2 / n; a half if causal, times the slowest device over the mean:
                  2 - 1/n where causal rows are contiguous; ceil(H / n) n / H where heads are shared out
    seconds       ring: the longer of a hop's flops and a hop's transfer, and the traffic of merging what it found in
                  float32, n times; others: flops + transfer

A transfer around a torus takes both ways at once in a gather and an n/8-th of them on average in an exchange; a switch
carries everything at once. All of it is meant for comparing, not for predicting a step.
"""

from __future__ import annotations

from typing import NamedTuple

from jaxlong.parallel.ulysses import share_heads


class Device(NamedTuple):
    """flops: a second, in bfloat16, of a good attention kernel. link: bytes a second, one way, to a neighbour.

    latency: seconds to start a transfer. memory, bandwidth: bytes, and bytes a second. torus: neighbours are wired,
    without a switch.
    """

    flops: float
    link: float
    latency: float
    memory: float
    bandwidth: float
    torus: bool


DEVICES = {
    "TPU v4": Device(0.5 * 275e12, 45e9, 2e-6, 32e9, 1.2e12, True),
    "TPU v5 lite": Device(0.5 * 197e12, 45e9, 2e-6, 16e9, 0.82e12, True),
    "TPU v5": Device(0.5 * 459e12, 90e9, 2e-6, 95e9, 2.77e12, True),
    "TPU v6 lite": Device(0.5 * 918e12, 90e9, 2e-6, 32e9, 1.64e12, True),
    "TPU7x": Device(0.5 * 1153e12, 90e9, 2e-6, 95e9, 3.69e12, True),
    "NVIDIA A100": Device(0.5 * 312e12, 300e9, 8e-6, 80e9, 2.0e12, False),
    "NVIDIA H100": Device(0.5 * 989e12, 450e9, 8e-6, 80e9, 3.35e12, False),
    "NVIDIA H200": Device(0.5 * 989e12, 450e9, 8e-6, 141e9, 4.8e12, False),
    "cpu": Device(5e10, 5e9, 5e-5, 8e9, 2e10, False),
}
"""Half of the published peak, and the published links, by the beginning of JAX's `device_kind`."""


class Shape(NamedTuple):
    """Attention over whole rows, as far as the other mesh axes leave it to a group of devices.

    key_dim, value_dim: of what is moved, where it is not keys and values of head_dim. layout: of the tokens.
    """

    batch: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    key_dim: int | None = None
    value_dim: int | None = None
    itemsize: int = 2
    causal: bool = True
    layout: str = "zigzag"


class Cost(NamedTuple):
    """Of one device, forward and backward: bytes sent, flops, bytes of keys and their gradients held, seconds."""

    sent: float
    flops: float
    held: float
    seconds: float


def costs(shape: Shape, *, ring: int, ulysses: int = 1, device: Device) -> dict[str, Cost]:
    """The cost of each strategy over ring * ulysses devices; "usp" if both are more than one."""
    devices = ring * ulysses
    found = {
        "all_gather": _all_gather(shape, devices, device),
        "ring": _ring(shape, devices, 1, device),
        "ulysses": _ring(shape, 1, devices, device),
    }
    return found | ({"usp": _ring(shape, ring, ulysses, device)} if ring > 1 and ulysses > 1 else {})


def quickest(shape: Shape, device: Device, *, ring: int, ulysses: int = 1) -> str:
    """The strategy of least seconds among those that hold keys in an eighth of the memory (else that holds least)."""
    found = costs(shape, ring=ring, ulysses=ulysses, device=device)
    fit = {name: cost for name, cost in found.items() if cost.held <= device.memory / 8}
    return min(fit, key=lambda name: fit[name].seconds) if fit else min(found, key=lambda name: found[name].held)


def device(kind: str) -> Device:
    """The constants of a `device_kind`; of an NVIDIA A100 for one that is not known, whose ratios are middling."""
    known = max((name for name in DEVICES if kind.startswith(name)), key=len, default="NVIDIA A100")
    return DEVICES[known]


def _width(shape: Shape) -> int:
    """Elements of a token's key and value in one head, as they are moved."""
    key = shape.head_dim if shape.key_dim is None else shape.key_dim
    return key + (shape.head_dim if shape.value_dim is None else shape.value_dim)


def _flops(shape: Shape, devices: int) -> float:
    """Forward 1, backward 2.5 of two products over all visible pairs, if devices share them evenly."""
    pairs = shape.length**2 * (0.5 if shape.causal else 1)
    value = shape.value_dim or shape.head_dim
    return 3.5 * 2 * shape.batch * shape.heads * (shape.head_dim + value) * pairs / devices


def _imbalance(shape: Shape, devices: int) -> float:
    return 2 - 1 / devices if shape.causal and shape.layout == "contiguous" else 1.0


def _all_gather(shape: Shape, devices: int, device: Device) -> Cost:
    tokens = shape.batch * shape.length
    element = 2 * shape.itemsize + 4
    held = tokens * shape.kv_heads * _width(shape) * (shape.itemsize + 4)
    sent = (devices - 1) / devices * tokens * shape.kv_heads * _width(shape) * element
    flops = _flops(shape, devices) * _imbalance(shape, devices)
    link = device.link * (2 if device.torus else 1)
    return Cost(sent, flops, held, sent / link + 3 * device.latency + flops / device.flops)


def _ring(shape: Shape, ring: int, ulysses: int, device: Device) -> Cost:
    """An exchange over `ulysses` devices around a ring of `ring`; either may be one device."""
    share = share_heads(shape.heads, shape.kv_heads, ulysses)
    waste = share.queries.size / shape.heads
    tokens = shape.batch * shape.length / ring  # of a device once it has exchanged tokens for heads
    moved = shape.heads * (shape.head_dim + (shape.value_dim or shape.head_dim)) + share.keys.size * _width(shape)
    exchanged = 2 * (ulysses - 1) / ulysses * tokens / ulysses * moved * shape.itemsize
    of_keys = tokens * share.keys.shape[1] * _width(shape)
    forward, backward = of_keys * shape.itemsize, of_keys * (shape.itemsize + 4)
    flops = _flops(shape, ring * ulysses) * _imbalance(shape, ring) * waste

    exchange = exchanged / device.link * (max(1, ulysses / 8) if device.torus else 1)
    exchange += 6 * device.latency * (ulysses > 1)
    hop = lambda sent, share: max(sent / device.link + device.latency, share * flops / device.flops / ring)
    sums = tokens * shape.heads / ulysses * waste * (shape.head_dim + (shape.value_dim or shape.head_dim)) + of_keys
    merging = 3 * 4 * sums / device.bandwidth  # out, dq and dkv are read and written, what is added is read
    around = ring * (hop(forward, 1 / 3.5) + hop(backward, 2.5 / 3.5) + merging) if ring > 1 else flops / device.flops
    sent = exchanged + (ring - 1) * (forward + backward) + (of_keys * 4 if ring > 1 else 0)
    held = 3 * (forward + backward) if ring > 1 else of_keys * (shape.itemsize + 4)
    return Cost(sent, flops, held, exchange + around)
