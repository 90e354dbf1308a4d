"""A run's compliance record: what regulations ask for, set beside what happened, with evidence and gaps.

It is written from the ledger, the treaty and the released artefacts alone, so anybody who has the folder can write it
again. It states evidence, never a legal conclusion: whether a rule applies, and whether what is here is enough, is for
those who answer for it. What is asked for is in our words; the reference leads to the text that binds.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from ..errors import TreatyError
from ..treaty import Treaty, describe, from_dict, not_covered, unprotected
from .folder import Run, read_run, write_page
from .guarantee import guarantee_of
from .record import Section, Table, page, write_json

SCHEMA, VERSION = "foedus/compliance", 1
NO_CONCLUSION = (
    "This page states evidence and gaps. It draws no legal conclusion: whether a rule applies here, and whether this is"
    " enough, is for those who answer for it to say."
)
State = Literal["evidence", "in part", "gap"]


@dataclass(frozen=True)
class Evidence:
    """One thing that can be looked up. `kind`: treaty, ledger, guarantee, artefact or test; `where`: in which file,
    record or clause; `what` it shows.
    """

    kind: Literal["treaty", "ledger", "guarantee", "artefact", "test"]
    where: str
    what: str


@dataclass(frozen=True)
class Row:
    """What one provision asks for, in our words, and what there is about it."""

    reference: str
    asks: str
    evidence: tuple[Evidence, ...] = ()
    gaps: tuple[str, ...] = ()

    @property
    def state(self) -> State:
        """Whether there is evidence, gaps, or both."""
        return "gap" if not self.evidence else "in part" if self.gaps else "evidence"


@dataclass(frozen=True)
class Facts:
    """A run and its treaty, and what may be cited of them. `folder`: the run's."""

    run: Run
    treaty: Treaty
    folder: Path
    found: dict[str, Any] = field(default_factory=dict, compare=False)

    @cached_property
    def records(self) -> Sequence[Any]:
        """The ledger as far as it fits."""
        return self.run.ledger.records[: self.run.ledger.broken_at]

    @property
    def agreed(self) -> str:
        """The digest of the treaty that the ledger opens with; "" where it does not say."""
        return next((str(r["body"].get("treaty", "")) for r in self.records if r["kind"] == "opened"), "")

    @property
    def broken(self) -> tuple[str, ...]:
        """The gaps that a broken or missing ledger leaves, or one that is about another treaty."""
        if not self.run.ledger.records:
            return ("The run has no ledger.",)
        if (at := self.run.ledger.broken_at) is not None:
            return (f"The ledger does not verify from record {at} on: {self.run.ledger.why}.",)
        if self.agreed != self.treaty.digest():
            opened, reads = self.agreed[:12], self.treaty.digest()[:12]
            said = f"the ledger opens with treaty {opened}…, and treaty.toml reads as {reads}…"
            return (f"The treaty was changed, or this version reads it otherwise: {said}.",)
        return ()

    def clause(self, *keys: str, what: str) -> Evidence:
        """Clauses of the treaty, as its resolved text has them."""
        tables = self.treaty.tables()
        said = [f"{k} = {tables.get(k.partition('.')[0], {}).get(k.partition('.')[2], 'not set')}" for k in keys]
        return Evidence("treaty", f"treaty.toml, {'; '.join(said)}", what)

    def ledger(self, kind: str, what: str) -> tuple[Evidence, ...]:
        """The records of a kind, by number and hash; none where there are none."""
        found = [r for r in self.records if r["kind"] == kind]
        if not found:
            return ()
        first, last = found[0], found[-1]
        span = f"{len(found)} records, {first['index']} to {last['index']}"
        numbers = f"record {first['index']}" if first is last else span
        where = f'ledger.jsonl, kind "{kind}", {numbers} (last hash {last["hash"][:16]}…)'
        return (Evidence("ledger", where, what),)

    def artefact(self, name: str, what: str) -> tuple[Evidence, ...]:
        """A file of the run's folder; none where it is missing."""
        return (Evidence("artefact", name, what),) if (self.folder / name).is_file() else ()


Rows = Callable[[Facts], Iterator[Row]]


