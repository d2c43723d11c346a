"""Tiny models with random parameters, and one whose answers are known."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxlong.core.mask import causal, sliding
from jaxlong.core.position import Rope
from jaxlong.layers.mlp import SwiGLU
from jaxlong.mixers import GQA
from jaxlong.model import LM, init_params

VOCAB = 128
WINDOW = GQA(heads=2, kv_heads=1, head_dim=8, position=Rope(base=500.0), mask=sliding(4), conv=3)
FULL = WINDOW.clone(mask=causal(), conv=0, qk_norm=True)


@functools.cache
def model():
    """(model, parameters): a ring buffer with a convolution, and full attention."""
    lm = LM(vocab=VOCAB, width=16, depth=2, pattern=(WINDOW, FULL), mlp=SwiGLU(hidden=24))
    shapes = jax.eval_shape(functools.partial(init_params, lm), jax.random.key(0))
    rng = np.random.default_rng(0)  # compiles nothing, as initialising would
    return lm, jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), leaf.dtype), shapes)


def logits(lm, params, tokens):
    """All logits of the whole sequence at once, [B, T, V] in float64."""
    tokens = jnp.asarray(tokens)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    return np.asarray(_forward(lm, params, tokens, positions), np.float64)


@functools.partial(jax.jit, static_argnums=0)
def _forward(lm, params, tokens, positions):
    return lm.apply({"params": params}, tokens, positions=positions, segment_ids=jnp.ones_like(tokens))[0]


def greedy(lm, params, prompt, count, total=40):
    """Tokens by repeated whole forward passes; what stands to the right of a token does not change its logits."""
    tokens = list(prompt)
    for _ in range(count):
        row = np.zeros((1, total), np.int32)
        row[0, : len(tokens)] = tokens
        tokens.append(int(logits(lm, params, row)[0, len(tokens) - 1].argmax()))
    return tokens[len(prompt) :]


@dataclasses.dataclass(frozen=True)
class Sums:
    """Logits from the sum of the embeddings seen so far and the position; quick to compile, sensitive to padding."""

    vocab: int = VOCAB

    def params(self):
        rng = np.random.default_rng(1)
        draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
        return {"embed": draw(self.vocab, 8), "place": draw(7, 8), "head": draw(8, self.vocab)}

    def apply(self, variables, tokens, *, positions, segment_ids, state=None, method=None):
        p = variables["params"]
        sums = jnp.cumsum(p["embed"][tokens] * segment_ids[..., None], axis=1)
        sums += 0 if state is None else state[:, None]
        hidden = jnp.sin(sums) + p["place"][positions % 7]
        out = hidden if method == "features" else hidden @ p["head"]
        return out, None if state is None else sums[:, -1]

    def init_state(self, batch, max_len, *, max_chunk, dtype=None):
        return jnp.zeros((batch, 8))


class Bigram:
    """A model whose logits are a row of a table, and whose state records what it was fed."""

    vocab = 5

    def apply(self, variables, tokens, *, positions, segment_ids, state=None, method=None):
        if state is not None:
            seen, count = state
            new = jnp.stack([tokens, positions, segment_ids], axis=-1)
            state = (jax.lax.dynamic_update_slice(seen, new, (0, count, 0)), count + tokens.shape[1])
        if method == "features":
            return jnp.zeros((*tokens.shape, 1)), state
        return variables["params"][tokens], state

    def init_state(self, batch, max_len, *, max_chunk, dtype=None):
        self.max_len, self.max_chunk = max_len, max_chunk
        return jnp.full((batch, max_len, 3), -1, jnp.int32), jnp.int32(0)
