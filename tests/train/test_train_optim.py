"""Schedules against their formulas, optimizers against NumPy in float64 and against their definition."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import train_toy as toy
from jax.sharding import PartitionSpec as P

from jaxlong.core.types import BadInput
from jaxlong.train.optim import (
    WSD,
    AdamW,
    Constant,
    Cosine,
    Muon,
    decays,
    learning_rate,
    make_optimizer,
    matrix_dimensions,
)

STEPS = 40


def wanted_cosine(step: int) -> float:
    if step < 7:
        return 3e-3 * (step + 1) / 8
    return 3e-3 * (0.2 + 0.8 * 0.5 * (1 + np.cos(np.pi * (step - 7) / (STEPS - 7))))


def wanted_wsd(step: int) -> float:
    if step < 7:
        return 3e-3 * (step + 1) / 8
    return 3e-3 * (1 - 0.8 * max(0, step - 30) / 10)


@pytest.mark.parametrize(
    ("schedule", "wanted"),
    [
        (Cosine(3e-3, warmup=7, final=0.2), wanted_cosine),
        (WSD(3e-3, warmup=7, decay=10, final=0.2), wanted_wsd),
        (Constant(3e-3, warmup=7), lambda step: 3e-3 * min(1, (step + 1) / 8)),
        (Constant(3e-3), lambda step: 3e-3),
    ],
)
def test_schedule_formula(schedule, wanted):
    rate = jax.jit(learning_rate(schedule, STEPS))
    for step in range(STEPS + 1):
        np.testing.assert_allclose(rate(jnp.int32(step)), wanted(step), rtol=2e-6)
    np.testing.assert_allclose(
        rate(jnp.int32(10 * STEPS)), wanted(STEPS) if schedule != Constant(3e-3) else 3e-3, rtol=2e-6
    )


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: Cosine(0.0), "schedule.peak: 0.0: is no learning rate; more than 0"),
        (lambda: Cosine(1.0, warmup=-1), "schedule.warmup: -1: is no number of steps; 0 or more"),
        (lambda: Cosine(1.0, final=2.0), "schedule.final: 2.0: is no fraction of the peak; 0 to 1"),
        (lambda: WSD(1.0, decay=-5), "schedule.decay: -5: is no number of steps; 0 or more"),
        (lambda: AdamW(b2=1.0), "optimizer.b2: 1.0: is no decay rate; 0 or more, below 1"),
        (lambda: AdamW(eps=0.0), "optimizer.eps: 0.0: divides by zero; more than 0"),
        (lambda: Muon(weight_decay=-1.0), "optimizer.weight_decay: -1.0: would grow the weights; 0 or more"),
        (lambda: Muon(iterations=0), "optimizer.iterations: 0: is no number of iterations; 1 or more"),
        (lambda: Muon(rms=0.0), "optimizer.rms: 0.0: is no size of an update; more than 0"),
    ],
)
def test_bad_values(make, line):
    with pytest.raises(BadInput) as caught:
        make()
    assert str(caught.value) == line


def test_schedule_that_does_not_fit():
    with pytest.raises(BadInput, match=r"^schedule: WSD\(.*\): takes 12 steps, the run has 10; 10 or fewer$"):
        make_optimizer(AdamW(), WSD(1.0, warmup=5, decay=7), steps=10)


@pytest.mark.parametrize(
    ("names", "reduction", "output"),
    [
        (("embed", "mlp"), (0,), (1,)),
        (P("layers", "mlp", "embed"), (1,), (2,)),
        (P("layers", "embed", "heads", "head_dim"), (1,), (2, 3)),
        (P("layers", "heads", "head_dim", "embed"), (1, 2), (3,)),
        (P("layers", "experts", "embed", "mlp"), (2,), (3,)),
        (P("rank", "heads", "head_dim"), (0,), (1, 2)),
    ],
)
def test_matrices(names, reduction, output):
    assert matrix_dimensions(names) == (reduction, output)
    assert decays(names)


@pytest.mark.parametrize("names", [("vocab", "embed"), ("embed", "vocab"), ("layers", None, None), (None, None)])
def test_not_matrices_but_decayed(names):
    assert matrix_dimensions(names) is None
    assert decays(names)


@pytest.mark.parametrize(
    "names", [(), ("embed",), ("layers", "embed"), ("layers", "heads", "head_dim"), ("kv_heads", "head_dim")]
)
def test_vectors(names):
    assert matrix_dimensions(names) is None
    assert not decays(names)


def gradients(params, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape) * 0.1, jnp.float32), params)


def apply(tx, params, steps=3):
    @jax.jit
    def update(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(tx.init)(params)
    for seed in range(steps):
        params, state = update(gradients(params, seed), state, params)
    return params, state


def test_adamw_against_float64():
    """Clipping, moments, bias correction, decoupled decay of matrices only, the schedule."""
    algorithm, schedule = AdamW(b1=0.8, b2=0.9, eps=1e-6, weight_decay=0.3), Cosine(1e-2, warmup=2)
    start = toy.init_params(jax.random.key(0))
    got, _ = apply(make_optimizer(algorithm, schedule, steps=STEPS, clip=0.5, axes=toy.AXES), start)

    params = jax.tree.map(lambda p: np.asarray(p, np.float64), start)
    m = v = jax.tree.map(np.zeros_like, params)
    decay = {"embed": 0.3, "layers": {"w": 0.3, "scale": 0.0}, "head": 0.3}
    for t in range(3):
        g = jax.tree.map(lambda p: np.asarray(p, np.float64), gradients(start, t))
        norm = np.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(g)))
        g = jax.tree.map(lambda leaf: leaf * min(1, 0.5 / norm), g)  # noqa: B023
        m = jax.tree.map(lambda a, b: 0.8 * a + 0.2 * b, m, g)
        v = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b**2, v, g)
        rate = 1e-2 * min(1, (t + 1) / 3)
        unbiased = (1 - 0.8 ** (t + 1), 1 - 0.9 ** (t + 1))
        params = jax.tree.map(
            lambda p, a, b, d: p - rate * (a / unbiased[0] / (np.sqrt(b / unbiased[1]) + 1e-6) + d * p),  # noqa: B023
            params, m, v, decay,
        )  # fmt: skip
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_no_clipping():
    params = {"w": jnp.ones((4, 4))}
    tx = make_optimizer(AdamW(), Constant(1.0), steps=1, clip=0.0)
    updates, _ = tx.update({"w": jnp.full((4, 4), 1e9)}, tx.init(params), params)
    assert jnp.isfinite(updates["w"]).all()


MUON_AXES = {
    "embed": P("vocab", "embed"),
    "wq": P("layers", "embed", "heads", "head_dim"),
    "wo": P("layers", "heads", "head_dim", "embed"),
    "down": P("layers", "mlp", "embed"),
    "bq": P("layers", "heads", "head_dim"),
    "scale": P("layers", "embed"),
    "conv": P("layers", None, None),
}
MUON_SHAPES = {"embed": (20, 16), "wq": (3, 16, 4, 8), "wo": (3, 4, 8, 16), "down": (3, 24, 16), "bq": (3, 4, 8),
               "scale": (3, 16), "conv": (3, 5, 16)}  # fmt: skip
MATRICES = {"wq": (3, 16, 32), "wo": (3, 32, 16), "down": (3, 24, 16)}


def muon(weight_decay=0.0):
    algorithm = Muon(weight_decay=weight_decay, b1=0.8, b2=0.9)
    return make_optimizer(algorithm, Constant(1.0), steps=STEPS, clip=0.0, axes=MUON_AXES)


@pytest.fixture(scope="module")
def after_muon():
    """Zeros, after two steps of Muon without weight decay, and the optimizer's state."""
    return apply(muon(), {name: jnp.zeros(shape) for name, shape in MUON_SHAPES.items()}, steps=2)


