"""LongNet against a float64 NumPy loop over branches, segments and heads; masked and gathered forms agree."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from differences import assert_gradients, exact
from flax import linen as nn

from jaxlong.core.mask import causal
from jaxlong.core.position import NoPE
from jaxlong.core.types import BadInput
from jaxlong.mixers import GQA, LongNet

WIDTH = 8
SETTINGS = {
    "cyclic": (LongNet(4, 2, 6, branches=((4, 1), (8, 2)), position=NoPE()), 19),
    "grouped": (LongNet(4, 4, 4, branches=((3, 1), (7, 3), (16, 4)), offsets="grouped", position=NoPE()), 22),
    "detached": (LongNet(2, 1, 6, branches=((3, 2), (5, 1), (64, 3)), weights="detached", position=NoPE()), 13),
}
settings = pytest.mark.parametrize(("mixer", "length"), SETTINGS.values(), ids=SETTINGS)


def setup(mixer, length, batch=2):
    x = jax.random.normal(jax.random.key(0), (batch, length, WIDTH))
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), x.shape[:2])
    params = nn.unbox(jax.jit(mixer.init)(jax.random.key(1), x, positions=positions))["params"]
    return params, x, positions


def naive(mixer, params, x, mixture=None):
    """Equations (4) to (9) of the paper, token by token and head by head. x [T D] -> y [T D], weights of branches.

    `mixture`: those weights, where they are to stay as they are.
    """
    length, y, found = len(x), 0, {}
    for h in range(mixer.heads):
        g = h * mixer.kv_heads // mixer.heads
        q, k, v = x @ params["wq"][:, h], x @ params["wk"][:, g], x @ params["wv"][:, g]
        scores = np.exp(q @ k.T / np.sqrt(mixer.head_dim))
        rows = []
        for i in range(length):
            sums, outs = [], []
            for segment, rate in mixer.branches:
                offset = h % rate if mixer.offsets == "cyclic" else int(h // (mixer.heads / rate))
                start = i // segment * segment
                picked = [j for j in range(start, min(start + segment, length)) if (j - start) % rate == offset]
                if i in picked:
                    seen = [j for j in picked if j <= i]
                    sums.append(scores[i, seen].sum())
                    outs.append(scores[i, seen] @ v[seen] / sums[-1])
            found[h, i] = np.array(sums) / sum(sums)
            rows.append((found if mixture is None else mixture)[h, i] @ np.array(outs))
        y = y + np.array(rows) @ params["wo"][h]
    return y, found


def close(got, want, tolerance=1e-5):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(1.0, np.abs(want).max()))


def masked(mixer, params, x, positions):
    """The same row told to be one document by segment ids: the form for any packing."""
    ids = jnp.zeros_like(positions)
    return mixer.apply({"params": params}, x, positions=positions, segment_ids=ids)[0]


def gathered(mixer, params, x, positions):
    return mixer.apply({"params": params}, x, positions=positions)[0]


@pytest.mark.thorough
@settings
def test_equals_the_paper(mixer, length):
    params, x, positions = setup(mixer, length)
    want = np.stack([naive(mixer, exact(params), row)[0] for row in exact(x)])
    for form in (gathered, masked):
        close(jax.jit(functools.partial(form, mixer))(params, x, positions), want)


@pytest.mark.thorough
@settings
@pytest.mark.parametrize("form", [gathered, masked])
def test_gradients_equal_those_of_the_paper(mixer, length, form):
    params, x, positions = setup(mixer, length, batch=1)
    weights = np.random.default_rng(0).standard_normal(x.shape)
    grads = jax.jit(jax.grad(lambda p, x: (form(mixer, p, x, positions) * weights).sum(), (0, 1)))(params, x)
    mixture = naive(mixer, exact(params), exact(x)[0])[1] if mixer.weights == "detached" else None
    assert_gradients(grads, lambda at: (naive(mixer, at[0], at[1][0], mixture)[0] * weights[0]).sum(), (params, x))


def test_one_branch_of_everything_is_full_attention():
    mixer = LongNet(heads=4, kv_heads=2, head_dim=6, branches=((17, 1),))
    params, x, positions = setup(mixer, 17)
    full = GQA(heads=4, kv_heads=2, head_dim=6, mask=causal())
    want = full.apply({"params": params}, x, positions=positions)[0]
    close(gathered(mixer, params, x, positions), want, 2e-6)
    close(masked(mixer, params, x, positions), want, 2e-6)


def test_gathering_costs_what_the_formula_says():
    """Scores of the gathered form, counted in its program: T w / r^2 a head and branch."""
    mixer = LongNet(4, 4, 8, branches=((32, 1), (64, 2), (128, 4)), position=NoPE())
    length = 128
    params, x, positions = setup(mixer, length, batch=1)
    flops = jax.jit(functools.partial(gathered, mixer)).lower(params, x, positions).compile().cost_analysis()["flops"]
    products = sum(4 * length * 4 * 8 * w / r**2 for w, r in mixer.branches)
    parameters = 2 * length * sum(p.size for p in jax.tree.leaves(params))
    assert products + parameters < flops < 1.5 * (products + parameters)


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"branches": ((4, 2),)}, "branches: .*: some tokens are in none; a rate of 1 in one of them"),
        ({"branches": ((4, 1), (2, 3))}, "dilated.rate: 3: some heads would keep no token of a segment of 2; 1 to 2"),
        ({"offsets": "random"}, "offsets: random: no such value; one of cyclic, grouped"),
        ({"weights": "none"}, "weights: none: no such value; one of attached, detached"),
        ({"kv_heads": 3}, "kv_heads: 3: does not divide heads = 4"),
    ],
)
def test_bad_input(fields, line):
    with pytest.raises(BadInput, match=line):
        LongNet(**{"heads": 4, "kv_heads": 2, "head_dim": 6, **fields})