def compliance(folder: Path) -> dict[str, Any]:
    """The record of a run's folder. Raises `RunError` where it is none, `TreatyError` where it has no treaty."""
    f = facts_of(folder)
    head = f.records[-1] if f.records else {}
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "conclusion": NO_CONCLUSION,
        "run": f.run.name,
        "ended": f.run.ended,
        "treaty": f.agreed or f.treaty.digest(),
        "leaves": describe(f.treaty),
        "ledger": {"records": len(f.run.ledger.records), "verified": f.run.ledger.broken_at is None and bool(f.records),
                   "head": head.get("hash", "")},
        "frameworks": [
            {"name": name, "about": about, "rows": [_plain(row) for row in rows(f)]} for name, about, rows in FRAMEWORKS
        ],
    }  # fmt: skip


def write_compliance(folder: Path) -> tuple[Path, Path]:
    """Writes `compliance.json` and `compliance.html` into a run's folder; returns their paths."""
    known = compliance(folder)
    do = "Make room or mend the permissions, and write it again with `foedus compliance`."
    return write_json(folder / "compliance.json", known), write_page(folder / "compliance.html", render(known), do)


def facts_of(folder: Path) -> Facts:
    """A run's folder, read."""
    run = read_run(folder)
    if not run.treaty_text:
        raise TreatyError("a run with a treaty.toml", "none", "Restore it: without it nothing says what was agreed.")
    return Facts(run, from_dict(tomllib.loads(run.treaty_text)), Path(folder))


# What can be cited again and again


def _purpose(f: Facts) -> tuple[tuple[Evidence, ...], tuple[str, ...]]:
    if f.treaty.treaty.purpose:
        return (f.clause("treaty.purpose", what="the purpose is part of the digest that parties agree on"),), ()
    return (), ("The treaty names no purpose.",)


def _leaves(f: Facts) -> tuple[Evidence, ...]:
    return (Evidence("treaty", "treaty.toml, in words below", f"what leaves a silo: {len(describe(f.treaty))} things"),)


def _minimised(f: Facts) -> tuple[Evidence, ...]:
    tables = f.treaty.tables()
    asked = [key for key in ("data.text", "data.scrub", "data.max_examples") if key.split(".")[1] in tables["data"]]
    return (
        *_leaves(f),
        f.clause(*asked, "disclosure.loss", "disclosure.holdings", what="what is read, and what stands under a name"),
        *f.ledger("round", "rounds are recorded by digests and counts; no text and no update"),
    )


def _scrub_gap(f: Facts) -> tuple[str, ...]:
    scrubbed = f.treaty.data.scrub
    return () if scrubbed else ("The treaty asks for no scrubbing of names and addresses from the text.",)


def _scrubbed(f: Facts) -> tuple[Evidence, ...]:
    return (f.clause("data.scrub", what="marks in place of names and addresses"),) if f.treaty.data.scrub else ()


def _sums(f: Facts) -> tuple[tuple[Evidence, ...], tuple[str, ...]]:
    if f.treaty.secure.sums == "open":
        return (), ("Sums are in the open: the coordinator sees every single update.",)
    shown = Evidence("test", "tests/test_secure_run.py::"
                     "test_nothing_leaves_a_silo_but_the_masked_vector_and_protocol_messages_of_fixed_size",
                     "what leaves a silo under secure sums")  # fmt: skip
    return (f.clause("secure.sums", "cohort.minimum", what="no single update can be read"), shown), ()


def _guarantee(f: Facts) -> tuple[tuple[Evidence, ...], tuple[str, ...]]:
    """The guarantee as the ledger opens with it, and as the summary states it."""
    opened = next((r["body"].get("privacy") for r in f.records if r["kind"] == "opened"), None)
    given = guarantee_of(opened or {})
    if not given.stated:
        return (), (unprotected(f.treaty),)
    real = () if not given.simulated else ("The noise was simulated: nobody is protected by this run.",)
    shown = "tests/test_private_run.py::test_every_kind_of_guarantee_runs_to_a_statement_that_its_ledger_bears_out"
    evidence = (
        Evidence("guarantee", "ledger.jsonl, record 0, privacy", given.short),
        Evidence("test", shown, "a statement is what the ledger's events compose to"),
    )
    uncovered = not_covered(f.treaty)
    return evidence, (*real, *((f"ε does not cover: {'; '.join(uncovered)}.",) if uncovered else ()))


