"""The loop: what hooks are told and when, resuming their files, and every way to end."""

from __future__ import annotations

import json
import logging
import signal
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train_toy as toy

from jaxlong.core.types import BadInput
from jaxlong.train import throughput
from jaxlong.train.hooks import Every, JsonLines, Profile, Progress, TensorBoard
from jaxlong.train.loop import Diverged, Hook, Stopped, fit
from jaxlong.train.state import TrainState
from jaxlong.train.throughput import Throughput, peak_flops


@jax.jit
def count(state, batch):
    """A step that costs nothing: the loss is the step's number, as is the parameter."""
    step = state.step + 1
    after = TrainState(step, {"w": step * jnp.ones(3)}, (), state.skipped, state.streak)
    return after, {"loss": step.astype(jnp.float32), "weight": batch.loss_weights.sum()}


def fresh(step: int = 0) -> TrainState:
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero + step, {"w": jnp.ones(3)}, (), zero, zero)


class Recorder(Hook):
    def __init__(self, every: int = 10**9):
        self.every, self.calls = every, []

    def begin(self, step, steps):
        self.calls.append(("begin", step, steps))

    def metrics(self, step, values):
        assert values["loss"] == step
        self.calls.append(("metrics", step))

    def wants(self, step):
        return step % self.every == 0

    def state(self, step, state):
        assert int(state.step) == step
        self.calls.append(("state", step))

    def finish(self, step, state):
        assert int(state.step) == step
        self.calls.append(("finish", step))

    def close(self):
        self.calls.append(("close",))


def test_each_hook_sees_each_step_once_and_in_order():
    hook, batches = Recorder(every=3), toy.Batches()
    state = fit(fresh(), count, batches, steps=7, hooks=(hook,))
    assert int(state.step) == 7
    assert batches.index == 7  # none taken beyond the last step
    told = [call for call in hook.calls if call[0] != "state"]
    assert told == [("begin", 0, 7), *(("metrics", n) for n in range(1, 8)), ("finish", 7), ("close",)]
    for n in (3, 6):  # numbers up to the step whose state is handed out come first
        assert hook.calls.index(("state", n)) == hook.calls.index(("metrics", n)) + 1


def test_numbers_come_one_step_late():
    """The host asks for a step's numbers only when the next step is under way."""
    order = []

    class Watch(Hook):
        def metrics(self, step, values):
            order.append(f"told {step}")

    def step(state, batch):
        order.append(f"start {int(state.step) + 1}")
        return count(state, batch)

    fit(fresh(), step, toy.Batches(), steps=3, hooks=(Watch(),))
    assert order == ["start 1", "start 2", "told 1", "start 3", "told 2", "told 3"]


def test_goes_on_from_the_states_step():
    hook, batches = Recorder(), toy.Batches()
    fit(fresh(5), count, batches, steps=8, hooks=(hook,))
    assert [call[1] for call in hook.calls if call[0] == "metrics"] == [6, 7, 8]
    assert batches.index == 3
    done = Recorder()
    fit(fresh(8), count, batches, steps=8, hooks=(done,))
    assert done.calls == [("begin", 8, 8), ("finish", 8), ("close",)]
    assert batches.index == 3


def test_hooks_are_closed_after_an_error():
    def broken(state, batch):
        raise ZeroDivisionError

    hook = Recorder()
    with pytest.raises(ZeroDivisionError):
        fit(fresh(), broken, toy.Batches(), steps=3, hooks=(hook,))
    assert hook.calls == [("begin", 0, 3), ("close",)]


def test_batches_that_end_too_early():
    hook = Recorder()
    batches = [toy.rows(0, index) for index in range(4)]
    with pytest.raises(BadInput, match=r"^train.steps: 9: the batches end after step 4; 4 or fewer$"):
        fit(fresh(), count, batches, steps=9, hooks=(hook,))
    assert hook.calls[-3:] == [("metrics", 4), ("finish", 4), ("close",)]


