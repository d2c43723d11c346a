"""The language model: states, remat, blocks, heads, extension; what is scanned is not stored."""

from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlong.core.mask import sliding
from jaxlong.core.position import PI, Alibi, NoPE, Yarn
from jaxlong.core.state import nbytes
from jaxlong.core.types import BadInput, Batch
from jaxlong.layers.mlp import Gelu, SwiGLU
from jaxlong.layers.moe import MoE
from jaxlong.mixers import GQA, RWKV7, RWKVChannelMix
from jaxlong.model import LM, Block, Layer, extend, init_params, logical_axes
from jaxlong.ops.attend import Backend
from jaxlong.parallel.memory import POLICIES
from jaxlong.train.grads import ahead, next_token_loss

LOCAL, GLOBAL = GQA(heads=2, kv_heads=1, head_dim=8, mask=sliding(4)), GQA(heads=2, kv_heads=2, head_dim=8, conv=3)
MODEL = LM(vocab=32, width=16, depth=4, pattern=(LOCAL, GLOBAL), mlp=SwiGLU(hidden=24))
TOKENS = jax.random.randint(jax.random.key(1), (2, 12), 0, 32)


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda key: init_params(MODEL, key))(jax.random.key(0))


def logits(model, params, tokens=TOKENS, **sequence):
    return jax.jit(lambda p, t: model.apply({"params": p}, t, **sequence)[0])(params, tokens)


def batch(tokens=TOKENS):
    shape = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
    return Batch(tokens, jnp.roll(tokens, -1, 1), positions, jnp.ones(shape, jnp.int32), jnp.ones(shape))


def block(mixer, mlp, leaves, x, first=None):
    """One block on its own, compiled: operation by operation it would take much longer."""
    positions = batch().positions
    run = jax.jit(lambda p, x, first: Block(mixer, mlp, 0).apply({"params": p}, x, positions, None, None, first))
    x, _, first = run(leaves, x, first)
    return x, first


def continued(model, params, cut):
    """Logits of tokens before and after a cut, the latter from the state of the former."""
    state, positions = model.init_state(2, 12, max_chunk=max(cut, 12 - cut)), batch().positions
    step = jax.jit(lambda t, p, s: model.apply({"params": params}, t, positions=p, state=s))
    first, state = step(TOKENS[:, :cut], positions[:, :cut], state)
    return jnp.concatenate([first, step(TOKENS[:, cut:], positions[:, cut:], state)[0]], axis=1)


def gradients(model, params):
    loss = next_token_loss(model, chunk=8)
    return jax.jit(jax.grad(lambda p: loss(p, batch())[0]))(params)


def close(a, b, atol=2e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=atol * max(1, np.abs(y).max())), a, b)


def test_every_parameter_is_stacked_and_named(params):
    axes = logical_axes(MODEL)
    names = jax.tree.leaves(axes, is_leaf=lambda node: isinstance(node, jax.sharding.PartitionSpec))
    assert all(len(n) == leaf.ndim for n, leaf in zip(names, jax.tree.leaves(params), strict=True))
    assert all(leaf.shape[0] == 2 for leaf in jax.tree.leaves(params["layers"]))


def test_state_continues_the_sequence(params):
    whole = logits(MODEL, params)
    state = MODEL.init_state(2, 12, max_chunk=5)
    step = jax.jit(lambda t, p, s: MODEL.apply({"params": params}, t, positions=p, state=s))
    outs, start = [], 0
    for size in (5, 1, 5, 1):
        positions = jnp.broadcast_to(jnp.arange(start, start + size, dtype=jnp.int32), (2, size))
        out, state = step(TOKENS[:, start : start + size], positions, state)
        outs.append(out)
        start += size
    close(jnp.concatenate(outs, 1), whole, 1e-5)


def test_state_bytes_add_up():
    state = jax.eval_shape(lambda: MODEL.init_state(3, 100, max_chunk=2, dtype="bfloat16"))
    sizes = {"width": 16, "max_chunk": 2, "itemsize": 2}
    assert nbytes(state) == 2 * sum(mixer.state_bytes(3, 100, **sizes) for mixer in MODEL.pattern)


@pytest.fixture(scope="module")
def plain_gradients(params):
    return gradients(MODEL, params)


@pytest.mark.thorough
@pytest.mark.parametrize("remat", [name for name in POLICIES if name != "none"])
def test_remat_changes_no_value(remat, params, plain_gradients):
    close(gradients(MODEL.clone(remat=remat), params), plain_gradients)


@pytest.mark.thorough
@pytest.mark.parametrize("block", [5, 64])
def test_blockwise_feed_forward_changes_no_value(block, params, plain_gradients):
    close(gradients(MODEL.clone(mlp_block=block), params), plain_gradients)


