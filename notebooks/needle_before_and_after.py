# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Needles before and after an extension
#
# A small model learns text and retrieval at a short length, fails beyond it, and reads four times further under YaRN,
# with the same parameters. `STEPS` is what the quickstart takes (a few minutes on a CPU); fewer show the way, not the
# figures. In Colab or Kaggle first, in a checkout: `%pip install -q -e .`.

# %%
import os
import tempfile
from dataclasses import replace
from pathlib import Path

from configs import quickstart
from jaxlong import run
from jaxlong.core.position import Yarn
from jaxlong.evals import report
from jaxlong.model import extend

STEPS = int(os.environ.get("STEPS", "500"))
SAMPLES = int(os.environ.get("SAMPLES", "5"))
folder = Path(tempfile.mkdtemp())

# %% [markdown]
# ## Pretrain
# An experiment is a value; any field is replaced, nothing is configured elsewhere.

# %%
base = quickstart.config()
schedule = replace(base.train.schedule, warmup=max(1, STEPS // 20), decay=max(1, STEPS * 3 // 10))
base = replace(
    base,
    train=replace(base.train, steps=STEPS, schedule=schedule),
    evaluation=replace(base.evaluation, samples=SAMPLES, lengths=(128, 512)),
)
params = run.train(base, folder / "pretrain")

# %% [markdown]
# ## The same parameters, two readings
# `extend` replaces the rotary scaling of every mixer; the parameters stay what they are.

# %%
yarn = Yarn(factor=4.0, original=quickstart.LENGTH, beta_fast=8.0)
plain = run.assess(base, params, name="plain RoPE", tokens=2048)
extended = run.assess(replace(base, model=extend(base.model, yarn)), params, name="YaRN", tokens=2048)

# %%
panels = {"plain RoPE": plain.samples, "YaRN, not tuned": extended.samples}
figure = report.heat_maps(panels, trained=quickstart.LENGTH, title="Needles found")
report.save(figure, folder / "needle.png")
figure  # noqa: B018  shown by the notebook

# %%
rows = [[loss.model, loss.window, f"{loss.perplexity:.2f}"] for loss in plain.losses + extended.losses]
report.markdown_table(["model", "window", "perplexity"], rows)
