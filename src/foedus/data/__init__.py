"""Text from anywhere as one table; who holds which part of it; what is held out."""

from .partition import Partition, partition
from .readers import Columns, dropped, from_dataset, only, read
from .split import SplitPlan, Splits, bound_contributions, holdings, split

__all__ = [
    "Columns",
    "Partition",
    "SplitPlan",
    "Splits",
    "bound_contributions",
    "dropped",
    "from_dataset",
    "holdings",
    "only",
    "partition",
    "read",
    "split",
]
