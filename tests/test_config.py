"""Experiments as values: every field reachable, stored as data, never run as code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jaxlong.config import Experiment, from_data, load, override, parse, to_data, validate
from jaxlong.core.mask import Causal, Sinks, Sliding
from jaxlong.core.position import Yarn
from jaxlong.core.types import BadInput
from jaxlong.mixers import GQA
from jaxlong.run import flat

CONFIGS = [Path(__file__).parent.parent / "configs" / f"{name}.py" for name in ("tiny", "quickstart")]


@pytest.fixture(scope="module")
def tiny() -> Experiment:
    return load(str(CONFIGS[0].with_name("tiny.py")))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_stored_as_data_and_back(path):
    experiment = load(str(path))
    text = json.dumps(to_data(experiment))
    assert from_data(json.loads(text)) == experiment
    assert hash(experiment.model) == hash(from_data(json.loads(text)).model)
    validate(experiment, 1)


def test_every_field_can_be_set_to_its_own_value(tiny):
    """Each leaf of the experiment is reachable by its dotted path, and takes back what it printed."""
    leaves = flat(to_data(tiny))
    assert len(leaves) > 60
    for path, value in leaves.items():
        if isinstance(value, str) and value[:1].isupper() and f"{path}." in " ".join(leaves):
            continue  # the name of a type, whose fields follow
        text = str(tuple(value)) if isinstance(value, list) else str(value)
        if not text or path.endswith(("line", "question")):
            continue  # formats with quotes and equals signs are set below
        if text[:1].isupper() and text.isidentifier() and text not in ("None", "True", "False"):
            text += "()"
        assert to_data(override(tiny, path, text)) == to_data(tiny), path


def test_values_of_all_kinds(tiny):
    changed = override(tiny, "train.steps", "200")
    assert changed.train.steps == 200 and tiny.train.steps == 1000
    assert override(tiny, "model.dtype", "bfloat16").model.dtype == "bfloat16"
    assert override(tiny, "train.clip", "2").train.clip == 2.0
    assert override(tiny, "train.tensorboard", "true").train.tensorboard is True
    assert override(tiny, "train.profile", "(3, 5)").train.profile == (3, 5)
    assert override(tiny, "train.profile", "None").train.profile is None
    assert override(tiny, "mesh", "data=2,seq=4").mesh == "data=2,seq=4"
    assert override(tiny, "evaluation.tasks.0.line", "key {key} is {value}.").evaluation.tasks[0].line.endswith("}.")
    scaled = override(tiny, "model.pattern.0.position.scaling", "Yarn(factor=4, original=256)")
    assert scaled.model.pattern[0].position.scaling == Yarn(factor=4, original=256)
    masked = override(tiny, "model.pattern.0.mask", "And(a=Causal(), b=Or(a=Sliding(left=8), b=Sinks(n=2)))")
    assert masked.model.pattern[0].mask == Causal() & (Sliding(8) | Sinks(2))
    hybrid = override(tiny, "model.pattern", "(GQA(heads=4,kv_heads=1,head_dim=8), GQA(heads=2,kv_heads=2,head_dim=8))")
    assert [type(mixer) for mixer in hybrid.model.pattern] == [GQA, GQA] and hybrid.model.groups == 2


@pytest.mark.parametrize(
    "text", ["__import__('os').system('true')", "open('x')", "[].append(1)", "(lambda: 1)()", "GQA.examples()", "1 + 1"]
)
def test_nothing_is_run(tiny, text):
    with pytest.raises(BadInput):
        override(tiny, "model.pattern.0.mask", text)
    with pytest.raises(BadInput):
        parse(text, "config.x", int)


def test_stored_data_names_only_registered_types(tiny):
    data = to_data(tiny)
    data["model"]["mlp"]["type"] = "Popen"
    with pytest.raises(BadInput, match=r"config.model.mlp: Popen: no such type"):
        from_data(data)
    data = to_data(tiny)
    data["model"]["depht"] = 3
    with pytest.raises(BadInput, match=r"config.model.depht: 3: no such field of LM; nearest: depth"):
        from_data(data)
    data = to_data(tiny)
    data["train"]["steps"] = "many"
    with pytest.raises(BadInput, match=r"config.train.steps: many: not of type int"):
        from_data(data)
    data = to_data(tiny)
    del data["model"]["width"]
    with pytest.raises(BadInput, match=r"config.model: LM: .*width"):
        from_data(data)


@pytest.mark.parametrize(
    "content,say",
    [
        ("def config(:\n", "line 1"),
        ("x = 1\n", "has no function config"),
        ("def config():\n    return 3\n", "returned int"),
    ],
)
def test_files_that_are_no_experiment(tmp_path, content, say):
    path = tmp_path / "c.py"
    path.write_text(content)
    with pytest.raises(BadInput, match=say):
        load(str(path))
    with pytest.raises(BadInput, match=r"no such file; nearest: .*c\.py"):
        load(str(tmp_path / "cc.py"))
