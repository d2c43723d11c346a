"""An experiment turned into calls of the library: what the scripts and notebooks share."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlong.config import Experiment, from_data, resolved, to_data, validate
from jaxlong.core.types import BadInput, Batch
from jaxlong.data import Batches, Data, batches
from jaxlong.evals import Loss, Table, evaluate, loss_by_position, perplexity, report
from jaxlong.evals.perplexity import save_losses
from jaxlong.inference import Runner
from jaxlong.model import LM, init_params, logical_axes
from jaxlong.parallel.layout import permute
from jaxlong.parallel.manual import sequence_devices
from jaxlong.parallel.mesh import make_mesh, partition, row_share, shard_batch
from jaxlong.train.checkpoint import Store, check_workdir, load_params, open_checkpoint, stored_config
from jaxlong.train.grads import accumulated
from jaxlong.train.hooks import Checkpoints, JsonLines, Profile, Progress, TensorBoard
from jaxlong.train.loop import Hook, fit
from jaxlong.train.optim import learning_rate, make_optimizer
from jaxlong.train.state import TrainState, abstract_state, leaf_name, state_shardings
from jaxlong.train.step import Step, make_step

log = logging.getLogger(__name__)

MAY_CHANGE = frozenset(
    {"mesh", "sequence", "layout", "evaluation", "data.threads"}
    | {f"train.{name}" for name in ("steps", "log_every", "save_every", "keep", "tensorboard", "profile")}
)
"""Fields that a run may be continued with other values of."""


class Loaded(NamedTuple):
    """An experiment and its trained parameters, as a checkpoint holds them."""

    experiment: Experiment
    params: Any
    step: int


def train(
    experiment: Experiment,
    workdir: str | Path,
    *,
    params: Any = None,
    hooks: Sequence[Hook] = (),
    title: str = "train",
) -> Any:
    """Train in a run folder, or go on where its newest verified checkpoint ends; returns the parameters.

    The folder gets `experiment.json`, `metrics.jsonl` and checkpoints.

    Args:
        params: parameters to begin with (a fresh folder only); None draws them from the experiment's seed.
        hooks: called after the built-in ones.
        title: shown beside the progress.

    Raises:
        BadInput: before compilation, for anything about the experiment or the folder that cannot work.
    """
    stored, sizes = to_data(experiment), check(experiment, workdir, params)
    experiment = resolved(experiment, sizes)
    model, recipe = experiment.model, experiment.train
    mesh = make_mesh(experiment.mesh)
    share = row_share(mesh.devices, jax.process_index())
    stream = batches(experiment.data, seed=experiment.seed, share=share.index, shares=share.count)
    step, create = program(experiment)
    with jax.set_mesh(mesh):
        target = sharded_state(experiment, mesh)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, target)
        store = Store(workdir, config=stored, keep=recipe.keep)
        restored = store.restore(target)
        if restored is not None:
            state = restored.state
            stream.set_state(restored.data)
            log.info("%s goes on at step %d", workdir, restored.step)
        elif params is None:
            fresh = jax.jit(lambda key: create(init_params(model, key)), out_shardings=shardings)
            state = fresh(jax.random.key(experiment.seed))
        else:
            state = jax.jit(create, out_shardings=shardings)(jax.tree.map(np.asarray, params))
        compiled = jitted(step, shardings)
        try:
            state = fit(
                state,
                compiled,
                (shard_batch(laid_out(batch, experiment.layout, sizes), mesh) for batch in stream),
                steps=recipe.steps,
                hooks=[*_hooks(experiment, Path(workdir), title), *hooks, _checkpoints(experiment, store, stream)],
                flops_per_token=flops_per_token(model, experiment.data.length),
            )
        finally:
            stream.close()
    return state.params


class Program(NamedTuple):
    """The training step of an experiment, and the state that it makes of parameters."""

    step: Step
    create: Callable[[Any], TrainState]


def program(experiment: Experiment) -> Program:
    """What `train` repeats, as functions."""
    model, recipe = experiment.model, experiment.train
    tx = make_optimizer(
        recipe.optimizer, recipe.schedule, steps=recipe.steps, clip=recipe.clip, axes=logical_axes(model)
    )
    weights = {"z_loss": recipe.z_loss, "mtp_weight": recipe.mtp_weight}
    grad_fn = recipe.gradient.of(model, loss_chunk=recipe.loss_chunk, seed=experiment.seed, **weights)
    rate = learning_rate(recipe.schedule, recipe.steps)
    step = make_step(accumulated(grad_fn, recipe.accumulation), tx, learning_rate=rate)
    return Program(step, lambda params: TrainState.create(params, tx))


def sharded_state(experiment: Experiment, mesh: Mesh | AbstractMesh) -> TrainState:
    """Shapes, dtypes and shardings of the state of training on a mesh."""
    model = experiment.model
    abstract = jax.eval_shape(lambda: program(experiment).create(init_params(model, jax.random.key(0))))
    return abstract_state(abstract, state_shardings(abstract, param_shardings(model, mesh), NamedSharding(mesh, P())))


def jitted(step: Step, shardings: TrainState) -> Any:
    """The step as one program: it takes the place of its state in memory."""
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def laid_out(batch: Batch, layout: str, sizes: Mapping[str, int]) -> Batch:
    """Rows of text in the order of a layout on the sequence axes of a mesh; positions and segments go with them."""
    return jax.tree.map(lambda rows: permute(rows, layout, sequence_devices(sizes)), batch)


def check(experiment: Experiment, workdir: str | Path, params: Any = None) -> dict[str, int]:
    """All that `train` checks before it reads data; returns the mesh's sizes. Raises BadInput; changes nothing."""
    sizes = validate(experiment, jax.device_count())
    check_resumable(experiment, workdir)
    if params is not None:
        check_params(experiment.model, params)
    return sizes


