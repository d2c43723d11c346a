"""Every strategy on every layout equals one device, and its program contains the transfers that it should."""

from __future__ import annotations

import itertools
import math
import re
from functools import partial
from importlib import import_module

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from strategies import HEADS, MASKS, alone, case, check, collectives, compiled

from jaxlong.core.mask import causal
from jaxlong.core.types import BadInput
from jaxlong.ops import Backend, attend, attend_with_lse
from jaxlong.ops.blockwise import blockwise, blockwise_backward
from jaxlong.parallel.layout import LAYOUTS
from jaxlong.parallel.memory import policy
from jaxlong.parallel.mesh import make_mesh
from jaxlong.parallel.partial import Meta
from jaxlong.parallel.ring import ring

MESHES = {"all_gather": "seq=8", "ring": "seq=8", "ulysses": "seq=8", "usp": "seq=4,ulysses=2"}


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    module = import_module("jaxlong.ops.attend")
    blocks = {"block_q": 4, "block_k": 4}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "KERNELS", module.KERNELS | {"blockwise": partial(blockwise, **blocks)})
        patch.setattr(module, "BACKWARDS", {"blockwise": partial(blockwise_backward, **blocks)})
        yield


@pytest.fixture(scope="module")
def want():
    """Results on one device, made once."""
    found = {}

    def of(*sizes, **more):
        key = sizes, tuple(more.items())
        if key not in found:
            found[key] = alone(case(*sizes, **more))
        return case(*sizes, **more), found[key]

    return of


PRODUCT = list(itertools.product(MESHES, LAYOUTS, MASKS, HEADS))
SOME = [
    ("ring", "zigzag", "causal", "gqa"),
    ("ring", "contiguous", "documents", "mla"),
    ("ring", "contiguous", "window", "mha"),
    ("ring", "zigzag", "window", "mqa"),
    ("ring", "striped", "bigbird", "mqa"),
    ("all_gather", "zigzag", "prefix", "mla"),
    ("ulysses", "zigzag", "alibi", "gqa"),
    ("ulysses", "contiguous", "documents", "mla"),
    ("usp", "zigzag", "alibi", "mqa"),
    ("usp", "contiguous", "bigbird", "gqa"),
]


@pytest.mark.parametrize(("strategy", "layout", "mask", "heads"), SOME)
def test_eight_devices_equal_one(want, strategy, layout, mask, heads):
    inputs, expected = want(mask, heads, 64)
    check(inputs, MESHES[strategy], strategy, layout, expected)


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "layout", "mask", "heads"), [p for p in PRODUCT if p not in SOME])
def test_eight_devices_equal_one_always(want, strategy, layout, mask, heads):
    test_eight_devices_equal_one(want, strategy, layout, mask, heads)


@pytest.mark.parametrize(
    ("mesh", "strategy", "layout", "length"),
    [
        ("seq=1", "ring", "zigzag", 14),
        ("seq=3", "ring", "zigzag", 30),  # no multiple of n squared
        ("seq=5", "usp", "striped", 35),
        ("ulysses=7", "usp", "zigzag", 42),
        ("seq=7", "ring", "contiguous", 42),
        ("data=2,seq=2,ulysses=2", "ring", "zigzag", 24),  # one ring of both axes
        ("data=2,tensor=2,seq=2", "usp", "zigzag", 24),
    ],
)
def test_any_number_of_devices(want, mesh, strategy, layout, length):
    inputs, expected = want("documents", "gqa", length)
    check(inputs, mesh, strategy, layout, expected)


@pytest.mark.parametrize("heads", [(7, 7), (6, 2), (10, 2), (4, 1)], ids=str)
@pytest.mark.parametrize("mesh", ["seq=4", "seq=8"])
def test_heads_that_do_not_divide_among_devices(want, heads, mesh):
    inputs, expected = want("alibi", "gqa", 32, sizes=heads)
    check(inputs, mesh, "ulysses", "contiguous", expected)


def test_an_implementation_without_a_backward_pass_of_its_own(want):
    inputs, expected = want("documents", "gqa", 32)
    check(inputs, "seq=4", "ring", "zigzag", expected, kernel="dense")


RING = {"collective-permute": 2}
RING_BOTH = {"collective-permute": 2 + 6}  # both of keys, once before the loop and once in it; owed in and after it


@pytest.mark.parametrize(
    ("strategy", "mesh", "mask", "forward", "both"),
    [
        ("ring", "seq=8", "causal", RING, RING_BOTH),
        ("ring", "seq=8", "window", {"collective-permute": 2}, {"collective-permute": 3}),
        ("all_gather", "seq=8", "causal", {"all-gather": 2}, {"all-gather": 2, "reduce-scatter": 1}),
        ("ulysses", "seq=4", "causal", {"all-gather": 1, "all-to-all": 3}, {"all-gather": 1, "all-to-all": 7}),
        (
            "usp",
            "seq=4,ulysses=2",
            "causal",
            RING | {"all-gather": 1, "all-to-all": 3},
            RING_BOTH | {"all-gather": 1, "all-to-all": 7},
        ),
    ],
)
def test_transfers_of_a_program(strategy, mesh, mask, forward, both):
    inputs = case(mask, "mha", 64)
    assert collectives(compiled(inputs, mesh, strategy, forward=True)) == forward
    assert collectives(compiled(inputs, mesh, strategy)) == both


