"""NSA against a float64 loop over queries, heads, windows and blocks, and against a public reference."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sparse_oracle import best, check, rotate, softmax_attention

from jaxlong.core.position import NoPE, Rope
from jaxlong.core.types import BadInput
from jaxlong.mixers import NSA

GOLDEN = Path(__file__).parents[1] / "golden" / "nsa.npz"


def phi(params, name, tokens):
    """One vector [C] from the tokens of a window [l, C]."""
    if f"phi_{name}_in" not in params:
        return tokens.mean(0)
    hidden = np.einsum("lc,lcf->f", tokens + params[f"phi_{name}_place"], params[f"phi_{name}_in"])
    return hidden / (1 + np.exp(-hidden)) @ params[f"phi_{name}_out"]


def naive(mixer, params, x):
    """One document [T D]."""
    (T, _), H, K, C = x.shape, mixer.heads, mixer.kv_heads, mixer.head_dim
    turn = rotate if isinstance(mixer.position, Rope) else lambda a, position: a
    q = np.stack([turn(a, t) for t, a in enumerate(np.einsum("td,dhc->thc", x, params["wq"]))])
    k, v = (np.einsum("td,dnkc->ntkc", x, params[name]) for name in ("wk", "wv"))
    gates = 1 / (1 + np.exp(-np.einsum("td,dhn->thn", x, params["wg"])))
    starts = range(0, T - mixer.compress + 1, mixer.stride)
    window = lambda a, start, head: a[start : start + mixer.compress, head]
    coarse_k = [[turn(phi(params, "k", window(k[0], s, g)), s) for s in starts] for g in range(K)]
    coarse_v = [[phi(params, "v", window(v[0], s, g)) for s in starts] for g in range(K)]
    rotated = np.stack([np.stack([turn(a, t) for t, a in enumerate(branch)]) for branch in k])

    o = np.zeros_like(q)
    for t, g in np.ndindex(T, K):
        heads = range(g * H // K, (g + 1) * H // K)
        done = [i for i, s in enumerate(starts) if s + mixer.compress - 1 <= t]
        scores = np.zeros(t // mixer.block + 1)
        for h in heads:
            keys, values = np.reshape(coarse_k[g], (-1, C))[done], np.reshape(coarse_v[g], (-1, C))[done]
            o[t, h] += gates[t, h, 0] * softmax_attention(q[t, h], keys, values)
            for i in done:
                p = softmax_attention(q[t, h], keys, np.eye(len(done))[i][:, None])[0]
                for n in range(len(scores)):
                    meet = starts[i] < (n + 1) * mixer.block and starts[i] + mixer.compress > n * mixer.block
                    scores[n] += p * meet
        own = t // mixer.block
        scores[: mixer.initial] = scores[max(0, own - mixer.recent + 1) :] = np.inf
        blocks = best(scores, mixer.top_k)
        chosen = [j for j in range(t + 1) if j // mixer.block in blocks]
        near = list(range(max(0, t - mixer.window + 1), t + 1))
        for h in heads:
            for branch, seen in ((1, chosen), (2, near)):
                out = softmax_attention(q[t, h], rotated[branch, seen, g], v[branch, seen, g])
                o[t, h] += gates[t, h, branch] * out
    return np.einsum("thc,hcd->td", o, params["wo"])


@pytest.mark.thorough
@pytest.mark.parametrize(
    "mixer,lengths",
    [
        (NSA(4, 2, 4, compress=4, stride=2, hidden=6, block=3, top_k=3, initial=1, recent=1, window=3), (18,)),
        (NSA(4, 1, 4, compress=5, stride=3, hidden=0, block=2, top_k=4, window=5, position=NoPE()), (13, 1, 6)),
    ],
    ids=["mlp", "mean_packed"],
)
def test_values_and_gradients(mixer, lengths):
    check(mixer, partial(naive, mixer), lengths, directions=1)


@pytest.mark.thorough
@pytest.mark.parametrize("case", ["a", "b"])
def test_equals_the_public_reference(case):
    """Mean pooling, windows = blocks, keys and values shared by both branches, nothing local."""
    golden = {name.split("_", 1)[1]: a for name, a in np.load(GOLDEN).items() if name.startswith(case)}
    block, top_k = (int(n) for n in golden["settings"])
    D, H, C = golden["wq"].shape
    mixer = NSA(
        H, golden["wk"].shape[1], C, compress=block, stride=block, hidden=0, block=block, top_k=top_k, position=NoPE()
    )
    nothing = np.zeros_like(golden["wv"])
    params = {
        "wq": golden["wq"],
        "wk": np.stack([golden["wk"], golden["wk"], nothing], axis=1),
        "wv": np.stack([golden["wv"], golden["wv"], nothing], axis=1),
        "wg": np.concatenate([golden["wg"], np.zeros((D, H, 1), np.float32)], axis=-1),
        "wo": golden["wo"],
    }
    x = jnp.asarray(golden["x"])
    positions = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])

    def loss(params, x):
        y, _ = mixer.apply({"params": params}, x, positions=positions)
        return (y * golden["weigh"]).sum(), y

    (_, y), (grads, dx) = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(jax.tree.map(jnp.asarray, params), x)
    both = lambda a: a[:, 0] + a[:, 1]
    got = {"y": y, "dx": dx, "dwq": grads["wq"], "dwk": both(grads["wk"]), "dwv": both(grads["wv"])}
    got |= {"dwg": grads["wg"][..., :2], "dwo": grads["wo"]}
    for name, value in got.items():
        np.testing.assert_allclose(value, golden[name], rtol=0, atol=1e-5 * np.abs(golden[name]).max(), err_msg=name)


def test_refuses():
    with pytest.raises(BadInput, match="top_k: 2: is too small; 3 or more"):
        NSA(4, 2, 8, top_k=2)
    with pytest.raises(BadInput, match="stride: 4: leaves tokens out"):
        NSA(4, 2, 8, compress=3, stride=4)
    for field in ("block", "window", "recent"):
        with pytest.raises(BadInput, match=field):
            NSA(4, 2, 8, **{field: 0})
