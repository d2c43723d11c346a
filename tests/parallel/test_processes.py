"""Two and four processes on one host: the same training, and an orderly end when one of them is gone."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import processes_job as job
import pytest

from jaxlong import run
from jaxlong.core.types import BadInput
from jaxlong.parallel import processes
from jaxlong.parallel.mesh import AXES, make_mesh, parse_mesh, row_share
from jaxlong.parallel.processes import LOST, init_distributed
from jaxlong.train.checkpoint import open_checkpoint
from jaxlong.train.manifest import Manifest

ROOT = Path(__file__).parent.parent.parent


# Which rows a process reads ------------------------------------------------------------------------------


def grid(mesh: str, processes: int, devices: int, order=None) -> np.ndarray:
    """Devices of as many processes, each with the next ones of `order`, in the shape of a mesh."""
    sizes = parse_mesh(mesh, devices)
    made = [SimpleNamespace(process_index=i * processes // devices) for i in range(devices)]
    made = made if order is None else [made[i] for i in order]
    return np.array(made, object).reshape([sizes[axis] for axis in AXES])


def shares(devices: np.ndarray, processes: int) -> list[tuple[int, int]]:
    return [tuple(row_share(devices, p)) for p in range(processes)]


def test_one_process_reads_all():
    assert shares(grid("data=2,fsdp=2,seq=2", 1, 8), 1) == [(0, 1)]


def test_a_sequence_over_all_processes_is_read_by_all():
    assert shares(grid("seq=256", 64, 256), 64) == [(0, 1)] * 64
    assert shares(grid("seq=8,tensor=2", 4, 16), 4) == [(0, 1)] * 4


def test_rows_are_read_in_parts_where_processes_hold_parts():
    assert shares(grid("data=8", 4, 8), 4) == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert shares(grid("data=2,fsdp=4,seq=2", 4, 16), 4) == [(0, 4), (1, 4), (2, 4), (3, 4)]


def test_processes_along_the_sequence_read_the_same_rows():
    assert shares(grid("data=2,seq=8", 4, 16), 4) == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert shares(grid("fsdp=4,seq=64", 64, 256), 64) == [(p // 16, 4) for p in range(64)]


def test_what_counts_is_where_devices_lie():
    """The mesh of a torus may put a later process first."""
    assert shares(grid("data=4", 2, 4, order=[2, 3, 0, 1]), 2) == [(1, 2), (0, 2)]


@pytest.mark.parametrize(
    ("mesh", "order"),
    [
        ("data=4", [0, 2, 1, 3]),  # no neighbours
        ("data=2,seq=2", [0, 1, 1, 2]),  # one process holds a part of the other row
        ("data=4", [0, 0, 0, 2]),  # not equal
    ],
)
def test_all_read_all_where_parts_overlap(mesh, order):
    assert shares(grid(mesh, 2, 4, order), 2) == [(0, 1)] * 2


# Joining --------------------------------------------------------------------------------------------------

NAMES = (
    *("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"),
    *("SLURM_NTASKS", "SLURM_STEP_NODELIST", "OMPI_COMM_WORLD_SIZE"),
    *("TPU_ML_PLATFORM", "TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES", "TPU_SKIP_MDS_QUERY"),
    *("MEGASCALE_NUM_SLICES", "GCE_METADATA_IP"),
)


@pytest.fixture
def nothing(monkeypatch):
    """An environment that knows of no other process."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def test_init_distributed_names_what_is_missing(nothing, monkeypatch):
    init_distributed()  # one process: nothing to do
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    with pytest.raises(BadInput, match=r"^JAX_PROCESS_ID: unset"):
        init_distributed()
    with pytest.raises(BadInput, match=r"^heartbeat: 0: is too short"):
        init_distributed(heartbeat=0)
    monkeypatch.setenv("JAX_PROCESS_ID", "one")
    with pytest.raises(BadInput, match="not integers"):
        init_distributed()