@pytest.mark.parametrize(("remat", "permutes"), [("attn_out", 8), ("full", 10)])
@pytest.mark.usefixtures("compile_well")
def test_remat_that_keeps_the_output_never_runs_the_ring_again(remat, permutes):
    """In scanned layers, where no mask is larger than a tile either."""
    positions = jnp.broadcast_to(jnp.arange(64, dtype=jnp.int32), (2, 64))
    x, weights = jnp.ones((2, 64, 2, 8)), jnp.ones((3, 8, 8))

    @partial(jax.checkpoint, policy=policy(remat))
    def layer(x, w):
        at = {"q_positions": positions, "k_positions": positions}
        return x + attend(x @ w, x @ w, x, mask=causal(), **at, backend=Backend("blockwise", "ring")), None

    step = jax.jit(jax.grad(lambda w, x: (jax.lax.scan(layer, x, w)[0] ** 2).mean()))
    with jax.set_mesh(make_mesh("data=2,seq=4")):
        text = step.lower(weights, x).compile().as_text()
        jaxpr = str(step.trace(weights, x).jaxpr)
    assert collectives(text)["collective-permute"] == permutes
    masks = [math.prod(map(int, shape.split(","))) for shape in re.findall(r"bool\[([\d,]+)\]", jaxpr)]
    assert max(masks) <= 2 * 16 * 16  # a hop's, of all heads; a layer's has 4 hops, and there are 3 layers


def test_inside_ones_own_shard_map(want):
    """A plain function as the local step; `attend` stays local."""
    inputs, expected = want("causal", "gqa", 32)
    q, k, v, at = (jnp.asarray(inputs.tokens[name]) for name in ("q", "k", "v", "positions"))

    def local(q, k, v, meta):
        where = {"q_positions": meta.q_positions, "k_positions": meta.k_positions}
        return attend_with_lse(q, k, v, mask=causal(), **where, backend=Backend("dense", "ring"))

    mesh = jax.make_mesh((4,), ("line",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    part = lambda q, k, v, at: ring(local, q, k, v, Meta(at, at), axis="line")[0]
    found = jax.jit(jax.shard_map(part, mesh=mesh, in_specs=P(None, "line"), out_specs=P(None, "line")))(q, k, v, at)
    np.testing.assert_allclose(found, expected["out"], atol=1e-5)


def test_bfloat16_merges_in_float32():
    """No worse than one device in bfloat16: parts are rounded once, at the end."""
    inputs = case("causal", "gqa", 64)
    q, k, v, at = (jnp.asarray(inputs.tokens[name]) for name in ("q", "k", "v", "positions"))
    low = [x.astype(jnp.bfloat16) for x in (q, k, v)]

    def run(floats, backend):
        where = {"q_positions": at, "k_positions": at, "mask": causal(), "backend": backend}
        return jax.jit(jax.value_and_grad(lambda f: (attend(*f, **where).astype(jnp.float32) ** 2).sum()))(floats)

    exact = run([x.astype(jnp.float32) for x in low], Backend("dense"))
    one = run(low, Backend("blockwise"))
    with jax.set_mesh(make_mesh("seq=8")):
        many = run(low, Backend("blockwise", "ring"))
    for a, b, c in zip(*map(jax.tree.leaves, (exact, one, many)), strict=True):
        error = lambda x, a=a: np.abs(np.asarray(x, np.float32) - a).max() / np.abs(a).max()
        assert error(c) <= 1.5 * error(b) + 1e-3


def test_queries_that_see_nothing():
    """Exactly 0, lse -inf, and no gradient, whatever their cotangent."""
    at = jnp.broadcast_to(jnp.arange(32, dtype=jnp.int32), (1, 32))
    x, ids = jnp.ones((1, 32, 2, 8)), jnp.where(at < 4, -1, 0)

    @jax.jit
    def run(x):
        where = {"q_positions": at, "k_positions": at, "q_segments": ids, "k_segments": ids, "mask": causal()}
        return attend_with_lse(x, x, x, **where, backend=Backend("blockwise", "ring"))

    with jax.set_mesh(make_mesh("seq=8")):
        (out, lse), pull = jax.vjp(run, x)
        gradient = pull((jnp.full_like(out, jnp.nan).at[:, 4:].set(1), jnp.zeros_like(lse)))[0]
    assert (out[:, :4] == 0).all() and (lse[:, :4] == -jnp.inf).all() and np.isfinite(lse[:, 4:]).all()
    assert np.isfinite(gradient).all() and (gradient[:, :4] == 0).all()


@pytest.mark.parametrize(
    ("strategy", "queries", "keys", "line"),
    [
        ("ring", 36, 36, "backend.sequence: ring: 36 queries do not split over the 8 devices of seq; nearest: 32, .*"),
        ("usp", 32, 36, "backend.sequence: usp: 36 keys do not split .*; nearest: 32, or auto"),
    ],
)
def test_lengths_that_a_strategy_cannot_split(strategy, queries, keys, line):
    at = lambda n: jnp.arange(n, dtype=jnp.int32)[None]
    x = lambda n: jnp.ones((1, n, 2, 8))
    with jax.set_mesh(make_mesh("seq=8")), pytest.raises(BadInput, match=f"^{line}$"):
        where = {"q_positions": at(queries), "k_positions": at(keys)}
        attend(x(queries), x(keys), x(keys), mask=causal(), **where, backend=Backend(sequence=strategy))


def test_one_query_is_everyones(want):
    """Decoding under any strategy."""
    at, x = jnp.arange(16, dtype=jnp.int32)[None], jnp.ones((1, 16, 2, 8))
    with jax.set_mesh(make_mesh("seq=8")):
        where = {"q_positions": at[:, -1:], "k_positions": at}
        out = attend(x[:, :1], x, x, mask=causal(), **where, backend=Backend(sequence="ring"))
    np.testing.assert_allclose(out, 1, rtol=1e-6)