def test_blocks_and_scan_equal_a_loop_over_layers(params):
    """The scanned pattern equals its blocks applied one after another."""
    x = params["embed"][TOKENS] * 4.0
    for group in range(2):
        for i, mixer in enumerate(MODEL.pattern):
            weights = jax.tree.map(lambda leaf, g=group: leaf[g], params["layers"][f"block_{i}"])
            x, _ = block(mixer, MODEL.mlp, weights, x)
    x = x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * params["norm"]["scale"]
    close(logits(MODEL, params), x @ params["head"], 1e-5)


def test_tied_head_soft_cap_and_gelu():
    model = MODEL.clone(tied=True, soft_cap=3.0, mlp=Gelu(hidden=8))
    weights = init_params(model, jax.random.key(0))
    assert "head" not in weights and model.head(weights).shape == (16, 32)
    hidden = model.apply({"params": weights}, TOKENS, method="features")[0]
    close(logits(model, weights), 3 * jnp.tanh(hidden @ weights["embed"].T / 3), 1e-5)


def test_activations_in_bfloat16(params):
    low = logits(MODEL.clone(dtype="bfloat16"), params)
    assert low.dtype == jnp.float32
    assert np.abs(low - logits(MODEL, params)).max() < 0.15


def test_extend_keeps_parameters_and_factor_one_changes_nothing(params):
    yarn = extend(MODEL, Yarn(factor=4.0, original=12))
    assert [mixer.position.scaling for mixer in yarn.pattern] == [Yarn(factor=4.0, original=12)] * 2
    assert jax.tree.structure(init_params(yarn, jax.random.key(0))) == jax.tree.structure(params)
    assert np.abs(logits(yarn, params) - logits(MODEL, params)).max() > 1e-3
    close(logits(extend(MODEL, Yarn(factor=1.0, original=12)), params), logits(MODEL, params))


def test_interpolation_equals_slower_positions(params):
    positions = 3 * batch().positions
    scaled = extend(MODEL.clone(pattern=(GLOBAL, GLOBAL)), PI(factor=3.0))
    weights = init_params(scaled, jax.random.key(0))
    plain = logits(MODEL.clone(pattern=(GLOBAL, GLOBAL)), weights)
    close(logits(scaled, weights, positions=positions), plain, 1e-5)


def test_extend_needs_a_rotation():
    model = MODEL.clone(pattern=(GQA(heads=2, kv_heads=1, head_dim=8, position=NoPE()),))
    with pytest.raises(BadInput, match="no mixer rotates"):
        extend(model, PI(factor=2.0))
    mixed = extend(model.clone(pattern=(LOCAL, GQA(heads=2, kv_heads=1, head_dim=8, position=Alibi()))), PI(factor=2.0))
    assert mixed.pattern[1].position == Alibi()


@pytest.mark.parametrize("remat", ["none", "full", "attn_out"])
def test_masks_are_not_stored_a_layer(remat):
    """The largest boolean of a differentiated step stays a tile, whatever the number of tiles and layers."""
    kernel = Backend(kernel="blockwise")

    def largest(length: int) -> int:
        pattern = (GQA(heads=2, kv_heads=1, head_dim=8, backend=kernel),)
        model = LM(vocab=32, width=16, depth=3, pattern=pattern, mlp=SwiGLU(hidden=16), remat=remat)
        weights = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
        row = jax.eval_shape(lambda: batch(jnp.zeros((1, length), jnp.int32)))
        loss = next_token_loss(model, chunk=64)
        text = str(jax.make_jaxpr(jax.grad(lambda p, b: loss(p, b)[0]))(weights, row))
        shapes = re.findall(r"bool\[([\d,]+)\]", text)
        return max(math.prod(map(int, shape.split(","))) for shape in shapes)

    assert largest(8192) <= largest(4096) * 1.01 + 8192


@pytest.mark.parametrize(
    "change,say",
    [
        ({"depth": 5}, "model.depth: 5: no multiple of the pattern's length 2"),
        ({"vocab": 0}, "model.vocab: 0"),
        ({"pattern": ()}, "has no mixer"),
        ({"dtype": "int8"}, "model.dtype: int8"),
        ({"remat": "half"}, "model.remat: half"),
        ({"mlp_block": -1}, "model.mlp_block: -1"),
    ],
)
def test_refused(change, say):
    with pytest.raises(BadInput, match=re.escape(say)):
        MODEL.clone(**change)


MIX = LM(
    vocab=32,
    width=16,
    depth=5,
    before=(Layer(GLOBAL, SwiGLU(hidden=40)),),
    pattern=(LOCAL, Layer(GLOBAL, Gelu(hidden=8))),
    after=(LOCAL, LOCAL),
    mlp=MoE(hidden=8, experts=4, top_k=2, shared=1, router="sigmoid", bias_rate=0.01),
    mtp=2,
)


@pytest.fixture(scope="module")
def mixed():
    """Random parameters of MIX, drawn without compiling an initialisation."""
    shapes, rng = jax.eval_shape(lambda: init_params(MIX, jax.random.key(0))), np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), leaf.dtype), shapes)


