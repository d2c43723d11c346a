"""Bad input ends before any program is compiled, with exit code 2 and one line, and writes nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments import cli, evaluate, extend, generate, pretrain, quickstart
from jaxlong import run

ROOT = Path(__file__).parent.parent
TINY = f"--config={ROOT}/configs/tiny.py"
SMALL = (
    TINY, "--config.model.width=16", "--config.model.depth=1", "--config.model.pattern.0.heads=2",
    "--config.model.pattern.0.head_dim=8", "--config.model.mlp.hidden=16", "--config.data.length=16",
    "--config.data.batch=8", "--config.train.steps=2", "--config.train.schedule.warmup=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder with one real checkpoint; tests copy it."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert cli.run(pretrain.main, pretrain.FLAGS, ["pretrain", *SMALL, f"--workdir={folder}"]) == 0
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def refused(script, argv, folder: Path, monkeypatch, capsys) -> str:
    """The one line of a refusal, after checking all that a refusal must be."""
    reached = lambda *a, **k: pytest.fail("the model was about to be compiled")
    monkeypatch.setattr(run, "fit", reached)
    for name in ("generate", "logprobs"):
        monkeypatch.setattr(run.Runner, name, reached)
    monkeypatch.chdir(folder)
    before = tree(folder)
    capsys.readouterr()
    script.FLAGS.unparse_flags()
    for flag in script.FLAGS:
        script.FLAGS[flag].unparse()
    code = cli.run(script.main, script.FLAGS, [script.__name__, *argv])
    errors = capsys.readouterr().err
    assert code == 2, f"exit code {code}: {errors}"
    lines = errors.splitlines()
    assert len(lines) == 1, errors
    assert "Traceback" not in errors and len(lines[0].split(": ")) >= 3
    assert tree(folder) == before, "something was written or lost"
    return lines[0]


def text(value: str | bytes):
    """Makes corpus.txt (and corpus.jsonl) with that content."""

    def make(folder: Path, trained: Path) -> None:
        data = value if isinstance(value, bytes) else value.encode()
        (folder / "texts").mkdir()
        (folder / "texts" / "corpus.txt").write_bytes(data)
        (folder / "corpus.jsonl").write_bytes(data)

    return make


def copied(damage=lambda run: None):
    """Copies the trained run to run/ and damages it."""

    def make(folder: Path, trained: Path) -> None:
        shutil.copytree(trained, folder / "run")
        damage(folder / "run")

    return make


def step_folder(run_folder: Path) -> Path:
    return max((run_folder / "checkpoints").iterdir(), key=lambda p: p.name)


def data_files(run_folder: Path) -> list[Path]:
    return [p for p in step_folder(run_folder).rglob("*") if p.is_file() and p.parent.name == "d"]


def flip_bits(run_folder: Path) -> None:
    for file in data_files(run_folder):
        data = bytearray(file.read_bytes())
        for i in range(len(data) // 4, len(data), 997):
            data[i] ^= 4
        file.write_bytes(data)


def halve(run_folder: Path) -> None:
    for file in data_files(run_folder):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty_step(run_folder: Path) -> None:
    for child in step_folder(run_folder).iterdir():
        shutil.rmtree(child) if child.is_dir() else child.unlink()


def nothing(folder: Path, trained: Path) -> None:
    pass


def folder_source(kind: str) -> str:
    return f"--config.data.mixture.0.source={kind}"


def pre(*argv: str, make=nothing, say: str):
    return pytest.param(pretrain, [*SMALL, "--workdir=run", *argv], make, say, id=" ".join(argv)[-60:] or say[:40])


def case(script, *argv: str, make=nothing, say: str, id: str | None = None):
    return pytest.param(
        script, list(argv), make, say, id=id or f"{script.__name__.split('.')[-1]} {' '.join(argv)}"[:60]
    )


TEXTS = folder_source('TextFolder(path="texts")')
LINES = folder_source('Jsonl(path="corpus.jsonl")')

CASES = [
    # configuration: names, types, values
    case(pretrain, "--workdir=run", say="config: unset", id="no config"),
    case(pretrain, "--config=configs/tiny.py", "--workdir=run",
        say="config: configs/tiny.py: no such file", id="no such config"),
    case(pretrain, TINY, say="workdir: unset", id="no workdir"),
    case(pretrain, TINY, "--workdir=run", "--wrokdir=x", say="flag:", id="unknown flag"),
    case(pretrain, TINY, "--workdir=run", "extra", say="argument: extra", id="left-over argument"),
    pre("--config.model.widht=32", say="config.model.widht: 32: no such field of LM; nearest: width"),
    pre("--config.modle.width=32", say="config.modle.width: 32: no such field of Experiment; nearest: model"),
    pre("--config.model.width=wide", say="config.model.width: wide: not of type int"),
    pre("--config.train.steps=1.5", say="config.train.steps: 1.5: not of type int"),
    pre("--config.train.steps=0", say="train.steps: 0: is too small; 1 or more"),
    pre("--config.model.width=-8", say="config.model.width: -8: must be positive"),
    pre("--config.model.dtype=float8", say="config.model.dtype: float8: no floating type of activations"),
    pre("--config.model.remat=some", say="config.model.remat: some: no such remat policy; one of none"),
    pre("--config.model.depth=3", "--config.model.pattern=(GQA(heads=2,kv_heads=1,head_dim=8),"
        "GQA(heads=2,kv_heads=2,head_dim=8))", say="config.model.depth: 3: no multiple of the pattern's length 2"),
    pre("--config.model.pattern.1.heads=2",
        say="config.model.pattern.1.heads: 2: config.model.pattern has no item '1'"),
    pre("--config.model.pattern.0.kv_heads=3", say="config.model.pattern.0.kv_heads: 3: does not divide heads = 2"),
    pre("--config.model.pattern.0.head_dim=7", say="config.model.pattern.0.head_dim: 7: dimensions rotate in pairs"),
    pre("--config.model.pattern.0.mask=Sliding(left=0)",
        say="sliding.left: 0: a window sees at least its own token; 1 or more"),
    pre("--config.model.pattern.0.mask=Slidign(left=4)",
        say="config.model.pattern.0.mask: Slidign: no such type; nearest: Sliding"),
    pre("--config.model.pattern.0.position.scaling=Yarn(factor=0.5,original=16)",
        say="Yarn.factor: 0.5: a context cannot be extended by less than 1"),
    pre("--config.model.pattern.0.position.base=nan", say="config.model.pattern.0.position.base: nan"),
    pre("--config.model.pattern.0.backend.kernel=flahs",
        say="config.model.pattern.0.backend.kernel: flahs: no such name"),
    pre("--config.model.vocab=100", say="model.vocab: 100: the tokenizer makes ids up to 255; 256 or more"),
    pre("--config.train.schedule.peak=-1", say="config.train.schedule.peak: -1"),
    pre("--config.train.schedule.warmup=500", say="warmup"),
    pre("--config.train.profile=(5,2)", say="train.profile: (5, 2): is no window of steps"),
    pre("--config.train.steps", say="config.train.steps"),
    # mesh and shapes
    pre("--mesh=data=3", say="mesh: data=3: multiplies to 3, but there are 8 devices"),
    pre("--mesh=data=-1,seq=-1", say="mesh: data=-1,seq=-1: -1 is given for data and seq"),
    pre("--mesh=data=-1,seq=3", say="mesh: data=-1,seq=3: 3 does not divide 8 devices"),
    pre("--mesh=dta=8", say="mesh: dta=8: unknown axis 'dta'"),
    pre("--mesh=data=0", say="mesh: data=0: size 0 of 'data'"),
    pre("--mesh=data", say="mesh: data: 'data' is not axis=size"),
    pre("--mesh=data=1,tensor=8", say="model.pattern.0.heads: 2: does not split over tensor = 8"),
    pre("--mesh=data=8", "--config.data.batch=6", say="data.batch: 6"),
    pre(
        *("--mesh=data=1,seq=8", "--config.data.length=20"),
        say="data.length: 20: does not divide into the 8 parts of contiguous rows on 8 devices; nearest: 16",
    ),
    pre(
        *("--mesh=data=1,seq=8", "--config.layout=zigzag", "--config.data.length=24"),
        say="data.length: 24: does not divide into the 16 parts of zigzag rows on 8 devices; nearest: 32",
    ),
    pre(
        *("--mesh=data=1,seq=8", "--config.layout=zigzag", "--config.train.gradient=SeCO(chunk=8)"),
        say="layout: zigzag: SeCO cuts rows along the text; nearest: contiguous",
    ),
    pre("--config.train.gradient=SeCO(chunk=0)", say="train.chunk: 0: a chunk holds at least one token; 1 or more"),
    pre("--config.layout=zigzg", say="layout: zigzg: no such value; one of auto, contiguous, zigzag, striped"),
    pre("--config.sequence=rings", say="sequence: rings: no such value; one of auto, none, all_gather, ring, ulysses"),
    pre(
        *("--mesh=data=4,tensor=2", "--config.model.pattern=(GQA(heads=4,kv_heads=3,head_dim=8),)"),
        say="kv_heads: 3: does not divide heads = 4; one of [1, 2, 4]",
    ),
    pre("--config.model.pattern.0.heads=3", say="config.model.pattern.0.kv_heads: 2: does not divide heads = 3"),
    pre("--config.train.accumulation=3", say="train.accumulation: 3: does not divide data.batch = 8"),
    pre("--config.data.length=1", say="config.data.length: 1: too small"),
    pre("--config.data.batch=0", say="config.data.batch: 0: too small"),
    # data
    pre(TEXTS, say="texts"),
    pre(TEXTS, make=text(""), say="data.length: 16: the corpus has only 1 tokens"),
    pre(TEXTS, make=text(b"caf\xe9 " * 50), say="UTF-8"),
    pre(TEXTS, make=text(b"a\0b" * 50), say="NUL"),
    pre(TEXTS, make=text("short"), say="data.length: 16: the corpus has only"),
    pre(LINES, make=text('{"text": "a"}\n{"text": \n'), say="corpus.jsonl"),
    pre(LINES, make=text('{"txet": "' + "a" * 99 + '"}\n'), say="text"),
    pre(folder_source('Stdlib(split="test")'), say="split"),
    pre("--config.data.tokenizer=HuggingFace(path='missing.json')", say="missing.json"),
    pre("--config.data.mixture=()", say="data.mixture"),
    pre("--config.data.mixture.0.weight=0", say="weight"),
    pre("--config.data.mixture=(Samples(task=Needle(haystack=Stdlib(split='train'))),)", "--config.data.length=8",
        say="length: 8: too short for 1 needles"),
    # folders and checkpoints
    case(pretrain, *SMALL, "--workdir=/proc/no/run", say="workdir", id="folder that cannot be made"),
    case(pretrain, *SMALL, "--workdir=corpus.jsonl", make=text("x"), say="workdir", id="workdir is a file"),
    pre("--config.model.width=32", make=copied(),
        say="workdir: run: holds another experiment: model.width is 16 there, 32 here"),
    pre("--config.seed=7", make=copied(), say="workdir: run: holds another experiment: seed is 0 there, 7 here"),
    case(evaluate, "--from=run", say="run", id="checkpoint missing"),
    case(evaluate, "--from=run", make=copied(flip_bits), say="run", id="checkpoint with flipped bits"),
    case(evaluate, "--from=run", make=copied(halve), say="run", id="checkpoint half-written"),
    case(evaluate, "--from=run", make=copied(empty_step), say="run", id="checkpoint folder empty"),
    case(evaluate, "--from=run", "--config.evaluation.samples=0", make=copied(), say="samples: 0", id="no samples"),
    case(evaluate, "--from=run", "--config.evaluation.lengths=(8,)", make=copied(),
        say="length: 8: too short", id="task too long"),
    case(extend, "--from=run", "--workdir=new", "--factor=0.5", make=copied(), say="factor", id="factor below 1"),
    case(extend, "--from=run", "--workdir=new", "--method=yran", make=copied(),
        say="method: yran", id="unknown method"),
    case(extend, "--from=run", "--workdir=run", make=copied(),
        say="workdir: run: holds another experiment", id="extend in place"),
    case(extend, "--from=run", "--workdir=new", "--config.model.width=32", make=copied(),
        say="model.embed: (256, 32)", id="extend another width"),
    case(generate, "--from=run", "--prompt=", make=copied(), say="prompt", id="empty prompt"),
    case(generate, "--from=run", "--prompt=a", "--temperature=-1", make=copied(),
        say="temperature: -1", id="temperature"),
    case(generate, "--from=run", "--prompt=a", "--top_p=0", make=copied(), say="top_p: 0", id="top_p"),
    case(generate, "--from=run", "--prompt=a", "--max_new=0", make=copied(), say="max_new: 0", id="max_new"),
    case(generate, "--from=run", "--prompt=a\0b", make=copied(), say="NUL", id="NUL in the prompt"),
    case(quickstart, "--out=texts", make=text("x"), say="out: texts: is not empty", id="quickstart into a full folder"),
]  # fmt: skip


@pytest.mark.parametrize("script,argv,make,say", CASES)
def test_one_line_and_nothing_written(script, argv, make, say, trained, tmp_path, monkeypatch, capsys):
    make(tmp_path, trained)
    line = refused(script, argv, tmp_path, monkeypatch, capsys)
    assert say in line, line


def test_there_are_forty_cases():
    assert len(CASES) >= 40


def test_another_dtype_is_refused(trained, tmp_path, monkeypatch, capsys):
    """A checkpoint whose arrays are of another type than its experiment's is not cast in silence."""
    import jax

    from jaxlong.train.checkpoint import load_params

    opened = run.open_checkpoint(trained)
    model = run.from_data(opened.config).model
    shapes = jax.eval_shape(lambda: run.init_params(model, jax.random.key(0)))
    half = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, "bfloat16"), shapes)
    with pytest.raises(run.BadInput, match="bfloat16"):
        load_params(trained, half)


@pytest.mark.parametrize("argv", [["--mesh=data=3"], ["--config.model.widht=1"]], ids=["mesh", "field"])
def test_as_a_program(argv, tmp_path):
    """The same through a real process: exit code 2, one line on stderr, nothing on stdout."""
    command = [sys.executable, "-m", "experiments.pretrain", TINY, f"--workdir={tmp_path}/run", *argv]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert done.returncode == 2 and not done.stdout
    assert len(done.stderr.splitlines()) == 1 and ": " in done.stderr
    assert not (tmp_path / "run").exists()


def test_ids_outside_the_vocabulary(trained):
    loaded = run.load(trained)
    runner = run.Runner(loaded.experiment.model, loaded.params, loaded.experiment.data.tokenizer)
    with pytest.raises(run.BadInput, match="outside the vocabulary"):
        runner.logprobs(np.array([[1, 2, 999]]))
