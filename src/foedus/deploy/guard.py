"""A silo's gate: bytes in, bytes out, and nothing reaches the silo's model and data that it did not agree to.

    size ─▶ signature ─▶ receiver, body ─▶ treaty ─▶ consent ─▶ number ─▶ signatures of all ─▶ charter, hours
         ─▶ what the treaty asks ─▶ round order ─▶ engine ─▶ model, names, shapes, finite ─▶ written down ─▶ work
         ─▶ consent and charter again

Whatever is refused changes nothing but the ledger's record of it. Whoever did not prove that it may ask hears the
same four bytes (`CLOSED`); the coordinator of a treaty hears the reason, in a signed report. Nothing is raised to the
transport. Charter, consent and treaty are looked at anew for every message, so that an operator's decision holds at
once, for what is being worked on too. An ask that was taken is in the ledger before it is worked on; one that was cut
off is worked on again when the same bytes come again, and the silo's custody then gives what it gave before.
"""

from __future__ import annotations

import logging
import shutil
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock
from typing import Any, Generic, Protocol, TypeVar

from ..engines.base import Ask, Engine
from ..engines.frames import pack_report, unpack_ask
from ..engines.in_process import InProcess
from ..errors import FoedusError, SiloError, WireError
from ..governance import TRAY, consent
from ..governance.envelope import ASK, CLOSED, OVERHEAD, Envelope, Reason, Refused, seal, unseal
from ..governance.ledger import Ledger
from ..governance.order import BYE, Order
from ..governance.refusals import Refusals
from ..secure.keys import Identity
from ..silo.handler import failed
from ..treaty import charter as charters
from ..treaty import signed as treaties
from ..treaty.charter import Charter, Refusal
from ..treaty.signed import Signed
from ..types import Params, Receipt, Report, Task
from ..wire import canonical, digest, pack
from .cost import cost_of, limit
from .forms import AGREE, EVALUATE, HELLO, TRAIN, Agreed, TaskForm, task_of

log = logging.getLogger("foedus.guard")
COUNTERS = "counters.json"
T = TypeVar("T")


class Home(Protocol):
    """Where the silo keeps things; see `home.py`."""

    @property
    def charter(self) -> Path: ...
    @property
    def state(self) -> Path: ...
    @property
    def treaties(self) -> Path: ...
    @property
    def budgets(self) -> Path: ...
    def work(self, digest: str) -> Path: ...


@dataclass(frozen=True)
class Work:
    """What answers under one treaty, how tasks must look that it is given, and what the silo came to by the treaty
    (`Workplace.agreed`).
    """

    engine: Engine
    form: TaskForm
    agreed: Mapping[str, Any] = field(default_factory=dict)


def work_of(engine: InProcess, agreed: Mapping[str, Any] | None = None) -> Work:
    """What a silo's own engine answers."""
    return Work(engine, TaskForm.of(engine.handler), agreed or {})


@dataclass(frozen=True)
class _Asked:
    """An ask that the treaty allows. `stream`: what it is round by round, "" for steps that are none of it."""

    ask: Ask
    task: Task | None = None

    @property
    def stream(self) -> str:
        return f"{self.ask.kind} {self.ask.split}".strip() if self.task or self.ask.kind == BYE else ""

    @property
    def round(self) -> int:
        return 0 if self.task is None else self.task.round


