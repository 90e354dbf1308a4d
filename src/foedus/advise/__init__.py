"""Decision help: is federation the right answer, what would it cost, and what would a limited pilot be.

`answers.py` has the questions, `rules.py` the scoring, `cost.py` the arithmetic, `draft.py` the pilot.
"""

from __future__ import annotations

from typing import Any

from .answers import QUESTIONS, Answers, load
from .cost import SHAPES, costs
from .draft import pilot
from .rules import OPTIONS, RULES, judge

__all__ = ["OPTIONS", "QUESTIONS", "RULES", "SHAPES", "Answers", "advise", "costs", "judge", "load", "pilot"]


def advise(answers: Answers) -> dict[str, Any]:
    """The advice as plain values: every option with its score and reasons, costs, and a pilot where one makes sense.

    Raises `GuaranteeError` where the guarantee that is asked for cannot be accounted.
    """
    cost = costs(answers)
    options = judge(answers, cost)
    best = options[0]
    federate = best.name == "federation"
    return {
        "answers": answers.plain(),
        "best": best.name if best.score > 0 and not best.barred else None,
        "federation": federate,
        "options": [option.plain() for option in options],
        "costs": cost.plain(),
        "pilot": pilot(answers).plain() if answers.silos >= 2 else None,
    }
