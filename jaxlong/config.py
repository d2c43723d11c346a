"""Experiments as values: built by a Python file, overridden by dotted paths, stored as data.

`load` runs a configuration file of the user's own. What a checkpoint stores is JSON of registered names
and fields; `from_data` and `override` build only what `REGISTRY` names, and never run code.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib.util
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxlong.core import mask, position
from jaxlong.core.types import BadInput
from jaxlong.data import MQAR, SOURCES, TOKENIZERS, Data, Packed, Samples
from jaxlong.evals import TASKS
from jaxlong.layers.mlp import FEED_FORWARDS
from jaxlong.layers.moe import MIXTURES
from jaxlong.mixers import MIXERS
from jaxlong.model import LM, Layer, balanced_layout, distributed, parts
from jaxlong.ops.attend import SEQUENCES, Backend
from jaxlong.parallel.layout import LAYOUTS
from jaxlong.parallel.layout import parts as layout_parts
from jaxlong.parallel.manual import sequence_devices
from jaxlong.parallel.mesh import parse_mesh
from jaxlong.train.chunked import GRADIENTS, SAMPLINGS
from jaxlong.train.grads import Gradient, Whole
from jaxlong.train.optim import OPTIMIZERS, SCHEDULES, AdamW, Cosine, Optimizer, Schedule


@dataclass(frozen=True)
class Train:
    """How to train.

    Fields:
        gradient: how gradients are taken: `Whole`, or in chunks of the row (`jaxlong.train.chunked`).
        steps: optimizer steps.    accumulation: micro-batches a step.    clip: global gradient norm; 0 is none.
        z_loss: weight of log(Z)^2.    mtp_weight: of multi-token prediction's loss, where the model has it.
        loss_chunk: tokens a row whose logits exist at once.
        log_every, save_every: steps between metric lines and checkpoints.    keep: checkpoints kept.
        tensorboard: also write TensorBoard events (extra [metrics]).
        profile: first and last step of a profiler window; None takes no profile.
    """

    steps: int = 1000
    optimizer: Optimizer = field(default_factory=AdamW)
    schedule: Schedule = field(default_factory=lambda: Cosine(peak=1e-3, warmup=50))
    gradient: Gradient = field(default_factory=Whole)
    clip: float = 1.0
    accumulation: int = 1
    z_loss: float = 0.0
    mtp_weight: float = 0.3
    loss_chunk: int = 1024
    log_every: int = 10
    save_every: int = 500
    keep: int = 2
    tensorboard: bool = False
    profile: tuple[int, int] | None = None


@dataclass(frozen=True)
class Evaluation:
    """What `experiments.evaluate` measures: tasks at lengths in tokens, and perplexity on `text`."""

    tasks: tuple[Any, ...] = ()
    lengths: tuple[int, ...] = ()
    samples: int = 100
    text: Any = None
    stride: int = 64


@dataclass(frozen=True)
class Experiment:
    """Everything that decides what a run computes.

    Fields:
        mesh: sizes of axes, as `jaxlong.parallel.mesh.make_mesh` reads them.
        sequence, layout: how devices of the sequence axes share keys, and in which order they hold a row's tokens,
            as in `jaxlong.ops.attend.Backend`, for all mixers. "auto" leaves the one to each mixer's backend, and
            takes for the other what `jaxlong.model.balanced_layout` says.
    """

    model: LM
    data: Data
    train: Train = Train()
    evaluation: Evaluation = Evaluation()
    mesh: str = "data=-1"
    sequence: str = "auto"
    layout: str = "auto"
    seed: int = 0


def _by_class_name(*classes: type) -> dict[str, type]:
    named = {cls.__name__: cls for cls in classes}
    assert len(named) == len(set(classes)), "two classes of one name"
    return named


REGISTRY: Mapping[str, type] = _by_class_name(
    Experiment, Train, Evaluation, Data, Packed, Samples, MQAR, LM, Layer, Backend,
    *MIXERS.values(), *FEED_FORWARDS.values(), *MIXTURES.values(), *mask.MASKS.values(),
    *position.POSITIONS.values(), *position.SCALINGS.values(),
    *SOURCES.values(), *TOKENIZERS.values(), *TASKS.values(), *OPTIMIZERS.values(), *SCHEDULES.values(),
    *GRADIENTS.values(), *SAMPLINGS.values(),
)  # fmt: skip
"""Every class that a stored or overridden configuration may name."""


def load(path: str, kind: type = Experiment) -> Any:
    """Run `config()` of a Python file. Raises BadInput if there is no such file or it makes no `kind`."""
    file = Path(path)
    if not file.is_file():
        near = difflib.get_close_matches(file.name, [f.name for f in file.parent.glob("*.py")], 1, 0.3)
        raise BadInput("config", path, "no such file", f"nearest: {file.parent / near[0]}" if near else "a Python file")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise BadInput("config", path, "is no Python file", f"configs/<name>.py with config() -> {kind.__name__}")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise BadInput("config", path, f"line {error.lineno}: {error.msg}", "valid Python") from None
    if not callable(getattr(module, "config", None)):
        raise BadInput("config", path, "has no function config()", f"def config() -> {kind.__name__}")
    made = module.config()
    if not isinstance(made, kind):
        raise BadInput("config", path, f"config() returned {type(made).__name__}", f"a value of {kind.__name__}")
    return made


# Data ---------------------------------------------------------------------------------------------------


def to_data(value: Any) -> Any:
    """JSON-able data of a configuration: {"type": name, field: value, ...}. The inverse of `from_data`."""
    if dataclasses.is_dataclass(value):
        return {"type": type(value).__name__} | {name: to_data(getattr(value, name)) for name in field_names(value)}
    if isinstance(value, (tuple, list)):
        return [to_data(item) for item in value]
    return value


def from_data(data: Any, path: str = "config") -> Any:
    """Build a configuration from its stored data. Raises BadInput for what is not registered or does not fit."""
    if isinstance(data, Mapping):
        kind, given = data.get("type"), {name: item for name, item in data.items() if name != "type"}
        return build(kind, {name: from_data(item, f"{path}.{name}") for name, item in given.items()}, path)
    if isinstance(data, list):
        return tuple(from_data(item, f"{path}.{i}") for i, item in enumerate(data))
    return data


def build(kind: Any, arguments: Mapping[str, Any], path: str) -> Any:
    """A registered class called with fields that are checked against their annotations."""
    if kind not in REGISTRY:
        raise BadInput(path, kind, "no such type", nearest(str(kind), REGISTRY))
    cls = REGISTRY[kind]
    for name, value in arguments.items():
        if name not in field_names(cls):
            raise BadInput(f"{path}.{name}", value, f"no such field of {kind}", nearest(name, field_names(cls)))
        hint = hints(cls)[name]
        if not fits(value, hint):
            raise BadInput(f"{path}.{name}", value, f"not of type {describe_type(hint)}", describe_type(hint))
    try:
        return cls(**arguments)
    except TypeError as error:
        raise BadInput(
            path, kind, str(error).split("__init__() ")[-1], f"fields: {', '.join(field_names(cls))}"
        ) from None


def field_names(cls: Any) -> list[str]:
    """Fields of a dataclass or linen module that belong to its configuration."""
    return [f.name for f in dataclasses.fields(cls) if f.init and f.name not in ("parent", "name")]


def hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), 1, 0.4)
    return f"nearest: {close[0]}" if close else f"one of {', '.join(known)}"


def fits(value: Any, hint: Any) -> bool:
    """Whether a value may stand where the annotation says `hint`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, option) for option in arguments)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if arguments and arguments[-1] is Ellipsis:
            return all(fits(item, arguments[0]) for item in value)
        return len(value) == len(arguments) and all(map(fits, value, arguments))
    if origin is typing.Literal:
        return value in arguments
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is None or hint is type(None):
        return value is None
    if getattr(hint, "_is_protocol", False) or not isinstance(hint, type):
        return dataclasses.is_dataclass(value)  # a source, task or tokenizer: checked by what it must do
    return isinstance(value, hint)


