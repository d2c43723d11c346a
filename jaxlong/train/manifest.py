"""What a checkpoint says about itself: one JSON object a step, protected by a checksum.

{"crc32": n, "body": {"format", "step", "versions", "config", "data", "leaves": {name: [shape, dtype, fingerprint]}}}
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from jaxlong.core.types import BadInput

FORMAT = 1
PACKAGES = ("jaxlong", "jax", "flax", "optax", "orbax-checkpoint")


class Damaged(Exception):
    """A step of a checkpoint that cannot be trusted; says why in a few words."""


@dataclass(frozen=True)
class Manifest:
    """Fields: config and data are the caller's JSON (the experiment, the data iterator's state); leaves maps a
    leaf's name to its shape, dtype and fingerprint."""

    step: int
    config: Mapping[str, Any]
    data: Any
    leaves: Mapping[str, tuple[tuple[int, ...], str, int]]
    versions: Mapping[str, str]
    format: int = FORMAT

    def encode(self) -> dict[str, Any]:
        """As JSON-able data. Raises TypeError for a config or data that is not."""
        body = json.loads(json.dumps(asdict(self)))
        return {"crc32": _checksum(body), "body": body}

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a step folder. Raises Damaged if it is missing, changed or of another step."""
        try:
            stored = json.loads((folder / "meta" / "metadata").read_bytes())
            body = stored["body"]
            intact = stored["crc32"] == _checksum(body)
        except FileNotFoundError:
            raise Damaged("has no manifest") from None
        except (OSError, ValueError, TypeError, KeyError):
            raise Damaged("its manifest cannot be read") from None
        if not intact:
            raise Damaged("its manifest does not match its checksum")
        if body["format"] != FORMAT:
            raise BadInput("checkpoint", folder, f"is of format {body['format']}", f"format {FORMAT}")
        if folder.name != str(body["step"]):
            raise Damaged(f"its manifest is of step {body['step']}")
        leaves = {name: (tuple(shape), dtype, mark) for name, (shape, dtype, mark) in body.pop("leaves").items()}
        return cls(leaves=leaves, **body)

    def expect(self, targets: Mapping[str, Any], prefix: str, folder: Path) -> None:
        """Check that the leaves below `prefix` are those of `targets`, in name, shape and dtype.

        Raises:
            BadInput: they are of another architecture or dtype; names the first leaf that differs.
        """
        allowed = "the configuration that it was saved with"
        for name, target in targets.items():
            wanted = f"{target.dtype}{list(target.shape)}"
            if name not in self.leaves:
                raise BadInput("checkpoint", folder, f"has no {name} {wanted}", allowed)
            shape, dtype, _ = self.leaves[name]
            if (shape, dtype) != (tuple(target.shape), str(target.dtype)):
                raise BadInput("checkpoint", folder, f"{name} is {dtype}{list(shape)} there and {wanted} here", allowed)
        for name in self.leaves:
            if name.startswith(prefix) and name not in targets:
                raise BadInput("checkpoint", folder, f"has {name}, which is not expected here", allowed)


def versions() -> dict[str, str]:
    """Versions of the packages that a checkpoint depends on, as far as they are installed as packages."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _checksum(body: Any) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())
