"""The server's half of a round: who is asked, how answers become one total, how a release moves the model."""

from .aggregators import Aggregator, ExpectedMean, WeightedMean
from .optimizers import OPTIMIZERS, Adaptive, ServerOptimizer, Sgd
from .samplers import FixedSize, Full, Poisson, Sampler, SecretPoisson

__all__ = [
    "OPTIMIZERS",
    "Adaptive",
    "Aggregator",
    "ExpectedMean",
    "FixedSize",
    "Full",
    "Poisson",
    "Sampler",
    "SecretPoisson",
    "ServerOptimizer",
    "Sgd",
    "WeightedMean",
]