def check_params(model: LM, params: Any) -> None:
    """Refuse parameters that are not the model's, by the first leaf that differs."""
    wanted = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    shapes = lambda tree: {leaf_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    here, there = shapes(wanted), shapes(params)
    for name in sorted(here.keys() | there.keys()):
        if here.get(name) != there.get(name):
            why = f"the parameters given have {there.get(name, 'none')}"
            raise BadInput(f"model.{name}", here.get(name, "none"), why, "the architecture that was trained")


def _hooks(experiment: Experiment, workdir: Path, title: str) -> Iterator[Hook]:
    recipe = experiment.train
    yield Progress(title)
    yield JsonLines(workdir / "metrics.jsonl", every=recipe.log_every)
    if recipe.tensorboard:
        yield TensorBoard(workdir / "tensorboard", every=recipe.log_every)
    if recipe.profile is not None:
        yield Profile(workdir / "profile", *recipe.profile)


def _checkpoints(experiment: Experiment, store: Store, stream: Batches) -> Hook:
    return Checkpoints(store, every=experiment.train.save_every, data=stream)


def check_resumable(experiment: Experiment, workdir: str | Path) -> None:
    """Refuse a run folder that cannot be written or that holds another experiment; changes nothing."""
    check_workdir(workdir)
    stored = stored_config(workdir)
    if stored is None:
        return
    there, here = flat(to_data(from_data(stored))), flat(to_data(experiment))  # fields that it lacks have defaults
    for name in sorted(there.keys() | here.keys()):
        old, new = there.get(name, "absent"), here.get(name, "absent")
        if old != new and not _may_change(name):
            why = f"holds another experiment: {name} is {old} there, {new} here"
            raise BadInput("workdir", workdir, why, "another folder, or the same values")


def _may_change(name: str) -> bool:
    return any(name == field or name.startswith(field + ".") for field in MAY_CHANGE)


def flat(data: Any, prefix: str = "") -> dict[str, Any]:
    """Stored configuration data by dotted path: {"model.width": 64, ...}; types stand under the path itself."""
    if isinstance(data, dict):
        out = {prefix: data["type"]} if prefix else {}
        for name, item in data.items():
            if name != "type":
                out |= flat(item, f"{prefix}.{name}" if prefix else name)
        return out
    if isinstance(data, (list, tuple)) and any(isinstance(item, (dict, list, tuple)) for item in data):
        out = {}
        for i, item in enumerate(data):
            out |= flat(item, f"{prefix}.{i}")
        return out
    return {prefix: data}


def param_shardings(model: LM, mesh: Mesh | AbstractMesh) -> Any:
    """A NamedSharding for each parameter, from its logical axes."""
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    place = lambda names, leaf: NamedSharding(mesh, partition(tuple(names), leaf.shape, mesh))
    return jax.tree.map(place, logical_axes(model), shapes, is_leaf=lambda node: isinstance(node, P))


def flops_per_token(model: LM, length: int) -> float:
    """Training flops a token: 6 a parameter in use (the embedding's rows are looked up) and 3 times what mixers add."""
    count = count_params(model) - (0 if model.tied else model.vocab * model.width)
    idle = sum(mlp.idle_params(model.width) for _, mlp in model.blocks if hasattr(mlp, "idle_params"))
    mixing = sum(part.mixing_flops(length) for block in model.blocks for part in block if hasattr(part, "mixing_flops"))
    return 6.0 * (count - idle) + 3.0 * mixing


def load(path: str | Path) -> Loaded:
    """The experiment and parameters of a run folder or a step folder, on one device.

    Raises:
        BadInput: no checkpoint there, or none that is whole.
    """
    opened = open_checkpoint(path)
    experiment = from_data(opened.config)
    if not isinstance(experiment, Experiment):
        raise BadInput("from", path, "holds no experiment", "a folder that pretrain or extend wrote")
    shapes = jax.eval_shape(lambda: init_params(experiment.model, jax.random.key(0)))
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), shapes)
    restored = load_params(path, target)
    return Loaded(experiment, restored.state, restored.step)