def describe_type(hint: Any) -> str:
    return (
        hint.__name__
        if isinstance(hint, type) and typing.get_origin(hint) is None
        else str(hint).replace("typing.", "")
    )


# Overrides ----------------------------------------------------------------------------------------------


def override(experiment: Any, path: str, text: str) -> Any:
    """The experiment, or any other value made of dataclasses, with the field at a dotted path replaced.

    `text` is a Python literal, a word, or a registered type: `train.steps=200`, `model.dtype=bfloat16`,
    `model.pattern.0.position.scaling=Yarn(factor=4, original=128)`. A path goes through fields and the
    numbers of tuple items.

    Raises:
        BadInput: no such field (names the nearest), or a value of another type.
    """
    return _replace(experiment, path.split("."), text, f"config.{path}", "config")


def _replace(node: Any, path: list[str], text: str, full: str, here: str) -> Any:
    name, rest = path[0], path[1:]
    if isinstance(node, tuple):
        if not name.isdigit() or int(name) >= len(node):
            raise BadInput(
                full, text, f"{here} has no item '{name}'", f"0 to {len(node) - 1}" if node else "it is empty"
            )
        index = int(name)
        item = (
            _replace(node[index], rest, text, full, f"{here}.{name}") if rest else parse(text, full, type(node[index]))
        )
        return (*node[:index], item, *node[index + 1 :])
    if not dataclasses.is_dataclass(node):
        raise BadInput(full, text, f"{here} is {node!r} and has no fields", "a shorter path")
    if name not in field_names(node):
        raise BadInput(full, text, f"no such field of {type(node).__name__}", nearest(name, field_names(node)))
    old, hint = getattr(node, name), hints(type(node))[name]
    new = _replace(old, rest, text, full, f"{here}.{name}") if rest else parse(text, full, hint)
    try:
        return node.clone(**{name: new}) if hasattr(node, "clone") else dataclasses.replace(node, **{name: new})
    except BadInput as error:
        field = error.field.rpartition(".")[2]
        other = field != name and field in field_names(node)
        at, value = (f"{here}.{field}", error.value) if other else (full, text)
        raise BadInput(at, value, error.why, error.allowed) from None


