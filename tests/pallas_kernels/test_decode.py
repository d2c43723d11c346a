"""Decode attention without a TPU: the kernel, interpreted, and its twin against the oracle; what is refused."""

from __future__ import annotations

import itertools
from importlib import import_module

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_cases import arguments

from jaxlong.core.mask import bigbird, causal, dilated, sinks, sliding
from jaxlong.ops import Backend, attend
from jaxlong.ops.dense import dense
from pallas_kernels import decode, machine
from pallas_kernels.decode import ref, twin
from pallas_kernels.decode.blocks import code
from pallas_kernels.decode.config import Config, cost, form_of, search_space

FLOAT8 = jnp.float8_e4m3fn
CASES = {  # mask, arguments, form and parts
    "ring": (causal(), {"held": (300, 123)}, ("lines", 2)),
    "pages": (causal(), {"held": (290, 77), "page": 16, "K": 2}, ("lines", 2)),
    "int8 ring": (sliding(150), {"stored": jnp.int8, "T": 3}, ("lines", 1)),
    "latents": (causal(), {"K": 1, "C": 24, "V": 16, "latent": True, "held": (300, 1)}, ("lanes", 2)),
    "empty rows": (causal(), {"held": (0, 300)}, ("lines", 2)),
    "one token": (causal(), {"held": (1, 1), "B": 2}, ("heads", 3)),
    "window": (sliding(40), {"S": 512}, ("lines", 1)),
    "window and first": (sliding(40) | sinks(3), {"S": 512}, ("heads", 2)),
    "blocks": (bigbird(3, 1, 2, 16, 0) & causal(), {"S": 256}, ("lanes", 2)),
    "eight queries": (causal(), {"T": 8, "packed": True}, ("lines", 2)),
    "scores": (causal(), {"slopes": True, "sinks": True, "soft_cap": 2.0, "T": 2}, ("lines", 2)),
    "scores of heads": (causal(), {"slopes": True, "sinks": True, "soft_cap": 2.0, "T": 2}, ("heads", 1)),
    "one key head": (causal(), {"K": 1}, ("lines", 1)),
    "key heads": (causal(), {"K": 4}, ("lanes", 1)),
    "six heads of three": (causal(), {"H": 6, "K": 3, "S": 128}, ("lines", 1)),
    "wide": (causal(), {"C": 128, "V": 64, "S": 130}, ("heads", 1)),
    "bfloat16": (causal(), {"dtype": jnp.bfloat16}, ("lines", 2)),
    "float8 heads": (causal(), {"stored": FLOAT8, "dtype": jnp.bfloat16}, ("heads", 2)),
    "int8 lanes": (causal(), {"stored": jnp.int8}, ("lanes", 1)),
    "int8 pages": (causal(), {"stored": jnp.int8, "page": 64, "held": (0, 200), "K": 1}, ("lines", 2)),
    "a factor a page": (causal(), {"stored": FLOAT8, "page": 16, "per_page": True}, ("lines", 1)),
    "pages of latents": (
        causal(),
        {"page": 128, "K": 1, "C": 24, "latent": True, "stored": jnp.int8},
        ("lanes", 2),
    ),
    "pages of heads": (sliding(20), {"page": 32, "T": 2, "slopes": True}, ("heads", 2)),
}


def close(found, wanted, at=3e-5):
    for got, want in zip(found, wanted, strict=True):
        got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
        finite = np.isfinite(want)
        np.testing.assert_array_equal(np.isfinite(got), finite)
        np.testing.assert_array_equal(got[~finite], want[~finite])
        np.testing.assert_allclose(got[finite], want[finite], atol=at, rtol=at)


def interpreted(setting, inputs, config, interpret=True):
    return jax.jit(lambda inputs: decode.attention(setting, inputs, config, interpret))(inputs)


def error(inputs):
    """What rounding weights of at most 1 to 16 bits does to values of up to 4 or so."""
    return 2e-2 if inputs.q.dtype == jnp.bfloat16 else 3e-5


@pytest.mark.thorough
@pytest.mark.parametrize("name", CASES)
def test_the_twin_is_the_oracle(name):
    mask, changes, (form, splits) = CASES[name]
    setting, inputs, _ = arguments(mask, **changes)
    found = decode.in_parts(twin.parts, setting, inputs, Config(128, splits, form=form))
    close(found, ref.attention(setting, inputs), error(inputs))


QUICK = ("ring", "pages", "int8 ring", "latents")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in CASES])
def test_the_kernel_is_the_oracle(name):
    mask, changes, (form, splits) = CASES[name]
    setting, inputs, _ = arguments(mask, **changes)
    found = interpreted(setting, inputs, Config(128, splits, form=form))
    close(found, ref.attention(setting, inputs), error(inputs))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ring", "pages"])