@pytest.mark.parametrize("process,say", [(0, "not all processes joined within 2 s"), (1, "process 0 did not answer")])
def test_init_distributed_gives_up_in_one_line(process, say):
    """A process whose partners never come ends within its time-out, with exit code 2 and no stack trace."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(process)}
    command = [sys.executable, "-m", "experiments.pretrain", "--config=configs/tiny.py", "--workdir=none"]
    done = subprocess.run(
        [*command, "--init_timeout=2"], cwd=ROOT, env=os.environ | job, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1 and say in done.stderr


TPU = {"TPU_ML_PLATFORM": "JAX"}


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "n[1-4]"}, True),
        ({"SLURM_NTASKS": "4"}, False),  # the batch script itself
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "n1"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        (TPU | {"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        (TPU | {"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        (TPU | {"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "2"}, True),
        (TPU | {"TPU_SKIP_MDS_QUERY": "1"}, False),
        (TPU | {"GCE_METADATA_IP": "127.0.0.1:1"}, False),  # no metadata server
    ],
)
def test_launchers(environment, several, nothing, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert processes._launcher() is several


@pytest.mark.parametrize(
    ("workers", "env", "several"),
    [("10.0.0.1,10.0.0.2", "", True), ("10.0.0.1", "", False), ("10.0.0.1", "MEGASCALE_NUM_SLICES: '2'", True)],
)
def test_a_tpu_machine_asks_its_metadata(workers, env, several, nothing, monkeypatch):
    class Metadata(BaseHTTPRequestHandler):
        def do_GET(self):
            assert self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200)
            self.end_headers()
            self.wfile.write({"worker-network-endpoints": workers, "tpu-env": env}[self.path.split("/")[-1]].encode())

        def log_message(self, *words):
            pass

    with HTTPServer(("127.0.0.1", 0), Metadata) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("TPU_ML_PLATFORM", "JAX")
        monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.server_port}")
        assert processes._launcher() is several
        server.shutdown()
        thread.join()


# Training -------------------------------------------------------------------------------------------------


@pytest.fixture
def start():
    """A function that starts the processes of a job, of one CPU device each; none outlives the test."""
    started: list[subprocess.Popen] = []

    def starts(count: int, *arguments: object) -> list[subprocess.Popen]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        given = os.environ | {
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": str(count),
            "JAX_ENABLE_COMPILATION_CACHE": "0",  # a kill may tear what others read
            "XLA_FLAGS": "",
        }
        command, pipe = [sys.executable, str(Path(job.__file__)), *map(str, arguments)], subprocess.PIPE
        for i in range(count):
            environment = given | {"JAX_PROCESS_ID": str(i)}
            started.append(subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True))
        return started[-count:]

    yield starts
    for member in started:
        if member.returncode is None:
            member.kill()
            member.communicate()


def finish(members: list[subprocess.Popen]) -> list[str]:
    """Wait for all; what each wrote to stderr."""
    said = [member.communicate(timeout=300)[1] for member in members]
    assert [member.returncode for member in members] == [0] * len(members), said
    return said


def lines(workdir: Path) -> list[dict]:
    file = workdir / "metrics.jsonl"
    whole = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in whole if line.endswith("\n")]


@pytest.mark.thorough
@pytest.mark.parametrize("mesh", ["seq=2", "data=2", "fsdp=2"])
def test_two_processes_train_as_one_device(mesh, start, tmp_path, monkeypatch):
    """Rows that both read, each for its part of the length, and rows read in two parts; process 0 alone tells of it."""
    members = start(2, "experiment", tmp_path / "two", mesh)
    monkeypatch.setattr(run, "make_mesh", lambda spec: make_mesh("data=1", jax.devices()[:1]))
    monkeypatch.setattr(run, "validate", lambda experiment, devices: dict.fromkeys(AXES, 1))
    params = run.train(job.EXPERIMENT, tmp_path / "one")
    told, silent = finish(members)
    assert "loss" in told and silent == ""
    losses = lambda name: [line["loss"] for line in lines(tmp_path / name)]
    np.testing.assert_allclose(losses("two"), losses("one"), rtol=2e-5)
    for x, y in zip(jax.tree.leaves(run.load(tmp_path / "two").params), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5 * np.abs(y).max())
    assert open_checkpoint(tmp_path / "two").data == open_checkpoint(tmp_path / "one").data


# The end --------------------------------------------------------------------------------------------------


def outcome(workdir: Path):
    """Fingerprints of all leaves, the data's state, and the numbers of every step."""
    opened = open_checkpoint(workdir)
    numbers = [(line["step"], line["loss"], line["grad_norm"]) for line in lines(workdir)]
    return opened.step, Manifest.read(opened.folder).leaves, opened.data, numbers


def end_one(members: list[subprocess.Popen], workdir: Path, victim: int, number: signal.Signals, step: int) -> None:
    """Send a signal to one of four processes once they are past a step; see how the others end."""
    deadline = time.monotonic() + 240
    while len(lines(workdir)) < step and all(member.poll() is None for member in members):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert all(member.poll() is None for member in members), [member.communicate() for member in members]
    members[victim].send_signal(number)
    sent = time.monotonic()
    others = [member for member in members if member is not members[victim]]
    said = [member.communicate(timeout=120)[1] for member in others]
    assert time.monotonic() - sent < job.HEARTBEAT + 5
    assert [member.returncode for member in others] == [LOST] * 3, said
    for line in said:
        line = re.sub("(train|step) .*\n", "", line)
        assert line.startswith("this process ends: another process was killed") and line.endswith("to go on\n"), line
        assert len(line.splitlines()) == 1, line


@pytest.mark.thorough
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("victim", [2, 0])
def test_the_others_end(victim, number, start, tmp_path):
    """One of four processes is killed or stopped: the others end within the heartbeat and 5 s, each in one line."""
    end_one(start(4, "sum", tmp_path), tmp_path, victim, number, 3)


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_of_its_own_ends_the_job(failing, start, tmp_path):
    """Who fails shows its traceback and ends after a heartbeat, though the other waits for it in a collective."""
    members = start(2, "sum", tmp_path, failing)
    said = [member.communicate(timeout=120)[1] for member in members]
    assert [member.returncode for member in members] == ([1, LOST] if failing == 0 else [LOST, 1]), said
    assert "RuntimeError: a fault of its own" in said[failing]
    assert said[1 - failing].startswith("this process ends: another process") and said[1 - failing].count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "number", "step"),
    [
        (2, signal.SIGKILL, 8),
        (0, signal.SIGKILL, 7),
        (1, signal.SIGSTOP, 6),
        (0, signal.SIGSTOP, 9),
        (3, signal.SIGKILL, 6),
    ],
)
def test_started_again_training_ends_bit_identically(victim, number, step, start, tmp_path):
    """Parameters, optimizer state, data and numbers are those of four processes that nobody disturbed."""
    end_one(start(4, "toy", tmp_path, "ended:10000"), tmp_path / "ended", victim, number, step)
    finish(start(4, "toy", tmp_path, "ended:16", "whole:16"))
    assert outcome(tmp_path / "ended") == outcome(tmp_path / "whole")
