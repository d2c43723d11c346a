"""Killed and started again, moved to another mesh: training ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlong import run
from jaxlong.parallel.mesh import make_mesh
from jaxlong.train import loop

ROOT = Path(__file__).parent.parent


STEPS, MESH = 40, "data=2,fsdp=2,seq=2"
ARGUMENTS = [
    "--config=configs/tiny.py", f"--mesh={MESH}", f"--config.train.steps={STEPS}", "--config.train.save_every=7",
    "--config.train.log_every=1", "--config.train.schedule.warmup=5", "--config.model.width=32",
    "--config.model.depth=2",
    "--config.model.mlp.hidden=32", "--config.model.pattern.0.head_dim=8", "--config.model.pattern.0.conv=3",
    "--config.data.length=32", "--config.data.batch=8",
]  # fmt: skip
ENVIRONMENT = os.environ | {
    "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_cpu_collective_call_terminate_timeout_seconds=600",
    "JAX_PLATFORMS": "cpu",
}


def start(workdir: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "experiments.pretrain", *ARGUMENTS, f"--workdir={workdir}"]
    return subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(workdir: Path) -> None:
    process = start(workdir)
    errors = process.communicate(timeout=300)[1]
    assert process.returncode == 0, errors.decode()


def lines(workdir: Path) -> list[dict]:
    file = workdir / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def final_state(workdir: Path) -> dict[str, np.ndarray]:
    """Every array of the last checkpoint, read by Orbax itself, and the state of the data."""
    import orbax.checkpoint as ocp

    folder = (workdir / "checkpoints" / str(STEPS)).absolute()
    with ocp.PyTreeCheckpointer() as reader, warnings.catch_warnings(action="ignore"):
        arrays = reader.restore(folder / "state")
    return arrays | {"data": run.open_checkpoint(workdir).data}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "run"
    finish(workdir)
    return workdir


def same(a: Path, b: Path) -> None:
    x, y = final_state(a), final_state(b)
    assert x.keys() == y.keys() and x.pop("data") == y.pop("data")
    for name, leaf in x.items():
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(y[name]), err_msg=name)
    timing = {"tokens_per_second", "seconds_per_step", "seconds", "time", "mfu"}
    facts = lambda folder: [{k: v for k, v in line.items() if k not in timing} for line in lines(folder)]
    assert facts(a) == facts(b)


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_killed_at_random_steps(seed, uninterrupted, tmp_path):
    """SIGKILL at a random step, twice; the end is bit-identical in parameters, optimizer state and data order."""
    rng, workdir = random.Random(seed), tmp_path / "run"
    for low, high in ((3, 16), (18, 34)):
        target, process = rng.randint(low, high), start(workdir)
        deadline = time.monotonic() + 240
        while (not lines(workdir) or lines(workdir)[-1]["step"] < target) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
        process.communicate()
    finish(workdir)
    same(workdir, uninterrupted)


def test_finished_run_started_again_changes_nothing(uninterrupted):
    before = final_state(uninterrupted)
    finish(uninterrupted)
    after = final_state(uninterrupted)
    assert before.pop("data") == after.pop("data")
    jax.tree.map(np.testing.assert_array_equal, before, after)


class Watch(loop.Hook):
    def __init__(self):
        self.losses = []

    def metrics(self, step, values):
        self.losses.append(values["loss"])


def test_another_mesh(uninterrupted, tmp_path):
    """8 -> 4 -> 1 devices: restored values are identical, and 20 further steps lose the same to 1e-5."""
    stored = run.from_data(run.open_checkpoint(uninterrupted).config)
    saved = final_state(uninterrupted)
    losses = {}
    for devices, mesh in ((8, MESH), (4, "data=1,fsdp=2,seq=2"), (1, "data=1")):
        shutil.copytree(uninterrupted, tmp_path / str(devices))
        longer = replace(stored, mesh=mesh, train=replace(stored.train, steps=STEPS + 20))
        watch, first = Watch(), {}

        def fit(state, *arguments, first=first, **options):
            paths = jax.tree_util.tree_leaves_with_path(state)
            first.update({jax.tree_util.keystr(p, simple=True, separator="."): np.asarray(leaf) for p, leaf in paths})
            return loop.fit(state, *arguments, **options)

        with pytest.MonkeyPatch.context() as patch:
            subset = jax.devices()[:devices]
            patch.setattr(run, "fit", fit)
            patch.setattr(run, "make_mesh", lambda spec, d=subset: make_mesh(spec, d))
            patch.setattr(jax, "device_count", lambda d=devices: d)
            run.train(longer, tmp_path / str(devices), hooks=(watch,))
        assert len(watch.losses) == 20
        losses[devices] = np.array(watch.losses)
        for name, leaf in first.items():
            np.testing.assert_array_equal(leaf, np.asarray(saved[name]), err_msg=name)
    for devices in (4, 1):
        np.testing.assert_allclose(losses[devices], losses[8], rtol=1e-5)
