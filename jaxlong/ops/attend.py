"""Attention: one call, a table of implementations, and the mesh around them."""

from __future__ import annotations

import contextlib
import difflib
import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.sharding import AbstractMesh
from jaxtyping import Float, Int

from jaxlong.core.mask import Mask
from jaxlong.core.types import BadInput
from jaxlong.ops.blockwise import blockwise, blockwise_backward
from jaxlong.ops.decode import FEW_QUERIES, decode
from jaxlong.ops.dense import accumulator, dense
from jaxlong.ops.flash import flash, flash_backward
from jaxlong.parallel.attention import STRATEGIES, sequence_attention
from jaxlong.parallel.layout import LAYOUTS
from jaxlong.parallel.manual import SEQUENCE, auto_mesh, axis_sizes
from jaxlong.parallel.partial import Gradients, Meta, recomputed
from jaxlong.parallel.partial import merge as merge
from pallas_kernels.machine import platform

KERNELS: Mapping[str, Callable[..., tuple[Array, Array]]] = {
    "dense": dense,
    "blockwise": blockwise,
    "flash": flash,
    "decode": decode,
}
"""Implementations by name. All take the arguments of `dense`; NotImplementedError says that one cannot take these."""

BACKWARDS: Mapping[str, Callable[..., tuple[Array | None, ...]]] = {
    "blockwise": blockwise_backward,
    "flash": flash_backward,
}
"""Backward passes of a part of the keys, given out and lse of all, for implementations that have one. The others run
again, in float32."""

SEQUENCES = ("auto", "none", *STRATEGIES)

DENSE_SCORES = 128 * 128
"""Up to T * S of this, "auto" holds all scores. Forward and backward the two cost the same at 64 x 64 on a CPU and near
400 x 400 on a GPU, and dense compiles in half the time."""

_log = logging.getLogger(__name__)


def _known(field: str, name: object, names: tuple[str, ...]) -> None:
    if name not in names:
        near = difflib.get_close_matches(str(name), names, n=1)
        raise BadInput(
            field, name, "no such name", f"did you mean {near[0]}?" if near else f"one of {', '.join(names)}"
        )


@dataclass(frozen=True)
class Backend:
    """How to compute attention; never what it computes.

    Args:
        kernel: a name in `KERNELS`, several names to be tried in order, or "auto".
        sequence: how devices share keys where the mesh of `jax.set_mesh` has an axis "seq" or "ulysses" of more than
            one (`jaxlong.parallel.attention`): "all_gather", "ring", "ulysses", "usp", or the quickest by a model of
            their cost, "auto". "none" leaves it to the compiler.
        layout: the order in which a row holds its tokens (`jaxlong.parallel.layout`). No value depends on it where
            positions are right; it says which devices hold neighbours in the text, and what a strategy costs.

    Raises:
        BadInput: for a name that does not exist.
    """

    kernel: str | tuple[str, ...] = "auto"
    sequence: str = "auto"
    layout: str = "contiguous"

    def __post_init__(self):
        for name in (self.kernel,) if isinstance(self.kernel, str) else self.kernel:
            _known("backend.kernel", name, ("auto", *KERNELS) if name is self.kernel else tuple(KERNELS))
        if not self.kernel:
            raise BadInput("backend.kernel", repr(self.kernel), "nothing to try", f"some of {', '.join(KERNELS)}")
        _known("backend.sequence", self.sequence, SEQUENCES)
        _known("backend.layout", self.layout, LAYOUTS)