def parse(text: str, path: str, hint: Any = Any) -> Any:
    """The value that `text` writes, checked against `hint`."""
    if fits(text, hint) and hint is not Any and not fits(None, hint):
        return text  # a field of strings takes the word as it stands
    try:
        value = _literal(ast.parse(text.strip(), mode="eval").body, path)
    except BadInput:
        raise
    except (SyntaxError, ValueError):
        value = text
    value = float(value) if hint is float and isinstance(value, int) and not isinstance(value, bool) else value
    if not fits(value, hint):
        raise BadInput(path, text, f"not of type {describe_type(hint)}", f"a value of {describe_type(hint)}")
    return value


def _literal(node: ast.expr, path: str) -> Any:
    """Evaluate literals, tuples and calls of registered types with keyword arguments; nothing else."""
    match node:
        case ast.Call(func=ast.Name(id=kind), args=[], keywords=keywords):
            return build(kind, {str(k.arg): _literal(k.value, f"{path}.{k.arg}") for k in keywords}, path)
        case ast.Call(func=ast.Name(id=kind)):
            raise BadInput(path, ast.unparse(node), "arguments need their names", f"{kind}(field=value)")
        case ast.Tuple(elts=items) | ast.List(elts=items):
            return tuple(_literal(item, path) for item in items)
        case ast.Name(id="true"):
            return True
        case ast.Name(id="false"):
            return False
        case ast.Name(id=word):
            return word
    return ast.literal_eval(node)


# Checks across fields -----------------------------------------------------------------------------------