def _chain(f: Facts) -> tuple[Evidence, ...]:
    if f.run.ledger.broken_at is not None or not f.records:
        return ()
    head = f.records[-1]
    where = f"ledger.jsonl, records 0 to {head['index']}, head {head['hash']}"
    return (
        Evidence("ledger", where, "a chain of hashes without gap or change"),
        Evidence("test", "tests/governance/test_ledger.py::test_every_changed_byte_is_found", "changes are found"),
    )


def _signed(f: Facts) -> tuple[tuple[Evidence, ...], tuple[str, ...]]:
    """Signatures under the treaty, where the run lies in a federation's home."""
    place = f.folder.resolve().parent.parent / "treaties" / f.treaty.digest()[:12]
    files = sorted(place.glob("*.treaty.json")) if place.is_dir() else []
    if not files:
        return (), ("No signed treaty lies beside this run: which organisations agreed is not shown here.",)
    from ..treaty.signed import load

    signed = load(files[0])
    said = f"signatures of {', '.join(sorted(signed.signatures)) or 'no silo'}"
    gap = (f"No signature of {', '.join(signed.missing)}.",) if signed.missing else ()
    return (Evidence("treaty", f"treaties/{f.treaty.digest()[:12]}/{files[0].name}", said),), gap


def _measured(f: Facts) -> tuple[tuple[Evidence, ...], tuple[str, ...]]:
    evaluated = f.run.summary.get("evaluation")
    if not evaluated:
        return (), ("The run has not ended, so its final evaluation is missing.",)
    said = f"held-out figures of: {', '.join(sorted(evaluated))}"
    return (Evidence("artefact", "summary.json, evaluation", said),), ()


def _audited(f: Facts) -> tuple[tuple[Evidence, ...], tuple[str, ...]]:
    if not f.run.audit:
        return (), ("No audit was made: `foedus audit` attacks the released model as an adversary would.",)
    return f.artefact("audit.html", "attacks on the released model, and how they fared"), ()


def _adapter(f: Facts) -> tuple[Evidence, ...]:
    digest = (f.run.summary.get("adapter") or {}).get("sha256")
    return (Evidence("artefact", "adapter/", f"the released adapter, SHA-256 {digest}"),) if digest else ()


_AT_REST = "Whether keys and checkpoints were encrypted at rest is not in a run's folder; `foedus status` says it."
_WIRE = "How messages were carried is not in a run's folder; docs/deploy.md says what a deployment must switch on."
_THREATS = "The threat model of this treaty is written by `foedus threats`."


def _row(reference: str, asks: str, *parts: Any) -> Row:
    """A row from evidence, tuples of it, gaps as text, and pairs of both."""
    evidence: list[Evidence] = []
    gaps: list[str] = []
    for part in _flat(parts):
        (evidence if isinstance(part, Evidence) else gaps).append(part)
    return Row(reference, asks, tuple(dict.fromkeys(evidence)), tuple(dict.fromkeys(gaps)))


def _flat(parts: Any) -> Iterator[Any]:
    for part in parts:
        if isinstance(part, tuple):
            yield from _flat(part)
        else:
            yield part


# The frameworks


