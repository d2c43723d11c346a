"""Recurrences, convolutions and shifts along rows whose tokens lie on several devices, in spans of the text.

However long a span of tokens is, to a recurrent state it does one thing: it turns the state H at its entry into
A H + S at its exit. So every device runs its spans at once, from an empty state; summaries (A, S) are exchanged; and
what the true entry adds to the outputs is added. Two spans in a row are one, (A2 A1, A2 S1 + S2), and

    before = prefix(join, summary, chain)

is what all spans before each come to, after log2 as many rounds as there are spans: in each, summaries move 1, 2, 4,
... spans on. That is a few states a device on the wire and in memory, however long the row and wide the mesh. Where the
layout is zigzag a device holds two spans of the text, of which one hands on to the right and one to the left; nothing
else changes and no activation moves.

A convolution needs the tokens next to its span (`halo`). A state of which there is no summary is handed from span to
span (`hand_on`). What counts tokens by their place in the row gets the spans in the order of the text (`moved`).

All of these are plain functions for one's own `jax.shard_map`: they take arrays of which each row is one span,
[B spans, T, ...] or [B spans, ...], and a `Chain`. `jaxlong.parallel.rows` is the shard_map of this library.

LASP (arXiv 2404.02882) hands the state on in a ring, LASP-2 (arXiv 2502.07563) and flash-linear-attention gather all
summaries; rounds of doubling steps are Hillis and Steele's scan (1986).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int

from jaxlong.parallel.layout import parts, spans
from jaxlong.parallel.manual import vary_alike


class Chain(NamedTuple):
    """The spans of a row in the order of the text, on the devices of mesh axes that `jax.shard_map` has made manual.

    axes: names of mesh axes; together they have n devices, the last axis fastest.
    layout: "contiguous", a span a device, or "zigzag", two (`jaxlong.parallel.layout`).
    """

    axes: tuple[str, ...]
    layout: str = "contiguous"

    @property
    def held(self) -> int:
        """Spans that a device holds."""
        return parts(self.layout, 1)

    @property
    def places(self) -> Int[np.ndarray, "N"]:
        """Of each span of the text its place: device * held + number on the device."""
        devices = lax.axis_size(self.axes)
        return np.argsort(spans(devices)) if self.layout == "zigzag" else np.arange(devices)

    def numbers(self) -> Int[Array, "held"]:
        """Which spans of the text this device holds."""
        return jnp.asarray(np.argsort(self.places))[lax.axis_index(self.axes) * self.held + jnp.arange(self.held)]

    def cut(self, x: Array) -> Array:
        """The rows of a device [B, held T, ...] as spans [B held, T, ...]."""
        return x.reshape(x.shape[0] * self.held, -1, *x.shape[2:])

    def split(self, x: Array) -> Array:
        """[B held, ...] -> [B, held, ...]."""
        return x.reshape(-1, self.held, *x.shape[1:])

    def join(self, x: Array) -> Array:
        """The inverse of `split`, and, for whole rows, of `cut` after it."""
        return x.reshape(-1, *x.shape[2:])


def earlier(x: Any, by: int, chain: Chain) -> Any:
    """What the span `by` places earlier in the text holds (negative: later), for each span; zeros beyond the text."""
    places = chain.places
    source = np.full_like(places, -1)
    if by > 0:
        source[places[by:]] = places[:-by]
    else:
        source[places[:by]] = places[-by:]
    return moved(x, source, chain)


def moved(x: Any, source: Int[np.ndarray, "N"], chain: Chain) -> Any:
    """Into each place of a span what lies at the place `source` of it; zeros where that is negative."""
    routes: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for there, here in enumerate(source.tolist()):
        if here >= 0:
            (device, of), (target, to) = divmod(here, chain.held), divmod(there, chain.held)
            routes.setdefault((of, to), []).append((device, target))

    def arrange(leaf: Array) -> Array:
        leaf = chain.split(leaf)
        into = lambda to: sum(_send(leaf[:, of], routes.get((of, to), []), chain) for of in range(chain.held))
        return chain.join(jnp.stack([into(to) for to in range(chain.held)], axis=1))

    return jax.tree.map(arrange, x)


def prefix(join: Callable[[Any, Any], Any], summary: Any, chain: Chain) -> Any:
    """The summary of all spans before each span of the text, exclusively; zeros before the first.

    Args:
        join: (summary of a span or more, summary of what follows them) -> summary of both. Associative; a first
            argument of zeros must stand for a text that begins with the second.
    """
    before, reach = earlier(summary, 1, chain), 1
    while reach < len(chain.places) - 1:
        before = join(earlier(before, reach, chain), before)
        reach *= 2
    return before


def dense(early: Float[Array, "*B K VK"], late: Float[Array, "*B K VK"]) -> Float[Array, "*B K VK"]:
    """[S | A], S [K V] and A [K K], of two spans in a row: S = A2 S1 + S2 and A = A2 A1, in full float32."""
    values = late.shape[-1] - late.shape[-2]
    added = jnp.pad(late[..., :values], [(0, 0)] * (late.ndim - 1) + [(0, late.shape[-2])])
    return jnp.matmul(late[..., values:], early, precision="highest") + added


def diagonal(early: tuple[Array, Array], late: tuple[Array, Array]) -> tuple[Array, Array]:
    """(a, S), of shapes that broadcast, of two spans in a row: a = a2 a1 and S = a2 S1 + S2."""
    return early[0] * late[0], early[1] * late[0] + late[1]


def final(x: Any, chain: Chain) -> Any:
    """What the last span of the text holds, on all devices: [B held, ...] -> [B, ...]."""
    device, slot = divmod(int(chain.places[-1]), chain.held)
    there = lax.axis_index(chain.axes) == device
    return jax.tree.map(lambda leaf: lax.psum(jnp.where(there, chain.split(leaf)[:, slot], 0), chain.axes), x)


def halo(x: Array, chain: Chain, *, before: int = 0, after: int = 0) -> Array:
    """Spans [B held, T, ...] with the tokens next to them in the text, [B held, before + T + after, ...]; else zeros.

    One exchange between neighbours for each span that the halo reaches into.
    """
    length = x.shape[1]
    left = [earlier(x[:, -before:], by, chain) for by in range(-(-before // length), 0, -1)]
    right = [earlier(x[:, :after], -by, chain) for by in range(1, 1 - (-after // length))]
    wide = jnp.concatenate([*left, x, *right], axis=1)
    start = sum(part.shape[1] for part in left) - before
    return wide[:, start : start + before + length + after]


def hand_on(step: Callable[[Any, Any], Any], tokens: Any, first: Any, chain: Chain) -> Any:
    """The state at the entry of each span where `step(tokens, state) -> state` has gone over all spans before it.

    For states of which a span has no summary. One span works at a time, so this takes as long as the whole row would
    on one device, but no more memory than a span and a state for each turn; only the state moves. Backward the same:
    each span is computed again. (Devices that wait work on nothing of use: a branch that only some take must
    not hold what the compiler exchanges along other axes.)

    Args:
        tokens: arrays [B held, T, ...].
        first: arrays [B held, ...], of which the first span of the text takes its own.
    """
    numbers = chain.numbers()
    tokens, first = vary_alike((tokens, first))

    def turn(entry: Any, number: Array) -> tuple[Any, None]:
        slot = jnp.argmax(numbers == number)
        left = step(*jax.tree.map(lambda x: chain.split(x)[:, slot], (tokens, entry)))
        came = earlier(jax.tree.map(lambda x: jnp.repeat(x, chain.held, axis=0), left), 1, chain)

        def receive(old: Array, new: Array) -> Array:
            mine = (numbers == number + 1).reshape(-1, *[1] * (old.ndim - 1))
            return chain.join(jnp.where(mine, chain.split(new), chain.split(old)))

        return jax.tree.map(receive, entry, came), None

    turns = jnp.arange(len(chain.places) - 1)
    return lax.scan(jax.checkpoint(turn, prevent_cse=False), first, turns)[0]


def _send(x: Array, pairs: list[tuple[int, int]], chain: Chain) -> Array:
    """x from the first to the second device of each pair; zeros on the others."""
    if all(here == there for here, there in pairs):
        stays = jnp.isin(lax.axis_index(chain.axes), jnp.asarray([here for here, _ in pairs], jnp.int32))
        return jnp.where(stays, x, 0)
    return lax.ppermute(x, chain.axes, pairs)
