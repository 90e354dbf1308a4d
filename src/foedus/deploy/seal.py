"""The coordinator's gate: asks leave it sealed and numbered, and an answer comes in only if it is that silo's, to that
ask, under that treaty, and in the form that the treaty gives it.

What is not authentic is raised, and its message may be sent again: somebody on the way may have spoilt it. What a silo
signed and should not have is final: it becomes a failed report, and the round goes on without that silo.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .. import wire
from ..engines.base import Ask
from ..engines.frames import pack_ask, unpack_report
from ..engines.processes import round_of
from ..errors import FoedusError, SiloError, WireError, one_of
from ..governance.envelope import ANSWER, CLOSED, Reason, Refused, name_of, number_of, seal, unseal
from ..governance.ledger import Ledger
from ..governance.order import Numbers
from ..governance.refusals import Refusals
from ..secure.keys import Identity
from ..silo.handler import failed
from ..treaty import signed as treaties
from ..treaty.signed import Signed
from ..types import Receipt, Report
from .forms import AGREE, EVALUATE, HELLO, TRAIN, ReportForm, same_work

if TYPE_CHECKING:
    from ..build import Workplace

log = logging.getLogger("foedus.seal")
MOST = 1 << 32
MOST_WORDS = 1000
"""Characters of a silo's reason that are kept."""
OUTSTANDING = 8
"""Asks of a silo that are remembered: answers to older ones are unsolicited."""


@dataclass(frozen=True)
class _Asked:
    """What an answer must fit."""

    kind: str
    round: int
    task: str
    size: int


class Seal:
    """Seals asks under one treaty, and opens the answers to them. `numbers`: the file of the treaty's numbers, which
    outlives runs. `place`: the coordinator's own, without which no form is checked: then only hellos and good-byes may
    be asked. `most`: bytes of an answer.
    """

    def __init__(
        self,
        identity: Identity,
        signed: Signed,
        numbers: Path,
        ledger: Ledger,
        place: Workplace | None = None,
        most: int = MOST,
    ) -> None:
        self.identity, self.signed, self.most = identity, signed, most
        self.numbers, self.refusals = Numbers(numbers), Refusals(ledger)
        self.form = ReportForm.of(place) if place is not None else None
        self.agreed = place.agreed() if place is not None else None
        self._asked: dict[str, dict[bytes, _Asked]] = {}

    def seal(self, ask: Ask) -> bytes:
        """The bytes of an ask: a new message, each time. Raises `SiloError` for a silo that the treaty does not have,
        and `GuaranteeError` for work under a treaty that not all have signed.
        """
        if ask.silo not in self.signed.roster:
            raise SiloError("one of the treaty's silos", f'"{ask.silo}"', one_of(ask.silo, self.signed.roster))
        if ask.kind != HELLO:
            self.signed.require()
        treaty, receiver = bytes.fromhex(self.signed.digest), self.signed.roster[ask.silo]
        blob = seal(self.identity, receiver, treaty, self.numbers.next(ask.silo), pack_ask(ask))
        known = self._asked.setdefault(ask.silo, {})
        task = wire.digest(ask.payload) if ask.payload else ""
        known[name_of(blob)] = _Asked(ask.kind, round_of(ask) if ask.payload else 0, task, len(ask.payload))
        while len(known) > OUTSTANDING:
            del known[next(iter(known))]
        return blob

    def open(self, silo: str, asked: bytes, answer: bytes) -> Report:
        """The report in an answer of this silo to these bytes; a failed one for what it should not have signed.

        Raises `Refused` for what that silo did not sign as an answer to them. Either way the ledger counts it.
        """
        try:
            about, frame = self._opened(silo, asked, answer)
        except Refused as refused:
            self._note(refused, silo)
            raise
        try:
            return self._checked(silo, about, frame)
        except Refused as refused:
            self._note(refused, silo)
            return failed(silo, about.round, refused)

    def merged(self, hello: Report) -> Signed:
        """The treaty with the signatures that came with a hello; they are checked. Raises `WireError` for others'."""
        try:
            self.signed = self.signed.merged(treaties.unpack(hello.mail))
        except FoedusError as error:
            refused = Refused(Reason.MALFORMED, "signatures under this treaty", error.came)
            self._note(refused, hello.silo)
            raise refused from error
        return self.signed

    def flush(self) -> None:
        """Brings the ledger's counts of refusals up to date; to be called now and then, and at the end."""
        self.refusals.flush()

    def _opened(self, silo: str, asked: bytes, answer: bytes) -> tuple[_Asked, bytes]:
        if answer == CLOSED:
            raise Refused(Reason.CLOSED, "a silo that knows this coordinator", "one that answered no more than that")
        name, known = name_of(asked), self._asked.get(silo, {})
        if silo not in self.signed.roster or name not in known:
            raise Refused(Reason.UNSOLICITED, "an answer to something that was asked", "one to something else")
        key = self.signed.roster[silo]
        envelope = unseal(answer, kind=ANSWER, senders=(key,), receiver=self.identity.public, most=self.most)
        if envelope.treaty.hex() != self.signed.digest:
            raise Refused(Reason.WRONG_TREATY, f"treaty {self.signed.digest[:12]}", envelope.treaty.hex()[:12])
        if (envelope.answers, envelope.number) != (name, number_of(asked)):
            raise Refused(Reason.UNSOLICITED, "the answer to this ask", "the answer to another")
        return known[name], bytes(envelope.body)

    def _checked(self, silo: str, about: _Asked, frame: bytes) -> Report:
        try:
            report = unpack_report(frame)
        except WireError as error:
            raise Refused(Reason.MALFORMED, error.expected, error.came) from error
        if report.silo != silo:
            raise Refused(Reason.FALSE_RECEIPT, "a report of the silo that signed it", "one of another")
        if report.receipt.failure:
            return Report(
                silo, about.round, b"", Receipt(silo, about.round, failure=report.receipt.failure[:MOST_WORDS])
            )
        if about.kind != HELLO:
            self._receipt(about, report)
            if self.form is not None:
                self.form.check(about.kind, report)
        if about.kind == AGREE and self.agreed is not None:
            same_work(self.agreed, report.mail)
        return report

    def _receipt(self, about: _Asked, report: Report) -> None:
        """What a receipt says must be what happened."""
        receipt = report.receipt
        if not all(map(math.isfinite, [receipt.seconds, *receipt.disclosed.values()])) or receipt.seconds < 0:
            raise Refused(Reason.NON_FINITE, "finite facts in a receipt", "others")
        if about.kind not in (TRAIN, EVALUATE):
            return
        said = receipt.round, receipt.task, receipt.payload, receipt.bytes_up, receipt.bytes_down
        was = about.round, about.task, wire.digest(report.payload), len(report.payload), about.size
        if said != was:
            raise Refused(Reason.FALSE_RECEIPT, "a receipt of this task and this payload", "another")

    def _note(self, refused: Refused, silo: str) -> None:
        try:
            self.refusals.note(refused, silo=silo, treaty=self.signed.digest)
        except FoedusError as error:
            log.error("%s", error)


def reason_of(failure: str) -> Reason | None:
    """Why a silo refused, from its report's failure; None where it tried and failed."""
    word = failure.removeprefix("refused (").partition(")")[0] if failure.startswith("refused (") else ""
    return next((reason for reason in Reason if reason.value == word), None)
