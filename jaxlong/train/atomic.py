"""Files that are either as they were or as they should be, whenever the process dies."""

from __future__ import annotations

import os
from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Put `text` in the place of a file by one rename; readers never see a part of it."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    draft.write_text(text)
    os.replace(draft, path)
