"""Choosing the next token from logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jaxlong.core.types import BadInput


@runtime_checkable
class Sampler(Protocol):
    """A hashable value; part of what is compiled."""

    def __call__(self, logits: Float[Array, "B V"], key: Array) -> Int[Array, "B"]: ...


@dataclass(frozen=True)
class Greedy:
    """The most likely token; the first of equals."""

    def __call__(self, logits: Float[Array, "B V"], key: Array) -> Int[Array, "B"]:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)


GREEDY = Greedy()


@dataclass(frozen=True)
class Sample:
    """A random token, from softmax(logits / temperature) cut to its likely part.

    Fields:
        temperature: 0 is greedy.
        top_k: keep the k most likely tokens; None keeps all.
        top_p: of those, keep the most likely ones until their probabilities reach p, at least one
            (nucleus sampling; Holtzman et al., arXiv 1904.09751).
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self):
        if not self.temperature >= 0:
            raise BadInput("temperature", self.temperature, "below zero", "0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            raise BadInput("top_k", self.top_k, "keeps no token", "1 or more, or None")
        if not 0 < self.top_p <= 1:
            raise BadInput("top_p", self.top_p, "is no share of the probability", "above 0, at most 1")

    def __call__(self, logits: Float[Array, "B V"], key: Array) -> Int[Array, "B"]:
        if self.temperature == 0:
            return Greedy()(logits, key)
        return jax.random.categorical(key, self.cut(logits)).astype(jnp.int32)

    def cut(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        """Logits over the temperature, -inf where a token is cut. Of equal logits, the lower ids are kept first."""
        scaled = logits.astype(jnp.float32) / self.temperature
        if self.top_k is None and self.top_p == 1:
            return scaled
        order = jnp.argsort(-scaled, axis=-1, stable=True)
        likely = jnp.take_along_axis(scaled, order, axis=-1)
        if self.top_k is not None:
            likely = jnp.where(jnp.arange(likely.shape[-1]) < self.top_k, likely, -jnp.inf)
        probabilities = jax.nn.softmax(likely, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        kept = jnp.where((before < self.top_p) & (probabilities > 0), likely, -jnp.inf)
        return jnp.take_along_axis(kept, jnp.argsort(order, axis=-1), axis=-1)
