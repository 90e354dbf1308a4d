"""Evaluation: sums from the silos to figures. Sums add; averages of averages are never taken."""

from .metrics import TOGETHER, Evaluation, figures

__all__ = ["TOGETHER", "Evaluation", "figures"]
