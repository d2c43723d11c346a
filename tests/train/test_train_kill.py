"""Runs that are killed and started again end as if nothing had happened."""

from __future__ import annotations

import json
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import train_toy as toy

from jaxlong.train.checkpoint import open_checkpoint
from jaxlong.train.manifest import Manifest

PROGRAM = Path(__file__).with_name("train_toy.py")
STEPS = 40


def start(workdir: Path, milliseconds: int, steps: int = STEPS, *job: str) -> subprocess.Popen:
    workdir.mkdir(exist_ok=True)
    command = [sys.executable, "-W", "error", str(PROGRAM), str(workdir), str(steps), str(milliseconds), *job]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
    """Compiles once for all processes; complete before the first kill, which could tear an entry."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
        assert start(tmp_path_factory.mktemp("warm"), 0, steps=3).communicate() == ("", "")
        yield


def wait_for_step(workdir: Path, step: int, process: subprocess.Popen) -> None:
    """Until the run's numbers say that it is past a step."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        path = workdir / "progress"
        text = path.read_text() if path.exists() else ""
        if text and int(text) >= step:
            return
        time.sleep(0.002)
    raise AssertionError(f"step {step} was not reached: {process.communicate()}")


def outcome(workdir: Path):
    """Fingerprints of all leaves, the data iterator's state, and the numbers of every step."""
    opened = open_checkpoint(workdir)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    numbers = [{key: line[key] for key in ("step", "loss", "grad_norm", "learning_rate")} for line in lines]
    return opened.step, Manifest.read(opened.folder).leaves, opened.data, numbers


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    toy.run(str(workdir), STEPS)
    found = outcome(workdir)
    assert found[0] == STEPS
    assert [line["step"] for line in found[3]] == list(range(1, STEPS + 1))
    return found


def kill_and_resume(workdir: Path, kills: int, rng: random.Random) -> None:
    reached = 0
    for _ in range(kills):
        process = start(workdir, milliseconds=20)
        reached = rng.randint(reached + 1, min(reached + STEPS // kills, STEPS - 1))
        wait_for_step(workdir, reached, process)
        time.sleep(rng.random() * 0.06)  # anywhere in a step or in a save
        process.kill()
        _, errors = process.communicate()
        assert errors == ""
        (workdir / "progress").unlink()
        opened = [int(folder.name) for folder in (workdir / "checkpoints").iterdir() if folder.name.isdecimal()]
        reached = max(opened, default=0)
    process = start(workdir, milliseconds=0)
    assert process.communicate() == ("", "")
    assert process.returncode == 0


def test_killed_twice(tmp_path, uninterrupted):
    kill_and_resume(tmp_path, 2, random.Random(0))
    assert outcome(tmp_path) == uninterrupted


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
def test_killed_many_times(tmp_path, uninterrupted, seed):
    kill_and_resume(tmp_path, 6, random.Random(seed))
    assert outcome(tmp_path) == uninterrupted


def test_sigterm_saves_and_exits_with_0(tmp_path, uninterrupted):
    process = start(tmp_path, milliseconds=50)
    wait_for_step(tmp_path, 4, process)
    process.send_signal(signal.SIGTERM)
    sent = time.monotonic()
    assert process.communicate() == ("", "")
    assert process.returncode == 0
    assert time.monotonic() - sent < 10
    step = open_checkpoint(tmp_path).step
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert 4 < step < STEPS and len(lines) == step
    toy.run(str(tmp_path), STEPS)
    assert outcome(tmp_path) == uninterrupted


@pytest.mark.slow
def test_sigterm_to_one_of_two_processes(tmp_path):
    """Both stop after the same step, and save it together; each process then holds half of every shard."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    both = [start(tmp_path, 50, STEPS, address, "2", str(index)) for index in range(2)]
    wait_for_step(tmp_path, 7, both[0])
    both[1].send_signal(signal.SIGTERM)
    for process in both:
        output = process.communicate()
        assert process.returncode == 0, output
        assert "Traceback" not in output[1]
    step = open_checkpoint(tmp_path).step
    assert 7 < step < STEPS
    again = [start(tmp_path, 0, step + 5, address, "2", str(index)) for index in range(2)]
    for process in again:
        output = process.communicate()
        assert process.returncode == 0, output
    assert open_checkpoint(tmp_path).step == step + 5
    assert [line["step"] for line in outcome(tmp_path)[3]] == list(range(1, step + 6))