class Results(NamedTuple):
    """What an evaluation measured: samples of tasks, perplexity by window, loss by position."""

    samples: Table
    losses: list[Loss]
    positions: list[Loss]

    @classmethod
    def empty(cls) -> Results:
        return cls(Table(), [], [])

    def save(self, path: Path) -> None:
        """Add every record to the JSON lines at `path`."""
        self.samples.save(path)
        save_losses([*self.losses, *self.positions], path)

    def __add__(self, other: Results) -> Results:  # type: ignore[override]
        return Results(self.samples + other.samples, self.losses + other.losses, self.positions + other.positions)


def assess(
    experiment: Experiment,
    params: Any,
    *,
    name: str = "",
    tokens: int = 65536,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Results:
    """Run an experiment's evaluation: its tasks at its lengths, and the loss of its text at windows of those lengths.

    Args:
        name: of the model, carried by every record.
        tokens: of text to score, from the first documents that are as long as the longest window.
        progress: called with (samples done, samples in all).
    """
    check_params(experiment.model, params)
    plan, data = experiment.evaluation, experiment.data
    longest = max(plan.lengths, default=data.length)
    runner = Runner(experiment.model, params, data.tokenizer, bucket=min(longest, 512), max_batch=64)
    table = Table()
    if plan.tasks:
        table = evaluate(
            runner, plan.tasks, plan.lengths, samples=plan.samples, seed=seed, model=name, progress=progress
        )
    losses, positions = [], []
    if plan.text is not None:
        documents = long_documents(data, plan.text, length=longest, tokens=tokens)
        for window in plan.lengths:
            stride = min(plan.stride, window - 1)
            losses.append(perplexity(runner, documents, window=window, stride=stride, batch=32, model=name))
        positions = loss_by_position(runner, documents, length=longest, batch=32, model=name)
    return Results(table, losses, positions)


def long_documents(data: Data, source: Sequence[str], *, length: int, tokens: int) -> list[np.ndarray]:
    """Documents of at least `length` tokens, cut to four lengths each, until they hold `tokens` tokens.

    Raises:
        BadInput: no document is so long.
    """
    documents: list[np.ndarray] = []
    for text in source:
        if sum(map(len, documents)) >= tokens:
            break
        ids = np.asarray(data.tokenizer.encode(text[: 32 * length]), np.int32)[: 4 * length]
        if len(ids) >= length:
            documents.append(ids)
    if not documents:
        raise BadInput(
            "evaluation.lengths", length, "no document of the text is so long", "shorter lengths, or longer text"
        )
    return documents


def write_report(results: Results, out: Path, *, trained: int) -> None:
    """Write results.jsonl, report.md and figures into a folder; the latter are views of the former."""
    (out / "results.jsonl").unlink(missing_ok=True)
    results.save(out / "results.jsonl")
    parts = ["# Evaluation\n"]
    if len(results.samples):
        parts += [
            "Accuracy in percent, with 95 % intervals, by length in tokens.\n",
            report.accuracy_markdown({"": results.samples}),
        ]
        if any(record.depth is not None for record in results.samples.records):
            report.save(report.heat_maps({"": results.samples}, trained=trained), out / "needle.png")
            parts.append("![accuracy by length and depth](needle.png)\n")
    if results.losses:
        rows = [[loss.window, loss.stride, f"{loss.perplexity:.3f}", loss.tokens] for loss in results.losses]
        parts += [
            "Sliding-window perplexity.\n",
            report.markdown_table(["window", "stride", "perplexity", "tokens"], rows),
        ]
        report.save(report.perplexity_by_window({"": results.losses}, trained=trained), out / "perplexity.png")
        report.save(report.loss_by_position({"": results.positions}, trained=trained), out / "position.png")
        parts.append("![perplexity by window](perplexity.png) ![loss by position](position.png)\n")
    (out / "report.md").write_text("\n".join(parts))


def count_params(model: LM) -> int:
    """Number of parameters."""
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    return sum(int(leaf.size) for leaf in jax.tree.leaves(shapes))
