"""Continuing prompts and scoring tokens with a trained model."""

from jaxlong.inference.generate import generate, stream
from jaxlong.inference.runner import Runner
from jaxlong.inference.sampler import Greedy, Sample, Sampler

__all__ = ["Greedy", "Runner", "Sample", "Sampler", "generate", "stream"]
