"""What the float64 NumPy oracles of sparse mixers share: rotation, softmax, and the comparison with a mixer."""

from __future__ import annotations

from itertools import pairwise

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

WIDTH = 12


def rotate(x, position, base=10000.0):
    """The rotary embedding of one head [C] (or several, [n C]) at one position, halves paired."""
    half = x.shape[-1] // 2
    angle = position * base ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)


def softmax_attention(q, keys, values, scale=None):
    """One query [C] over keys [n C] and values [n V]; 0 where n = 0."""
    if not len(keys):
        return np.zeros(values.shape[-1])
    scores = keys @ q * (len(q) ** -0.5 if scale is None else scale)
    weights = np.exp(scores - scores.max())
    return weights @ values / weights.sum()


def best(scores, k):
    """Indices of the k largest scores, ties to the lower index, as a set."""
    return set(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k])


def documents(naive, params, x, lengths):
    """naive(params, x [T D]) for each document of each row, side by side."""
    edges = np.cumsum((0, *lengths))
    rows = [[naive(params, row[a:b]) for a, b in pairwise(edges)] for row in x]
    return np.stack([np.concatenate(row) for row in rows])


def random_params(mixer, rng):
    """Parameters of the mixer's shapes in float64, none of them small."""
    x, positions = jnp.zeros((1, 2, WIDTH)), jnp.zeros((1, 2), jnp.int32)
    shapes = jax.eval_shape(lambda: nn.unbox(mixer.init(jax.random.key(0), x, positions=positions)["params"]))
    return {name: rng.normal(size=leaf.shape) * 0.4 for name, leaf in shapes.items()}


def single(tree):
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), tree)


def whole(mixer, params, x, positions, segments):
    return mixer.apply({"params": params}, x, positions=positions, segment_ids=segments)[0]


def with_state(mixer, params, x, positions, segments):
    state = mixer.init_state(len(x), x.shape[1], width=WIDTH, max_chunk=x.shape[1], dtype=x.dtype)
    return mixer.apply({"params": params}, x, positions=positions, segment_ids=segments, state=state)[0]


def check(mixer, naive, lengths, *, seed=0, directions=2, run=whole, still=()):
    """A mixer's outputs, and its gradients along random directions, against `naive` in float64.

    Gradients are taken with respect to every parameter and x; the oracle's are central differences. Those named in
    `still` must be 0.
    """
    rng = np.random.default_rng(seed)
    total = sum(lengths)
    x = rng.normal(size=(2, total, WIDTH))
    tile = lambda parts: jnp.asarray(np.tile(np.concatenate(parts), (2, 1)), jnp.int32)
    positions = tile([np.arange(n) for n in lengths])
    segments = tile([np.full(n, i + 1) for i, n in enumerate(lengths)])
    params = random_params(mixer, rng)
    weigh = rng.normal(size=x.shape)

    def loss(params, x):
        y = run(mixer, params, x, positions, segments)
        return (y * weigh).sum(), y

    (_, y), (param_grads, x_grad) = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(single(params), single(x))
    want = documents(naive, params, x, lengths)
    np.testing.assert_allclose(y, want, rtol=0, atol=1e-5 * np.abs(want).max())

    value = lambda params, x: (documents(naive, params, x, lengths) * weigh).sum()
    step = 1e-6
    for name in (*params, None):
        grad = np.asarray(x_grad if name is None else param_grads[name], np.float64)
        assert (np.abs(grad).max() > 0) == (name not in still), name
        for _ in range(directions):
            along = rng.normal(size=grad.shape)
            ends = []
            for sign in (step, -step):
                moved = params if name is None else params | {name: params[name] + sign * along}
                ends.append(value(moved, x + sign * along if name is None else x))
            slope = (ends[0] - ends[1]) / (2 * step)
            np.testing.assert_allclose(
                (grad * along).sum(), slope, rtol=0, atol=2e-5 * np.linalg.norm(grad), err_msg=str(name)
            )
