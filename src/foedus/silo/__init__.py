"""The silo: where the data lives. `handler.py` answers asks, `train.py` runs local steps (`private.py` private ones),
`shard.py` holds the data.
"""

from .handler import Handler
from .shard import Silo, Units, pool
from .train import LocalPlan

__all__ = ["Handler", "LocalPlan", "Silo", "Units", "pool"]
