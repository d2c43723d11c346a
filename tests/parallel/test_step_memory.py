"""The menu of remat policies, blocks of queries, and what a program stores at a million tokens."""

from __future__ import annotations

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlong.core.mask import bigbird, sliding
from jaxlong.core.position import Alibi
from jaxlong.core.types import BadInput, Batch
from jaxlong.layers.mlp import SwiGLU
from jaxlong.layers.moe import MoE
from jaxlong.mixers import GQA, MIXERS, MLA
from jaxlong.model import LM, Block, init_params
from jaxlong.parallel.memory import NAMES, named, policy
from jaxlong.parallel.mesh import make_mesh
from jaxlong.train.grads import full, next_token_loss
from jaxlong.train.state import TrainState
from jaxlong.train.step import make_step

HEADS = GQA(heads=2, kv_heads=1, head_dim=8)
LATENT = MIXERS["mla"].examples()["mla"]
PATTERN = (HEADS.clone(mask=sliding(5), gate=True), LATENT)
MODEL = LM(vocab=32, width=16, depth=2, pattern=PATTERN, mlp=SwiGLU(hidden=24))
CONVOLVES = MODEL.clone(pattern=(HEADS, HEADS.clone(conv=3)))


def shapes(model):
    return jax.eval_shape(lambda: init_params(model, jax.random.key(0)))


def batch(length, rows=2):
    tokens = jax.random.randint(jax.random.key(0), (rows, length), 0, 32)
    where = jnp.arange(length, dtype=jnp.int32)
    segments = jnp.broadcast_to(1 + (where > length // 3), tokens.shape).astype(jnp.int32)
    positions = jnp.broadcast_to(jnp.where(where > length // 3, where - length // 3 - 1, where), tokens.shape)
    return Batch(tokens, jnp.roll(tokens, -1, 1), positions, segments, jnp.ones(tokens.shape))


def abstract(length, rows=1):
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    return Batch(tokens, tokens, tokens, tokens, jax.ShapeDtypeStruct((rows, length), jnp.float32))


@functools.cache
def gradients(model):
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), shapes(model))
    return jax.jit(full(next_token_loss(model, chunk=8)))(params, batch(14))


def same(got, want, tolerance=2e-6):
    top = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(want))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * top), got, want)


# The menu ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_policy_changes_no_value():
    same(gradients(MODEL.clone(remat="names(mixer_out, attend_lse)+offload(block_in, attend_out)")), gradients(MODEL))


def saved(remat, block=0):
    """Shapes of what the backward pass of a layer keeps of the forward pass, by the jaxpr."""
    model = LM(vocab=32, width=16, depth=2, pattern=(HEADS,), mlp=SwiGLU(hidden=24), remat=remat, query_block=block)
    loss = next_token_loss(model)
    jaxpr = jax.make_jaxpr(jax.grad(lambda p, b: loss(p, b)[0]))(shapes(model), abstract(640))
    layers = next(eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan" and eqn.params["length"] == 2)
    return sorted(var.aval.str_short() for var in layers.outvars if var.aval.shape[:1] == (2,))


def test_what_a_policy_keeps():
    x, out, lse = "float32[2,1,640,16]", "float32[2,1,640,2,8]", "float32[2,1,640,2]"
    assert saved("full") == [x]
    assert saved("names(block_in)") == [x]
    assert saved("names(attend_out,attend_lse)") == saved("attn_out") == sorted([x, out, lse])
    assert saved("names(mixer_out)") == [x, x]
    assert saved("offload(block_in)") == ["float32<host>[2,1,640,16]"]


@pytest.mark.slow
def test_offload_on_a_tpu(monkeypatch):
    """Compiled for four v5e chips: the inputs of the layers wait on the host, and the peak falls by about as much."""
    pytest.importorskip("libtpu")
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_LOG_DIR": "disabled",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():
        monkeypatch.setenv(name, value)
    described = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    mesh = make_mesh("fsdp=4,data=1", devices=list(described.devices))
    tokens, width, depth = 32768, 512, 16

    def compiled(remat):
        model = LM(
            vocab=1024,
            width=width,
            depth=depth,
            pattern=(GQA(heads=4, kv_heads=1, head_dim=128),),
            mlp=SwiGLU(hidden=4 * width),
            remat=remat,
            mlp_block=2048,
            dtype="bfloat16",
        )
        place = lambda spec: lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
        inputs = jax.tree.map(place(P()), shapes(model)), jax.tree.map(place(P("fsdp")), abstract(tokens, 4))
        with jax.set_mesh(mesh):
            return jax.jit(full(next_token_loss(model))).lower(*inputs).compile().memory_analysis()

    whole, offloaded = compiled("full"), compiled("offload(block_in)")
    inputs = depth * tokens * width * 2
    assert whole.host_temp_size_in_bytes == 0 and offloaded.host_temp_size_in_bytes >= inputs
    saved = whole.peak_memory_in_bytes - offloaded.peak_memory_in_bytes
    assert saved > 0.7 * inputs


MENU = "one of none, full, dots, attn_out, names\\(...\\), offload\\(...\\)"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("ful", f"model.remat: ful: no such remat policy; {MENU}"),
        ("names", f"model.remat: names: no such remat policy; {MENU}"),
        ("full+names(block_in)", f"model.remat: .*: no such remat policy; {MENU}"),
        ("names(atend_out)", r".*: no value has the name 'atend_out'; did you mean attend_out\?"),
        ("offload()", rf".*: no value has the name ''; names are {', '.join(NAMES)}"),
        ("names(block_in)+offload(block_in)", ".*: block_in is both kept and offloaded; each name once"),
    ],
)
def test_other_texts_are_refused(text, line):
    with pytest.raises(BadInput, match=f"^{line}$"):
        policy(text)
    with pytest.raises(BadInput, match=r"^name: x: no policy can choose it; one of block_in, .*$"):
        named(jnp.zeros(1), "x")


