"""The silo: where the data lives. `handler.py` answers asks, `train.py` runs local steps, `shard.py` holds the data."""

from .handler import Handler
from .shard import Silo, pool
from .train import LocalPlan

__all__ = ["Handler", "LocalPlan", "Silo", "pool"]
