"""What a treaty costs a silo's people, at the charter's δ and on top of all that was spent or promised before."""

from __future__ import annotations

from pathlib import Path

from ..governance.budget import Budget, Cap
from ..privacy import accountant, events
from ..treaty import Treaty, roster
from ..treaty.charter import Charter, Cost


def cost_of(treaty: Treaty, silo: str, budgets: Path, delta: float) -> Cost | None:
    """ε of a treaty by its own plan, and of the silo's life with it; None where the treaty protects nobody.

    It loads no model. Raises what `make_plan` raises for a treaty whose noise cannot be found.
    """
    if treaty.privacy.unit == "none":
        return None
    from ..build import privacy_plan  # heavy

    plan = privacy_plan(treaty, len(roster(treaty)))
    if plan is None:
        return None
    own, kept = plan.event(), Budget(budgets, silo)
    life = kept.promised() if kept.knows(treaty.digest()) else events.together(kept.promised(), own)
    return Cost(accountant.upper(own, delta), accountant.upper(life, delta))


def limit(charter: Charter, silo: str, budgets: Path) -> None:
    """Makes the charter's ε for life the cap of the silo's budget, which refuses by itself what exceeds it."""
    cap, kept = Cap(charter.privacy.epsilon_for_life, charter.privacy.delta), Budget(budgets, silo)
    if kept.cap != cap:
        kept.allow(cap)