class Terminate(Hook):
    """Sends SIGTERM to this process after a step."""

    def __init__(self, step: int):
        self.at = step

    def wants(self, step):
        return step == self.at

    def state(self, step, state):
        signal.raise_signal(signal.SIGTERM)


def test_sigterm_ends_in_order():
    before = signal.getsignal(signal.SIGTERM)
    hook, batches = Recorder(), toy.Batches()
    with pytest.raises(Stopped) as stopped:
        fit(fresh(), count, batches, steps=100, hooks=(Terminate(4), hook))
    assert stopped.value.code == 0
    assert stopped.value.step == int(stopped.value.state.step) == batches.index == 4
    assert hook.calls[-3:] == [("metrics", 4), ("finish", 4), ("close",)]
    assert signal.getsignal(signal.SIGTERM) is before


def test_outside_the_main_thread_signals_are_left_alone():
    before, ended = signal.getsignal(signal.SIGTERM), []

    class Look(Hook):
        def state(self, step, state):
            ended.append(signal.getsignal(signal.SIGTERM) is before)

        def wants(self, step):
            return True

    thread = threading.Thread(target=fit, args=(fresh(), count, toy.Batches()), kwargs={"steps": 2, "hooks": (Look(),)})
    thread.start()
    thread.join()
    assert ended == [True, True]


def spoil(bad):
    """A toy step whose loss is NaN at the steps in `bad`."""

    def step(state, batch):
        number = int(state.step) + 1
        if number in bad:
            batch = batch._replace(loss_weights=np.full_like(batch.loss_weights, np.nan))
        return toy.jitted_step()(state, batch)

    return step


def test_gives_up_after_a_streak(caplog):
    state, _ = toy.placed_state(toy.make_mesh(1))
    hook = JsonLinesInMemory()
    with caplog.at_level(logging.WARNING), pytest.raises(Diverged) as error:
        fit(state, spoil(range(3, 99)), toy.Batches(), steps=50, hooks=(hook,), patience=4)
    assert str(error.value) == "step 6: the last 4 steps were skipped; loss is not finite"
    assert [record.message for record in caplog.records] == ["step 3 is skipped: loss is not finite"]
    assert [line["skipped"] for line in hook.lines] == [0, 0, 1, 2, 3, 4]


def test_single_bad_steps_go_on(caplog):
    state, _ = toy.placed_state(toy.make_mesh(1))
    with caplog.at_level(logging.WARNING):
        state = fit(state, spoil({2, 5, 6}), toy.Batches(), steps=8, patience=3)
    assert (int(state.step), int(state.skipped), int(state.streak)) == (8, 3, 0)
    assert [record.message[:6] for record in caplog.records] == ["step 2", "step 5"]


class JsonLinesInMemory(Hook):
    def __init__(self):
        self.lines = []

    def metrics(self, step, values):
        self.lines.append(values)


# Files --------------------------------------------------------------------------------------------------


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_json_lines(tmp_path):
    path = tmp_path / "sub" / "metrics.jsonl"
    fit(fresh(), count, toy.Batches(), steps=10, hooks=(JsonLines(path, every=4),))
    assert [(line["step"], line["loss"]) for line in lines(path)] == [(4, 4), (8, 8), (10, 10)]
    assert {"weight", "tokens_per_second", "seconds_per_step"} <= lines(path)[0].keys()
    assert "mfu" not in lines(path)[0]  # a CPU's peak is not known


def test_json_lines_after_a_restart(tmp_path):
    """Later lines and one that was cut off go; each step stands there once, whatever was lost."""
    path = tmp_path / "metrics.jsonl"
    fit(fresh(), count, toy.Batches(), steps=9, hooks=(JsonLines(path),))
    whole = [line["loss"] for line in lines(path)]
    with path.open("a") as file:
        file.write('{"step": 3, "lo')
    fit(fresh(6), count, toy.Batches(), steps=9, hooks=(JsonLines(path),))
    assert [line["loss"] for line in lines(path)] == whole == list(range(1, 10))
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_json_lines_of_numbers_that_json_lacks(tmp_path):
    sink = JsonLines(tmp_path / "m.jsonl")
    sink.begin(0, 1)
    sink.write(1, {"loss": float("nan"), "grad_norm": float("inf"), "weight": 2.0})
    sink.close()
    assert lines(tmp_path / "m.jsonl") == [{"step": 1, "loss": None, "grad_norm": None, "weight": 2.0}]


