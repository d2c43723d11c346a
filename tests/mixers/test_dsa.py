"""Sparse latent attention: against Hugging Face and flash-linear-attention, and who learns from what."""

from __future__ import annotations

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from latent_golden import latent_case, made, near

from jaxlong.core.mask import causal
from jaxlong.core.types import BadInput
from jaxlong.mixers import DSA, MLA
from jaxlong.ops.indexer import Sight, select_by_index
from jaxlong.ops.select import attend_selected

GOLDEN = np.load(Path(__file__).parent.parent / "golden" / "dsa.npz")
SMALL = DSA(heads=2, kv_rank=8, nope_dim=4, rope_dim=4, value_dim=6, q_rank=5, top_k=4, index_heads=3, index_dim=8)
INDEXER = {"index_wq", "index_wk", "index_w", "index_norm", "index_bias"}
LENGTH = 21
FIELDS = [name for name in DSA.__dataclass_fields__ if name not in ("parent", "name")]


class Chooser(DSA):
    """Returns what DSA chooses."""

    @nn.compact
    def __call__(self, x, positions):
        queries, w, keys = self._index(x, self._query_input(x), positions)
        sight = Sight(positions, positions, None, None)
        return select_by_index(queries, w, keys, sight, mask=self.mask, heads=self.heads, count=self.top_k)


def as_booleans(chosen, length):
    indices, valid = (np.asarray(x)[:, :, 0] for x in chosen)
    named = np.zeros((*indices.shape[:2], length), int)
    for b, t, n in zip(*np.nonzero(valid), strict=True):
        named[b, t, indices[b, t, n]] += 1
    assert named.max() <= 1
    return named.astype(bool)


@pytest.mark.thorough
@pytest.mark.parametrize("case", ["v32", "v32_yarn"])
def test_equals_transformers(case):
    """The chosen keys, values, and gradients (which pass by the indexer)."""
    get, mixer, params = latent_case(GOLDEN, case, DSA)
    positions, length = get("positions"), get("x").shape[1]

    @jax.jit
    def run(params, x):
        y, back = jax.vjp(lambda p, x: mixer.apply({"params": p}, x, positions=positions)[0], params, x)
        return y, back(get("g"))

    chooser = Chooser(**{name: getattr(mixer, name) for name in FIELDS})
    chosen = jax.jit(lambda p, x: chooser.apply({"params": p}, x, positions))(params, get("x"))
    np.testing.assert_array_equal(as_booleans(chosen, length), get("chosen"))
    y, (dparams, dx) = run(params, get("x"))
    near(y, get("y"), "y")
    near(dx, get("dx"), "dx")
    assert dparams.keys() >= INDEXER
    for name, gradient in dparams.items():
        if name in INDEXER:
            assert not np.asarray(gradient).any(), name
        else:
            near(gradient, get(f"d/{name}"), name)


@pytest.mark.thorough
@pytest.mark.parametrize("case", ["fla", "fla_long"])
def test_ops_equal_the_naive_reference(case):
    """Scores, choice and attention over it, with heads of any key."""
    get = lambda name: jnp.asarray(GOLDEN[f"{case}/{name}"])
    length = get("q").shape[1]
    positions = jnp.tile(jnp.arange(length, dtype=jnp.int32), (2, 1))
    chosen = select_by_index(
        get("index_q"),
        get("index_w"),
        get("index_k"),
        Sight(positions, positions, None, None),
        mask=causal(),
        heads=get("q").shape[2],
        count=int(get("top_k")),
    )
    np.testing.assert_array_equal(as_booleans(chosen, length), get("chosen"))
    where = dict(mask=causal(), q_positions=positions, k_positions=positions)
    o, back = jax.vjp(lambda *x: attend_selected(*x, chosen, **where)[0], *(get(name) for name in "qkv"))
    near(o, get("o"), "o")
    for name, gradient in zip("qkv", back(get("g")), strict=True):
        near(gradient, get(f"d/{name}"), name)


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_enough_keys_are_latent_attention(dtype):
    """Bit for bit, values and gradients: with top_k >= T, and while the indexer warms up."""
    params, x, positions = made(SMALL, LENGTH, dtype)
    shared = {name: getattr(SMALL, name) for name in FIELDS if name in MLA.__dataclass_fields__}
    dense_params = {name: a for name, a in params.items() if name not in INDEXER}

    def run(mixer, params):
        y, back = jax.vjp(lambda p, x: mixer.apply({"params": p}, x, positions=positions)[0], params, x)
        return y, *back(jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape).astype(dtype))

    y, dparams, dx = jax.jit(lambda p: run(MLA(**shared), p))(dense_params)
    for mixer in (SMALL.clone(top_k=LENGTH), SMALL.clone(stage="dense")):
        other, dother, dx_other = jax.jit(lambda p: run(mixer, p))(params)  # noqa: B023
        np.testing.assert_array_equal(np.asarray(other, np.float32), np.asarray(y, np.float32))
        np.testing.assert_array_equal(np.asarray(dx_other, np.float32), np.asarray(dx, np.float32))
        for name, gradient in dparams.items():
            np.testing.assert_array_equal(np.asarray(dother[name]), np.asarray(gradient), err_msg=name)


