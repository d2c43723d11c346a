"""Pretrain a small model on real text, watch it fail beyond its context, extend it, and find needles there.

    python -m experiments.quickstart

Takes a few minutes on 2 CPU cores and needs no download. Writes into --out: report.md, loss.png, needle.png,
perplexity.png, results.jsonl and the checkpoints of all runs.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

from absl import flags

from configs import quickstart as recipe
from experiments import cli
from jaxlong import run
from jaxlong.config import Experiment
from jaxlong.core.position import NTK, PI, Yarn
from jaxlong.core.types import BadInput
from jaxlong.evals import report
from jaxlong.model import extend
from jaxlong.run import Results
from jaxlong.train.checkpoint import check_workdir

FLAGS = flags.FlagValues()
flags.DEFINE_string("out", "runs/quickstart", "folder of the results; must be empty or new", flag_values=FLAGS)

LENGTH, LONG = recipe.LENGTH, 4 * recipe.LENGTH
METHODS = {
    "plain RoPE": None,
    "PI": PI(factor=4.0),
    "NTK": NTK(factor=4.0),
    "YaRN": Yarn(factor=4.0, original=LENGTH, beta_fast=8.0),
}
# share of the whole time that each kind of stage takes, to tell how much is left
SHARES = {"pretrain": 40.0, "zero-shot": 6.0, "tune": 5.0, "tuned": 2.5}


class Clock:
    """Names each stage with its number and the time left in all, from the shares of the stages done."""

    def __init__(self, kinds: list[str]):
        self.kinds, self.done, self.started = kinds, 0, time.monotonic()

    def next(self, name: str) -> str:
        before = sum(SHARES[kind] for kind in self.kinds[: self.done])
        ahead = sum(SHARES[kind] for kind in self.kinds[self.done :])
        left = f", about {(time.monotonic() - self.started) / before * ahead:.0f} s left in all" if before else ""
        self.done += 1
        return f"[{self.done}/{len(self.kinds)}{left}] {name}"


def main(overrides) -> None:
    if overrides:
        raise BadInput(
            f"config.{overrides[0][0]}", overrides[0][1], "quickstart takes no overrides", "experiments.pretrain"
        )
    out, started = Path(FLAGS.out), time.monotonic()
    check_workdir(out)
    if out.exists() and any(out.iterdir()):
        raise BadInput("out", out, "is not empty", "a new folder, or remove it")
    base = recipe.config()
    cli.show(base)

    clock = Clock(["pretrain", *["zero-shot"] * len(METHODS), *["tune", "tuned"] * len(METHODS)])
    params = run.train(base, out / "pretrain", title=clock.next("pretrain"))
    results = Results.empty()
    for method, scaling in METHODS.items():
        model = base.model if scaling is None else extend(base.model, scaling)
        results += assess(replace(base, model=model), params, clock, method, "zero-shot")
    for method, scaling in METHODS.items():
        longer = recipe.tuning(scaling)
        folder = out / f"tuned-{method.split()[0].lower()}"
        tuned = run.train(longer, folder, params=params, title=clock.next(f"tune {method}"))
        results += assess(longer, tuned, clock, method, "tuned")
    results.save(out / "results.jsonl")
    text = write(results, base, out, time.monotonic() - started)
    sys.stdout.write(f"\n{text}\nwritten to {out}\n")


def assess(experiment: Experiment, params, clock: Clock, method: str, when: str) -> Results:
    title = clock.next(f"evaluate {method}, {when}")
    return run.assess(experiment, params, name=f"{method}, {when}", tokens=8192, progress=cli.progress(title))


def write(results: Results, base: Experiment, out: Path, seconds: float) -> str:
    """Figures and report, all views of the results; returns the report."""
    names = [f"{method}, {when}" for when in ("zero-shot", "tuned") for method in METHODS]
    tables = {name: results.samples.where(lambda r, name=name: r.model == name) for name in names}
    losses = {name: [loss for loss in results.losses if loss.model == name] for name in names}
    before, after = "plain RoPE, zero-shot", "YaRN, tuned"

    report.save(report.loss_curve(curves(out, base.train.steps), title="Training loss"), out / "loss.png")
    panels = {"before: plain RoPE": tables[before], "after: YaRN and 20 steps of tuning": tables[after]}
    report.save(report.heat_maps(panels, trained=LENGTH, title="Needles found"), out / "needle.png")
    report.save(
        report.perplexity_by_window(losses, trained=LENGTH, title="Held-out perplexity"), out / "perplexity.png"
    )

    checks = verdicts(tables, losses)
    text = "\n".join(
        [
            "# Quickstart\n",
            f"{run.count_params(base.model):,} parameters, pretrained at {LENGTH} tokens on the standard library's"
            f" source, extended to {LONG}. {seconds:.0f} s in all.\n",
            report.markdown_table(["figure", "measured", "wanted", ""], [[*map(str, check)] for check in checks]),
            'Needle accuracy in percent, by length in tokens; "far" counts needles farther than'
            f" {LENGTH} tokens from the question. Perplexity of held-out text, by window.\n",
            comparison(tables, losses),
            "![needles found](needle.png)\n",
            "![perplexity](perplexity.png) ![loss](loss.png)\n",
            f"Corpus: {base.data.mixture[0].identity()['source']}\n",
        ]
    )
    (out / "report.md").write_text(text)
    return text


def verdicts(tables, losses) -> list[tuple[str, str, str, str]]:
    """(figure, measured, wanted, met or MISSED) for everything that this run promises."""
    inside = lambda name: tables[name].where(lambda r: r.length <= LENGTH).overall()
    far = lambda name: tables[name].where(lambda r: r.length == LONG and r.distance > LENGTH).overall()
    ppl = lambda name: next(loss.perplexity for loss in losses[name] if loss.window == LENGTH)
    change = ppl("YaRN, tuned") / ppl("plain RoPE, zero-shot") - 1
    rows = [
        (f"needles within {LENGTH}, plain RoPE", inside("plain RoPE, zero-shot"), ">= 90 %", lambda x: x >= 0.9),
        (f"needles within {LENGTH}, YaRN tuned", inside("YaRN, tuned"), ">= 90 %", lambda x: x >= 0.9),
        (f"far needles at {LONG}, plain RoPE", far("plain RoPE, zero-shot"), "<= 10 %", lambda x: x <= 0.1),
        (f"far needles at {LONG}, plain RoPE tuned", far("plain RoPE, tuned"), "<= 10 %", lambda x: x <= 0.1),
        (f"far needles at {LONG}, YaRN tuned", far("YaRN, tuned"), ">= 85 %", lambda x: x >= 0.85),
    ]
    told = [
        (figure, f"{100 * e.mean:.1f} % of {e.samples}", wanted, "met" if holds(e.mean) else "MISSED")
        for figure, e, wanted, holds in rows
    ]
    met = "met" if change <= 0.05 else "MISSED"
    return [*told, (f"perplexity within {LENGTH}, YaRN tuned against before", f"{100 * change:+.1f} %", "<= +5 %", met)]


def comparison(tables, losses) -> str:
    """The table of methods, before and after tuning."""
    lengths = sorted({record.length for table in tables.values() for record in table.records})
    rows = []
    for name, table in tables.items():
        accuracy = [f"{100 * estimate.mean:.0f}" for estimate in table.by_length().values()]
        far = table.where(lambda r: r.length == LONG and r.distance > LENGTH).overall()
        found = {loss.window: f"{loss.perplexity:.2f}" for loss in losses[name]}
        rows.append([name, *accuracy, f"{100 * far.mean:.0f}", found[LENGTH], found[LONG]])
    return report.markdown_table(["method", *map(str, lengths), f"{LONG} far", f"ppl {LENGTH}", f"ppl {LONG}"], rows)


def curves(out: Path, pretrained: int) -> list[report.Curve]:
    """The loss of every run, from its metrics; tuning goes on where pretraining ended."""
    found = []
    for path in sorted(out.glob("*/metrics.jsonl")):
        name, lines = path.parent.name, [json.loads(line) for line in path.read_text().splitlines()]
        first = 0 if name == "pretrain" else pretrained
        found.append(report.Curve(name, [first + line["step"] for line in lines], [line["nll"] for line in lines]))
    return found


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS))