@pytest.mark.parametrize("stored", [None, jnp.int8, FLOAT8], ids=["plain", "int8", "float8"])
@pytest.mark.parametrize("mask", [causal(), sliding(70)], ids=["causal", "window"])
@pytest.mark.parametrize(("H", "K"), [(4, 4), (8, 2), (6, 1)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_all_kinds_of_caches(dtype, H, K, mask, stored, kind):
    for seed, (S, T) in enumerate(((300, 1), (256, 4))):
        changes = {"page": (32, 64)[seed]} if kind == "pages" else {}
        held = (S - 1, 5) if seed else (0, S)
        setting, inputs, _ = arguments(mask, H=H, K=K, S=S, T=T, dtype=dtype, stored=stored, held=held, **changes)
        config = Config(128, 2, form="lines" if kind == "pages" or seed else "heads")
        close(interpreted(setting, inputs, config), ref.attention(setting, inputs), error(inputs))


@pytest.mark.parametrize("stored", [jnp.int8, FLOAT8], ids=["int8", "float8"])
def test_8_bits_stay_within_what_their_factors_say(stored):
    """An error e of every score changes weights by exp(+-2 e) at most, and lse by e; float8 rounds to 4 bits."""
    setting, inputs, exact = arguments(B=1, S=256, stored=stored)
    exact = exact._replace(q=0.1 * exact.q)
    inputs = inputs._replace(q=exact.q)
    off = lambda x, factor: factor / 2 if stored == jnp.int8 else jnp.maximum(jnp.abs(x) / 16, factor * 2**-10)
    of_k, of_v = (off(x, f[..., None]) for x, f in ((exact.k, inputs.k_scale), (exact.v, inputs.v_scale)))
    q = jnp.abs(exact.q).reshape(1, 1, 2, 2, -1)
    e = (setting.scale * jnp.einsum("btkgc,bskc->bkgs", q, jnp.broadcast_to(of_k, exact.k.shape))).max(-1).reshape(4)
    values = jnp.repeat(jnp.abs(exact.v).max((0, 1)), 2, axis=0)
    moved = jnp.repeat(jnp.broadcast_to(of_v, exact.v.shape).max((0, 1)), 2, axis=0)
    out, lse = interpreted(setting, inputs, Config(128))
    want, of_all = ref.attention(setting, exact)
    assert (jnp.abs(out - want)[0, 0] <= moved + jnp.expm1(2 * e)[:, None] * values + 1e-6).all()
    assert (jnp.abs(lse - of_all)[0, 0] <= e + 1e-6).all()
    assert jnp.abs(out - want).max() > 1e-5  # there is something to bound


@pytest.mark.parametrize("form", ["lines", "lanes"])
def test_what_no_query_sees_may_be_anything(form):
    """A key head's queries see none of another's NaN, either."""
    setting, inputs, _ = arguments(sliding(40), held=(300, 100))
    clean = interpreted(setting, inputs, Config(128, form=form))
    unseen = code(setting, inputs) == 0
    spoil = lambda x: jnp.where(unseen[..., None, None], jnp.nan, x).astype(x.dtype)
    found = interpreted(setting, inputs._replace(k=spoil(inputs.k), v=spoil(inputs.v)), Config(128, form=form))
    close(found, clean, 1e-6)
    seen = jnp.argmin(unseen[0])
    out, _ = interpreted(setting, inputs._replace(v=inputs.v.at[0, seen, 1, 3].set(jnp.nan)), Config(128, form=form))
    expected = np.zeros(out.shape, bool)
    expected[0, :, 2:, 3] = True
    np.testing.assert_array_equal(np.isnan(out), expected)


def test_paged_attention():
    """Pages in any order, rows of any length; the table's end may hold anything."""
    _, inputs, _ = arguments(B=3, T=2, page=16, S=160)
    lengths = jnp.array([0, 1, 150], jnp.int32)
    table = jnp.where(jnp.arange(10) * 16 < lengths[:, None], inputs.pages, 10**6)
    run = jax.jit(lambda *x: decode.paged_attention(*x, mask=causal(), interpret=True))
    out, lse = run(inputs.q, inputs.k, inputs.v, table, lengths)
    for b, length in enumerate((0, 1, 150)):
        keys, values = (x[inputs.pages[b]].reshape(1, -1, 2, 16)[:, :length] for x in (inputs.k, inputs.v))
        at = jnp.arange(length, dtype=jnp.int32)[None]
        for t in range(2):
            mine = (out[b, t], lse[b, t])
            if length - 2 + t < 0:
                close(mine, (jnp.zeros((4, 16)), jnp.full(4, -jnp.inf)))
                continue
            place = jnp.array([[length - 2 + t]], jnp.int32)
            want = dense(inputs.q[b : b + 1, t : t + 1], keys, values, mask=causal(), q_positions=place, k_positions=at)
            close(mine, (want[0][0, 0], want[1][0, 0]))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"T": 9}, "9 queries a row, not 1 to 8"),
        ({"S": 100}, "100 slots, fewer than 128"),
        ({"dtype": jnp.float16}, "queries of float16"),
        ({"mask": dilated(16, 2)}, "differs between heads"),
        ({"K": 1, "C": 24, "V": 25, "latent": True}, "25 of 24 columns"),
        ({"page": 8, "K": 1}, "pages of 8 lines of bfloat16, not a multiple of 16"),
        ({"config": Config(130)}, "blocks of 130 of 300 slots"),
        ({"config": Config(128, stages=1)}, "1 blocks in memory"),
        ({"H": 256, "T": 8, "S": 128}, "together more than 1024"),
    ],
)
def test_a_refusal_says_why(changes, reason, monkeypatch):
    monkeypatch.setattr(machine, "platform", lambda: "tpu")
    changes = dict({"dtype": jnp.bfloat16} | changes)
    config = changes.pop("config", None)
    setting, inputs, _ = arguments(**changes)
    assert reason in decode.refusal(setting, inputs, config)
    with pytest.raises(NotImplementedError, match=reason):
        decode.attention(setting, inputs, config, interpret=True)