def _gdpr(f: Facts) -> Iterator[Row]:
    yield _row(
        "Art. 5(1)(a)",
        "lawful, fair and transparent processing",
        _leaves(f),
        f.artefact("report.html", "what was done, in plain words"),
        "The legal basis is not recorded here.",
    )
    yield _row("Art. 5(1)(b)", "collected for stated purposes, and used for no other", _purpose(f), _signed(f))
    yield _row("Art. 5(1)(c)", "data minimisation", _minimised(f), _scrub_gap(f), f.broken)
    yield _row("Art. 5(1)(d)", "accurate data", "Nothing here says whether the text in the silos is accurate.")
    yield _row(
        "Art. 5(1)(e)",
        "kept no longer than needed",
        Evidence("treaty", "treaty.toml, [data] source", "text stays in its silo; the run's folder holds none"),
        "How long adapter, checkpoints and ledger are kept is not part of the treaty: the operator must say.",
    )
    yield _row("Art. 5(1)(f)", "integrity and confidentiality", _sums(f), _guarantee(f), _chain(f), f.broken)
    yield _row(
        "Art. 5(2)",
        "accountability: compliance can be shown",
        _chain(f),
        f.broken,
        f.ledger("opened", "which treaty, which base model, which silos"),
    )
    yield _row(
        "Art. 6, 7",
        "a legal basis; where it is consent, that it was given and can be withdrawn",
        _signed(f),
        "Consent of the people in the text, or another basis, is for each silo to hold; none is recorded here.",
        "What is spent of a budget, and what a model has learned, is not undone when consent is withdrawn.",
    )
    yield _row(
        "Art. 25",
        "data protection by design and by default",
        _sums(f),
        _guarantee(f),
        f.clause("disclosure.loss", "disclosure.holdings", what="what is disclosed, decided beforehand"),
    )
    yield _row(
        "Art. 30",
        "records of processing activities",
        _purpose(f),
        f.ledger("opened", "the parties by name"),
        f.ledger("round", "what happened, round by round"),
        f.broken,
        "Contacts, categories of people and data, and time limits are not recorded here.",
    )
    yield _row("Art. 32", "security of processing", _sums(f), _guarantee(f), _chain(f), _AT_REST, _WIRE)
    yield _row(
        "Art. 35",
        "an impact assessment where the risk is high",
        _audited(f),
        _THREATS,
        "The assessment itself is not made here; this page and the threat model may feed it.",
    )


def _hipaa(f: Facts) -> Iterator[Row]:
    yield _row("§ 164.502(b)", "the minimum necessary", _minimised(f), _scrub_gap(f))
    yield _row(
        "§ 164.514(a), (b)",
        "de-identification",
        _scrub_gap(f),
        _scrubbed(f),
        "Scrubbing is no expert determination, and does not remove all 18 identifiers of the safe harbour.",
    )
    yield _row("§ 164.308(a)(1)(ii)(A)", "a risk analysis", _audited(f), _THREATS)
    yield _row("§ 164.312(a)", "access control", _signed(f), "Who may log in to the machines is not recorded here.")
    yield _row("§ 164.312(b)", "audit controls", _chain(f), f.ledger("round", "activity, round by round"), f.broken)
    yield _row("§ 164.312(c)(1)", "integrity", _chain(f), _adapter(f), f.broken)
    yield _row("§ 164.312(d)", "authentication of who takes part", _signed(f))
    yield _row("§ 164.312(e)(1)", "transmission security", _sums(f), _WIRE)
    yield _row(
        "§ 164.316(b)(2)(i)",
        "documentation kept for six years",
        f.artefact("ledger.jsonl", "the record to keep"),
        "How long it is kept is for the operator to set.",
    )


def _ai_act(f: Facts) -> Iterator[Row]:
    yield _row(
        "Art. 10",
        "data governance: origin, preparation, biases, gaps",
        f.clause("data.source", "silos.by", "split.by", what="where data come from and how they are divided"),
        _by_domain(f),
        "Representativeness and bias of the silos' text are not examined here.",
    )
    yield _row(
        "Art. 11",
        "technical documentation",
        f.artefact("report.html", "method, figures, hardware, versions"),
        f.artefact("adapter/README.md", "the model card"),
        Evidence("treaty", "treaty.toml", "all settings"),
    )
    yield _row(
        "Art. 12",
        "events are logged automatically",
        _chain(f),
        f.ledger("round", "every round"),
        f.broken,
        "Use of the model after its release is not logged here.",
    )
    yield _row(
        "Art. 13",
        "instructions and limits for those who deploy it",
        f.artefact("adapter/README.md", "the model card"),
        _guarantee(f),
        _purpose(f),
    )
    yield _row(
        "Art. 15",
        "accuracy, robustness, cybersecurity",
        _measured(f),
        _audited(f),
        _sums(f),
        "Resistance to poisoned updates was not measured in this run.",
    )
    yield _row(
        "Art. 17",
        "a quality management system",
        _chain(f),
        _adapter(f),
        "A run is one record of such a system, not the system.",
    )
    yield _row(
        "Art. 53",
        "general-purpose models: documentation, and a summary of training content",
        f.clause("model.base", what="the base model"),
        f.clause("data.source", what="the training content's source"),
        "No summary of the silos' content is written: it stays in the silos.",
    )