def losses(mixer, params, x, positions):
    (y, _), kept = mixer.apply({"params": params}, x, positions=positions, mutable=["losses"])
    return y, kept["losses"]["indexer_kl"][0]


@pytest.mark.thorough
@pytest.mark.parametrize("stage", ["dense", "sparse"])
def test_model_and_indexer_learn_apart(stage):
    """The indexer from its loss alone, everything else and x from the outputs alone."""
    mixer = SMALL.clone(stage=stage)
    params, x, positions = made(mixer, LENGTH)
    outputs = jax.grad(lambda p, x: (losses(mixer, p, x, positions)[0] ** 2).sum(), (0, 1))
    own = jax.grad(lambda p, x: losses(mixer, p, x, positions)[1], (0, 1))
    (model, model_x), (indexer, indexer_x) = jax.jit(outputs)(params, x), jax.jit(own)(params, x)
    assert np.asarray(model_x).any() and not np.asarray(indexer_x).any()
    for name in params:
        learns = (model, indexer) if name not in INDEXER else (indexer, model)
        assert np.asarray(learns[0][name]).any() and not np.asarray(learns[1][name]).any(), name


def test_loss_is_sown_only_where_it_is_asked_for():
    params, x, positions = made(SMALL, LENGTH)
    y, loss = jax.jit(losses, static_argnums=0)(SMALL, params, x, positions)
    plain = lambda p: SMALL.apply({"params": p}, x, positions=positions)[0]
    np.testing.assert_array_equal(y, jax.jit(plain)(params))
    assert loss.shape == () and loss > 0
    variables = jax.eval_shape(lambda: SMALL.init(jax.random.key(0), x, positions=positions))
    assert set(variables) == {"params"}
    logarithms = lambda f: str(jax.make_jaxpr(f)(params)).count(" log ")
    assert logarithms(lambda p: losses(SMALL, p, x, positions)) > logarithms(plain) > 0


@pytest.mark.thorough
@pytest.mark.parametrize("stage", ["dense", "sparse"])
def test_loss_in_chunks(stage):
    """The mean over tokens is the same whether x comes whole or in chunks."""
    mixer = SMALL.clone(stage=stage)
    params, x, positions = made(mixer, LENGTH)
    state, total = mixer.init_state(2, LENGTH, width=12, max_chunk=14, dtype=x.dtype), 0.0
    for part in (slice(0, 7), slice(7, LENGTH)):
        (_, state), kept = jax.jit(
            lambda x, positions, state: mixer.apply(
                {"params": params}, x, positions=positions, state=state, mutable=["losses"]
            )
        )(x[:, part], positions[:, part], state)
        total += kept["losses"]["indexer_kl"][0] * (part.stop - part.start) / LENGTH
    np.testing.assert_allclose(total, jax.jit(losses, static_argnums=0)(mixer, params, x, positions)[1], rtol=1e-5)


def test_a_learned_indexer_foresees_attention():
    """A few steps on the dense loss bring it down; the model stays as it was."""
    mixer = SMALL.clone(stage="dense")
    params, x, positions = made(mixer, LENGTH)
    step = jax.jit(jax.value_and_grad(lambda p: losses(mixer, p, x, positions)[1]))
    first, _ = step(params)
    learned = params
    for _ in range(60):
        _, gradient = step(learned)
        learned = jax.tree.map(lambda p, g: p - 0.5 * g, learned, gradient)
    assert step(learned)[0] < 0.6 * first
    assert all((learned[name] == params[name]).all() for name in params if name not in INDEXER)


@pytest.mark.parametrize(
    "change,field",
    [
        ({"top_k": 0}, "top_k"),
        ({"index_heads": 0}, "index_heads"),
        ({"index_dim": 3}, "index_dim"),
        ({"index_dim": 12, "indexer_dtype": "float8"}, "index_dim"),
        ({"indexer_dtype": "int8"}, "indexer_dtype"),
        ({"stage": "warm"}, "stage"),
        ({"heads": 0}, "heads"),
    ],
    ids=str,
)
def test_bad_fields(change, field):
    with pytest.raises(BadInput) as error:
        SMALL.clone(**change)
    assert error.value.field == field
