"""Federated algorithms, one file each. `ALGORITHMS` is what a treaty can name; `base.py` has the contract."""

from .base import Algorithm
from .fedavg import FedAvg
from .fedprox import FedProx

ALGORITHMS = {
    "fedavg": "FedAvg (McMahan et al. 2017): the mean of what silos learned",
    "fedprox": "FedProx (Li et al. 2020): local steps held near the global model",
    "scaffold": "SCAFFOLD (Karimireddy et al. 2020), DP-SCAFFOLD with [privacy]: control variates against drift",
    "alignment": "Feature distributions drawn together by MMD, silos weighed by domain attention (Wang et al. 2025)",
    "reversal": "DANN (Ganin and Lempitsky 2015): features from which no silo can be told, by a reversed gradient",
    "udalm": "UDALM (Karouzos et al. 2021): topics where there are labels, and language everywhere",
    "knn-adapter": "kNN-Adapter (Huang et al. 2023): how far to trust a store of text; the base stays as it is",
    "fedlap": "FedLAP-DP (Wang et al. 2024): synthetic texts with a silo's gradients instead of an update",
    "alone": "Every silo for itself, by the same steps: what the others are compared with",
}
"""Name → a line about it. `methods.py` makes them."""

__all__ = ["ALGORITHMS", "Algorithm", "FedAvg", "FedProx"]
