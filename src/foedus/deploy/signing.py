"""Proposing, judging, signing and collecting treaties, in the home of a coordinator or of a silo.

What is refused here stands in the silo's ledger with the clause that said no, as what is refused by `guard.py` does.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from ..errors import FoedusError, GuaranteeError, RunError, one_of
from ..governance.envelope import Reason, Refused
from ..governance.identity import key_from
from ..governance.refusals import Refusals
from ..treaty import Treaty, charter, signed
from ..treaty.charter import Refusal
from ..treaty.signed import Signed
from .cost import cost_of
from .home import FederationHome, Home, SiloHome


def home_at(path: Path) -> Home:
    """Whichever home a folder is: a silo's or a coordinator's. Raises `RunError` for any other folder."""
    return SiloHome.at(path) if (path / SiloHome.FILE).is_file() else FederationHome.at(path)


def propose(home: FederationHome, treaty: Treaty) -> tuple[Signed, Path]:
    """A treaty as the coordinator signs it for the silos that it names, which must have been admitted."""
    made = signed.propose(treaty, home.identity(), {name: key_from(card.key) for name, card in home.cards().items()})
    path = _kept(home, made)
    body = {"treaty": made.digest, "name": made.name, "silos": list(made.roster)}
    home.open_ledger().once("proposed", body, same=("treaty",))
    return signed.load(path), path


def judged(home: SiloHome, treaty: Signed, now: datetime | None = None) -> list[Refusal]:
    """The clauses of a silo's charter that forbid a treaty."""
    permits = charter.load(home.charter)
    try:
        cost = cost_of(treaty.treaty, home.name, home.budgets, permits.privacy.delta)
    except FoedusError:  # which the charter takes for a no
        cost = None
    return charter.refusals(permits, treaty, joined=home.joined, cost=cost, now=now or datetime.now(UTC))


def sign(home: SiloHome, treaty: Signed, now: datetime | None = None) -> tuple[Signed, Path]:
    """A treaty with the silo's signature, kept in its home. Raises `GuaranteeError` for one that its coordinator did
    not sign, that knows the silo by another key, or that its charter forbids; the ledger keeps the attempt.
    """
    name, own = home.name, home.identity()
    if treaty.roster.get(name) != own.public:
        came = "another" if name in treaty.roster else "none"
        do = "Send your card to the coordinator, who admits it and proposes the treaty anew."
        raise GuaranteeError(f'this silo\'s key for "{name}" in the treaty', came, do)
    if not treaty.proposed:
        raise GuaranteeError("a treaty that its coordinator signed", "one that it did not", "Ask it for its own copy.")
    ledger = home.open_ledger()
    if clauses := judged(home, treaty, now):
        refused = Refused(Reason.CHARTER, "what this silo's charter permits", f"{len(clauses)} clauses that forbid it")
        Refusals(ledger).note(refused, treaty=treaty.digest, ask="sign", clauses=[str(clause) for clause in clauses])
        raise GuaranteeError(
            f"a treaty within the charter of {name}", "; ".join(map(str, clauses)),
            "Nothing was signed, and the ledger keeps the attempt. Ask for a treaty within the charter, or change it.",
        )  # fmt: skip
    path = _kept(home, treaty.signed_by(own))
    ledger.once("signed", {"treaty": treaty.digest, "name": treaty.name}, same=("treaty",))
    return signed.load(path), path


def collect(home: Home, copies: Iterable[Signed]) -> list[Signed]:
    """Brings signatures from copies into the home's own treaties; those treaties. Raises `RunError` for a copy of a
    treaty that the home does not have.
    """
    found: dict[str, Signed] = {}
    for copy in copies:
        if signed.found(home.treaties, copy.digest) is None:
            known = [treaty.name for treaty in home.signed()]
            came = f'"{copy.name}" ({copy.digest[:12]})'
            raise RunError("a copy of a treaty that is here", came, f"Sign it first. {one_of(copy.name, known)}")
        found[copy.digest] = signed.load(_kept(home, copy))
    return list(found.values())


def _kept(home: Home, treaty: Signed) -> Path:
    """Keeps a treaty in the home, with the signatures that are known of it."""
    return signed.save(treaty, signed.place(home.treaties, treaty.digest))