def attend(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B S K C"],
    v: Float[Array, "B S K V"],
    *,
    mask: Mask,
    q_positions: Int[Array, "B T"],
    k_positions: Int[Array, "B S"],
    q_segments: Int[Array, "B T"] | None = None,
    k_segments: Int[Array, "B S"] | None = None,
    heads: Int[Array, "H"] | None = None,
    bias: Float[Array, "#B #H #T #S"] | None = None,
    alibi_slopes: Float[Array, "H"] | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, "H"] | None = None,
    backend: Backend = Backend(),
) -> Float[Array, "B T H V"]:
    """Softmax attention: `attend_with_lse` without the lse."""
    return attend_with_lse(
        q,
        k,
        v,
        mask=mask,
        q_positions=q_positions,
        k_positions=k_positions,
        q_segments=q_segments,
        k_segments=k_segments,
        heads=heads,
        bias=bias,
        alibi_slopes=alibi_slopes,
        scale=scale,
        soft_cap=soft_cap,
        sinks=sinks,
        backend=backend,
    )[0]


def attend_with_lse(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B S K C"],
    v: Float[Array, "B S K V"],
    *,
    mask: Mask,
    q_positions: Int[Array, "B T"],
    k_positions: Int[Array, "B S"],
    q_segments: Int[Array, "B T"] | None = None,
    k_segments: Int[Array, "B S"] | None = None,
    heads: Int[Array, "H"] | None = None,
    bias: Float[Array, "#B #H #T #S"] | None = None,
    alibi_slopes: Float[Array, "H"] | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, "H"] | None = None,
    backend: Backend = Backend(),
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """Softmax attention over the keys that a query sees, and the log of each softmax denominator.

        s = cap tanh(scale q.k / cap) + bias - slope |i - j|;  lse = log(sum_j exp s_j + exp sink)
        out = sum_j exp(s_j - lse) v_j

    Softmax and sums are float32. A query that sees no key gets exactly 0 with lse -inf (with a sink, its sink), and
    no gradient passes. Keys that it does not see change nothing, not even NaN ones. Differentiable in all float
    arrays and through both results; works under jit, grad, vmap, scan, remat and inside one's own `jax.shard_map`.

    Args:
        mask: which positions see which (`jaxlong.core.mask`).
        q_positions, k_positions: positions of queries and keys, in any order, at least 0.
        q_segments, k_segments: pairs with different ids do not attend, and a key with a negative id is an empty slot.
            Both or neither.
        heads: the indices by which masks tell heads apart, 0..H-1 unless q holds only some of a layer's heads.
        bias: added to the scores; its gradient is as large as it is.
        alibi_slopes: ALiBi (Press et al. 2022), symmetric for keys ahead.
        scale: C ** -0.5 unless given.
        soft_cap: keeps scores within +-soft_cap (Gemma 2, section 2), before bias and slopes.
        sinks: a logit a head that joins the denominator only (gpt-oss).
        backend: how to compute it.

    Returns:
        out in v's dtype, lse in float32.

    Raises:
        BadInput: H is not a multiple of K, segments on one side only, or heads that the mesh cannot divide.
        NotImplementedError: none of the backend's implementations takes these arguments; it names each one's reason.
    """
    H, K = q.shape[2], k.shape[2]
    if H % K:
        raise BadInput("heads", H, f"not a multiple of the {K} key heads", "each key head serves equally many queries")
    if (q_segments is None) != (k_segments is None):
        given = "k_segments" if q_segments is None else "q_segments"
        raise BadInput("segments", given, "given for one side only", "both q_segments and k_segments, or neither")
    if heads is None:
        heads = jnp.arange(H, dtype=jnp.int32)
    meta = Meta(q_positions, k_positions, q_segments, k_segments, heads, bias, alibi_slopes, sinks)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    local = Local(backend.kernel, mask, scale, soft_cap)
    return over_mesh(local, q, k, v, meta, mask, backend)


