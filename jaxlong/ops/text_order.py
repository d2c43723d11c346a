"""What counts tokens by their place in the row gets them in the order of the text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxlong.ops.attend import Backend
from jaxlong.parallel.rows import from_text, to_text


def text_order(call: Callable[[Any], Any], tokens: Any, *, backend: Backend) -> Any:
    """`call(tokens)` on arrays [B T ...] in the order of the text, its results back in that of the backend's layout.

    Each device sends its parts to those that hold them in a contiguous layout. With that, or without a mesh, nothing
    moves.
    """
    return from_text(call(to_text(tokens, backend.layout)), backend.layout)
