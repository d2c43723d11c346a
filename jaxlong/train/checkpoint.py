"""Checkpoints that survive being killed, notice damage and fit any mesh.

A run folder holds `experiment.json` and `checkpoints/<step>/`, written by Orbax in the background and moved
into place by one rename. Each step carries a manifest (`manifest.py`) with a fingerprint of every leaf
(`fingerprint.py`), taken on the devices before the save and again after a restore: Orbax itself reads flipped
bits and other dtypes without a word. Arrays are read back through TensorStore, the library below Orbax, leaf by
leaf: then damage has a name, and nothing is cast.

Folders are of a POSIX file system (buckets through a mount). Saves are safe against the death of the process,
not of the machine: nothing is synced to the medium.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jax.experimental import multihost_utils

from jaxlong.core.types import BadInput
from jaxlong.parallel.processes import broken_connection
from jaxlong.train.atomic import replace_text
from jaxlong.train.fingerprint import digests
from jaxlong.train.manifest import Damaged, Manifest, versions
from jaxlong.train.state import Params, TrainState, leaf_name

log = logging.getLogger(__name__)

STEPS = "checkpoints"
EXPERIMENT = "experiment.json"
READ_AT_ONCE = 4 * 2**30
"""Bytes of leaves whose reads are under way together."""


class Opened(NamedTuple):
    """A checkpoint whose manifest was read, and no array."""

    folder: Path
    step: int
    config: dict[str, Any]
    data: Any
    versions: dict[str, str]


class Restored(NamedTuple):
    """A verified state (or its parameters), its step, the data iterator's state and the stored configuration."""

    state: Any
    step: int
    data: Any
    config: dict[str, Any]


# Reading ------------------------------------------------------------------------------------------------


def open_checkpoint(path: str | os.PathLike) -> Opened:
    """Configuration and step of the newest checkpoint of a run folder, or of one step folder.

    Raises:
        BadInput: no checkpoint there, or none whose manifest is intact.
    """
    folders, reasons = _candidates(Path(path)), []
    for folder in folders:
        try:
            manifest = Manifest.read(folder)
        except Damaged as damage:
            reasons.append(f"step {folder.name} {damage}")
            continue
        return Opened(folder, manifest.step, dict(manifest.config), manifest.data, dict(manifest.versions))
    raise _none_usable(Path(path), reasons)


def load_params(path: str | os.PathLike, target: Params) -> Restored:
    """The verified parameters of the newest checkpoint of a run folder, or of one step folder.

    Args:
        target: tree of arrays or `jax.ShapeDtypeStruct`; its shardings are those of the result.

    Raises:
        BadInput: no checkpoint, none that verifies, or other names, shapes or dtypes than the target's.
    """
    restored, _ = _newest_verified(Path(path), target, "params.")
    return restored


def stored_config(workdir: str | os.PathLike) -> dict[str, Any] | None:
    """The configuration of the experiment that a run folder holds; None if it holds none.

    Raises:
        BadInput: it holds one whose configuration cannot be read.
    """
    workdir = Path(workdir)
    for folder in _step_folders(workdir / STEPS):
        try:
            return dict(Manifest.read(folder).config)
        except Damaged:
            continue
    try:
        return json.loads((workdir / EXPERIMENT).read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError):
        raise BadInput("workdir", workdir, f"its {EXPERIMENT} cannot be read", "another folder, or remove it") from None


def check_workdir(path: str | os.PathLike) -> None:
    """Check that a run folder can be made or written to, without writing anything.

    Raises:
        BadInput: it cannot.
    """
    path = Path(path).absolute()
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    if not existing.is_dir():
        raise BadInput("workdir", path, f"{existing} is no folder", "a folder that can be written to")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise BadInput("workdir", path, "is not writable", "a folder that can be written to")


def _candidates(path: Path) -> list[Path]:
    """Step folders that a path stands for, newest first. Raises BadInput if there are none."""
    if not path.is_dir():
        raise BadInput("checkpoint", path, "no such folder", "a run folder, or one of its steps")
    if path.name.isdecimal() and (path / "meta").is_dir():
        return [path.absolute()]
    folders = _step_folders(path / STEPS) or _step_folders(path)
    if not folders:
        raise BadInput("checkpoint", path, "holds no checkpoint", f"a run folder with {STEPS}/<step>, or a step")
    return folders


def _step_folders(steps: Path) -> list[Path]:
    """Finished steps, newest first: an empty folder or one that is still being written is none."""
    if not steps.is_dir():
        return []
    found = [folder for folder in steps.absolute().iterdir() if folder.name.isdecimal() and folder.is_dir()]
    return sorted((folder for folder in found if any(folder.iterdir())), key=lambda f: int(f.name), reverse=True)


def _newest_verified(path: Path, target: Any, prefix: str) -> tuple[Restored, list[Path]]:
    """The newest step that verifies, and the damaged ones that are newer."""
    damaged: dict[Path, str] = {}
    for folder in _candidates(path):
        try:
            restored = _verified(folder, target, prefix)
        except Damaged as damage:
            damaged[folder] = f"step {folder.name} {damage}"
            continue
        for reason in damaged.values():
            log.warning("checkpoint of %s; step %d is used instead", reason, restored.step)
        return restored, list(damaged)
    raise _none_usable(path, list(damaged.values()))