@dataclass(frozen=True)
class Local:
    """Attention on the arrays of one device, by the first implementation that takes them."""

    kernel: str | tuple[str, ...]
    mask: Mask
    scale: float
    soft_cap: float | None

    def __call__(self, q: Array, k: Array, v: Array, meta: Meta) -> tuple[Array, Array]:
        return self._first(q, k, lambda name: KERNELS[name](q, k, v, **self._options(meta)))

    def partial(self, q: Array, k: Array, v: Array, meta: Meta) -> tuple[Array, Array]:
        """The same with `out` in float32, to be merged with others."""
        dtype = accumulator(v.dtype)
        return self._first(q, k, lambda name: KERNELS[name](q, k, v, **self._options(meta), dtype=dtype))

    def backward(
        self, q: Array, k: Array, v: Array, meta: Meta, out: Array, lse: Array, dout: Array, dlse: Array
    ) -> Gradients:
        """The gradients of these keys' part, from results over all keys."""
        options = self._options(meta._replace(sinks=None))
        del options["sinks"]

        def run(name):
            if name not in BACKWARDS:
                alone = replace(self, kernel=name)
                return recomputed(alone, q, k, v, meta, out, lse, dout, dlse)
            return Gradients(*BACKWARDS[name](q, k, v, out, lse, dout, dlse, **options))

        return self._first(q, k, run)

    def _options(self, meta: Meta) -> dict[str, Any]:
        of_meta = meta._asdict()
        del of_meta["weights"]
        return {"mask": self.mask, "scale": self.scale, "soft_cap": self.soft_cap} | of_meta

    def _first(self, q: Array, k: Array, run: Callable[[str], Any]) -> Any:
        return first_taken("attend", _order(self.kernel, q.shape[1], k.shape[1]), run)


def over_mesh(
    local: Any, q: Array, k: Array, v: Array | None, meta: Meta, mask: Mask, backend: Backend
) -> tuple[Array, Array]:
    """`local` on the mesh of `jax.set_mesh`, by the backend's strategy, or here if no axis splits the sequence.

    A kernel is a program of one device. Where there are any, the other axes are split here too, not by the compiler.
    """
    mesh = None if backend.sequence == "none" else auto_mesh()
    if mesh is None or (max(axis_sizes(mesh, SEQUENCE)) == 1 and not _for_kernels(mesh, k.shape[2])):
        return local(q, k, v, meta)
    how = {"mask": mask, "strategy": backend.sequence, "layout": backend.layout}
    return sequence_attention(local, q, k, v, meta, mesh=mesh, **how)


def _for_kernels(mesh: AbstractMesh, key_heads: int) -> bool:
    """Whether the mesh has several devices of a kind that has kernels, and divides the key heads."""
    tensor = mesh.shape.get("tensor", 1)
    return mesh.size > 1 and platform() in ("gpu", "cuda", "tpu") and (key_heads == 1 or key_heads % tensor == 0)


def _order(kernel: str | tuple[str, ...], queries: int, keys: int) -> tuple[str, ...]:
    if kernel == "auto":
        names = ("dense", "blockwise") if queries * keys <= DENSE_SCORES else ("flash", "blockwise", "dense")
        names = ("decode", *names) if queries <= FEW_QUERIES < keys else names
        return tuple(name for name in names if name in KERNELS)
    return (kernel,) if isinstance(kernel, str) else kernel


def first_taken(op: str, names: Iterable[str], run: Callable[[str], Any]) -> Any:
    """`run(name)` of the first implementation of an op that takes its arguments; why others do not is logged, once.

    Raises:
        NotImplementedError: none does. One that does not raises the same, with its reason.
    """
    reasons: list[str] = []
    for name in names:
        try:
            found = run(name)
        except NotImplementedError as error:
            reasons.append(f"{name}: {error}")
            _note(reasons[-1])
        else:
            _told.get()(op, name, tuple(reasons))
            return found
    raise NotImplementedError(f"no implementation takes these arguments; {'; '.join(reasons)}")


_told: ContextVar[Callable[[str, str, tuple[str, ...]], None]] = ContextVar("told", default=lambda *choice: None)


@contextlib.contextmanager
def telling(tell: Callable[[str, str, tuple[str, ...]], None]) -> Iterator[None]:
    """Calls `tell(op, name, reasons)` of whatever `first_taken` takes within, and why those before it refused."""
    token = _told.set(tell)
    try:
        yield
    finally:
        _told.reset(token)


@functools.cache
def _note(reason: str) -> None:
    """Logs why an implementation gave way, once."""
    _log.info("%s", reason)
