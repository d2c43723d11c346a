"""A small language model in plain JAX, batches that know where they are, and a run of both as a program.

    python train_toy.py WORKDIR STEPS MILLISECONDS [ADDRESS PROCESSES INDEX]

trains on eight simulated devices in all, saving every 3 steps; each step waits that long, so that a kill
falls anywhere.
"""

from __future__ import annotations

import os
import sys
import time
from functools import cache

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={8 // int((sys.argv[5:] or [1])[0])}"
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", ".."))

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlong.core.types import Batch
from jaxlong.train.checkpoint import Store
from jaxlong.train.grads import full
from jaxlong.train.hooks import Checkpoints, Hook, JsonLines
from jaxlong.train.loop import fit
from jaxlong.train.optim import AdamW, Cosine, learning_rate, make_optimizer
from jaxlong.train.state import TrainState, abstract_state, state_shardings
from jaxlong.train.step import make_step

VOCAB, WIDTH, LAYERS = 32, 16, 2
ROWS, LENGTH = 8, 12
HORIZON = 40
"""Steps that the schedule is made for, however many are run."""

AXES = {
    "embed": P("vocab", "embed"),
    "layers": {"w": P("layers", "embed", "mlp"), "scale": P("layers", "embed")},
    "head": P("embed", "vocab"),
}
CONFIG = {"model": {"type": "Toy", "width": WIDTH}, "seed": 0}


def init_params(key: jax.Array) -> dict:
    embed, w, head = jax.random.split(key, 3)
    return {
        "embed": jax.random.normal(embed, (VOCAB, WIDTH)),
        "layers": {
            "w": jax.random.normal(w, (LAYERS, WIDTH, WIDTH)) * WIDTH**-0.5,
            "scale": jnp.ones((LAYERS, WIDTH)),
        },
        "head": jax.random.normal(head, (WIDTH, VOCAB)) * WIDTH**-0.5,
    }


def loss_fn(params: dict, batch: Batch) -> tuple[jax.Array, dict]:
    layer = lambda x, p: (x + jnp.tanh(x @ p["w"]) * p["scale"], None)
    x, _ = jax.lax.scan(layer, params["embed"][batch.tokens], params["layers"])
    logits = x @ params["head"]
    chosen = jnp.take_along_axis(logits, batch.targets[..., None], axis=-1)[..., 0]
    losses = jax.nn.logsumexp(logits, axis=-1) - chosen
    weight = batch.loss_weights.sum()
    mean = (losses * batch.loss_weights).sum() / jnp.where(weight > 0, weight, 1.0)
    return mean, {"nll": mean, "weight": weight}


def rows(seed: int, index: int) -> Batch:
    """Batch `index`, a pure function of the seed: tokens that count up, from random starts."""
    rng = np.random.default_rng([seed, index])
    tokens = (rng.integers(0, VOCAB, (ROWS, 1)) + np.arange(LENGTH + 1) * rng.integers(1, 4, (ROWS, 1))) % VOCAB
    tokens = tokens.astype(np.int32)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (ROWS, LENGTH))
    weights = rng.random((ROWS, LENGTH), np.float32)
    return Batch(tokens[:, :-1], tokens[:, 1:], positions, np.ones_like(positions), weights)


class Batches:
    """Batches on the devices of a mesh; the state is an index."""

    def __init__(self, seed: int = 0, mesh: jax.sharding.Mesh | None = None, pause: float = 0.0):
        self.seed, self.index, self.mesh, self.pause = seed, 0, mesh, pause

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Batch:
        time.sleep(self.pause)
        batch = rows(self.seed, self.index)
        self.index += 1
        return batch if self.mesh is None else jax.device_put(batch, NamedSharding(self.mesh, P("data")))

    def get_state(self) -> dict:
        return {"index": self.index, "seed": self.seed}

    def set_state(self, state: dict) -> None:
        self.index, self.seed = state["index"], state["seed"]


def make_mesh(devices: int) -> jax.sharding.Mesh:
    return jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])


@cache
def optimizer():
    return make_optimizer(AdamW(), Cosine(peak=1e-2, warmup=3), steps=HORIZON, axes=AXES)


def placed_state(mesh: jax.sharding.Mesh) -> tuple[TrainState, TrainState]:
    """A fresh state with its matrices sharded over the mesh, and the target of a restore on it."""
    create, target = _placed(mesh)
    return create(), target


@cache
def _placed(mesh: jax.sharding.Mesh):
    tx = optimizer()
    create = lambda: TrainState.create(init_params(jax.random.key(0)), tx)
    abstract = jax.eval_shape(create)
    specs = {"embed": P("data"), "layers": {"w": P(None, "data"), "scale": P()}, "head": P(None, "data")}
    params = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, P))
    shardings = state_shardings(abstract, params, NamedSharding(mesh, P()))
    return jax.jit(create, out_shardings=shardings), abstract_state(abstract, shardings)


@cache
def jitted_step():
    tx = optimizer()
    step = make_step(full(loss_fn), tx, learning_rate(Cosine(peak=1e-2, warmup=3), HORIZON))
    return jax.jit(step, donate_argnums=0)


def run(workdir: str, steps: int, *, pause: float = 0.0, hooks: tuple[Hook, ...] = (), devices: int = 8) -> TrainState:
    """Train to `steps`, from the newest checkpoint of the folder if there is one."""
    mesh = make_mesh(devices)
    batches = Batches(mesh=mesh, pause=pause)
    state, target = placed_state(mesh)
    store = Store(workdir, config=CONFIG, keep=2)
    restored = store.restore(target)
    if restored is not None:
        state = restored.state
        batches.set_state(restored.data)
    always = (JsonLines(f"{workdir}/metrics.jsonl"), Checkpoints(store, every=3, data=batches))
    return fit(state, jitted_step(), batches, steps=steps, hooks=(*hooks, *always))


class Announce(Hook):
    """Tells a test, through a file, how far the run is."""

    def __init__(self, workdir: str):
        self.path = f"{workdir}/progress"

    def metrics(self, step: int, values: dict) -> None:
        if jax.process_index() == 0:
            with open(self.path, "w") as file:
                file.write(str(step))


if __name__ == "__main__":
    workdir, steps, pause = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]) / 1000
    if sys.argv[4:]:
        jax.distributed.initialize(sys.argv[4], int(sys.argv[5]), int(sys.argv[6]))
    run(workdir, steps, pause=pause, hooks=(Announce(workdir),))