def _none_usable(path: Path, reasons: list[str]) -> BadInput:
    return BadInput("checkpoint", path, f"no step can be used ({', '.join(reasons)})", "an undamaged checkpoint")


def _verified(folder: Path, target: Any, prefix: str) -> Restored:
    """A step's state in the shape of `target`. Raises Damaged, on all processes if on one."""
    paths, treedef = jax.tree_util.tree_flatten_with_path(target)
    targets = {prefix + leaf_name(path): leaf for path, leaf in paths}
    manifest, leaves, damage = None, None, None
    try:
        manifest = Manifest.read(folder)
        manifest.expect(targets, prefix, folder)
        leaves = _read(folder / "state", targets)
    except Damaged as error:
        damage = error
    if not _everywhere(damage is None) or manifest is None or leaves is None:
        raise damage or Damaged("cannot be read by another process")
    marks, _ = digests(leaves)
    for name, mark in zip(targets, marks, strict=True):
        if mark != manifest.leaves[name][2]:
            raise Damaged(f"is damaged in {name}: its bits do not match its fingerprint")
    return Restored(jax.tree.unflatten(treedef, leaves), manifest.step, manifest.data, dict(manifest.config))


def _read(folder: Path, targets: Mapping[str, Any]) -> list[Array]:
    """Arrays by name, laid out as their targets are. Raises Damaged, naming the leaf."""
    import tensorstore as ts

    arrays, context = [], ts.Context()
    for names in _portions(targets):
        reads = [_LeafRead(folder, name, targets[name], context) for name in names]
        arrays += [read.array() for read in reads]
    return arrays


def _portions(targets: Mapping[str, Any]) -> Iterator[list[str]]:
    """Names in order, in lists that hold at most about READ_AT_ONCE bytes."""
    names: list[str] = []
    size = 0
    for name, target in targets.items():
        names.append(name)
        size += target.size * np.dtype(target.dtype).itemsize
        if size >= READ_AT_ONCE:
            yield names
            names, size = [], 0
    if names:
        yield names


class _LeafRead:
    """One leaf on its way from the folder: opening it starts at once, `array` waits."""

    def __init__(self, folder: Path, name: str, target: Any, context: Any):
        import tensorstore as ts

        self.name, self.target = name, target
        base = {"driver": "file", "path": f"{folder}/"}
        kvstore = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
        self.store = ts.open({"driver": "zarr", "kvstore": kvstore}, open=True, read=True, context=context)

    def array(self) -> Array:
        target = self.target
        sharding = target.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
        try:
            store = self.store.result()
            if (store.shape, store.dtype.numpy_dtype) != (tuple(target.shape), np.dtype(target.dtype)):
                raise Damaged(f"is damaged in {self.name}: it is {store.dtype.name}{list(store.shape)}")
            parts = sharding.addressable_devices_indices_map(store.shape).values()
            reads = {_key(part): store[part].read() for part in parts}
            rows = {key: np.asarray(read.result()) for key, read in reads.items()}
        except (ValueError, OSError, RuntimeError):
            raise Damaged(f"is damaged in {self.name}: it cannot be read") from None
        return jax.make_array_from_callback(store.shape, sharding, lambda part: rows[_key(part)])


def _key(part: tuple[slice, ...]) -> tuple:
    """Slices are hashable from Python 3.12 on."""
    return tuple((piece.start, piece.stop) for piece in part)


# Writing ------------------------------------------------------------------------------------------------