def test_every_and_its_sinks(tmp_path):
    sink = JsonLines(tmp_path / "m.jsonl", every=100)
    called = []

    def evaluate(step, state):
        called.append(step)
        return {"heldout": float(state.params["w"][0])} if step < 6 else None

    fit(fresh(), count, toy.Batches(), steps=7, hooks=(sink, Every(2, evaluate, (sink,))))
    assert called == [2, 4, 6]
    assert lines(tmp_path / "m.jsonl")[:2] == [{"step": 2, "heldout": 2.0}, {"step": 4, "heldout": 4.0}]
    with pytest.raises(BadInput):
        Every(0, evaluate)


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboardX")
    fit(fresh(), count, toy.Batches(), steps=5, hooks=(TensorBoard(tmp_path / "tb", every=2),))
    events = list((tmp_path / "tb").glob("events*"))
    assert len(events) == 1
    assert events[0].read_bytes().count(b"loss") == 2


def test_tensorboard_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(BadInput, match=r"^train.tensorboard: True: needs tensorboardX; pip install "):
        TensorBoard(tmp_path)


def test_progress_in_plain_lines(capsys):
    fit(fresh(), count, toy.Batches(), steps=30, hooks=(Progress("tiny"),))
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "tiny 1/30  loss 1.0000"
    assert told[-1].startswith("tiny 30/30  loss 30.0000  ") and told[-1].endswith(" tokens/s  0:00 left")
    assert len(told) == 2


def test_progress_bar(capsys, monkeypatch):
    """On a terminal: one bar, which ends full."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    fit(fresh(), count, toy.Batches(), steps=30, hooks=(Progress("tiny"),))
    told = capsys.readouterr().err
    assert "30/30" in told and "loss 30.0000" in told and "━" in told


def test_profile(tmp_path):
    fit(fresh(), count, toy.Batches(), steps=6, hooks=(Profile(tmp_path, 3, 4),))
    assert list(tmp_path.glob("**/*.xplane.pb"))
    with pytest.raises(BadInput, match=r"^train.profile: \(5, 4\): is no window of steps; "):
        Profile(tmp_path, 5, 4)


def test_profile_that_the_run_ends_before(tmp_path):
    fit(fresh(), count, toy.Batches(), steps=2, hooks=(Profile(tmp_path, 1, 90),))
    assert list(tmp_path.glob("**/*.xplane.pb"))
    fit(fresh(7), count, toy.Batches(), steps=9, hooks=(Profile(tmp_path / "late", 3, 4),))
    assert not (tmp_path / "late").exists()


# Speed --------------------------------------------------------------------------------------------------


def test_throughput(monkeypatch):
    monkeypatch.setattr(throughput, "peak_flops", lambda kind: 1e12)
    speed = Throughput(flops_per_token=2e9)
    assert speed.arrived(100, now=10.0) == {}  # the first step compiles
    values = speed.arrived(300, now=10.5)
    assert values["tokens_per_second"] == 600
    assert values["seconds_per_step"] == 0.5
    np.testing.assert_allclose(values["mfu"], 600 * 2e9 / (8 * 1e12))
    for n in range(100):
        values = speed.arrived(50, now=11.0 + n)
    assert values["tokens_per_second"] == 50  # only the last steps count


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("cpu", None),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA L4", 121e12),
        ("Tesla T4", 65e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA GeForce RTX 3060", None),
    ],
)
def test_peak_flops(kind, peak):
    assert peak_flops(kind) == peak
