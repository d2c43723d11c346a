"""Each op that works along the text, on rows in spans on several devices, equals whole rows on one device.

Values, the state after the row, and gradients; documents with edges at and off those of spans; odd numbers of devices.
What the programs send is read off the compiled text.
"""

from __future__ import annotations

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlong.core.types import BadInput
from jaxlong.mixers import GQA, KDA, MIXERS, MLA, GatedDeltaNet
from jaxlong.model import LM, init_params
from jaxlong.ops.attend import Backend
from jaxlong.ops.chunks import starts
from jaxlong.ops.compressive import compressive_memory
from jaxlong.ops.delta import delta_rule, generalized_delta_rule
from jaxlong.ops.log_linear import log_linear
from jaxlong.ops.scan import linear_attention, linear_scan, phase_scan, selective_scan
from jaxlong.ops.short_conv import short_conv
from jaxlong.ops.token_shift import next_token, token_shift
from jaxlong.ops.wkv import wkv
from jaxlong.parallel.layout import permute, restore
from jaxlong.parallel.mesh import AXES, make_mesh

B, H, K, V = 2, 4, 4, 3
LENGTHS = {3: 48, 5: 40, 7: 42, 8: 48}
EDGES = {48: ((8, 3, 1, 36), (17, 15, 8, 8)), 40: ((4, 7, 29), (20, 1, 19)), 42: ((3, 8, 31), (22, 1, 19))}


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def inputs(T):
    """Arrays of tokens by name, and what all tokens share."""
    unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    seeded = (functools.partial(normal, B, T, seed=seed) for seed in range(100))
    draw = lambda *shape: next(seeded)(*shape)
    tokens = {
        "q": draw(H, K),
        "k": unit(draw(H, K)),
        "v": draw(H, V),
        "g": -0.3 * jnp.abs(draw(H, K)),
        "beta": jax.nn.sigmoid(draw(H)),
        "rate": jax.nn.sigmoid(draw(H, K)),
        "x": draw(6),
        "dt": 0.3 * jnp.abs(draw(6)),
        "scales": jnp.abs(draw(H, 7)),
    }
    shared = {"bonus": normal(H, K), "a": -jnp.abs(normal(6, 3)), "d": normal(6), "taps": normal(5, 6)}
    return tokens, shared


OPS = {
    "delta": lambda t, s, p, ids, r, b: delta_rule(
        t["q"], t["k"], t["v"], t["g"], t["beta"], resets=r, chunk=4, backend=b
    ),
    "generalized": lambda t, s, p, ids, r, b: generalized_delta_rule(
        t["q"], t["k"], t["v"], t["g"], -t["k"], t["k"] * t["rate"], resets=r, chunk=4, backend=b
    ),
    "linear": lambda t, s, p, ids, r, b: linear_attention(
        t["q"][:, :, :2], t["k"][:, :, :1], t["v"], resets=r, chunk=4, backend=b
    ),
    "decay a head": lambda t, s, p, ids, r, b: linear_attention(
        t["q"], t["k"], t["v"], t["g"][..., 0], resets=r, chunk=4, backend=b
    ),
    "decay a channel": lambda t, s, p, ids, r, b: linear_attention(
        t["q"], t["k"], t["v"], t["g"], bonus=s["bonus"], resets=r, chunk=4, backend=b
    ),
    "scan": lambda t, s, p, ids, r, b: linear_scan(t["rate"], t["q"], resets=r, chunk=4, backend=b),
    "selective": lambda t, s, p, ids, r, b: selective_scan(
        t["x"], t["dt"], s["a"], t["x"][..., :3], t["x"][..., 3:], s["d"], resets=r, chunk=4, backend=b
    ),
    "phase": lambda t, s, p, ids, r, b: jax.tree.map(jnp.sin, phase_scan(t["x"], resets=r, chunk=4, backend=b)),
    "wkv": lambda t, s, p, ids, r, b: _averages(wkv(30 * t["x"], t["dt"], s["a"][:, 0], s["d"], resets=r, backend=b)),
    "log linear": lambda t, s, p, ids, r, b: log_linear(
        t["q"], t["k"], t["v"], t["g"][..., 0], t["scales"], positions=p, segment_ids=ids, chunk=4, backend=b
    ),
    "memory": lambda t, s, p, ids, r, b: compressive_memory(
        t["q"], t["k"][:, :, :2], t["v"][:, :, :2], positions=p, segment_ids=ids, segment=5, update="delta", backend=b
    ),
    "convolution": lambda t, s, p, ids, r, b: short_conv(t["x"], s["taps"], ids, backend=b),
    "shift": lambda t, s, p, ids, r, b: token_shift(t["x"], ids, backend=b),
    "next": lambda t, s, p, ids, r, b: (next_token(t["x"], backend=b), None),
}
KINDS = ("delta", "decay a channel", "log linear", "convolution")