def test_elsewhere_attend_says_once_why_it_goes_another_way(caplog):
    import_module("jaxlong.ops.attend")._note.cache_clear()
    setting, inputs, _ = arguments(B=1, S=256)
    with caplog.at_level("INFO", logger="jaxlong.ops.attend"):
        for _ in range(2):
            found = through_ops(inputs, setting, "auto")
    if machine.platform() != "tpu":
        assert caplog.messages == [
            f"decode: the default device is neither a TPU nor a Hopper GPU but {machine.platform()}"
        ]
    close([found], [ref.attention(setting, inputs)[0]], 1e-5)


def through_ops(inputs, setting, kernel):
    return attend(
        inputs.q,
        inputs.k,
        inputs.k if inputs.v is None else inputs.v,
        mask=setting.mask,
        q_positions=inputs.q_positions,
        k_positions=inputs.k_positions,
        q_segments=inputs.q_segments,
        k_segments=inputs.k_segments,
        alibi_slopes=inputs.slopes,
        sinks=inputs.sinks,
        soft_cap=setting.soft_cap,
        backend=Backend(kernel),
    )


@pytest.mark.parametrize("latent", [False, True], ids=["keys and values", "latents"])
def test_gradients_through_attend_are_those_of_dense(latent, monkeypatch):
    run = decode.attention
    monkeypatch.setattr(machine, "platform", lambda: "tpu")
    monkeypatch.setattr(decode, "attention", lambda setting, inputs: run(setting, inputs, interpret=True))
    # as latents enter `attend`, all columns are values
    changes = {"K": 1, "latent": True} if latent else {"slopes": True, "sinks": True, "soft_cap": 2.0}
    setting, inputs, _ = arguments(B=1, T=2, S=140, held=(130,), **changes)

    def of(kernel):
        def loss(floats):
            given = inputs._replace(**floats)
            return (jnp.cos(through_ops(given, setting, kernel)) * jnp.arange(16)).sum()

        names = [n for n in ("q", "k", "v", "slopes", "sinks") if getattr(inputs, n) is not None]
        return jax.jit(jax.value_and_grad(loss))({n: getattr(inputs, n) for n in names})

    (value, found), (expected, wanted) = of("auto"), of("dense")
    close([value, *found.values()], [expected, *wanted.values()], 2e-4)


def test_settings_and_cost(monkeypatch):
    setting, inputs, _ = arguments(H=32, K=8, C=128, V=128, S=2048, dtype=jnp.bfloat16)
    best = Config.of(setting, inputs)
    assert best.form == "lines" and 2048 % best.block == 0 and best in search_space(setting, inputs)
    monkeypatch.setattr(machine, "platform", lambda: "tpu")
    assert all(decode.refusal(setting, inputs, config) is None for config in search_space(setting, inputs))
    assert cost(setting, inputs).bytes_accessed == 2 * 2048 * (8 * 512 + 4) + 2 * 32 * (256 + 512)
    assert form_of(*arguments(K=1, C=576, V=512, S=256, latent=True)[:2]) == "lanes"
    assert form_of(*arguments(H=6, K=3, C=128, V=128, S=256)[:2]) == "heads"


def test_copies_and_their_uses_do_not_race():
    """With memory that begins as NaN, and copies that take place as late as they may."""
    from jax.experimental.pallas import tpu as pltpu

    setting, inputs, _ = arguments(held=(300, 290), page=64, S=300)
    late = pltpu.InterpretParams(detect_races=True, dma_execution_mode="on_wait", uninitialized_memory="nan")
    config = Config(128, 1, 2)
    close(interpreted(setting, inputs, config, late), ref.attention(setting, inputs))


def test_the_product_of_cases_is_whole():
    forms = {form for _, _, (form, _) in CASES.values()}
    kinds = {("page" in changes, "stored" in changes) for _, changes, _ in CASES.values()}
    assert forms == {"lines", "heads", "lanes"} and kinds == set(itertools.product((False, True), repeat=2))
