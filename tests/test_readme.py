"""What the README shows is run: its Python blocks, its commands' flags, its tables."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def test_pieces_alone_take_ten_lines():
    assert len(BLOCKS) >= 3
    for block in BLOCKS:
        assert len([line for line in block.splitlines() if line.strip()]) <= 10, block


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.split("\n")[0][:40])
def test_python_block(block):
    """Each runs as it stands; the arrays that it is given are named in the text above it."""
    x = jax.random.normal(jax.random.key(0), (2, 64, 32))
    heads = lambda seed, n: jax.random.normal(jax.random.key(seed), (2, 64, n, 16))
    positions = jnp.broadcast_to(jnp.arange(64), (2, 64))
    names = {
        "jax": jax,
        "jnp": jnp,
        "x": x,
        "positions": positions,
        "q": heads(1, 4),
        "k": heads(2, 2),
        "v": heads(3, 2),
    }
    exec(block, names)
    if "f" in names:
        from jaxlong import attend, causal

        q, k, v = names["q"], names["k"], names["v"]
        alone = attend(q, k, v, mask=causal(), q_positions=positions, k_positions=positions)
        assert jnp.abs(names["out"] - alone).max() < 2e-6
    else:
        assert names["y"].shape == x.shape and jnp.isfinite(names["y"]).all()


def test_the_two_commands():
    assert "python3 -m pip install -e . && python3 -m experiments.quickstart" in README
    assert 'python3 -m pip install -e ".[test]" && python3 -m pytest' in README


def test_commands_name_real_scripts_and_files():
    for script in set(re.findall(r"python3? -m experiments\.(\w+)", README)):
        assert (ROOT / "experiments" / f"{script}.py").is_file(), script
    for path in set(re.findall(r"configs/\w+\.py", README)):
        assert (ROOT / path).is_file(), path
    for path in set(re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README)):
        assert (ROOT / path).is_file(), path


def test_tree_is_the_tree():
    """Each line of the annotated tree names a file or folder that exists."""
    block = re.search(r"```text\n(jaxlong/.*?)```", README, re.S).group(1)
    folders: list[str] = []
    for line in block.splitlines():
        name = line.strip().split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        folders = [*folders[:depth], name.rstrip("/")]
        assert (ROOT / "/".join(folders)).exists(), folders


def test_masks_and_positions_are_listed():
    from jaxlong.core.mask import MASKS
    from jaxlong.core.position import POSITIONS, SCALINGS

    algebra = {"And", "Or", "Not"}
    for name in [*(MASKS.keys() - algebra), *POSITIONS, *SCALINGS]:
        assert re.search(rf"\b{name}\b", README, re.I), name


def test_table_of_mixers_is_that_of_their_docstrings():
    """A new mixer writes its own row: `python -m tests.test_readme` prints the table."""
    assert menu() in README, f"the README's table of mixers is not\n\n{menu()}"


def menu() -> str:
    """Class, first sentence and papers of every mixer's docstring."""
    from jaxlong.mixers import MIXERS

    rows = ["| mixer | what it does | papers |", "|---|---|---|"]
    for cls in MIXERS.values():
        text = inspect.getdoc(cls)
        papers = dict.fromkeys(re.findall(r"arXiv (\d{4}\.\d{4,5})", text))
        links = ", ".join(f"[{n}](https://arxiv.org/abs/{n})" for n in papers)
        first = " ".join(text.split("\n\n")[0].split())
        rows.append(f"| `{cls.__name__}` | {first} | {links} |")
    return "\n".join(rows)


def test_import_is_light():
    """`import jaxlong` alone imports nothing heavy; names come when asked for."""
    code = "import sys, jaxlong; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert not {"jax", "flax", "grain", "orbax", "optax"} & set(done.stdout.split())


def test_public_names_resolve():
    import jaxlong

    for name in jaxlong.__all__:
        assert getattr(jaxlong, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        jaxlong.nothing  # noqa: B018


if __name__ == "__main__":
    sys.stdout.write(menu() + "\n")
