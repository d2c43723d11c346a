"""Jobs of many processes: how they find each other, and how the rest ends when one of them is gone.

A process that is killed takes no part in the next collective, and the others would wait for it. Process 0 hears a
heartbeat of every other one, and they hear it; once one is silent for `heartbeat` seconds all others end, each with
one line and exit code `LOST`. Started again, the job goes on at its newest checkpoint. Where a collective itself
fails at once (Gloo on CPUs does, its connections break), nobody waits for the heartbeat.
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
import urllib.request
from types import TracebackType
from typing import Any

import jax
from jaxlib import utils as jaxlib_utils

from jaxlong.core.types import BadInput

LOST = 75
"""Exit code of a process that ends because another one of its job was killed or does not answer: start the job again.

EX_TEMPFAIL of sysexits.h: what failed may succeed when it is tried again.
"""

BROKEN = re.compile("Gloo|NCCL|^UNAVAILABLE|^DEADLINE_EXCEEDED|[Cc]oordination ?[Ss]ervice")
"""What an error says when it comes from between the processes, and not from this one; its class is any of several."""

log = logging.getLogger(__name__)


def init_distributed(timeout: int = 300, warn_after: int = 30, heartbeat: int = 100) -> None:
    """Join the other processes of a job, if the environment says that there are any.

    Recognises hosts of a Cloud TPU slice (by the metadata of the machine, or the variables that GKE sets), tasks of
    `srun` and of Open MPI, and anywhere the variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.
    A single process returns at once. From then on this process ends as `LOST` says when another one is gone, and an
    exception that nobody catches ends it even if the others never end (they then are the ones who have lost it).

    Args:
        timeout: seconds to wait for all processes.
        warn_after: seconds after which a warning says who is awaited.
        heartbeat: seconds of silence after which a process counts as dead.

    Raises:
        BadInput: a variable is missing, not all processes came in time, or the heartbeat is below a second.
    """
    if heartbeat < 1:
        raise BadInput("heartbeat", heartbeat, "is too short", "seconds, 1 or more")
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    given = {name: os.environ.get(name) for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")}
    missing = [name for name, value in given.items() if value is None]
    if jax.distributed.is_initialized():
        return
    if len(missing) == len(given):
        if _launcher():
            _initialize({}, "the job's launcher", timeout, warn_after, heartbeat)
        return
    if missing:
        raise BadInput(missing[0], "unset", "the other JAX_ variables of a multi-process job are set", "set all three")
    try:
        arguments = {
            "coordinator_address": address,
            "num_processes": int(given["JAX_NUM_PROCESSES"]),
            "process_id": int(given["JAX_PROCESS_ID"]),
        }
    except ValueError:
        raise BadInput(
            "JAX_PROCESS_ID", f"{given['JAX_PROCESS_ID']} of {given['JAX_NUM_PROCESSES']}", "not integers"
        ) from None
    _initialize(arguments, f"{address} ({given['JAX_NUM_PROCESSES']} processes)", timeout, warn_after, heartbeat)


def _launcher() -> bool:
    """Whether several processes were started by one that JAX's own detection knows."""
    known = os.environ
    if "TPU_ML_PLATFORM" in known:  # JAX sets it where it finds TPU chips and their library
        hosts = known.get("TPU_PROCESS_ADDRESSES") or known.get("TPU_WORKER_HOSTNAMES")
        alone = "," not in hosts if hosts else "TPU_SKIP_MDS_QUERY" in known or _only_host_of_its_slice()
        return not alone or "MEGASCALE_NUM_SLICES" in known
    # The script of a batch job also sees the number of tasks; only those that srun starts see a step.
    tasks = [known.get("SLURM_NTASKS", "1")] if "SLURM_STEP_NODELIST" in known else []
    return any(int(n) > 1 for n in [*tasks, known.get("OMPI_COMM_WORLD_SIZE", "1")])


def _only_host_of_its_slice() -> bool:
    """Whether the metadata server of a Cloud TPU machine names no other hosts, or there is no such server."""
    server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    said = {}
    for key in ("worker-network-endpoints", "tpu-env"):
        url = f"http://{server}/computeMetadata/v1/instance/attributes/{key}"
        asked = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
        try:
            with urllib.request.urlopen(asked, timeout=10) as answer:
                said[key] = answer.read().decode()
        except OSError:
            return True
    return "," not in said["worker-network-endpoints"] and "MEGASCALE_NUM_SLICES" not in said["tpu-env"]


