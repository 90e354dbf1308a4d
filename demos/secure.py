"""Behind `make demo-secure`: eight silos in eight processes sum in secret while two of them are killed, and the sum is
checked.

The coordinator of this demo is curious: it writes down every vector that silos send it. And the silos keep what they
gave before any mask, which only a demo makes them do. So when the run is over one can add up in plain sight what was
added up in secret, and compare. Killed in the middle itself, the demo goes on where it was.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path
from urllib.parse import quote, unquote

from .stagehand import Check, foedus, read, records

ROOT = Path(__file__).parent.parent
TREATY, RUN = ROOT / "treaties/newsgroups-secure.toml", ROOT / "runs/newsgroups-secure"
HEARD, KILLED = "heard", "killed.json"
CURIOUS = "--curious"
SIMULATED = (
    "Simulated: all silos are on this machine, and the coordinator, which starts them, has dealt them their identities."
    "\nReal: a process for each silo, masks, shares of noise from the operating system, and `kill -9`."
)


def main() -> int:
    """The run, the kills and the checks; 0 if all of them held."""
    run = Path(sys.argv[1]) if len(sys.argv) > 1 else RUN
    if (run / "summary.json").exists() and not trays(run):
        shutil.rmtree(run)  # that demo is over
    print(SIMULATED, flush=True)
    began = time.monotonic()
    if not (run / "summary.json").exists() and (code := carried_out(run)):
        print("The run did not end. `make demo-secure` goes on with it.", file=sys.stderr)
        return code
    print(f"\nThe run took {time.monotonic() - began:.0f} s. Looking at what came out …\n", flush=True)
    held = [check.print() for check in checks(run)]
    subprocess.run([*foedus(), "privacy", "statement", str(run)], check=True)
    if not all(held):
        print(f"\nA check failed. What silos gave before any mask is still in {run}/silos/*/out-tray.")
        return 1
    for folder in (*trays(run), run / HEARD):
        shutil.rmtree(folder, ignore_errors=True)
    print(f"\nAll checks held. What silos gave before any mask is deleted.\nReport:  {run / 'report.html'}")
    return 0


# ---- the run, and two deaths ----


def carried_out(run: Path) -> int:
    """Carries the run out in a child process, and kills two of its silos on the way; returns the child's exit code."""
    if deadly_round(run) == rounds_of(run):
        print("It is too late in this run to kill anybody: it begins anew.", flush=True)
        shutil.rmtree(run)
    deadly = deadly_round(run)
    task = ["resume", str(run)] if (run / "treaty.toml").exists() else ["run", str(TREATY), "--out", str(run)]
    words = [sys.executable, "-m", "demos.secure", CURIOUS, str(run), *task, "--engine", "processes"]
    with subprocess.Popen(words, env={**os.environ, "FOEDUS_KEEP_TRAYS": "1"}) as child:
        try:
            while child.poll() is None:
                time.sleep(0.02)
                kill_two(run, deadly)
        except KeyboardInterrupt:  # which the child has heard, too
            child.wait()
    return child.returncode