# Blocks of queries ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("block", "remat"), [(5, "none"), pytest.param(4, "attn_out", marks=pytest.mark.slow)])
def test_blocks_of_queries_change_no_value(block, remat):
    """Packed rows, a window, a gate and latents; blocks that do not divide the row."""
    same(gradients(MODEL.clone(query_block=block, remat=remat)), gradients(MODEL))


@pytest.mark.slow
@pytest.mark.parametrize("block", [1, 64])
def test_layers_that_convolve_go_the_present_way(block):
    same(gradients(CONVOLVES.clone(query_block=block, remat="full", mlp_block=3)), gradients(CONVOLVES))


def test_attention_is_kept_where_the_policy_says_so():
    assert len(saved("attn_out", 128)) == len(saved("full", 128)) + 2


def test_states_and_rows_on_several_devices_go_the_present_way():
    model, data = MODEL.clone(query_block=4), abstract(16, 2)
    state = jax.eval_shape(lambda: MODEL.init_state(2, 16, max_chunk=16))

    def program(model, state):
        call = lambda params, data, state: model.apply({"params": params}, data.tokens, state=state)
        return str(jax.make_jaxpr(call)(shapes(MODEL), data, state))

    assert program(model, state) == program(MODEL, state)
    assert program(model, None) != program(MODEL, None)
    with jax.set_mesh(make_mesh("data=2,seq=4")):
        assert program(model, None) == program(MODEL, None)


def test_what_cannot_go_by_queries_is_refused():
    mamba, dsa = MIXERS["mamba2"].examples()["mamba2"], MIXERS["dsa"].examples()["dsa"]
    for pattern, mlp, names in (
        ((mamba,), SwiGLU(8), "Mamba2 and SwiGLU"),
        ((dsa, HEADS.clone(conv=2)), None, "DSA and GQA"),
        ((HEADS,), MoE(8, 4, 2), "GQA and MoE"),
    ):
        line = rf"^model.query_block: 4: no layer of {names} looks .* alone; 0, or mlp_block$"
        with pytest.raises(BadInput, match=line):
            LM(vocab=32, width=16, depth=len(pattern), pattern=pattern, mlp=mlp, query_block=4)
    with pytest.raises(BadInput, match=r"^model.query_block: -1: is no number of tokens; 0 or more$"):
        MODEL.clone(query_block=-1)


