"""Every configuration, as shapes: it loads, fits its mesh, survives storage, and its model trains and decodes."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxlong.config import Experiment, from_data, load, to_data, validate
from jaxlong.core.types import Batch
from jaxlong.mixers import MIXERS
from jaxlong.model import init_params
from jaxlong.run import count_params, flops_per_token
from jaxlong.train.grads import next_token_loss

FOLDER = Path(__file__).parent.parent / "configs"
NOT_EXPERIMENTS = ("published", "__init__")
TEXTS = {file.stem: file.read_text() for file in sorted(FOLDER.glob("*.py"))}
FILES = [name for name, text in TEXTS.items() if "-> Experiment" in text and name not in NOT_EXPERIMENTS]
SMALL = [name for name in FILES if name.startswith("small")]
PUBLISHED = [name for name in FILES if name not in SMALL and name not in ("tiny", "quickstart")]

PARAMETERS = {
    "llama3_8b": 8.03e9,
    "llama_3b": 3.43e9,
    "llama_7b": 6.74e9,
    "llama_13b": 13.02e9,
    "llama_30b": 32.53e9,
    "moba_8b": 8.03e9,
    "deepseek_v3": 671.03e9 + 11.6e9,  # and the predictor of one more token, whose embedding and head are shared
    "rwkv4_7b": 7.39e9,
    "rwkv6_7b": 7.64e9,
    "rwkv7_3b": 2.95e9,
    "ttt_linear_1b": 1.35e9,
    "mamba_3b": 2.77e9,
    "mamba2_3b": 2.70e9,
    "gla_1b": 1.365e9,
    "retnet_7b": 6.7e9,
    "minimax_01": 456e9,
    "nsa_27b": 27.3e9,
    "sparse_transformer": 95e6,
    "log_linear_800m": 0.8e9,
    "lfm2_1b": 1.17e9,
    "kimi_linear_48b": 49.1e9,
    "qwen3_next_80b": 80e9,
}
"""What their authors report, as exactly as they do."""


def experiment(name: str) -> Experiment:
    return load(str(FOLDER / f"{name}.py"))


@pytest.mark.parametrize("name", FILES)
def test_loads_fits_its_mesh_and_survives_storage(name):
    made = experiment(name)
    validate(made, 64 if name in PUBLISHED else 1)
    assert from_data(to_data(made)) == made
    assert f"configs/{name}.py" in TEXTS[name] or name == "quickstart", "its own command"


@pytest.mark.thorough
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_as_shapes(name):
    """The loss and a decoding step are traced at the model's own size; nothing is computed."""
    model = experiment(name).model
    if name in PARAMETERS:
        assert count_params(model) == pytest.approx(PARAMETERS[name], rel=0.01)
    assert flops_per_token(model, 4096) > 0
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    ids, weights = jax.ShapeDtypeStruct((1, 2048), jnp.int32), jax.ShapeDtypeStruct((1, 2048), jnp.float32)
    loss, metrics = jax.eval_shape(next_token_loss(model), params, Batch(ids, ids, ids, ids, weights))
    assert loss.shape == () and "nll" in metrics
    state = jax.eval_shape(lambda: model.init_state(1, 4096, max_chunk=1))
    one = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    decode = lambda p, t, at, s: model.apply({"params": p}, t, positions=at, segment_ids=t, state=s)
    logits, after = jax.eval_shape(decode, params, one, one, state)
    assert logits.shape == (1, 1, model.vocab)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), after) == jax.tree.map(lambda a: (a.shape, a.dtype), state)


def test_every_mixer_has_a_small_and_a_published_configuration():
    uses = {kind: {part for name in names for block in experiment(name).model.blocks for part in map(type, block)}
            for kind, names in (("small", SMALL), ("published", PUBLISHED))}  # fmt: skip
    for name, mixer in MIXERS.items():
        assert mixer in uses["small"], f"no configs/small_*.py trains {name}"
        assert mixer in uses["published"], f"no configuration at a published size has {name}"


def test_commands_name_files_that_exist():
    for name, text in TEXTS.items():
        for named in re.findall(r"configs/(\w+)\.py", text):
            assert named in TEXTS, f"configs/{name}.py names configs/{named}.py"
