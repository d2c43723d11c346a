"""Checkpoints: the same bits on any mesh, damage noticed and named, other architectures refused."""

from __future__ import annotations

import json
import logging
import random
import resource
import shutil
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train_toy as toy
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlong.core.types import BadInput
from jaxlong.train import checkpoint
from jaxlong.train.checkpoint import Store, check_workdir, load_params, open_checkpoint, stored_config
from jaxlong.train.manifest import Damaged, Manifest
from jaxlong.train.state import TrainState


def bits(tree):
    return [(leaf.dtype, leaf.shape, np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(tree)]


def mixed_state(step: int, mesh=None) -> TrainState:
    """A state with leaves of many dtypes, sizes and shardings."""
    key = jax.random.fold_in(jax.random.key(7), step)
    normal = lambda i, *shape: jax.random.normal(jax.random.fold_in(key, i), shape)
    params = {
        "embed": normal(0, 64, 32),
        "layers": {"w": normal(1, 2, 16, 32).astype(jnp.bfloat16), "scale": normal(2, 2, 16)},
        "mask": normal(3, 40) > 0,
    }
    opt_state = ({"mu": normal(4, 64, 32), "nu": normal(5, 64, 32) ** 2}, (jnp.int32(step),), jnp.zeros((8, 8)))
    state = TrainState(jnp.int32(step), params, opt_state, jnp.int32(1), jnp.int32(0))
    if mesh is None:
        return state
    place = lambda x: jax.device_put(x, NamedSharding(mesh, P("data") if x.ndim and x.shape[0] % 8 == 0 else P()))
    return jax.tree.map(place, state)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run folder with steps 10 and 20, and their states; not to be changed."""
    workdir = tmp_path_factory.mktemp("saved")
    store = Store(workdir, config=toy.CONFIG)
    states = {step: mixed_state(step, toy.make_mesh(8)) for step in (10, 20)}
    for step, state in states.items():
        assert store.save(state, {"index": step})
    store.close()
    return workdir, states


@pytest.fixture
def copy(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "run")
    return tmp_path / "run", saved[1]


def target_of(state, sharding=None):
    struct = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or x.sharding)
    return jax.tree.map(struct, state)


def restore(workdir, target):
    return Store(workdir, config=toy.CONFIG).restore(target)


# The same bits ------------------------------------------------------------------------------------------


def meshes():
    devices = jax.devices()
    yield jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=devices[:4])
    yield jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=devices[7:])
    yield jax.make_mesh((2, 4), ("rest", "data"), axis_types=(AxisType.Auto,) * 2)


@pytest.mark.parametrize("index", range(3))
def test_restores_the_same_bits_on_other_meshes(saved, index):
    workdir, states = saved
    mesh = list(meshes())[index]
    target = target_of(mixed_state(20, mesh))
    restored = restore(workdir, target)
    assert bits(restored.state) == bits(states[20])
    for leaf, wanted in zip(jax.tree.leaves(restored.state), jax.tree.leaves(target), strict=True):
        assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)
    assert (restored.step, restored.data, restored.config) == (20, {"index": 20}, toy.CONFIG)


def test_from_eight_devices_to_four_to_one(tmp_path):
    """Through a save on each mesh."""
    state = wanted = mixed_state(1, toy.make_mesh(8))
    for devices in (4, 1):
        store = Store(tmp_path, config=toy.CONFIG)
        store.save(state)
        store.close()
        target = target_of(mixed_state(1, toy.make_mesh(devices)))
        state = replace(restore(tmp_path, target).state, step=wanted.step + jnp.int32(5 - devices))
    assert bits(replace(state, step=wanted.step)) == bits(wanted)


def test_without_a_sharding_to_one_device(saved):
    state = saved[1][20]
    restored = restore(saved[0], jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state))
    assert bits(restored.state) == bits(state)
    assert restored.state.params["embed"].devices() == {jax.devices()[0]}


def test_what_is_saved_is_the_state_at_the_call(tmp_path):
    """Although the next steps reuse its memory while it is being written."""
    store = Store(tmp_path, config=toy.CONFIG, keep=9)
    grow = lambda p: ~p if p.dtype == bool else p * 1.5
    after = lambda s: replace(s, step=s.step + 1, params=jax.tree.map(grow, s.params))
    state, step = mixed_state(0, toy.make_mesh(8)), jax.jit(after, donate_argnums=0)
    wanted = {}
    for _ in range(4):
        state = step(state)
        wanted[int(state.step)] = bits(jax.tree.map(jnp.copy, state))
        store.save(state)
    store.close()
    for number, want in wanted.items():
        folder = tmp_path / "checkpoints" / str(number)
        assert bits(checkpoint._verified(folder, target_of(state), "").state) == want


def test_orbax_itself_can_read_it(saved):
    import orbax.checkpoint as ocp

    workdir, states = saved
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    targets = {"params.embed": jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=device)}
    arguments = ocp.args.PyTreeRestore(
        targets, restore_args=ocp.checkpoint_utils.construct_restore_args(targets), partial_restore=True
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        found = reader.restore(workdir / "checkpoints" / "20" / "state", args=arguments)
    assert bits(found["params.embed"]) == bits(states[20].params["embed"])


def test_keeps_the_newest(tmp_path):
    store = Store(tmp_path, config={}, keep=2)
    for step in (3, 6, 9, 12):
        store.save(mixed_state(step))
    store.close()
    assert sorted(folder.name for folder in (tmp_path / "checkpoints").iterdir()) == ["12", "9"]


def test_portions_are_read_in_order(saved, monkeypatch):
    monkeypatch.setattr(checkpoint, "READ_AT_ONCE", 1000)
    assert bits(restore(saved[0], target_of(saved[1][20])).state) == bits(saved[1][20])


# Opening ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["", "checkpoints", "checkpoints/20"])
def test_open_checkpoint(saved, where):
    opened = open_checkpoint(saved[0] / where)
    assert (opened.step, opened.config, opened.data) == (20, toy.CONFIG, {"index": 20})
    assert opened.folder == saved[0] / "checkpoints" / "20"
    assert opened.versions["jax"] == jax.__version__


def test_open_an_older_step(saved):
    assert open_checkpoint(saved[0] / "checkpoints" / "10").step == 10


def test_load_params(saved):
    workdir, states = saved
    target = target_of(states[20].params, jax.sharding.SingleDeviceSharding(jax.devices()[2]))
    loaded = load_params(workdir, target)
    assert bits(loaded.state) == bits(states[20].params)
    assert loaded.step == 20
    assert bits(load_params(workdir / "checkpoints/10", target).state) == bits(states[10].params)


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda path: None, "no such folder; a run folder, or one of its steps"),
        (lambda path: path.mkdir(), "holds no checkpoint; a run folder with checkpoints/<step>, or a step"),
        (lambda path: path.write_text("x"), "no such folder; a run folder, or one of its steps"),
        (lambda path: (path / "checkpoints/7").mkdir(parents=True), "holds no checkpoint; "),
        (lambda path: (path / "checkpoints/7.orbax-checkpoint-tmp/meta").mkdir(parents=True), "holds no checkpoint; "),
        (
            lambda path: (path / "checkpoints/7/state").mkdir(parents=True),
            "no step can be used (step 7 has no manifest); ",
        ),
    ],
)
def test_nothing_to_open(tmp_path, make, line):
    path = tmp_path / "run"
    make(path)
    for open_it in (open_checkpoint, lambda path: load_params(path, {"w": jnp.ones(3)})):
        with pytest.raises(BadInput) as error:
            open_it(path)
        assert str(error.value).startswith(f"checkpoint: {path}: {line}")


def test_stored_config(saved, tmp_path):
    assert stored_config(saved[0]) == toy.CONFIG
    assert stored_config(tmp_path) is stored_config(tmp_path / "missing") is None
    Store(tmp_path, config={"a": 1})
    assert stored_config(tmp_path) == {"a": 1}  # known before the first checkpoint
    (tmp_path / "experiment.json").write_text('{"a"')
    with pytest.raises(BadInput, match=r"^workdir: .*: its experiment.json cannot be read; "):
        stored_config(tmp_path)


def test_workdir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for use in (check_workdir, lambda path: Store(path, config={})):
        with pytest.raises(BadInput, match=r"^workdir: .*/file/run: .*/file is no folder; "):
            use(tmp_path / "file" / "run")
    check_workdir(tmp_path / "new" / "run")
    assert not (tmp_path / "new").exists()
    with pytest.raises(BadInput, match=r"^workdir: /proc/run: "):
        Store("/proc/run", config={})


def test_keep_nothing(tmp_path):
    with pytest.raises(BadInput, match=r"^train.keep: 0: keeps no checkpoint; 1 or more$"):
        Store(tmp_path / "run", config={}, keep=0)
    assert not (tmp_path / "run").exists()


# Other architectures ------------------------------------------------------------------------------------


EMBED = "params.embed is float32[64, 32] there and "


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda p: p | {"embed": jnp.zeros((64, 16))}, EMBED + "float32[64, 16] here"),
        (lambda p: p | {"embed": jnp.zeros((64, 32), jnp.bfloat16)}, EMBED + "bfloat16[64, 32] here"),
        (lambda p: p | {"embed": jnp.zeros((64, 32), jnp.int8)}, EMBED + "int8[64, 32] here"),
        (lambda p: p | {"head": jnp.zeros((3,))}, "has no params.head float32[3]"),
        (lambda p: {k: v for k, v in p.items() if k != "mask"}, "has params.mask, which is not expected here"),
        (lambda p: {"renamed" if k == "mask" else k: v for k, v in p.items()}, "has no params.renamed bool[40]"),
    ],
)  # fmt: skip
def test_another_architecture_or_dtype(saved, change, line):
    workdir, states = saved
    other = replace(states[20], params=change(states[20].params))
    for read in (lambda: restore(workdir, other), lambda: load_params(workdir, other.params)):
        with pytest.raises(BadInput) as error:
            read()
        folder = workdir / "checkpoints" / "20"
        assert str(error.value) == f"checkpoint: {folder}: {line}; the configuration that it was saved with"


def test_another_optimizer(saved):
    other = replace(saved[1][20], opt_state=())
    with pytest.raises(BadInput, match=r"has opt_state.0.mu, which is not expected here"):
        restore(saved[0], other)


def test_another_format(copy):
    path = copy[0] / "checkpoints" / "20" / "meta" / "metadata"
    body = Manifest.read(path.parent.parent)
    path.write_text(json.dumps(replace(body, format=99).encode()))
    with pytest.raises(BadInput, match=r"is of format 99; format 1$"):
        open_checkpoint(copy[0])


# Damage -------------------------------------------------------------------------------------------------


def files_of(step: Path) -> list[Path]:
    return sorted(path for path in step.rglob("*") if path.is_file())


def check_after_damage(run, states, caplog) -> bool:
    """Restores: either the newest state is intact, or the older one is used and one line says so."""
    caplog.clear()
    restored = restore(run, target_of(states[20]))
    assert bits(restored.state) == bits(states[restored.step])
    assert restored.data == {"index": restored.step}
    if restored.step == 20:
        assert not caplog.records
        return False
    (record,) = caplog.records
    assert record.message.startswith("checkpoint of step 20 ")
    assert record.message.endswith("; step 10 is used instead")
    assert "\n" not in record.message
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["10", "20.damaged"]
    return True


def fresh_copy(saved, run):
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(saved[0], run)
    return run / "checkpoints" / "20"


def flip_bits(saved, run, caplog, rng, trials) -> int:
    """Flips one bit in each of many copies, half placed by byte over the step, half by file; counts the damaged."""
    noticed = 0
    for trial in range(trials):
        files = files_of(fresh_copy(saved, run))
        sizes = [path.stat().st_size if trial % 2 else path.stat().st_size > 0 for path in files]
        path = rng.choices(files, sizes)[0]
        raw = bytearray(path.read_bytes())
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        path.write_bytes(raw)
        noticed += check_after_damage(run, saved[1], caplog)
    return noticed


def test_flipped_bits(saved, tmp_path, caplog, capfd):
    # Most bits of so small a checkpoint are never read, and Orbax lays out every run's bytes anew: some are noticed.
    assert flip_bits(saved, tmp_path / "run", caplog, random.Random(0), 40) > 0
    assert capfd.readouterr().err == ""


@pytest.mark.slow
def test_many_flipped_bits(saved, tmp_path, caplog, capfd):
    assert flip_bits(saved, tmp_path / "run", caplog, random.Random(1), 2000) >= 250
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("damage", ["halve", "empty", "delete"])
def test_every_file_truncated_or_deleted(saved, tmp_path, caplog, capfd, damage):
    noticed = 0
    for index in range(len(files_of(saved[0] / "checkpoints" / "20"))):
        path = files_of(fresh_copy(saved, tmp_path / "run"))[index]
        raw = path.read_bytes()
        path.unlink()
        if damage != "delete":
            path.write_bytes(raw[: len(raw) // 2] if damage == "halve" else b"")
        noticed += check_after_damage(tmp_path / "run", saved[1], caplog)
    assert noticed >= 3
    assert capfd.readouterr().err == ""


def test_folders_swapped(copy, caplog):
    """Both are intact, neither is where it should be."""
    run, states = copy
    steps = run / "checkpoints"
    for item in ("state", "meta"):
        (steps / "20" / item).rename(steps / "aside")
        (steps / "10" / item).rename(steps / "20" / item)
        (steps / "aside").rename(steps / "10" / item)
        if item == "state":
            with pytest.raises(Damaged, match=r"is damaged in .*: its bits do not match its fingerprint"):
                checkpoint._verified(steps / "20", target_of(states[20]), "")
    with pytest.raises(Damaged, match="its manifest is of step 10"):
        Manifest.read(steps / "20")


def test_damage_names_the_leaf(copy, caplog):
    run, states = copy
    edit_manifest(run / "checkpoints" / "20", "opt_state.0.nu")
    restore(run, target_of(states[20]))
    assert [record.message for record in caplog.records] == [
        "checkpoint of step 20 is damaged in opt_state.0.nu: its bits do not match its fingerprint; "
        "step 10 is used instead"
    ]


def edit_manifest(folder, name):
    """A manifest that is intact but expects other bits."""
    manifest = Manifest.read(folder)
    shape, dtype, mark = manifest.leaves[name]
    changed = replace(manifest, leaves=dict(manifest.leaves) | {name: (shape, dtype, mark ^ 1)})
    (folder / "meta" / "metadata").write_text(json.dumps(changed.encode()))


def test_nothing_verifies(copy):
    run, states = copy
    edit_manifest(run / "checkpoints" / "20", "params.embed")
    shutil.rmtree(run / "checkpoints" / "10" / "state" / "d")
    with pytest.raises(BadInput) as error:
        restore(run, target_of(states[20]))
    line = str(error.value)
    assert line.startswith(f"checkpoint: {run}: no step can be used (step 20 is damaged in params.embed: ")
    assert "step 10 is damaged in step: it cannot be read" in line
    assert "\n" not in line
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["10", "20"]  # nothing is lost


def test_an_explicit_step_has_no_substitute(copy):
    run, states = copy
    edit_manifest(run / "checkpoints" / "20", "params.embed")
    with pytest.raises(BadInput, match=r"no step can be used \(step 20 is damaged in params.embed"):
        load_params(run / "checkpoints" / "20", states[20].params)
    assert load_params(run, states[20].params).step == 10


def test_a_damaged_step_can_be_written_again(copy, caplog):
    run, states = copy
    edit_manifest(run / "checkpoints" / "20", "step")
    for _ in range(2):  # the second time the folder of damaged steps exists already
        store = Store(run, config=toy.CONFIG)
        assert store.restore(target_of(states[20])).step == 10
        store.save(states[20], {"index": 20})
        store.close()
        assert restore(run, target_of(states[20])).step == 20
        edit_manifest(run / "checkpoints" / "20", "step")


def test_an_empty_folder_is_no_checkpoint(tmp_path, caplog):
    (tmp_path / "checkpoints" / "7").mkdir(parents=True)
    (tmp_path / "checkpoints" / "9.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    store = Store(tmp_path, config={})
    assert store.restore(mixed_state(0)) is None
    store.save(mixed_state(7))
    store.close()
    assert restore(tmp_path, mixed_state(7)).step == 7
    assert not caplog.records


@pytest.mark.parametrize("part", [0, 1])
def test_leftovers_of_a_deletion_that_was_killed(copy, caplog, capfd, part):
    """Orbax deletes an old step file by file."""
    run, states = copy
    for path in files_of(run / "checkpoints" / "10")[part::2]:
        path.unlink()
    store = Store(run, config=toy.CONFIG)
    assert store.restore(target_of(states[20])).step == 20
    store.save(mixed_state(30))
    store.save(mixed_state(40))
    store.close()
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["30", "40"]
    assert not caplog.records
    assert capfd.readouterr().err == ""


# What is never saved ------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_state_that_is_not_finite(tmp_path, caplog, value):
    store = Store(tmp_path, config={})
    assert store.save(mixed_state(3))
    state = mixed_state(5)
    state.params["layers"]["w"] = state.params["layers"]["w"].at[1, 2, 3].set(value)
    assert not store.save(state)
    store.close()
    assert [record.message for record in caplog.records] == ["step 5 is not saved: params.layers.w is not finite"]
    assert open_checkpoint(tmp_path).step == 3


def test_a_folder_that_disappears(tmp_path, capfd):
    store = Store(tmp_path / "run", config={})
    store.save(mixed_state(3))
    store.wait()
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").write_text("now a file")
    began = time.monotonic()
    with pytest.raises(BadInput) as error:
        store.save(mixed_state(6))
    store.close()
    line = f"workdir: {tmp_path}/run: a checkpoint cannot be written (Not a directory); space and rights"
    assert str(error.value) == line
    assert time.monotonic() - began < 20
    assert capfd.readouterr().err == ""


def test_a_full_disk(tmp_path, capfd):
    """Simulated by a limit on the size of files; what was saved before stays."""
    store = Store(tmp_path, config={})
    store.save(mixed_state(3))
    store.wait()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
        with pytest.raises(BadInput, match=r"^workdir: .*: a checkpoint cannot be written \(File too large .*\); "):
            store.save(mixed_state(6))
            store.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    store.close()
    assert capfd.readouterr().err == ""
    store = Store(tmp_path, config={})
    assert store.restore(mixed_state(3)).step == 3
    store.save(mixed_state(6))
    store.close()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["3", "6"]


def test_nothing_is_said_on_stderr(tmp_path, caplog, capfd):
    with caplog.at_level(logging.WARNING):
        toy.run(str(tmp_path), 4)
        toy.run(str(tmp_path), 7)
    assert capfd.readouterr().err == ""
    assert not caplog.records
