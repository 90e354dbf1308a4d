"""Federated algorithms, one file each. `ALGORITHMS` maps a treaty's name to its class; `base.py` has the contract."""

from .base import Algorithm
from .fedavg import FedAvg
from .fedprox import FedProx

ALGORITHMS: dict[str, type] = {"fedavg": FedAvg, "fedprox": FedProx}

__all__ = ["ALGORITHMS", "Algorithm", "FedAvg", "FedProx"]