class Guard:
    """Answers sealed asks for one silo, one at a time, from any number of threads.

    `joined`: public key of the coordinator whose invitation the silo took, b"" for none. `engine`: what works under a
    treaty that all signed; called for every ask, it may load for minutes, and raises a `FoedusError` where it cannot.
    """

    def __init__(
        self,
        silo: str,
        identity: Identity,
        home: Home,
        joined: bytes,
        ledger: Ledger,
        engine: Callable[[Signed], Work],
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.silo, self.identity, self.home, self.joined = silo, identity, home, joined
        self.ledger, self.engine, self.now = ledger, engine, now
        self.refusals = Refusals(ledger)
        self._lock = Lock()
        self._charter, self._signed = _Kept(charters.load), _Kept(treaties.load)
        self._orders: dict[str, Order] = {}
        self._judged: dict[tuple[str, str], list[Refusal]] = {}
        self._last: tuple[bytes, bytes] | None = None

    def __call__(self, blob: bytes) -> bytes:
        """The answer to a message: whatever it is, and without ever raising."""
        try:
            envelope, charter = self._opened(blob)
        except Exception as error:
            self._note(_refused(error))
            return CLOSED
        with self._lock:
            return self._answer(envelope, charter)

    def flush(self) -> None:
        """Brings the ledger's counts of refusals up to date; to be called now and then, and at the end."""
        self.refusals.flush()

    close = flush

    # Who asks

    def _opened(self, blob: bytes) -> tuple[Envelope, Charter]:
        charter = self._charter(self.home.charter)
        trusted = charter.coordinators.trusted
        senders = {self.joined} if trusted == charters.JOINED else {bytes.fromhex(key) for key in trusted}
        most = charter.limits.max_bytes
        return unseal(blob, kind=ASK, senders=senders, receiver=self.identity.public, most=most), charter

    def _answer(self, envelope: Envelope, charter: Charter) -> bytes:
        asked: _Asked | None = None
        known = envelope.treaty.hex()
        try:
            signed, order = self._treaty(envelope)
            consent.read(self.home.state).check(signed.digest)
            new = order.is_new(envelope.number, envelope.name.hex())
            if not new and self._last is not None and self._last[0] == envelope.name:
                return self._last[1]
            asked = self._asked(signed, envelope)
            report = self._report(signed, order, envelope, asked, charter, new)
        except Exception as error:
            refused = _refused(error)
            self._note(refused, treaty=known, ask=asked.ask.kind if asked else "")
            if refused.reason in (Reason.LEFT, Reason.WITHDRAWN):
                self._forget(known)
            return self._sealed(envelope, failed(self.silo, asked.round if asked else 0, refused))
        answer = self._sealed(envelope, report)
        if len(answer) > charter.limits.max_bytes + OVERHEAD:
            came = f"{len(answer):,} of its answer"
            large = Refused(Reason.OVERSIZED, f"at most {charter.limits.max_bytes:,} bytes", came)
            self._note(large, treaty=known, ask=asked.ask.kind)
            answer = self._sealed(envelope, failed(self.silo, asked.round, large))
        self._last = envelope.name, answer
        return answer

    def _sealed(self, envelope: Envelope, report: Report) -> bytes:
        try:
            frame = pack_report(report)
        except WireError as error:
            frame = pack_report(failed(self.silo, report.round, error))
        return seal(
            self.identity, envelope.sender, envelope.treaty, envelope.number, frame, answers=envelope.name
        )  # fmt: skip

    # Whether it may

    def _treaty(self, envelope: Envelope) -> tuple[Signed, Order]:
        """The treaty of a message, which this silo knows from its own files, and what it took under it."""
        signed = treaties.found(self.home.treaties, envelope.treaty.hex(), self._signed)
        if signed is None:
            raise Refused(Reason.WRONG_TREATY, "a treaty that this silo knows", envelope.treaty.hex()[:12])
        if signed.coordinator != envelope.sender:
            raise Refused(Reason.STRANGER, "the coordinator of this treaty", "that of another")
        if signed.roster.get(self.silo) != self.identity.public:
            raise Refused(Reason.WRONG_TREATY, "a treaty with this silo in its roster", "one without")
        if signed.digest not in self._orders:
            taken = (r["body"] for r in self.ledger.records if r["kind"] == "asked")
            mine = [body for body in taken if body["treaty"] == signed.digest]
            self._orders[signed.digest] = Order(self.home.work(signed.digest) / COUNTERS, mine)
        return signed, self._orders[signed.digest]

    def _asked(self, signed: Signed, envelope: Envelope) -> _Asked:
        """What is asked, if the treaty has it."""
        try:
            ask = unpack_ask(bytes(envelope.body))
        except WireError as error:
            raise Refused(Reason.MALFORMED, error.expected, error.came) from error
        agreed = Agreed(signed.treaty, self.silo)
        agreed.ask(ask)
        if ask.kind not in (TRAIN, EVALUATE):
            return _Asked(ask)
        task = task_of(ask.payload)
        agreed.task(ask.kind, ask.split, task)
        return _Asked(ask, task)

    def _permitted(self, signed: Signed, charter: Charter) -> None:
        """Raises `Refused` unless all parties signed, and the charter permits the treaty, now."""
        if not signed.binding:
            raise Refused(Reason.UNSIGNED, "a treaty that all its parties signed", f"not {', '.join(signed.missing)}")
        clauses = self._clauses(signed, charter)
        if (shut := charters.closed(charter, self.now())) is not None:
            clauses = [shut]
        if clauses:
            raise _Forbidden(clauses)

    def _clauses(self, signed: Signed, charter: Charter) -> list[Refusal]:
        """The charter's clauses against a treaty; worked out once for each pair."""
        key = signed.digest, charter.digest
        if key not in self._judged:
            try:
                cost = cost_of(signed.treaty, self.silo, self.home.budgets, charter.privacy.delta)
            except FoedusError as error:
                _log(error)
                cost = None
            self._judged[key] = charters.refusals(charter, signed, joined=self.joined, cost=cost, now=self.now())
        return self._judged[key]

    # Work

    def _report(
        self, signed: Signed, order: Order, envelope: Envelope, asked: _Asked, charter: Charter, new: bool
    ) -> Report:
        if asked.ask.kind == HELLO:
            signed = _introduced(signed, asked.ask.mail)
            self._take(signed, order, envelope, asked, new)
            treaties.save(signed, treaties.place(self.home.treaties, signed.digest))
            return Report(self.silo, 0, b"", Receipt(self.silo, 0), signed.packed())
        if asked.ask.kind == BYE:
            self._take(signed, order, envelope, asked, new)
            self._forget(signed.digest)
            return Report(self.silo, 0, b"", Receipt(self.silo, 0))
        order.go_on()
        self._permitted(signed, charter)
        task_digest = digest(asked.ask.payload) if asked.task else ""
        if asked.task is not None:
            order.check(asked.stream, asked.round, task_digest)
        limit(charter, self.silo, self.home.budgets)
        work = self.engine(signed)
        if asked.task is not None:
            work.form.check(asked.ask.kind, asked.task)
            if (other := charters.another_model(charter, signed.treaty.model.base, asked.task.model)) is not None:
                raise _Forbidden([other])
        self._take(signed, order, envelope, asked, new, task_digest)
        report = self._worked(work, asked)
        self._still_allowed(signed)
        self._given(signed, envelope, asked, report, task_digest)
        return report

    def _still_allowed(self, signed: Signed) -> None:
        """Raises `Refused` for what the operator decided while the silo worked: what it made then stays inside. The
        clock is not asked again: work that began in its hours may end after them.
        """
        consent.read(self.home.state).check(signed.digest)
        if clauses := self._clauses(signed, self._charter(self.home.charter)):
            raise _Forbidden(clauses)

    def _take(self, signed: Signed, order: Order, envelope: Envelope, asked: _Asked, new: bool, task: str = "") -> None:
        """Writes an ask down, in the ledger and in the order of things, before anything is done about it."""
        if not new:
            return
        body = {
            "treaty": signed.digest, "number": envelope.number, "ask": envelope.name.hex(), "kind": asked.ask.kind,
            "bytes": len(envelope.body),
        }  # fmt: skip
        if asked.stream:
            body |= {"stream": asked.stream, "round": asked.round, "task": task}
        self.ledger.append("asked", body)
        order.take(envelope.number, envelope.name.hex(), asked.stream, asked.round, task)

    def _worked(self, work: Work, asked: _Asked) -> Report:
        """One report of this silo, of this round; whatever goes wrong inside is one of failure, without its data."""
        if asked.ask.kind == AGREE:
            return Report(self.silo, 0, b"", Receipt(self.silo, 0), canonical(work.agreed))
        try:
            (report,) = work.engine.ask([asked.ask])
            if report.silo != self.silo:
                raise SiloError("a report of this silo", "one of another", "Its engine serves one silo.")
        except Exception as error:
            _log(error)
            return failed(self.silo, asked.round, error)
        return report

    def _given(self, signed: Signed, envelope: Envelope, asked: _Asked, report: Report, task: str) -> None:
        """Writes down what leaves, before it leaves; of steps without a task only that they were asked."""
        if asked.task is None:
            return
        body = {
            "treaty": signed.digest, "number": envelope.number, "ask": asked.ask.kind,
            "round": asked.round + (asked.ask.kind == TRAIN),
            "task": task, "params": _digest_of(asked.task.params), "payload": report.receipt.payload,
            "bytes_up": len(report.payload), "bytes_down": len(asked.ask.payload), "failure": report.receipt.failure,
        }  # fmt: skip
        self.ledger.once("answered", body, same=("treaty", "number"))

    def _forget(self, treaty: str) -> None:
        """Removes what was kept so that a round could be given again: under this treaty none will be, any more."""
        shutil.rmtree(self.home.work(treaty) / TRAY, ignore_errors=True)

    def _note(self, refused: Refused, **facts: str) -> None:
        """Into the ledger; a ledger that cannot be written keeps no refusal from being one."""
        clauses = refused.clauses if isinstance(refused, _Forbidden) else ()
        try:
            self.refusals.note(refused, **facts, clauses=clauses)
        except FoedusError as error:
            log.error("%s", error)


def _introduced(signed: Signed, mail: bytes) -> Signed:
    """Everybody's signatures as far as both sides know them. `mail`: the coordinator's copy, or b""."""
    try:
        return signed.merged(treaties.unpack(mail)) if mail else signed
    except FoedusError as error:
        raise Refused(Reason.MALFORMED, "signatures under this treaty", type(error).__name__) from error


def _digest_of(params: Params) -> str:
    """As the coordinator's ledger has it of the round before."""
    return digest(pack({("params", name): x for name, x in params.items()}, {}))


class _Kept(Generic[T]):
    """Values of files, each read again when its file has changed."""

    def __init__(self, load: Callable[[Path], T]) -> None:
        self.load = load
        self._known: dict[Path, tuple[tuple[int, int, int], T]] = {}

    def __call__(self, path: Path) -> T:
        try:
            stat = path.stat()
        except OSError:
            return self.load(path)  # which says what is wrong
        mark = stat.st_mtime_ns, stat.st_size, stat.st_ino
        if self._known.get(path, (None,))[0] != mark:
            self._known[path] = mark, self.load(path)
        return self._known[path][1]


class _Forbidden(Refused):
    """What a charter's clauses forbid."""

    def __init__(self, clauses: Sequence[Refusal]) -> None:
        self.clauses = tuple(map(str, clauses))
        super().__init__(Reason.CHARTER, "what the charter permits", "; ".join(self.clauses))


def _refused(error: Exception) -> Refused:
    """What went wrong as a refusal. Of this silo's own errors the sender is told the kind alone."""
    if isinstance(error, Refused):
        return error
    _log(error)
    return Refused(Reason.UNABLE, "a silo that can answer", type(error).__name__)


def _log(error: Exception) -> None:
    """Says where it was raised. Only our own errors are quoted: the others' may hold data."""
    said = str(error) if isinstance(error, FoedusError) else type(error).__name__
    log.error("%s\n%s", said, "".join(traceback.format_tb(error.__traceback__)).rstrip())
