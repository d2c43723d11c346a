"""The house rules that can be read off the source: who imports whom, and what may stand where."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIBRARY = sorted(path for name in ("jaxlong", "pallas_kernels") for path in (ROOT / name).rglob("*.py"))
SCRIPTS = sorted(path for name in ("experiments", "configs") for path in (ROOT / name).rglob("*.py"))

# what each part may import of the project; a name allows what is below it
MAY_IMPORT = {
    "pallas_kernels": ("pallas_kernels",),
    "jaxlong.core": ("jaxlong.core",),
    "jaxlong.parallel": ("jaxlong.core", "jaxlong.parallel"),
    "jaxlong.ops": ("jaxlong.core", "jaxlong.ops", "jaxlong.parallel", "pallas_kernels"),
    "jaxlong.mixers": ("jaxlong.core", "jaxlong.ops", "jaxlong.mixers"),
    "jaxlong.layers": ("jaxlong.core", "jaxlong.ops", "jaxlong.layers"),
    "jaxlong.model": ("jaxlong.core", "jaxlong.ops", "jaxlong.mixers", "jaxlong.layers", "jaxlong.parallel"),
    "jaxlong.data": ("jaxlong.core.types", "jaxlong.data"),
    "jaxlong.evals": ("jaxlong.core.types", "jaxlong.evals"),
    "jaxlong.train": ("jaxlong.core", "jaxlong.parallel", "jaxlong.ops.loss", "jaxlong.train"),
    "jaxlong.inference": ("jaxlong.core", "jaxlong.model", "jaxlong.inference"),
    # what a run is made of is told by the run itself: its step, its state, its flops
    "jaxlong.plan": (
        "jaxlong.core",
        "jaxlong.model",
        "jaxlong.parallel",
        "jaxlong.train",
        "jaxlong.config",
        "jaxlong.run",
        "jaxlong.plan",
    ),
    "jaxlong.config": ("jaxlong",),
    "jaxlong.run": ("jaxlong",),
    "jaxlong": ("jaxlong",),
    "configs": ("jaxlong", "configs"),
    "experiments": ("jaxlong", "pallas_kernels", "configs", "experiments"),
}
# third-party packages that only some parts may import at the top of a module
ONLY_IN = {
    "absl": ("experiments",),
    "optax": ("jaxlong.train", "jaxlong.run"),
    "orbax": ("jaxlong.train",),
    "grain": ("jaxlong.data",),
    "flax": ("jaxlong.mixers", "jaxlong.layers", "jaxlong.model", "jaxlong.train", "jaxlong.run"),
    "matplotlib": (),
    "tensorboardX": (),
    "tokenizers": (),
    "torch": (),
    "ml_collections": (),
}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def part_of(module: str, parts) -> str:
    return max((part for part in parts if module == part or module.startswith(part + ".")), key=len)


def imports(tree: ast.AST) -> list[str]:
    """Modules imported, `from a import b` as a.b."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def top_level(tree: ast.Module) -> ast.Module:
    return ast.Module([node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))], [])


def allowed(name: str, prefixes) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


@pytest.mark.parametrize("path", LIBRARY + SCRIPTS, ids=module_of)
def test_imports(path):
    tree, module = ast.parse(path.read_text()), module_of(path)
    part = part_of(module, MAY_IMPORT)
    for name in imports(tree):
        if name.split(".")[0] in ("jaxlong", "pallas_kernels", "configs", "experiments", "tests"):
            assert allowed(name, MAY_IMPORT[part]), f"{module} ({part}) imports {name}"
    for name in imports(top_level(tree)):
        package = name.split(".")[0]
        assert package not in ONLY_IN or allowed(module, ONLY_IN[package]), f"{module} imports {name}"


def calls(tree: ast.AST) -> list[str]:
    """Dotted names of everything called."""
    return [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]


COLLECTIVES = {
    "shard_map",
    "psum",
    "pmean",
    "pmax",
    "ppermute",
    "all_gather",
    "all_to_all",
    "psum_scatter",
    "axis_index",
}
FORBIDDEN = {"eval", "exec", "pickle.load", "pickle.loads", "yaml.load", "np.load", "os.system"}


@pytest.mark.parametrize("path", LIBRARY, ids=module_of)
def test_what_stands_where(path):
    tree, module = ast.parse(path.read_text()), module_of(path)
    called = set(calls(tree))
    assert "print" not in called, "the library logs and returns; it does not print"
    if not module.startswith("jaxlong.parallel"):
        jax_calls = {name.split(".")[-1] for name in called if name.split(".")[0] in ("jax", "lax")}
        of_grids = {"axis_index"} if module.startswith("pallas_kernels") else set()
        assert not jax_calls & COLLECTIVES - of_grids, "collectives live in jaxlong.parallel"
    assert not called & FORBIDDEN, "loading never runs code"
    at_import = [ast.unparse(node) for node in tree.body if not isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    assert not any("jax.devices(" in line or "default_backend(" in line for line in at_import), "platform at call time"
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.args.kwarg is None, f"{module}.{node.name} takes **{node.args.kwarg and node.args.kwarg.arg}"


def test_library_has_no_utils_and_no_marks():
    for path in LIBRARY + SCRIPTS:
        assert "util" not in path.stem
        assert not any(mark in path.read_text() for mark in ("TODO", "FIXME", "XXX")), path


@pytest.mark.parametrize("path", [p for p in LIBRARY + SCRIPTS if p.stat().st_size], ids=module_of)
def test_every_module_says_what_it_is(path):
    assert ast.get_docstring(ast.parse(path.read_text())), path
