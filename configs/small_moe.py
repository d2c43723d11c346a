"""A mixture of 8 experts, 2 a token and one shared, and one more token predicted, on `configs/small.py`.

python -m experiments.pretrain --config=configs/small_moe.py --workdir=runs/small_moe
"""

import dataclasses

from configs.small import ATTENTION, small
from jaxlong.config import Experiment
from jaxlong.layers.moe import MoE


def config() -> Experiment:
    experts = MoE(hidden=48, experts=8, top_k=2, shared=1, router="sigmoid", bias_rate=0.001)
    experiment = small(ATTENTION, mlp=experts)
    return dataclasses.replace(experiment, model=experiment.model.clone(mtp=1))
