"""How a cohort's answers become one sum: in the open, or so that the coordinator learns the sum and nothing else."""

from .base import Gather, InTheOpen, ask
from .encrypted import EncryptedSums
from .masked import Masked

__all__ = ["EncryptedSums", "Gather", "InTheOpen", "Masked", "ask"]