def _averages(result):
    """Sums may have any largest logit."""
    o, (num, den, _) = result
    return o, num / den


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(name, layout, tokens, shared, positions, ids, weights):
    backend = Backend(layout=layout)

    def loss(tokens, shared):
        out, end = OPS[name](tokens, shared, positions, ids, starts(ids, backend=backend), backend)
        floats = [x for x in jax.tree.leaves(end) if jnp.issubdtype(x.dtype, jnp.floating)]
        return (out * weights[: math.prod(out.shape[2:])].reshape(out.shape[2:])).sum() + sum(
            (x * x).sum() for x in floats
        ), (out, floats)

    gradients, results = jax.grad(loss, (0, 1), has_aux=True)(tokens, shared)
    return results, gradients


def rows(T):
    tile = lambda parts: jnp.asarray(np.stack([np.concatenate(row) for row in parts]), jnp.int32)
    ids = tile([[np.full(n, i) for i, n in enumerate(row)] for row in EDGES[T]])
    return tile([[np.arange(n) for n in row] for row in EDGES[T]]), ids


def spread(name, layout, mesh, devices):
    T = LENGTHS[devices]
    (tokens, shared), where = inputs(T), rows(T)
    order = lambda tree: jax.tree.map(lambda x: permute(x, layout, devices), tree)
    back = lambda tree: jax.tree.map(lambda x: restore(x, layout, devices), tree)
    with jax.set_mesh(mesh):
        (out, end), (d_tokens, d_shared) = run(name, layout, order(tokens), shared, *order(where), normal(99))
    return (back(out), end), (back(d_tokens), d_shared)


@functools.cache
def alone(name, T):
    tokens, shared = inputs(T)
    return run(name, "contiguous", tokens, shared, *rows(T), normal(99))


def line_of(devices):
    sizes = [devices if axis == "seq" else 1 for axis in AXES]
    return Mesh(np.array(jax.devices()[:devices]).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def close(got, want, tolerance):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1.0, float(jnp.abs(b).max())))


cases = [(name, layout, n) for name in OPS for layout in ("contiguous", "zigzag") for n in (3, 5, 7)]
short = [(name, "zigzag", 3) for name in KINDS] + [("delta", "contiguous", 7), ("selective", "zigzag", 5)]


@pytest.mark.parametrize(
    "name,layout,devices", [pytest.param(*case, marks=() if case in short else pytest.mark.slow) for case in cases]
)
def test_spans_equal_whole_rows(name, layout, devices):
    got, want = spread(name, layout, line_of(devices), devices), alone(name, LENGTHS[devices])
    close(got[0], want[0], 5e-6 if name == "phase" else 2e-6)  # float32 angles of many turns
    close(got[1], want[1], 2e-5)


@pytest.mark.parametrize("name", [pytest.param("delta"), pytest.param("selective", marks=pytest.mark.slow)])
def test_beside_other_axes(name):
    """Rows over "data", heads over "tensor"."""
    mesh = make_mesh("data=2,seq=2,tensor=2")
    T, order = 48, lambda tree: jax.tree.map(lambda x: permute(x, "zigzag", 2), tree)
    (tokens, shared), where = inputs(T), rows(T)
    with jax.set_mesh(mesh):
        (out, end), _ = run(name, "zigzag", order(tokens), shared, *order(where), normal(99))
    close((restore(out, "zigzag", 2), end), alone(name, T)[0], 2e-6)


def test_one_device_is_the_local_op_bit_for_bit():
    (tokens, shared), where = inputs(48), rows(48)
    with jax.set_mesh(line_of(1)):
        got = run("delta", "zigzag", tokens, shared, *where, normal(99))
    jax.tree.map(np.testing.assert_array_equal, got, alone("delta", 48))


def test_inside_ones_own_shard_map_ops_stay_local():
    """Rows over all devices, by a shard_map that is not the library's."""
    tokens, _ = inputs(48)
    tokens = jax.tree.map(lambda x: jnp.concatenate([x, -x]), tokens)
    backend = Backend(layout="zigzag")
    op = lambda t: delta_rule(t["q"], t["k"], t["v"], t["g"], t["beta"], chunk=4, backend=backend)
    mesh = Mesh(np.array(jax.devices()[:4]), ("rows",))
    got = jax.jit(jax.shard_map(op, mesh=mesh, in_specs=P("rows"), out_specs=P("rows")))(tokens)
    close(got, op(tokens), 1e-6)


