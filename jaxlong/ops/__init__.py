"""Tensor algorithms without parameters; each picks an implementation."""

from jaxlong.ops.attend import Backend, attend, attend_with_lse, merge
from jaxlong.ops.feed_forward import feed_forward
from jaxlong.ops.loss import LossStats, cross_entropy

__all__ = ["Backend", "LossStats", "attend", "attend_with_lse", "cross_entropy", "feed_forward", "merge"]