def _nist(f: Facts) -> Iterator[Row]:
    yield _row(
        "GOVERN 1.4",
        "risk management by transparent policies and controls",
        Evidence("treaty", f"treaty.toml, digest {f.treaty.digest()}", "rules agreed before training"),
        _signed(f),
    )
    yield _row(
        "GOVERN 6.1",
        "risks from third parties",
        f.clause("model.base", what="the base model"),
        f.ledger("opened", "its digest"),
        "Where the base model's own training data came from is not known here.",
    )
    yield _row("MAP 1.1", "intended purpose and context", _purpose(f), "Context of use is not described beyond that.")
    yield _row("MAP 5.1", "likelihood and size of impacts", _audited(f), _THREATS)
    yield _row("MEASURE 2.3", "performance on conditions like those of use", _measured(f), _by_domain(f))
    yield _row("MEASURE 2.7", "security and resilience", _sums(f), _chain(f), f.broken)
    yield _row("MEASURE 2.10", "privacy risk", _guarantee(f), _audited(f))
    yield _row(
        "MANAGE 2.4",
        "a way to supersede, disengage or deactivate",
        _adapter(f),
        "Promotion and rollback are in the registry and not in a run's folder.",
    )
    yield _row(
        "MANAGE 4.1", "monitoring after deployment", "What happens to the model after its release is not seen here."
    )


def _by_domain(f: Facts) -> tuple[Evidence, ...]:
    named = f.treaty.data.domain
    return (f.clause("data.domain", what="results are broken down by it"),) if named else ()


FRAMEWORKS: tuple[tuple[str, str, Rows], ...] = (
    ("GDPR", "Regulation (EU) 2016/679", _gdpr),
    ("HIPAA", "45 CFR Part 164", _hipaa),
    ("EU AI Act", "Regulation (EU) 2024/1689; most of it binds high-risk systems, Art. 53 general ones", _ai_act),
    ("NIST AI RMF", "AI RMF 1.0 (NIST AI 100-1), which is voluntary", _nist),
)  # fmt: skip


# The page


def render(known: dict[str, Any]) -> str:
    """The record as a page."""
    ledger = known["ledger"]
    holds = f"ledger of {ledger['records']} records, " + ("verified" if ledger["verified"] else "NOT verified")
    about = f"Treaty {known['treaty'][:12]}…; {holds}; schema {SCHEMA} {VERSION}."
    sections = [_overview(known), *map(_section, known["frameworks"]), _left(known["leaves"])]
    return page("Compliance record", known["run"], about, sections, NO_CONCLUSION)


def _overview(known: dict[str, Any]) -> Section:
    counts = [
        [x["name"], *(str([row["state"] for row in x["rows"]].count(s)) for s in ("evidence", "in part", "gap"))]
        for x in known["frameworks"]
    ]
    heads = ["Framework", "Evidence", "In part", "Gap"]
    return Section("Overview", "How many provisions have evidence, evidence and gaps, or gaps alone.",
                   [Table("Provisions by state", heads, counts)])  # fmt: skip


def _left(lines: Sequence[str]) -> Section:
    return Section("What leaves a silo", "By the treaty, in words.", [Table("What leaves a silo", ["What"],
                                                                           [[line] for line in lines])])  # fmt: skip


def _section(framework: dict[str, Any]) -> Section:
    rows = [
        [row["reference"], row["asks"], row["state"],
         "\n".join(f"{e['what']} [{e['where']}]" for e in row["evidence"]) or "–", " ".join(row["gaps"]) or "–"]
        for row in framework["rows"]
    ]  # fmt: skip
    heads = ["Provision", "Asks for", "State", "Evidence", "Gaps"]
    return Section(framework["name"], framework["about"] + ".", [Table(framework["name"], heads, rows)])


def _plain(row: Row) -> dict[str, Any]:
    return {
        "reference": row.reference, "asks": row.asks, "state": row.state, "gaps": list(row.gaps),
        "evidence": [vars(evidence) for evidence in row.evidence],
    }  # fmt: skip