@pytest.mark.slow
@pytest.mark.parametrize("mixer", [GQA(heads=4, kv_heads=1, head_dim=16), GQA(heads=4, kv_heads=4, head_dim=16)])
def test_blocks_of_queries_take_a_quarter_of_the_memory(mixer):
    """Temporaries of one block's forward and backward pass under remat at 65536 tokens, against blockwise attention
    with everything else whole: the same block, the same gradients of weights and input."""
    T, D = 65536, 64

    def temporary(query_block):
        block = Block(mixer, SwiGLU(hidden=4 * D), 0, query_block)
        x, where = jax.ShapeDtypeStruct((1, T, D), jnp.float32), jax.ShapeDtypeStruct((1, T), jnp.int32)
        one = jnp.zeros((1, 1, D)), *[jnp.zeros((1, 1), jnp.int32)] * 2, None
        params = jax.eval_shape(lambda: nn.unbox(block.init(jax.random.key(0), *one)))
        run = jax.checkpoint(lambda params, x, where: block.apply(params, x, where, where, None)[0])
        step = lambda params, x, where, dy: jax.vjp(lambda params, x: run(params, x, where), params, x)[1](dy)
        return jax.jit(step).lower(params, x, where, x).compile().memory_analysis().temp_size_in_bytes

    assert temporary(1024) <= temporary(0) / 4


# A million tokens ----------------------------------------------------------------------------------------

LONG, WIDE, DEEP = 2**20, 64, 2
LAYER = GQA(heads=4, kv_heads=2, head_dim=16)


def inner(value):
    """The programs in a parameter of an equation."""
    if isinstance(value, tuple | list):
        return [program for item in value for program in inner(item)]
    program = getattr(value, "jaxpr", value)
    return [program] if hasattr(program, "eqns") else []


def arrays(program):
    """Shape and type of everything that a program makes, in loops, branches and on single devices too."""
    for eqn in program.eqns:
        yield from (var.aval for var in eqn.outvars if hasattr(var.aval, "dtype"))
        for value in eqn.params.values():
            for body in inner(value):
                yield from arrays(body)


def traced(**fields):
    """Of the train step at a million tokens a row: bytes of the largest array, and the largest table of integers or
    bits, which is what no row is.

    Abstract: the program is read as it was traced and differentiated, which is where values leave their loops.
    """
    fields = {"pattern": (LAYER,), "remat": "full", "mlp_block": 4096} | fields
    model = LM(vocab=512, width=WIDE, depth=DEEP, mlp=SwiGLU(hidden=4 * WIDE), **fields)
    tx = optax.adamw(1e-3)
    step = make_step(full(next_token_loss(model)), tx)
    state = jax.eval_shape(lambda: TrainState.create(init_params(model, jax.random.key(0)), tx))
    made = list(arrays(jax.make_jaxpr(step)(state, abstract(LONG)).jaxpr))
    size = lambda aval: math.prod(aval.shape)
    plain = [aval for aval in made if not jax.dtypes.issubdtype(aval.dtype, jax.dtypes.extended)]
    tables = [aval for aval in plain if LONG not in aval.shape and not jnp.issubdtype(aval.dtype, jnp.floating)]
    return max(size(a) * a.dtype.itemsize for a in plain), max(tables, key=size)


STEPS = {
    "causal": {},
    "attn_out": {"remat": "attn_out"},
    "offload": {"remat": "names(attend_out,attend_lse)+offload(block_in)"},
    "none": {"remat": "none"},
    "window": {"pattern": (LAYER.clone(mask=sliding(4096)),)},
    "bigbird": {"pattern": (LAYER.clone(mask=bigbird(3, 2, 3, 512, 0)),)},
    "alibi": {"pattern": (LAYER.clone(position=Alibi()),)},
    "mla": {"pattern": (MLA(heads=4, kv_rank=16, nope_dim=8, rope_dim=8, value_dim=16),)},
    "query_block": {"query_block": 4096},
}


@pytest.mark.parametrize("name", STEPS)
def test_nothing_leaves_the_layer_loop(name):
    """The largest array is the stack of the layers' inputs; no table is as large as a row."""
    most, table = traced(**STEPS[name])
    assert most <= DEEP * LONG * WIDE * 4
    assert math.prod(table.shape) <= LONG, table


def test_the_trap_is_seen(monkeypatch):
    """Without the barriers, which block sees which is found before the layers, and kept for all blocks."""
    monkeypatch.setattr(jax.lax, "optimization_barrier", lambda tree: tree)
    _, table = traced()
    assert math.prod(table.shape) > LONG