def test_layers_around_the_pattern(mixed):
    """Blocks before, scanned and after equal a loop over all of them; states continue."""
    weights = mixed
    x = weights["embed"][TOKENS] * 4.0
    names = [
        ("first_layers", 0, None),
        ("layers", 0, 0),
        ("layers", 1, 0),
        ("last_layers", 0, None),
        ("last_layers", 1, None),
    ]
    assert len(MIX.blocks) == MIX.depth == len(names)
    for (mixer, mlp), (group, place, index) in zip(MIX.blocks, names, strict=True):
        leaves = weights[group][f"block_{place}"]
        leaves = leaves if index is None else jax.tree.map(lambda leaf, i=index: leaf[i], leaves)
        x, _ = block(mixer, mlp, leaves, x)
    x = x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * weights["norm"]["scale"]
    whole = logits(MIX, weights)
    close(whole, x @ weights["head"], 1e-5)
    close(continued(MIX, weights, 5), whole, 1e-5)


def test_loss_adds_what_layers_tell_and_multi_token_prediction(mixed):
    loss_fn = next_token_loss(MIX, chunk=8, mtp_weight=0.5)
    (loss, metrics), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(mixed, batch())
    np.testing.assert_allclose(loss, metrics["nll"] + 0.5 * metrics["mtp_nll"], rtol=1e-6)  # the bias's loss is 0
    assert 1 <= metrics["expert_load"] <= 4
    bias = grads["layers"]["block_0"]["mlp"]["selection_bias"]
    np.testing.assert_allclose(np.abs(bias)[bias != 0], 0.01, rtol=1e-6)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads["ahead_0"]))


def test_ahead_sees_only_its_own_document():
    tokens = jnp.asarray([[1, 2, 3, 4, 5, 6]])
    rows = Batch(
        tokens, jnp.asarray([[2, 3, 0, 5, 6, 0]]), tokens, jnp.asarray([[1, 1, 1, 2, 2, 2]]),
        jnp.asarray([[1.0, 1, 0, 1, 1, 0]]),
    )  # fmt: skip
    future = ahead(rows, 2)
    np.testing.assert_array_equal(future.tokens[0], [[2, 3, 0, 5, 6, 0]])
    np.testing.assert_array_equal(future.weights, [[[1, 0, 0, 1, 0, 0]], [[0] * 6]])
    assert future.targets[0, 0, 0] == 3 and future.targets[0, 0, 3] == 6


def test_multi_token_prediction_is_causal(mixed):
    weights, rows = mixed, batch()

    def features(rows):
        hidden, _ = MIX.apply({"params": weights}, rows.tokens, positions=rows.positions, method="features")
        following = ahead(rows, 2).tokens
        return MIX.apply({"params": weights}, hidden, following, positions=rows.positions, method="features_ahead")

    changed = rows._replace(targets=rows.targets.at[:, 8].set((rows.targets[:, 8] + 1) % 32))
    a, b = jax.jit(features)(rows), jax.jit(features)(changed)
    np.testing.assert_array_equal(a[0, :, :8], b[0, :, :8])  # depth 1 reads target 8 at token 8
    np.testing.assert_array_equal(a[1, :, :7], b[1, :, :7])  # depth 2 at token 7
    assert np.abs(a[1, :, 7] - b[1, :, 7]).max() > 0


def test_values_of_the_first_layer_reach_the_others():
    """A scanned RWKV-7, channel mixing with a state in place of the MLP, equals a loop over its layers."""
    mixer = RWKV7(heads=2, head_dim=8, decay_rank=3, rate_rank=4, gate_rank=5, chunk=4)
    model = LM(vocab=32, width=16, depth=3, pattern=(mixer,), mlp=RWKVChannelMix(hidden=24), remat="full")
    shapes, rng = jax.eval_shape(lambda: init_params(model, jax.random.key(0))), np.random.default_rng(0)
    weights = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), leaf.dtype), shapes)
    x, first = weights["embed"][TOKENS] * 4.0, mixer.no_values(jnp.zeros((2, 12, 16)))
    for layer in range(3):
        leaves = jax.tree.map(lambda leaf, i=layer: leaf[i], weights["layers"]["block_0"])
        x, first = block(mixer, model.mlp, leaves, x, first)
    x = x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * weights["norm"]["scale"]
    whole = logits(model, weights)
    close(whole, x @ weights["head"], 1e-5)
    state = jax.eval_shape(lambda: model.init_state(2, 12, max_chunk=7))
    sizes = {"width": 16, "max_chunk": 7, "itemsize": 4}
    assert nbytes(state) == 3 * sum(part.state_bytes(2, 12, **sizes) for part in (mixer, model.mlp))
    close(continued(model, weights, 5), whole, 1e-5)
