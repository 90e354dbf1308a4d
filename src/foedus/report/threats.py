"""A treaty's threat model, for programs and for people: who sees what, what defends it, what remains, what shows it.

Everything follows from the treaty's features. The JSON has a schema of its own, `SCHEMA` and `VERSION`; a reader that
knows version 1 can read every 1. Claims about the transport and about homes hold where silos are run as docs/deploy.md
says; they are marked "deployment".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ..privacy.statement import UNITS
from ..treaty import Treaty, not_covered
from .folder import write_page
from .record import Section, Table, page, write_json

SCHEMA, VERSION = "foedus/threats", 1

Sight = Literal["nothing", "size and time", "noised", "sum", "noised sum", "whole"]
SIGHTS: tuple[Sight, ...] = ("nothing", "size and time", "noised sum", "sum", "noised", "whole")
"""What one may see of something, roughly from least to most."""

ASSETS = {
    "text": "the silo's text, and who is in it",
    "update": "one silo's update of one round",
    "total": "the sum of a round's updates",
    "model": "the released adapter, and every round's model",
    "figures": "losses and evaluation sums",
    "holdings": "how much of what each silo holds",
    "attendance": "which silos took part, when, for how long",
    "keys": "identities, masks' secrets, keys that open what lies on disk",
    "record": "ledgers and budgets: what happened, what was spent",
}
PARTIES = {
    "operator": "the silo's own operator",
    "silo": "another silo of the treaty, curious or false, alone or with others",
    "coordinator": "the coordinator, if it follows the protocol and remembers everything",
    "lying-coordinator": "the coordinator, if it also sends what it should not",
    "network": "whoever carries or cuts the messages",
    "user": "whoever gets the released model",
    "host": "whoever runs the machine under a silo or the coordinator",
}


@dataclass(frozen=True)
class Sees:
    """What one `party` sees of one `asset`, and `because` of what."""

    party: str
    asset: str
    sight: Sight
    because: str


@dataclass(frozen=True)
class Threat:
    """What could be done, by whom, to what. `remains`: what no defence here takes away. `tests`: that show a defence;
    none where nothing is claimed. `needs`: "" or "deployment".
    """

    id: str
    party: str
    asset: str
    what: str
    defends: str
    remains: str
    tests: tuple[str, ...] = ()
    needs: str = ""


def threats(treaty: Treaty) -> dict[str, Any]:
    """The threat model of a treaty: assets, parties, who sees what, threats, and what no guarantee covers."""
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "treaty": {"name": treaty.name, "digest": treaty.digest(), "features": sorted(treaty.features())},
        "assets": [{"id": name, "about": about} for name, about in ASSETS.items()],
        "parties": [{"id": name, "about": about} for name, about in PARTIES.items()],
        "sees": [asdict(row) for row in sees(treaty)],
        "threats": [asdict(row) | {"tests": list(row.tests)} for row in found(treaty)],
        "not_covered": not_covered(treaty) if treaty.privacy.unit != "none" else [],
    }


def write_threats(treaty: Treaty, folder: Path) -> tuple[Path, Path]:
    """Writes `threats.json` and `threats.html` into a folder; returns their paths."""
    known = threats(treaty)
    return write_json(folder / "threats.json", known), write_page(folder / "threats.html", render(known), _DO)


_DO = "Make room or mend the permissions, and write it again with `foedus threats`."


def sees(t: Treaty) -> list[Sees]:
    """Who sees what, by party and asset, in the order of both; every pair has a line."""
    told = {(row.party, row.asset): row for row in _sees(t)}
    return [told.get((p, a), Sees(p, a, "nothing", "nothing of it leaves for there")) for p in PARTIES for a in ASSETS]


def _sees(t: Treaty) -> Iterator[Sees]:
    yield from (Sees("operator", asset, "whole", "it is its own") for asset in ("text", "update", "holdings", "keys"))
    yield Sees("operator", "record", "whole", "its own ledger and budget")
    for party in ("operator", "silo", "coordinator", "lying-coordinator"):
        yield Sees(party, "model", "noised" if _noised(t) else "whole", "every round's model goes to every silo")
    yield Sees("user", "model", "noised" if _noised(t) else "whole", "the adapter is what is released")
    update, why = _update_at_coordinator(t)
    total: Sight = "noised sum" if _noised_before_sum(t) else "sum"
    for party in ("coordinator", "lying-coordinator"):
        yield Sees(party, "update", update, why)
        yield Sees(party, "total", total, "it adds up, or reads the secret sum")
        yield Sees(party, "figures", _figures(t), "sums of all silos only" if _secret(t) else "each silo's sums")
        yield _holdings(t, party)
        yield Sees(party, "attendance", "whole", "it asks, and sees who answers, when, with how many bytes")
        yield Sees(party, "record", "whole", "its own ledger; silos' budgets stay with them")
    if t.secure.sums == "encrypted":
        yield Sees("silo", "total", total, "the silos that hold the secret key decrypt every sum")
    elif t.cohort.minimum <= 2 or not _secret(t):
        yield Sees("silo", "total", total, "the next model less the last one, where the server's step is known")
    yield Sees("silo", "attendance", "nothing" if _hidden(t) else "size and time", _ATTENDANCE[_hidden(t)])
    yield Sees(
        "network", "attendance", "size and time", "who talks when, and how much; TLS hides the rest (deployment)"
    )
    yield Sees("host", "text", "whole", "memory and disk of a machine are open to whoever runs it")
    yield Sees("host", "update", "whole", "the same, at the silo")
    yield Sees("host", "keys", "whole", "while a process runs; at rest they are encrypted where a key was given"
                                        " (deployment)")  # fmt: skip
    yield Sees("host", "record", "whole", "ledgers are not secret: they hold digests and counts")


def found(t: Treaty) -> list[Threat]:
    """The threats that this treaty has, each with what defends against it and what remains."""
    return [threat for of in _THREATS for threat in of(t)]


# What the sights follow from


def _secret(t: Treaty) -> bool:
    return t.secure.sums != "open"


def _noised(t: Treaty) -> bool:
    return t.privacy.unit != "none" and t.privacy.max_norm != "none" and t.privacy.randomness != "simulated"


def _noised_before_sum(t: Treaty) -> bool:
    return _noised(t) and t.privacy.placement in ("silo", "shared")


def _hidden(t: Treaty) -> bool:
    return t.privacy.unit != "none" and bool(t.privacy.hide_cohort)


_ATTENDANCE = {True: "who took part is kept secret by chance draws", False: "the cohort of a round is in its task"}


def _update_at_coordinator(t: Treaty) -> tuple[Sight, str]:
    if t.secure.sums == "masked":
        return "nothing", f"masks cancel only in the sum of at least {t.cohort.minimum} silos"
    if t.secure.sums == "encrypted":
        part = (
            "" if t.secure.encrypted_share == 1 else f"; {1 - t.secure.encrypted_share:.0%} of its numbers are masked"
        )
        return "nothing", f"it adds ciphertexts that silos alone can open{part}"
    if _noised(t) and t.privacy.placement == "silo":
        return "noised", "the silo adds the whole noise before anything leaves"
    share = ", with a share of the noise alone" if _noised(t) and t.privacy.placement == "shared" else ""
    return "whole", f"sums are in the open: every update comes by itself{share}"


def _figures(t: Treaty) -> Sight:
    return "sum" if _secret(t) else "whole"


def _holdings(t: Treaty, party: str) -> Sees:
    if t.disclosure.holdings:
        return Sees(party, "holdings", "whole", "[disclosure] holdings = true")
    if t.server.weighting == "examples" and not _secret(t):
        return Sees(party, "holdings", "whole", "weights are numbers of examples, and stand beside updates")
    if t.server.weighting == "examples":
        return Sees(party, "holdings", "sum", "weights are numbers of examples, inside the secret sum")
    return Sees(party, "holdings", "nothing", "[disclosure] holdings = false, and all weigh alike")


# The threats


def _from_updates(t: Treaty) -> Iterator[Threat]:
    what = "read text, or whether a text was used, from one silo's update"
    if _secret(t):
        far = f"{100 * t.secure.corrupt:g} % of the silos" if t.secure.sums == "masked" else "the holders of the key"
        yield Threat("update-reading", "coordinator", "update", what, f"{t.secure.sums} sums: it sees no single update",
            f"together with {far} it can take their parts off a sum; and a sum still tells of the text behind it",
            ("tests/test_secure_run.py::test_nothing_leaves_a_silo_but_the_masked_vector_and_protocol_messages_of_fixed_size",
             "tests/test_secure_run.py::test_too_few_survivors_end_the_round_before_anything_is_opened"))  # fmt: skip
    elif _noised(t) and t.privacy.placement == "silo":
        yield Threat("update-reading", "coordinator", "update", what, f"noise in the silo, for {_unit(t)}",
            "what many units have in common stays readable; that is what is learned",
            ("tests/privacy/test_checklist_items.py::"
             "test_training_learns_of_the_data_through_releases_alone",))  # fmt: skip
    else:
        yield Threat("update-reading", "coordinator", "update", what, "nothing but the treaty and its word",
                     "exact recovery of whole sequences has been measured")  # fmt: skip


def _from_model(t: Treaty) -> Iterator[Threat]:
    what = "find out from the model whether a text, or a person, was in the training data"
    if _noised(t):
        stated = t.privacy.epsilon
        budget = f"ε = {stated:g}" if stated is not None else "the ε that its noise gives"
        yield Threat("membership", "user", "text", what, f"differential privacy for {_unit(t)}, {budget}",
            "up to what ε allows; several units of one person add up; and what others wrote about a person",
            ("tests/test_private_run.py::test_every_kind_of_guarantee_runs_to_a_statement_that_its_ledger_bears_out",
             "tests/audit/test_checks.py::test_a_planted_bug_is_caught"))  # fmt: skip
    else:
        yield Threat("membership", "user", "text", what, "nothing: the treaty promises no ε",
                     "membership and verbatim text; `foedus audit` measures how much")  # fmt: skip


def _from_figures(t: Treaty) -> Iterator[Threat]:
    yield Threat("figures", "coordinator", "figures", "learn about held-out text from exact evaluation sums",
        "they are opened for all silos together, once a round" if _secret(t) else "nothing: each silo's sums are read",
        "they carry no noise and are charged to no budget",
        ("tests/test_secure_run.py::test_evaluation_sums_are_opened_for_one_set_of_survivors_a_round",)
        if _secret(t) else ())  # fmt: skip


def _lies(t: Treaty) -> Iterator[Threat]:
    party = "lying-coordinator"
    yield Threat("another-treaty", party, "update", "ask for more than was agreed, or for a round again",
        "silos check the signed digest, the order of rounds and their charter, and keep the attempt in their ledger",
        "silos must compare ledgers to notice that they were told different things",
        ("tests/deploy/test_hostile.py::"
         "test_a_thousand_hostile_messages_change_nothing_and_each_is_counted_under_its_reason",
         "tests/deploy/test_guard.py::test_a_charter_that_is_made_stricter_ends_a_treaty_that_was_signed",
         "tests/deploy/test_guard.py::test_a_silo_answers_under_no_treaty_that_it_did_not_sign_itself",
         "tests/governance/test_order.py::test_rounds_never_go_back_and_each_has_one_task",
         "tests/governance/test_witness.py::test_two_silos_that_were_given_different_tasks_find_out",
         "tests/governance/test_openings.py::test_a_silo_opens_a_sum_for_one_set_of_survivors_only"),
        "deployment")  # fmt: skip
    if t.secure.sums == "masked":
        yield Threat("small-sums", party, "update", "open sums of few silos, or two sums that differ in one silo",
            f"thresholds against {100 * t.secure.corrupt:g} % in league; each sum is opened for one set of survivors",
            "sums of fewer than the cohort, where silos mask with some of the others only",
            ("tests/test_secure_run.py::test_a_sum_that_may_have_been_opened_is_opened_for_nobody_else",))  # fmt: skip
    yield Threat("crafted-model", party, "text", "send a model made to make updates tell more",
        "noise and clipping bound what any model can draw out" if _noised_before_sum(t) else
        "nothing in an update; models of other shape are refused",
        "" if _noised_before_sum(t) else "a crafted model of the right shape is not recognised")  # fmt: skip


def _false_silos(t: Treaty) -> Iterator[Threat]:
    clipped = t.privacy.unit == "silo"
    yield Threat("poisoning", "silo", "model", "send an update that spoils the model or plants a behaviour",
        "each silo's update is clipped, so its influence has a bound" if clipped else "non-finite updates are refused",
        "a sum cannot tell a false update from a rare one; watch quality on every silo before a promotion")  # fmt: skip
    if t.secure.sums == "encrypted":
        yield Threat("key-holder", "silo", "update", "the holder of the secret key opens what was sent by one silo",
            "the coordinator sends it sums alone", "key holder and coordinator together read every update",
            ("tests/secure/test_homomorphic.py::test_threshold_keys_are_refused_with_the_reason",))  # fmt: skip


def _around(t: Treaty) -> Iterator[Threat]:
    yield Threat("wire", "network", "update", "read, change, replay or withhold messages",
        "TLS with client keys, and signatures around every message", "times and sizes; and messages can be withheld,"
        " which a round survives while enough silos answer",
        ("tests/deploy/test_certificates.py::test_the_server_of_another_federation_is_not_trusted",
         "tests/engines/test_flower.py::test_a_silo_that_was_not_admitted_waits_and_sees_nothing",
         "tests/deploy/test_hostile.py::"
         "test_messages_of_yesterday_cannot_be_played_again_to_a_silo_that_was_restarted",
         "tests/deploy/test_deployment.py::"
         "test_a_signed_treaty_over_a_bad_line_gives_the_adapter_of_one_process_and_registers_it"),
        "deployment")  # fmt: skip
    yield Threat("rewriting", "host", "record", "change what a ledger says afterwards",
        "a chain of hashes, signatures, and the same rounds in the other parties' ledgers",
        "a party that changes its own ledger from the start, before anybody saw its head",
        ("tests/governance/test_ledger.py::test_every_changed_byte_is_found",
         "tests/governance/test_ledger.py::test_gaps_swaps_and_repetitions_are_found",
         "tests/governance/test_witness.py::test_an_end_that_was_cut_off_after_others_saw_it_is_found"))  # fmt: skip
    yield Threat("theft", "host", "keys", "copy disks or memory", "keys and checkpoints are encrypted at rest where a"
        " key was given", "whoever reads the memory of a running process reads what is in it; on the coordinator's disk"
        " messages under way lie as they came",
        ("tests/deploy/test_home.py::test_keys_are_sealed_where_the_home_says_by_whose_key",
         "tests/deploy/test_home.py::test_whatever_holds_a_secret_is_for_its_owner_only",
         "tests/deploy/test_deployment.py::test_where_homes_have_vaults_checkpoints_and_out_trays_are_sealed"),
        "deployment")  # fmt: skip
    if t.privacy.unit != "none":
        yield Threat("spending", "operator", "record", "spend more privacy of a person than was allowed, over treaties",
            "every silo charges its own budget before a round is released, and refuses beyond its cap",
            "people who are in several silos: their budgets add up, and nobody sees that",
            ("tests/governance/test_budget.py::test_a_spent_budget_refuses_before_anything_is_trained",
             "tests/test_private_run.py::test_every_silo_pays_before_it_releases"))  # fmt: skip
    if t.privacy.unit != "none" and t.privacy.randomness == "simulated":
        yield Threat("seeded-noise", "user", "text", "draw the noise again from the treaty's seed, and take it off",
            "nothing: simulated noise protects nobody", "everything that noise should have hidden",
            ("tests/test_private_run.py::test_noise_from_a_seed_says_so_everywhere",))  # fmt: skip


_THREATS: tuple[Callable[[Treaty], Iterator[Threat]], ...] = (
    _from_updates, _from_model, _from_figures, _lies, _false_silos, _around,
)  # fmt: skip


def _unit(t: Treaty) -> str:
    return UNITS[t.privacy.unit].partition(" (")[0]


# The page


def render(known: dict[str, Any]) -> str:
    """The threat model as a page."""
    return page(
        "Threat model",
        known["treaty"]["name"],
        f"Treaty {known['treaty']['digest'][:12]}…; schema {SCHEMA} {VERSION}.",
        [_who(known), _what(known["threats"]), *_uncovered(known["not_covered"]), _words(known)],
    )  # fmt: skip


def _who(known: dict[str, Any]) -> Section:
    assets = [asset["id"] for asset in known["assets"]]
    sight = {(row["party"], row["asset"]): row for row in known["sees"]}
    rows = [[p["id"], *(sight[p["id"], a]["sight"].replace("nothing", "–") for a in assets)] for p in known["parties"]]
    why = [[r["party"], r["asset"], r["sight"], r["because"]] for r in known["sees"] if r["sight"] != "nothing"]
    about = "A dash means nothing. Below, why."
    return Section("Who sees what", about, [
        Table("What each party sees of each asset", ["Party", *assets], rows),
        Table("Why", ["Party", "Asset", "Sees", "Because"], why),
    ])  # fmt: skip


def _what(rows: Sequence[dict[str, Any]]) -> Section:
    lines = [
        [r["id"], f"{r['party']}: {r['what']}", r["defends"] + (f" ({r['needs']})" if r["needs"] else ""),
         r["remains"] or "–", "; ".join(name.partition("::")[2].replace("_", " ") for name in r["tests"]) or "none"]
        for r in rows
    ]  # fmt: skip
    about = "What could be done, what defends, and what remains. Tests are named by what they show."
    heads = ["Threat", "Who could do what", "What defends", "What remains", "Tests"]
    return Section("Threats", about, [Table("Threats", heads, lines)])


def _uncovered(lines: Sequence[str]) -> list[Section]:
    if not lines:
        return []
    return [Section("Not covered by ε", "", [Table("What reads private data and is not charged", ["What"],
                                                   [[line] for line in lines])])]  # fmt: skip


def _words(known: dict[str, Any]) -> Section:
    rows = [[x["id"], x["about"]] for kind in ("assets", "parties") for x in known[kind]]
    return Section("Words", "", [Table("Assets and parties", ["Word", "Means"], rows)])
