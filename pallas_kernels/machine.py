"""The device that a program which is being traced is for."""

from __future__ import annotations

from typing import Any

import jax


def platform() -> str:
    """Where it will run: on the mesh of `jax.set_mesh`, whose devices need not be here, or else the default device."""
    described = _described()
    if described is not None:
        return described.platform
    chosen = jax.config.jax_default_device
    if chosen is None:
        return jax.default_backend()
    return chosen if isinstance(chosen, str) else chosen.platform


def kind() -> str:
    """The device's kind, such as "TPU v6 lite"."""
    described = _described()
    if described is not None:
        return described.device_kind
    chosen = jax.config.jax_default_device
    if chosen is None or isinstance(chosen, str):
        chosen = jax.local_devices(backend=chosen)[0]
    return chosen.device_kind


def _described() -> Any:
    """What the mesh tells of its devices, or None."""
    return jax.sharding.get_abstract_mesh().abstract_device