def deadly_round(run: Path) -> int:
    """The middle one; but where the demo was cut off before the sum of that was opened, the next that nobody began."""
    ledger, killed = records(run / "ledger.jsonl"), read(run / KILLED)
    if len(killed) == 2 and f"train {killed['given'][1]}" in opened_sums(ledger):
        return int(killed["given"][1])
    (run / KILLED).unlink(missing_ok=True)
    return max([rounds_of(run) // 2, *(r["body"]["round"] for r in ledger if r["kind"] == "charge")])


def kill_two(run: Path, round: int) -> None:
    """Kills the first silo that trains in this round, and the first other one whose masked vector has come."""
    killed = read(run / KILLED)
    if len(killed) == 2:
        return
    if "training" not in killed:
        silo = next((name for name in silos(run) if trains(run, name, round)), None)
        if silo is not None:
            time.sleep(1.0)
            if not heard(run, round, silo):
                kill(run, silo, round, "training")
    else:
        gave = [name for name in silos(run) if heard(run, round, name)]
        if gave:
            kill(run, gave[0], round, "given")


def kill(run: Path, silo: str, round: int, when: str) -> None:
    os.kill(int((home(run, silo) / "pid").read_text()), signal.SIGKILL)
    (run / KILLED).write_text(json.dumps(read(run / KILLED) | {when: [silo, round]}))
    words = {"training": "while it trains", "given": "after its masked vector has come, before the sum is opened"}
    print(f"kill -9 {silo} in round {round + 1}, {words[when]}", file=sys.stderr, flush=True)


def trains(run: Path, silo: str, round: int) -> bool:
    """Whether it has paid for the round, which it does before it trains, and given nothing yet."""
    budget = home(run, silo) / "budgets" / f"{quote(silo, safe='')}.jsonl"
    paid = [r["body"]["round"] for r in records(budget) if r["kind"] == "charge"]
    return round in paid and not heard(run, round, silo)


def curious(run: Path, words: Sequence[str]) -> None:
    """The command line, in a coordinator that writes down every vector that reaches it."""
    from foedus.cli import main as foedus_main
    from foedus.engines.processes import Processes

    ask = Processes.ask

    def noted(self: Processes, asks: Sequence) -> Iterator:
        kinds = {x.silo: x.kind for x in asks}
        for report in ask(self, asks):
            if kinds[report.silo] == "train" and report.payload:
                note(run, report.round, report.silo, report.payload)
            yield report

    Processes.ask = noted
    sys.argv = ["foedus", *words]
    foedus_main()


def note(run: Path, round: int, silo: str, payload: bytes) -> None:
    (run / HEARD).mkdir(exist_ok=True)
    part = run / HEARD / "part"
    part.write_bytes(payload)
    part.rename(run / HEARD / f"{round}.{time.time_ns()}.{quote(silo, safe='')}")


# ---- what must hold afterwards ----


def checks(run: Path) -> Iterator[Check]:
    """Who survived; the same adapter by plain addition; messages that say nothing."""
    from foedus.governance import verify

    ledger = verify(run / "ledger.jsonl")
    survivors = opened_sums(ledger)
    yield from _deaths(run, survivors)
    yield _prepaid(ledger)
    yield _plain_addition(run, ledger, survivors)
    yield _noise_alone(run)
    yield _results(run)


def _deaths(run: Path, survivors: dict[str, list[str]]) -> Iterator[Check]:
    names, killed = silos(run), read(run / KILLED)
    print("  In the sum of each round, by the ledger:")
    for round in range(rounds_of(run)):
        there = survivors[f"train {round}"]
        gone = [name for name in names if name not in there]
        print(f"    round {round + 1}: {len(there)} of {len(names)}{', without ' + ', '.join(gone) if gone else ''}")
    if set(killed) != {"training", "given"}:
        yield Check(False, "two silos were killed")
        return
    (first, round), (second, _) = killed["training"], killed["given"]
    purpose = f"train {round}"
    yield Check(first not in survivors[purpose], f"{first}, killed while it trained, is not in the sum of its round")
    yield Check(
        second in survivors[purpose] and purpose not in opened(run, second),
        f"{second}, killed after it gave, is in that sum, which the others opened without it",
    )
    journals = [opened(run, name) for name in names]
    once = all(len(set(purposes)) == len(purposes) for purposes in journals)
    yield Check(once, "no silo helped to open any sum twice")


def _prepaid(ledger: Sequence[dict]) -> Check:
    """A round's cost stands in the ledger before the round's survivors do."""
    at = {(r["kind"], r["body"].get("purpose", r["body"].get("round"))): r["index"] for r in reversed(ledger)}
    rounds = [purpose for kind, purpose in at if kind == "survivors" and purpose.startswith("train ")]
    before = all(at["charge", int(p.split()[1]) + 1] < at["survivors", p] for p in rounds)
    return Check(before, "each round's cost in privacy was in the ledger before its sum was opened")


def _plain_addition(run: Path, ledger: Sequence[dict], survivors: dict[str, list[str]]) -> Check:
    """All rounds once more, from the integers that the survivors gave before any mask, added up in plain sight."""
    from foedus import loop
    from foedus.build import adapter, build
    from foedus.execute import treaty_of
    from foedus.governance import RunFolder
    from foedus.lm.adapters import save_adapter

    place = build(treaty_of(RunFolder.open(run)))
    rules = replace(place.federation, gather=InPlainSight(run, survivors))
    *_, (state, _) = loop.run(rules, Nobody(), loop.start(rules, place.bench.start()))
    with tempfile.TemporaryDirectory() as folder:
        plain = save_adapter(place.base, adapter(place.treaty), state.params, Path(folder), "")
    secure = next(r["body"]["adapter"] for r in reversed(ledger) if r["kind"] == "closed")
    words = f"adapter by secure sums {secure[:16]}…, by plain integer addition over the survivors {plain[:16]}…"
    return Check(plain == secure, words)


class InPlainSight:
    """A way of gathering without secrets: it adds up the words that survivors kept, from before their masks."""

    blind = True

    def __init__(self, run: Path, survivors: dict[str, list[str]]) -> None:
        self.run, self.survivors = run, survivors

    def gather(self, engine, kind, task, *, split=""):
        from foedus import wire
        from foedus.stages.words import SUM
        from foedus.types import Total

        digest = wire.digest(wire.pack_task(task))
        words = [kept(self.run, silo, digest) for silo in self.survivors[f"{kind} {task.round}"]]
        return Total({SUM: reduce(lambda a, b: a + b, words)}, math.inf, len(words)), ()


class Nobody:
    """An engine that reaches nobody."""

    memory: dict = {}

    def ask(self, asks):
        raise AssertionError("Expected nobody to be asked.")


def _noise_alone(run: Path) -> Check:
    """Chi-square of the bytes of all masked vectors, and their correlation with what they mask."""
    import numpy as np

    from foedus import wire
    from foedus.stages.words import SUM

    counts, bare, largest, equal, vectors = np.zeros(256), np.zeros(256), 0.0, False, 0
    for file in sorted((run / HEARD).iterdir()):
        round, _, silo = file.name.split(".", 2)
        masked = wire.unpack(file.read_bytes())[0][SUM]
        words = given(run, unquote(silo), int(round))
        counts += np.bincount(masked.view(np.uint8), minlength=256)
        bare += np.bincount(words.view(np.uint8), minlength=256)
        r = np.corrcoef(signed(masked), signed(words))[0, 1]
        largest, equal = max(largest, abs(r) * math.sqrt(len(words))), equal or bool((masked == words).all())
        vectors += 1
    square, beside = chi_square(counts), chi_square(bare)
    held = vectors > 0 and not equal and abs(square - 255) < 6 * math.sqrt(510) and largest < 6
    return Check(held, (
        f"{vectors} masked vectors as they came: chi-square of their bytes {square:.0f} (255 ± 23 by chance; before the"
        f" masks {beside:.1e}), correlation with what they hide at most {largest:.1f} standard errors"
    ))  # fmt: skip


def _results(run: Path) -> Check:
    summary = read(run / "summary.json")
    before, after = (summary["evaluation"][phase]["perplexity"]["micro"] for phase in ("base", "federated"))
    sent = [x for silo in summary["bytes"]["up"].values() for x in silo if x]
    words = f"test perplexity {before:.0f} before, {after:.0f} after, with ε = {summary['privacy']['epsilon']:.2f}"
    return Check(after < before, f"{words}; {sum(sent) / len(sent):,.0f} bytes up a silo and round")


def chi_square(counts) -> float:
    expected = counts.sum() / len(counts)
    return float(((counts - expected) ** 2).sum() / expected)


def signed(words):
    return words.view(words.dtype.str.replace("u", "i")).astype(float)


# ---- what lies in the run's folder ----


def kept(run: Path, silo: str, task: str):
    """What a silo gave for the task with this digest, before any mask."""
    from foedus import wire
    from foedus.governance import Tray
    from foedus.stages.words import SUM

    found = Tray(home(run, silo) / "out-tray", every=True).kept(silo, task)
    if found is None:
        raise SystemExit(f"Expected the words of {silo} for task {task[:12]} in its tray; got none.")
    return wire.unpack(found[0].payload)[0][SUM]


def given(run: Path, silo: str, round: int):
    """What a silo gave in a round, before any mask."""
    from foedus import wire
    from foedus.governance import Tray
    from foedus.governance.custody import PAYLOAD
    from foedus.stages.words import SUM

    file = Tray(home(run, silo) / "out-tray", every=True).path(silo, round)
    return wire.unpack(wire.unpack(file.read_bytes())[0][PAYLOAD].tobytes())[0][SUM]


def opened_sums(ledger: Sequence[dict]) -> dict[str, list[str]]:
    """For whom each sum was opened."""
    return {r["body"]["purpose"]: r["body"]["survivors"] for r in ledger if r["kind"] == "survivors"}


def opened(run: Path, silo: str) -> list[str]:
    """What a silo's journal says that it helped to open."""
    return [r["body"]["purpose"] for r in records(home(run, silo) / "journals" / f"{quote(silo, safe='')}.jsonl")]


def heard(run: Path, round: int, silo: str) -> bool:
    return any((run / HEARD).glob(f"{round}.*.{quote(silo, safe='')}"))


def home(run: Path, silo: str) -> Path:
    return run / "silos" / quote(silo, safe="")


def silos(run: Path) -> list[str]:
    return sorted(unquote(folder.name) for folder in (run / "silos").glob("*"))


def trays(run: Path) -> list[Path]:
    return list(run.glob("silos/*/out-tray"))


def rounds_of(run: Path) -> int:
    import tomllib

    file = run / "treaty.toml"
    return tomllib.loads((file if file.exists() else TREATY).read_text())["algorithm"]["rounds"]


if __name__ == "__main__":
    sys.exit(curious(Path(sys.argv[2]), sys.argv[3:]) if CURIOUS in sys.argv[1:2] else main())