def _initialize(arguments: dict[str, Any], where: str, timeout: int, warn_after: int, heartbeat: int) -> None:
    """Join, under timers of our own: where JAX gives up, it aborts the process with a stack trace."""
    awaited = "was the same command started on every host, and is the port open?"
    if arguments.get("process_id"):
        _await_coordinator(arguments["coordinator_address"], where, timeout)
    timers = [
        threading.Timer(warn_after, log.warning, ("still waiting for the other processes at %s: %s", where, awaited)),
        threading.Timer(timeout, _give_up, (where, timeout, awaited)),
    ]
    for timer in timers:
        timer.daemon = True
        timer.start()
    try:
        jax.distributed.initialize(
            **arguments, initialization_timeout=timeout + 60, heartbeat_timeout_seconds=heartbeat
        )
    except (RuntimeError, ValueError, ImportError, OSError) as error:  # the latter two from asking a metadata server
        raise BadInput("jax.distributed", where, str(error).splitlines()[0], awaited) from None
    finally:
        for timer in timers:
            timer.cancel()
    if jax.distributed.is_initialized():
        _Ending(heartbeat).install()


def _await_coordinator(address: str, where: str, timeout: int) -> None:
    """Wait until something listens at the coordinator's address."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise BadInput("JAX_COORDINATOR_ADDRESS", address, "is no address", "host:port of process 0")
    deadline = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                why = f"process 0 did not answer within {timeout} s ({error})"
                raise BadInput("JAX_COORDINATOR_ADDRESS", where, why, "start process 0 there; open the port") from None
            time.sleep(0.2)


def _give_up(where: str, timeout: int, awaited: str) -> None:
    log.critical("%s", BadInput("jax.distributed", where, f"not all processes joined within {timeout} s", awaited))
    os._exit(2)  # the main thread waits inside JAX and cannot be interrupted


# The end ------------------------------------------------------------------------------------------------


def leave(code: int) -> None:
    """Say that this process is about to end with an exit code other than 0, for a reason of its own.

    JAX lets a process end together with all others, and they may wait for this one in a collective: after a heartbeat
    it ends without them. Does nothing in a job of one process.
    """
    if _Ending.current is not None:
        _Ending.current.leave(code)


def broken_connection(error: BaseException | None) -> str:
    """What an error, or one that led to it, says of the connection to the other processes; empty if nothing."""
    while error is not None and jax.distributed.is_initialized():
        if BROKEN.search(str(error)):
            return " ".join(str(error).splitlines()[0].split())[:200]
        error = error.__cause__ or error.__context__
    return ""


class _Ending:
    """How this process of a job ends.

    When JAX's service finds another process dead, or is itself gone, JAX logs a stack trace and calls `abort` in a
    thread of its own, whatever the main thread waits for; a callback of Python cannot be given to it (it is called
    with a status that has no form in Python). So the signal of `abort` is handled, in C since a handler of Python
    would wait for the main thread, and that log is turned off.
    """

    current: _Ending | None = None

    def __init__(self, heartbeat: int):
        self.heartbeat = heartbeat
        self.code: int | None = None
        self.told = threading.Lock()

    def install(self) -> None:
        _Ending.current = self
        if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") != "0":  # JAX sets 1 where the user sets none
            jaxlib_utils.absl_set_min_log_level(4)
        self.before, sys.excepthook = sys.excepthook, self._uncaught
        self.handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._aborted)  # kept, or C would call freed memory
        ctypes.CDLL(None).signal(signal.SIGABRT, self.handler)

    def leave(self, code: int) -> None:
        if self.code is None:
            self.code = code
            timer = threading.Timer(self.heartbeat, os._exit, (code,))
            timer.daemon = True
            timer.start()

    def _aborted(self, number: int) -> None:
        """Called in the thread of JAX that ends the process."""
        if self.code is not None:
            os._exit(self.code)
        self._lost(
            f"another process was killed or did not answer for {self.heartbeat} s, or JAX failed "
            "(TF_CPP_MIN_LOG_LEVEL=0 shows its own report)"
        )

    def _uncaught(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """In place of `sys.excepthook`."""
        if broken := broken_connection(error):
            self._lost(f"another process was killed or failed ({broken})")
        self.before(kind, error, trace)
        self.leave(130 if issubclass(kind, KeyboardInterrupt) else 1)

    def _lost(self, why: str) -> None:
        """Ends the process; of several threads that come here the first one speaks."""
        if not self.told.acquire(blocking=False):
            threading.Event().wait()
        os.write(2, f"this process ends: {why}; start the job again to go on\n".encode())
        os._exit(LOST)
