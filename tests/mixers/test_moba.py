"""MoBA against a float64 loop over queries, heads and blocks, and where it is full attention."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sparse_oracle import WIDTH, best, check, random_params, rotate, single, softmax_attention

from jaxlong.core.position import NoPE, Rope
from jaxlong.core.types import BadInput
from jaxlong.mixers import GQA, MoBA


def naive(mixer, params, x):
    """One document [T D]."""
    H, group, block = mixer.heads, mixer.heads // mixer.kv_heads, mixer.block
    q, k, v = (np.einsum("td,dhc->thc", x, params[name]) for name in ("wq", "wk", "wv"))
    if isinstance(mixer.position, Rope):
        q, k = (np.stack([rotate(a[t], t) for t in range(len(x))]) for a in (q, k))
    o = np.zeros_like(q)
    for t, h in np.ndindex(len(x), H):
        keys, values = k[:, h // group], v[:, h // group]
        gate = [q[t, h] @ keys[n * block : (n + 1) * block].mean(0) for n in range(t // block)]
        blocks = best(gate, mixer.top_k - 1) | {t // block}
        seen = [j for j in range(t + 1) if j // block in blocks]
        o[t, h] = softmax_attention(q[t, h], keys[seen], values[seen])
    return np.einsum("thc,hcd->td", o, params["wo"])


@pytest.mark.thorough
@pytest.mark.parametrize(
    "mixer,lengths",
    [
        (MoBA(heads=4, kv_heads=2, head_dim=8, block=3, top_k=2), (17,)),
        (MoBA(heads=3, kv_heads=1, head_dim=4, block=2, top_k=3, position=NoPE()), (9, 1, 11)),
        (MoBA(heads=2, kv_heads=2, head_dim=6, block=4, top_k=1), (3, 10)),
    ],
    ids=["gqa", "mqa_packed", "own_block_alone"],
)
def test_values_and_gradients(mixer, lengths):
    check(mixer, partial(naive, mixer), lengths)


@pytest.mark.parametrize("length", [1, 15])
def test_all_blocks_are_full_attention(length):
    settings = dict(heads=4, kv_heads=2, head_dim=8)
    mixer, full = MoBA(block=4, top_k=5, **settings), GQA(**settings)
    x = jax.random.normal(jax.random.key(0), (2, length, WIDTH))
    positions = jnp.tile(jnp.arange(length, dtype=jnp.int32), (2, 1))
    params = {"params": single(random_params(mixer, np.random.default_rng(1)))}
    run = jax.jit(lambda mixer, x: mixer.apply(params, x, positions=positions)[0], static_argnums=0)
    np.testing.assert_allclose(run(mixer, x), run(full, x), atol=1e-5)


def test_a_ring_that_overflows_forgets_the_oldest_blocks():
    """A state for 8 tokens, fed 14: the last query reads tokens 6 to 13; block 1 (4 to 7) is gone with its start."""
    mixer = MoBA(heads=2, kv_heads=1, head_dim=4, block=4, top_k=9, position=NoPE())
    x = jax.random.normal(jax.random.key(0), (1, 14, WIDTH))
    positions = jnp.arange(14, dtype=jnp.int32)[None]
    params = {"params": single(random_params(mixer, np.random.default_rng(1)))}
    step = jax.jit(lambda x, positions, state=None: mixer.apply(params, x, positions=positions, state=state))
    state = mixer.init_state(1, 8, width=WIDTH, max_chunk=1, dtype=x.dtype)
    for t in range(14):
        y, state = step(x[:, t : t + 1], positions[:, t : t + 1], state)
    alone, _ = step(x[:, 8:], positions[:, :6])  # blocks 2 and 3
    np.testing.assert_allclose(y[:, 0], alone[:, -1], atol=1e-6)


def test_refuses():
    for field in ("block", "top_k"):
        with pytest.raises(BadInput, match=field):
            MoBA(heads=4, kv_heads=2, head_dim=8, **{field: 0})
    with pytest.raises(BadInput, match="kv_heads"):
        MoBA(heads=4, kv_heads=3, head_dim=8)
