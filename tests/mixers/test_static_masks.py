"""GQA under each static mask: a dense float64 softmax over a matrix written again, and layers of transformers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlong.core.mask import Mask, bigbird, causal, dilated, fixed, longformer, sliding, strided
from jaxlong.core.position import NoPE
from jaxlong.mixers import GQA

GOLDEN = np.load(Path(__file__).parent.parent / "golden" / "static_masks.npz")
LENGTH, WIDTH = 29, 8


def back(sees):
    return lambda i, j, h: j <= i and sees(i, j, h)


def window(left, right=0):
    return lambda i, j, h: i - left < j <= i + right


def same_rows(segment, rate):
    keeps = lambda t, h: (t % segment - h) % rate == 0
    return lambda i, j, h: i // segment == j // segment and keeps(i, h) and keeps(j, h)


def global_and_window(size, first):
    return lambda i, j, h: i < first or j < first or i - size < j <= i


def blocks(size, first, draws, block, seed):
    """BigBird: near blocks, the first, and those that the later of two drew with the documented hash."""

    def drawn(late):
        runs = np.array_split(np.arange(first, max(late - size // 2, first)), draws)
        picks = []
        for run, choice in enumerate(runs):
            word = (late * 0x9E3779B1 + seed * 0x85EBCA77 + run * 0xC2B2AE3D) % 2**32
            word = (word ^ word >> 16) * 0x85EBCA6B % 2**32
            word = (word ^ word >> 13) * 0xC2B2AE35 % 2**32
            picks += [int(choice[(word ^ word >> 16) // 2 % len(choice)])] if len(choice) else []
        return picks

    def sees(i, j, h):
        late, early = max(i // block, j // block), min(i // block, j // block)
        return late - early <= size // 2 or early < first or early in drawn(late)

    return sees


MASKS = {
    "sliding": (sliding(5), window(5)),
    "sliding, both sides": (sliding(4, right=3), window(4, 3)),
    "strided": (strided(6), lambda i, j, h: j <= i and (i - j < 6 or (i - j) % 6 == 0)),
    "fixed": (fixed(6, 2), lambda i, j, h: j <= i and (i // 6 == j // 6 or j % 6 in (4, 5))),
    "dilated": (dilated(8, 2) & causal(), back(same_rows(8, 2))),
    "dilated, both sides": (dilated(9, 3), same_rows(9, 3)),
    "longformer": (longformer(4, 2) & causal(), back(global_and_window(4, 2))),
    "longformer, both sides": (
        sliding(3, right=2) | longformer(1, 2),
        lambda i, j, h: abs(i - j) <= 2 or min(i, j) < 2,
    ),
    "bigbird": (bigbird(3, 1, 2, 2, 5) & causal(), back(blocks(3, 1, 2, 2, 5))),
    "bigbird, both sides": (bigbird(3, 1, 2, 2, 5), blocks(3, 1, 2, 2, 5)),
}


def close(got, want, tolerance=1e-5):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(1.0, np.abs(want).max()))


def places(length, batch):
    return jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))


def softmax_attention(params, x, seen, weights):
    """y of one document [T D] under a matrix [H T T], and the gradient of sum(y weights) in x; float64."""
    (heads, size, _), kept = params["wo"].shape, params["wk"].shape[1]
    y, d_x = np.zeros_like(x), np.zeros_like(x)
    for h in range(heads):
        wq, wk, wv = params["wq"][:, h], params["wk"][:, h * kept // heads], params["wv"][:, h * kept // heads]
        q, k, v = x @ wq, x @ wk, x @ wv
        p = np.where(seen[h], np.exp(q @ k.T * size**-0.5), 0)
        p /= np.maximum(p.sum(1, keepdims=True), 1e-300)  # a row that sees nothing gives 0
        y += p @ v @ params["wo"][h]
        d_o = weights @ params["wo"][h].T
        d_s = p * (d_o @ v.T - (d_o * (p @ v)).sum(1, keepdims=True)) * size**-0.5
        d_x += d_s @ k @ wq.T + d_s.T @ q @ wk.T + p.T @ d_o @ wv.T
    return y, d_x


@pytest.mark.parametrize("name", MASKS)
def test_each_mask_equals_a_dense_softmax(name):
    mask, sees = MASKS[name]
    random = np.random.default_rng(0)
    normal = lambda *shape: random.standard_normal(shape).astype(np.float32) / 2
    shapes = {"wq": (WIDTH, 4, 4), "wk": (WIDTH, 2, 4), "wv": (WIDTH, 2, 4), "wo": (4, 4, WIDTH)}
    params = {key: jnp.asarray(normal(*shape)) for key, shape in shapes.items()}
    x, weights = jnp.asarray(normal(1, LENGTH, WIDTH)), normal(1, LENGTH, WIDTH)
    mixer = GQA(heads=4, kv_heads=2, head_dim=4, mask=mask, position=NoPE())

    def loss(x):
        y = mixer.apply({"params": params}, x, positions=places(LENGTH, 1))[0]
        return (y * weights).sum(), y

    d_x, y = jax.jit(jax.grad(loss, has_aux=True))(x)
    seen = np.array([[[sees(i, j, h) for j in range(LENGTH)] for i in range(LENGTH)] for h in range(4)])
    exact = {key: np.asarray(array, np.float64) for key, array in params.items()}
    want, d_want = softmax_attention(exact, np.asarray(x[0], np.float64), seen, weights[0].astype(np.float64))
    close(y[0], want)
    close(d_x[0], d_want)


@dataclass(frozen=True)
class Drawn(Mask):
    """A matrix [heads, length, length] as a mask."""

    table: bytes
    heads: int
    length: int

    def __call__(self, q, k, h=0):
        table = np.frombuffer(self.table, bool).reshape(self.heads, self.length, self.length)
        return jnp.asarray(table)[h, q, k]

    def tile(self, q0, q1, k0, k1):
        return (q0 <= q1) & (k0 <= k1), (q0 > q1) & (k0 > k1)

    def reach(self):
        return None


def check_golden(mixer, data):
    """Values and gradients of a layer of transformers."""
    width, (heads, kept, size) = data["x"].shape[-1], (mixer.heads, mixer.kv_heads, mixer.head_dim)
    shapes = {
        "wq": (width, heads, size),
        "wk": (width, kept, size),
        "wv": (width, kept, size),
        "wo": (heads, size, width),
    }
    params = {key: jnp.asarray(data[key].reshape(shape), jnp.float32) for key, shape in shapes.items()}
    positions = places(*reversed(data["x"].shape[:2]))

    def loss(params, x):
        y = mixer.apply({"params": params}, x, positions=positions)[0]
        return (y * data["weights"]).sum(), y

    (d_params, d_x), y = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, jnp.asarray(data["x"], jnp.float32))
    close(y, data["y"])
    close(d_x, data["d_x"])
    for key, got in d_params.items():
        close(got.reshape(data[f"d_{key}"].shape), data[f"d_{key}"])


def golden(name):
    return {key.split("/")[1]: GOLDEN[key] for key in GOLDEN.files if key.startswith(name + "/")}


@pytest.mark.parametrize("name", ["bigbird1", "bigbird2"])
def test_bigbird_with_the_draws_of_transformers(name):
    """The published layer draws with a generator that knows the length, ours with a hash of positions; and its last
    block is global. Its own plan goes in as a matrix: the softmax over the same blocks is what agrees."""
    data = golden(name)
    (heads, rows, _), length = data["plan"].shape, data["x"].shape[1]
    block = length // (rows + 2)
    seen = np.zeros((heads, rows + 2, rows + 2), bool)
    seen[:, [0, -1]] = seen[:, :, [0, -1]] = True
    for h, row in np.ndindex(heads, rows):
        seen[h, row + 1, row : row + 3] = seen[h, row + 1, data["plan"][h, row]] = True
    table = seen.repeat(block, 1).repeat(block, 2)
    size = data["x"].shape[-1] // heads
    check_golden(GQA(heads, heads, size, mask=Drawn(table.tobytes(), heads, length), position=NoPE()), data)
    # Up to the draws and the last block, the pattern is that of the library.
    ours = bigbird(3, 1, 0, 1, 0)(np.arange(rows + 2)[:, None], np.arange(rows + 2))
    undrawn = seen.copy()
    for h, row in np.ndindex(heads, rows):
        undrawn[h, row + 1, data["plan"][h, row]] = False
    np.testing.assert_array_equal(undrawn[:, :-1, :-1], np.broadcast_to(ours[:-1, :-1], (heads, rows + 1, rows + 1)))


@pytest.mark.parametrize(("name", "options"), [("mistral", {}), ("gemma", {"soft_cap": 2.0, "scale": 1 / 3})])
def test_sliding_windows_of_transformers(name, options):
    data = golden(name)
    heads, kept, size, reach = map(int, data["sizes"])
    check_golden(GQA(heads, kept, size, mask=sliding(reach), **options), data)