def newton_schulz(g):
    """Five steps of the quintic iteration of Jordan (2024), in float64."""
    x = g / (np.linalg.norm(g) + 1e-8)
    x = x.T if x.shape[0] > x.shape[1] else x
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if g.shape[0] > g.shape[1] else x


@pytest.mark.parametrize("name", MATRICES)
def test_muon_against_float64(after_muon, name):
    """Each layer's [inputs, outputs] matrix by itself: Nesterov momentum 0.95, bias correction as Adam's."""
    shape = MATRICES[name]
    zeros = {key: np.zeros(size) for key, size in MUON_SHAPES.items()}
    g = [np.asarray(gradients(zeros, seed)[name], np.float64).reshape(shape) for seed in range(2)]
    wanted, m = np.zeros(shape), np.zeros(shape)
    for t in range(2):
        m = 0.95 * m + 0.05 * g[t]
        ahead = 0.95 * m / (1 - 0.95 ** (t + 2)) + 0.05 * g[t] / (1 - 0.95 ** (t + 1))
        wanted -= 0.2 * np.sqrt(max(shape[1:])) * np.stack([newton_schulz(layer) for layer in ahead])
    np.testing.assert_allclose(np.asarray(after_muon[0][name]).reshape(shape), wanted, rtol=1e-3, atol=1e-4)


def test_muon_updates_are_nearly_orthogonal():
    """All singular values of a layer's update lie around rms * sqrt(max(in, out))."""
    one, _ = apply(muon(), {name: jnp.zeros(shape) for name, shape in MUON_SHAPES.items()}, steps=1)
    for name, shape in MATRICES.items():
        singular = np.linalg.svd(np.asarray(one[name]).reshape(shape), compute_uv=False)
        scale = 0.2 * np.sqrt(max(shape[1:]))
        assert (singular > 0.6 * scale).all() and (singular < 1.3 * scale).all(), name


def test_muon_decays_what_adamw_decays():
    params = {name: jnp.ones(shape) for name, shape in MUON_SHAPES.items()}
    zero = jax.tree.map(jnp.zeros_like, params)

    @jax.jit
    def difference(params):
        decayed, bare = (tx.update(zero, tx.init(params), params)[0] for tx in (muon(0.5), muon(0.0)))
        return jax.tree.map(jnp.subtract, decayed, bare)

    for name, change in difference(params).items():
        np.testing.assert_allclose(change, 0.0 if name in ("bq", "scale") else -0.5, atol=1e-6)


def test_muon_keeps_one_moment_of_matrices(after_muon):
    params, state = after_muon
    stored = sum(leaf.size for leaf in jax.tree.leaves(state))
    matrices = sum(params[name].size for name in MATRICES)
    rest = sum(leaf.size for leaf in params.values()) - matrices
    assert matrices + 2 * rest <= stored < matrices + 2 * rest + 10


@pytest.mark.parametrize("algorithm", [AdamW(), Muon()])
def test_without_axes_two_dimensions_make_a_matrix(algorithm):
    params = {"w": jnp.ones((6, 6)), "b": jnp.ones((6,))}
    tx = make_optimizer(algorithm, Constant(1e-2), steps=1)
    zero = jax.tree.map(jnp.zeros_like, params)
    decayed, _ = jax.jit(lambda params: tx.update(zero, tx.init(params), params))(params)
    assert not decayed["b"].any() and decayed["w"].all()
