"""The call: which implementation runs, what it refuses, and how partial results merge."""

from __future__ import annotations

import logging
from importlib import import_module

import jax.numpy as jnp
import pytest
from attention_oracle import assert_same, case

from jaxlong.core.mask import causal
from jaxlong.core.types import BadInput
from jaxlong.ops import Backend, attend, attend_with_lse, merge

module = import_module("jaxlong.ops.attend")  # the package offers the function of that name


@pytest.fixture
def calls(monkeypatch):
    """Which implementations are tried, in order; "picky" takes only four queries."""
    tried = []

    def named(name):
        def implementation(q, k, v, **options):
            tried.append(name)
            if name == "picky" and q.shape[1] != 4:
                raise NotImplementedError(f"{q.shape[1]} queries")
            return q, q[..., 0]

        return implementation

    monkeypatch.setattr(module, "KERNELS", {name: named(name) for name in ("picky", "dense", "blockwise")})
    module._note.cache_clear()
    return tried


def call(T, kernel, S=None, H=2, **segments):
    S = S or T
    x = lambda length, heads: jnp.ones((1, length, heads, 8))
    at = lambda length: jnp.arange(length, dtype=jnp.int32)[None]
    return attend(
        x(T, H),
        x(S, 2),
        x(S, 2),
        mask=causal(),
        q_positions=at(T),
        k_positions=at(S),
        backend=Backend(kernel),
        **segments,
    )


def test_the_next_implementation_is_tried_and_the_reason_logged_once(calls, caplog):
    with caplog.at_level(logging.INFO, logger="jaxlong.ops.attend"):
        call(4, ("picky", "dense"))
        assert calls == ["picky"]
        call(5, ("picky", "dense"))
        call(5, ("picky", "dense"))
    assert calls == ["picky", "picky", "dense", "picky", "dense"]
    assert caplog.messages == ["picky: 5 queries"]


def test_a_single_implementation_never_gives_way(calls):
    with pytest.raises(NotImplementedError, match="picky: 5 queries"):
        call(5, "picky")


def test_auto_goes_by_the_number_of_scores(calls):
    side = int(module.DENSE_SCORES**0.5)
    call(side, "auto")
    call(1, "auto", S=side * side)
    call(side, "auto", S=side + 1)
    assert calls == ["dense", "dense", "blockwise"]


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: Backend("blokwise"), r"backend.kernel: blokwise: .*; did you mean blockwise\?"),
        (lambda: Backend(("dense", "auto")), "backend.kernel: auto: .*; one of dense, blockwise, flash, decode"),
        (lambda: Backend(()), r"backend.kernel: \(\): nothing to try; .*"),
        (lambda: Backend(sequence="all-gather"), r"backend.sequence: all-gather: .*; did you mean all_gather\?"),
        (lambda: call(4, "dense", H=3), "heads: 3: not a multiple of the 2 key heads; .*"),
        (
            lambda: call(4, "dense", k_segments=jnp.zeros((1, 4), jnp.int32)),
            "segments: k_segments: .* one side only; .*",
        ),
    ],
)
def test_bad_input(make, line):
    with pytest.raises(BadInput, match=f"^{line}$"):
        make()


def test_parts_merge_to_the_whole():
    """Keys split in three, one part empty for every query: values, lse, and gradients through both."""
    inputs = case("causal", T=20, S=40, features=("segments",))
    bounds = ((0, 11), (11, 30), (30, 40))
    inputs.ints["k_segments"] = inputs.ints["k_segments"].at[:, 11:30].set(-1)

    def in_parts(q, k, v, *, k_positions, k_segments, **rest):
        result = jnp.zeros((*q.shape[:3], v.shape[-1])), jnp.full(q.shape[:3], -jnp.inf)
        for start, stop in bounds:
            cut = lambda x, start=start, stop=stop: x[:, start:stop]
            keys = {"k_positions": cut(k_positions), "k_segments": cut(k_segments)}
            result = merge(result, attend_with_lse(q, cut(k), cut(v), **keys, **rest))
        return result

    assert_same(inputs.run(in_parts), inputs.oracle(), 2e-6)


def test_merging_bfloat16_into_float32_stays_float32():
    lse = jnp.zeros((1, 2, 1))
    out, _ = merge((jnp.ones((1, 2, 1, 4)), lse), (jnp.full((1, 2, 1, 4), 2, jnp.bfloat16), lse))
    assert out.dtype == jnp.float32
    assert_same(out, jnp.full((1, 2, 1, 4), 1.5), 1e-7)
