"""TTT-MLP 1.3B with the Mamba backbone (Sun et al., arXiv 2407.04620, appendix C).

python -m experiments.pretrain --config=configs/ttt_mlp_1b.py --workdir=runs/ttt_mlp --mesh=fsdp=64
"""

from configs.published import published
from configs.ttt_linear_1b import MODEL as LINEAR
from jaxlong.config import Experiment
from jaxlong.mixers import TTTMLP

MODEL = LINEAR.clone(pattern=(TTTMLP(heads=32, head_dim=64, conv=4, gate=True),))


def config() -> Experiment:
    return published(MODEL, length=2048, batch=256, mesh="fsdp=-1", peak=1e-3)