class Store:
    """The checkpoints of one run folder, for the run that writes them.

    Args:
        workdir: the run folder; made if missing.
        config: JSON-able description of the experiment, kept in `experiment.json` and in every step. Compare
            with `stored_config` before: an other one that the folder holds is replaced.
        keep: newest steps kept; 2 or more leave one to fall back to.

    Raises:
        BadInput: the folder cannot be written to, or `keep` is below 1.
    """

    def __init__(self, workdir: str | os.PathLike, *, config: Mapping[str, Any], keep: int = 2):
        if keep < 1:
            raise BadInput("train.keep", keep, "keeps no checkpoint", "1 or more")
        check_workdir(workdir)
        self.workdir = Path(workdir).absolute()
        self.config, self.keep = dict(config), keep
        self.steps = self.workdir / STEPS
        self._manager: Any = None
        if jax.process_index() == 0:
            try:
                self.steps.mkdir(parents=True, exist_ok=True)
                replace_text(self.workdir / EXPERIMENT, json.dumps(self.config, indent=1) + "\n")
            except OSError as error:
                raise BadInput("workdir", workdir, f"cannot be written ({error.strerror})", "another folder") from None
        _barrier("checkpoint folder")

    def restore(self, target: TrainState) -> Restored | None:
        """The newest verified state, laid out as `target`; None if the folder holds no checkpoint yet.

        A damaged step that is newer is reported in one line and moved aside to `<step>.damaged`, so that
        training can write that step again.

        Args:
            target: a state of arrays or `jax.ShapeDtypeStruct` with shardings, on any mesh.

        Raises:
            BadInput: there are checkpoints but none verifies, or they are of another architecture or dtype.
        """
        if not _step_folders(self.steps):
            return None
        restored, damaged = _newest_verified(self.workdir, target, "")
        _barrier("checkpoint read")
        if jax.process_index() == 0:
            for folder in damaged:
                aside = folder.with_name(f"{folder.name}.damaged")
                shutil.rmtree(aside, ignore_errors=True)
                folder.rename(aside)
        _barrier("damaged checkpoints moved")
        return restored

    def save(self, state: TrainState, data: Any = None) -> bool:
        """Start saving a state under its step; returns once the state may be donated.

        Args:
            data: JSON-able state of the data iterator after the state's last batch.

        Returns:
            False, with one line in the log, if a leaf is not finite: such a state is never saved.

        Raises:
            BadInput: this save or the one before cannot be written.
        """
        import orbax.checkpoint as ocp

        paths, _ = jax.tree_util.tree_flatten_with_path(state)
        leaves = {leaf_name(path): leaf for path, leaf in paths}
        marks, finite = digests(list(leaves.values()))
        step = int(state.step)
        if not all(finite):
            bad = list(leaves)[finite.index(False)]
            log.warning("step %d is not saved: %s is not finite", step, bad)
            return False
        table = {
            name: (leaf.shape, str(leaf.dtype), mark) for (name, leaf), mark in zip(leaves.items(), marks, strict=True)
        }
        manifest = Manifest(step, self.config, data, table, versions())
        arguments = ocp.args.Composite(state=ocp.args.PyTreeSave(leaves), meta=ocp.args.JsonSave(manifest.encode()))
        with self._writing():
            self._open_manager().save(step, args=arguments, force=True)
        return True

    def wait(self) -> None:
        """Block until the last save is in place. Raises BadInput if it cannot be written."""
        if self._manager is not None:
            with self._writing():
                self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait, and end the background threads."""
        if self._manager is not None:
            manager, self._manager = self._manager, None
            with self._writing():
                manager.close()

    def _open_manager(self) -> Any:
        """Orbax's manager, opened late since it lists the steps once, which `restore` may still move."""
        import orbax.checkpoint as ocp

        if self._manager is None:
            _remove_empty(self.steps)
            _hush_failed_writes()
            registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
            arrays = ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=False)  # the layout that `_LeafRead` opens
            registry.add("state", ocp.args.PyTreeSave, arrays)
            registry.add("meta", ocp.args.JsonSave, ocp.JsonCheckpointHandler("metadata"))
            options = ocp.CheckpointManagerOptions(
                preservation_policy=ocp.checkpoint_managers.LatestN(self.keep),
                cleanup_tmp_directories=True,
                # Otherwise a folder that cannot be made leaves threads that wait for it for minutes.
                async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
                lightweight_initialize=True,  # no word about what is left of a step whose deletion was killed
            )
            self._manager = ocp.CheckpointManager(self.steps, options=options, handler_registry=registry)
        return self._manager

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            if broken_connection(error):
                raise  # another process is gone: the folder is not to blame
            # TensorStore's messages name files first and the cause last.
            why = getattr(error, "strerror", None) or str(error).rsplit(": ", 1)[-1] or type(error).__name__
            raise BadInput(
                "workdir", self.workdir, f"a checkpoint cannot be written ({why})", "space and rights"
            ) from None


def _remove_empty(steps: Path) -> None:
    """Remove empty folders with a step's name, which Orbax takes for finished steps."""
    if jax.process_index() == 0:
        for folder in steps.iterdir():
            if folder.name.isdecimal() and folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
    _barrier("empty steps removed")


def _hush_failed_writes() -> None:
    """Keep the tracebacks of a failed write off stderr: `Store` raises it in one line.

    Orbax's threads log theirs through absl; each write of TensorStore that ends after its event loop adds one
    through asyncio's log or as an unraisable error.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_no_failed_write)
    if not isinstance(sys.unraisablehook, _NoClosedLoops):
        sys.unraisablehook = _NoClosedLoops(sys.unraisablehook)


def _no_failed_write(record: logging.LogRecord) -> bool:
    of_orbax = "orbax" in Path(record.pathname).parts or "OCDBT database" in record.getMessage()
    return record.exc_info is None or not of_orbax


class _NoClosedLoops:
    def __init__(self, hook: Any):
        self.hook = hook

    def __call__(self, unraisable: Any) -> None:
        if unraisable.exc_type is not RuntimeError or str(unraisable.exc_value) != "Event loop is closed":
            self.hook(unraisable)


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _everywhere(ok: bool) -> bool:
    """Whether all processes say yes."""
    return ok if jax.process_count() == 1 else bool(np.all(multihost_utils.process_allgather(np.array(ok))))
