"""Latent attention: both forms, and Hugging Face's modules."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from latent_golden import latent_case, made, near

from jaxlong.core.mask import sliding
from jaxlong.core.position import Alibi, NoPE, Rope
from jaxlong.core.types import BadInput
from jaxlong.mixers import MLA

GOLDEN = np.load(Path(__file__).parent.parent / "golden" / "mla.npz")
CASES = sorted({name.split("/")[0] for name in GOLDEN.files if "/" in name})
SMALL = MLA(heads=3, kv_rank=10, nope_dim=6, rope_dim=4, value_dim=5, q_rank=7)


@pytest.mark.thorough
@pytest.mark.parametrize("form", ["expanded", "absorbed"])
@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case, form):
    """Values and gradients of deepseek_v3 (with and without a bottleneck of queries, YaRN) and kimi_linear."""
    get, mixer, params = latent_case(GOLDEN, case, MLA)
    mixer = mixer.clone(form=form)

    @jax.jit
    def run(params, x):
        apply = lambda p, x: mixer.apply({"params": p}, x, positions=get("positions"))[0]
        y, back = jax.vjp(apply, params, x)
        return y, back(get("g"))

    y, (dparams, dx) = run(params, get("x"))
    near(y, get("y"), "y")
    near(dx, get("dx"), "dx")
    for name, gradient in dparams.items():
        near(gradient, get(f"d/{name}"), name)


@pytest.mark.thorough
@pytest.mark.parametrize("position", [Rope(interleaved=True), NoPE()], ids=["rope", "nope"])
@pytest.mark.parametrize("mask", [SMALL.mask, sliding(7)], ids=["causal", "window"])
def test_absorbed_equals_expanded(position, mask):
    """Values and gradients."""
    expanded = SMALL.clone(position=position, mask=mask, form="expanded")
    params, x, positions = made(expanded, 33)
    segments = jnp.asarray(np.repeat([[1, 2]], [20, 13], axis=1).repeat(2, 0), jnp.int32)

    def run(form):
        mixer = expanded.clone(form=form)
        f = lambda p, x: mixer.apply({"params": p}, x, positions=positions, segment_ids=segments)[0]
        y, back = jax.vjp(f, params, x)
        return y, back(jnp.cos(jnp.arange(y.size)).reshape(y.shape))

    jax.tree.map(
        lambda a, b: near(a, b, "form"), jax.jit(lambda: run("absorbed"))(), jax.jit(lambda: run("expanded"))()
    )


def test_bfloat16_forms_round_alike():
    """In bfloat16 the absorbed form is as near to the truth as the expanded one."""
    big = MLA(heads=4, kv_rank=32, nope_dim=16, rope_dim=8, value_dim=16, form="expanded")
    params, x, positions = made(big, 48)
    narrow = lambda a: a.astype(jnp.bfloat16)
    run = lambda form, p, x: big.clone(form=form).apply({"params": p}, x, positions=positions)[0].astype(jnp.float32)

    @jax.jit
    def errors(params, x):
        truth = run("expanded", *jax.tree.map(lambda a: narrow(a).astype(jnp.float32), (params, x)))
        return [jnp.abs(run(form, params, narrow(x)) - truth).max() for form in ("absorbed", "expanded")], truth

    (absorbed, expanded), truth = errors(params, x)
    assert absorbed < 1.5 * expanded < 0.03 * jnp.abs(truth).max()


def test_form_is_the_cheaper_one():
    """At DeepSeek-V3's sizes a long cache is read absorbed by up to 157 queries; a whole row is expanded."""
    v3 = MLA(heads=128, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128, q_rank=1536)
    forms = {queries: v3._cheaper(queries, 10**6) for queries in (1, 157, 158, 4096)}
    assert forms == {1: "absorbed", 157: "absorbed", 158: "expanded", 4096: "expanded"}
    assert v3._cheaper(100, 100) == v3._cheaper(10**5, 10**5) == "expanded"
    assert v3.clone(kv_rank=64)._cheaper(4096, 4096) == "absorbed"


def test_cache_holds_only_latents():
    """576 elements a token at DeepSeek-V3's sizes, 57 times less than keys and values of 128 heads."""
    v3 = MLA(heads=128, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128, q_rank=1536)
    state = jax.eval_shape(lambda: v3.init_state(1, 100, width=7168, max_chunk=1, dtype=jnp.bfloat16))
    assert state.latent.shape == (1, 100, 576) and state.index is None


@pytest.mark.parametrize(
    "change,field",
    [
        ({"heads": 0}, "heads"),
        ({"kv_rank": 0}, "kv_rank"),
        ({"q_rank": 0}, "q_rank"),
        ({"rope_dim": 3}, "Rope"),
        ({"form": "folded"}, "form"),
        ({"position": Alibi()}, "position"),
    ],
    ids=str,
)
def test_bad_fields(change, field):
    with pytest.raises(BadInput) as error:
        SMALL.clone(**change)
    assert error.value.field.startswith(field)


def test_state_of_another_mixer():
    params, x, positions = made(SMALL, 4)
    other = SMALL.clone(kv_rank=11).init_state(2, 8, width=12, max_chunk=4, dtype=x.dtype)
    with pytest.raises(BadInput, match=r"state\.latent"):
        SMALL.apply({"params": params}, x, positions=positions, state=other)