def collectives(program: str) -> dict[str, list[int]]:
    """Sizes in numbers of what each collective of a compiled program gives."""
    found: dict[str, list[int]] = {}
    for shape, kind in re.findall(
        r"= \w+\[([\d,]*)\]\S* (all-gather|all-to-all|all-reduce|collective-permute|reduce-scatter)\(", program
    ):
        found.setdefault(kind, []).append(math.prod(int(n) for n in shape.split(",") if n))
    return found


@pytest.mark.parametrize("layout,ways", [("contiguous", 1), ("zigzag", 3)])
@pytest.mark.parametrize("name", ["delta", "decay a channel"])
def test_states_are_all_that_moves(name, layout, ways):
    """Forward: a permute a round and way for each array of the summary, with no array of tokens among them."""
    mesh, n = line_of(8), 8
    (tokens, shared), (positions, ids) = inputs(48), rows(48)
    backend = Backend(layout=layout)
    place = NamedSharding(mesh, P(None, "seq"))
    op = lambda tokens: OPS[name](tokens, shared, positions, ids, None, backend)[0]
    with jax.set_mesh(mesh):
        program = jax.jit(op, in_shardings=place, out_shardings=place).lower(tokens).compile().as_text()
    sent = collectives(program)
    spans = n * (2 if layout == "zigzag" else 1)
    rounds = 1 + math.ceil(math.log2(spans - 1))
    arrays = 1 if name == "delta" else 2
    assert set(sent) == {"collective-permute"}
    assert len(sent["collective-permute"]) <= rounds * ways * arrays
    assert max(sent["collective-permute"]) <= B * H * K * (V + K)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [(KDA(heads=2, head_dim=4, chunk=4), GQA(heads=2, kv_heads=1, head_dim=4))])
def test_a_model_on_zigzag(pattern):
    """Layers scanned and recomputed; documents packed; the gradients of all parameters."""
    model = LM(vocab=13, width=8, depth=4, pattern=pattern, mlp=None, remat="full")
    zigzag = tuple(mixer.clone(backend=Backend(layout="zigzag")) for mixer in pattern)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 13, (B, 48)), jnp.int32)
    positions, ids = rows(48)
    params = init_params(model, jax.random.key(0))

    def step(model, params, tokens, positions, ids, labels):
        logits = model.apply({"params": params}, tokens, positions=positions, segment_ids=ids)[0]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1).mean()

    grad = jax.jit(jax.value_and_grad(step, argnums=1), static_argnums=0)
    want = grad(model, params, tokens, positions, ids, tokens)
    order = lambda x: permute(x, "zigzag", 4)
    with jax.set_mesh(make_mesh("data=2,seq=4")):
        got = grad(model.clone(pattern=zigzag), params, *map(order, (tokens, positions, ids, tokens)))
    close(got, want, 2e-5)


@pytest.mark.parametrize("name", MIXERS)
def test_striped_is_refused_by_what_works_along_the_text(name):
    """In one line that names the mixer and the nearest layout, when the module is made."""
    mixer = next(iter(MIXERS[name].examples().values()))
    if isinstance(mixer, GQA) or type(mixer) is MLA:
        mixer.clone(backend=Backend(layout="striped"))
        return
    with pytest.raises(BadInput, match=rf"^backend.layout: striped: {type(mixer).__name__} .*; nearest: zigzag$"):
        mixer.clone(backend=Backend(layout="striped"))
    with pytest.raises(BadInput, match="striped: GQA"):
        GQA(heads=2, kv_heads=2, head_dim=4, conv=3, backend=Backend(layout="striped"))


def test_lengths_that_do_not_divide():
    """Zigzag names the nearest; contiguous rows are left to the compiler."""
    mixer = GatedDeltaNet(heads=2, head_dim=4, chunk=4, backend=Backend(layout="zigzag"))
    x, positions = normal(B, 50, 8), jnp.tile(jnp.arange(50), (B, 1))
    init = lambda mixer: jax.eval_shape(lambda: mixer.init(jax.random.key(0), x, positions=positions))
    with jax.set_mesh(line_of(8)):
        with pytest.raises(BadInput, match="length: 50: does not divide into the 16 parts of zigzag; nearest: 48"):
            init(mixer)
        init(mixer.clone(backend=Backend()))
