"""A fingerprint of an array's bits that does not depend on how the array is laid out over devices.

    F(x) = sum_i mix(word_i + i * 0x9E3779B9)   mod 2**32

over the array's elements as unsigned words, i the linear index in row-major order, mix the finaliser of
MurmurHash3 (a bijection of 32-bit words, Appleby, public domain). A change within one word always changes F:
its term differs, and different terms below 2**32 have different sums. Other damage goes unseen with
probability 2**-32. Addition modulo 2**32 is exact in any order, so F is the same on every mesh.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import UInt32

GOLDEN = 0x9E3779B9


@jax.jit
def digest(x: Array) -> UInt32[Array, "2"]:
    """[fingerprint, 1 if every element is finite] of an array; computed where the array lives."""
    finite = jnp.all(jnp.isfinite(x)) if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.array(True)
    words = _words(x)
    total = jnp.sum(_mix(words + _index(words.shape) * jnp.uint32(GOLDEN)), dtype=jnp.uint32)
    return jnp.stack([total, finite.astype(jnp.uint32)])


def digests(leaves: list[Array]) -> tuple[list[int], list[bool]]:
    """Fingerprints of arrays, and whether each is finite. Waits for the arrays."""
    # One at a time: several collective programs in flight can starve each other on simulated CPU devices.
    found = [jax.device_get(digest(leaf)) for leaf in leaves]
    return [int(d[0]) for d in found], [bool(d[1]) for d in found]


def _words(x: Array) -> Array:
    """An array's bits as uint32, in row-major order; 64-bit elements make two words on a trailing axis."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag], axis=-1)
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    bits = jnp.iinfo(x.dtype).bits if jnp.issubdtype(x.dtype, jnp.integer) else jnp.finfo(x.dtype).bits
    if bits >= 32:
        return jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{bits}")).astype(jnp.uint32)


def _index(shape: tuple[int, ...]) -> Array:
    """The linear index of every element, modulo 2**32."""
    index = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        stride = np.uint32(math.prod(shape[axis + 1 :]) % 2**32)
        index += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * stride
    return index


def _mix(h: Array) -> Array:
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)
