"""The server's half of a round: who is asked, how answers become one total, how a release moves the model."""

from .aggregators import Aggregator, WeightedMean
from .optimizers import OPTIMIZERS, Adaptive, ServerOptimizer, Sgd
from .samplers import FixedSize, Full, Poisson, Sampler

__all__ = [
    "OPTIMIZERS",
    "Adaptive",
    "Aggregator",
    "FixedSize",
    "Full",
    "Poisson",
    "Sampler",
    "ServerOptimizer",
    "Sgd",
    "WeightedMean",
]