def validate(experiment: Experiment, devices: int) -> dict[str, int]:
    """Check everything that can be known before compilation; returns the mesh's sizes.

    Raises:
        BadInput: the first field that cannot work, with what would.
    """
    model, data, train = experiment.model, experiment.data, experiment.train
    mesh = parse_mesh(experiment.mesh, devices)
    for name in ("steps", "accumulation", "loss_chunk", "log_every", "save_every", "keep"):
        _at_least(f"train.{name}", getattr(train, name), 1)
    _at_least("train.clip", train.clip, 0)
    _at_least("train.z_loss", train.z_loss, 0)
    _at_least("train.mtp_weight", train.mtp_weight, 0)
    if train.profile is not None and not 0 <= train.profile[0] < train.profile[1]:
        raise BadInput("train.profile", train.profile, "is no window of steps", "(first, last) with first < last")
    if data.tokenizer.vocab_size > model.vocab:
        why = f"the tokenizer makes ids up to {data.tokenizer.vocab_size - 1}"
        raise BadInput("model.vocab", model.vocab, why, f"{data.tokenizer.vocab_size} or more")
    rows = mesh["data"] * mesh["fsdp"]
    if data.batch % train.accumulation:
        raise BadInput(
            "train.accumulation", train.accumulation, f"does not divide data.batch = {data.batch}", "a divisor"
        )
    if data.batch // train.accumulation % rows:
        why = f"{data.batch // train.accumulation} rows a micro-batch do not split over data * fsdp = {rows}"
        raise BadInput("data.batch", data.batch, why, f"a multiple of {rows * train.accumulation}")
    _check_length(experiment, mesh)
    for group in ("before", "pattern", "after"):
        for i, layer in enumerate(getattr(model, group)):
            for part in parts(layer, model.mlp):
                _check_heads(f"model.{group}.{i}", part, mesh)
    return mesh


def _check_length(experiment: Experiment, mesh: Mapping[str, int]) -> None:
    """Rows must divide into what the layout hands to devices, and mixers must run on it."""
    for name, allowed in (("sequence", SEQUENCES), ("layout", ("auto", *LAYOUTS))):
        if getattr(experiment, name) not in allowed:
            raise BadInput(name, getattr(experiment, name), "no such value", f"one of {', '.join(allowed)}")
    length, devices = experiment.data.length, sequence_devices(mesh)
    layout = resolved(experiment, mesh).layout
    count = layout_parts(layout, devices)
    if length % count:
        why = f"does not divide into the {count} parts of {layout} rows on {devices} devices"
        raise BadInput("data.length", length, why, f"nearest: {max(1, round(length / count)) * count}")


def _check_heads(where: str, part: Any, mesh: Mapping[str, int]) -> None:
    """Heads and experts must divide over the axes that share them; a single key head is everyone's."""
    for name, axis in (("heads", "tensor"), ("kv_heads", "tensor"), ("experts", "expert")):
        count = getattr(part, name, 0)
        if count % mesh[axis] and not (name == "kv_heads" and count == 1):
            near = max(1, round(count / mesh[axis])) * mesh[axis]
            raise BadInput(f"{where}.{name}", count, f"does not split over {axis} = {mesh[axis]}", f"nearest: {near}")


def resolved(experiment: Experiment, mesh: Mapping[str, int]) -> Experiment:
    """The experiment with the strategy and layout of its mesh's sequence axes in the backends of its mixers.

    Args:
        mesh: sizes of all axes, from `parse_mesh`.

    Raises:
        BadInput: no such strategy or layout, or a mixer does not run on it.
    """
    model, devices = experiment.model, sequence_devices(mesh)
    layout, sequence = experiment.layout, experiment.sequence
    gradient = experiment.train.gradient
    if layout == "auto":
        layout = "contiguous" if gradient.in_text_order else balanced_layout(model, experiment.data.length, devices)
    if gradient.in_text_order and layout != "contiguous":
        why = f"{type(gradient).__name__} cuts rows along the text"
        raise BadInput("layout", layout, why, "nearest: contiguous")
    model = distributed(model, sequence=None if sequence == "auto" else sequence, layout=layout)
    return dataclasses.replace(experiment, model=model, layout=layout)


def _at_least(field: str, value: float, least: float) -> None:
    if value < least:
        raise BadInput(field, value, "is too small", f"{least} or more")
