"""Behind `make demo-deploy`: a coordinator and three silos, each a process with a home, keys and data of its own, carry
out a treaty over TLS, by the commands that operators type.

    archives ─▶ homes ─▶ treaties signed, one refused ─▶ up ─▶ run, a silo killed ─▶ promoted, rolled back ─▶ checked

Every line that begins with `$` is a command as it was run. Where an operator writes into a file of his own, the line is
shown with `>`. All processes are on this machine, and one person plays all parties: that alone is simulated.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .stagehand import Check, foedus, read, records

ROOT = Path(__file__).parent.parent
TREATY, RUN = ROOT / "treaties/newsgroups-deploy.toml", ROOT / "runs/deploy"
SILOS = ("archive-a", "archive-b", "archive-c")
FEDERATION, MODEL = "federation", "newsgroups"
STRICT, FRAIL = "archive-b", "archive-c"
"""Whose operator reads treaties closely; whose process is killed."""
GREEDY = {"name": "newsgroups-greedy", "epsilon": 40.0, "rank": 64}
HASTY = {"name": "newsgroups-hasty", "rounds": 1, "every": 1, "epsilon": 4.0, "lr": 1.0}
"""What the two other treaties say instead: one asks for too much, one spoils the model (`lr`: the server's)."""
DEADLY_ROUND = 2
"""How many rounds are over when the silo is killed, in the middle of the next one."""
PATIENCE_S = 3600.0
SIMULATED = (
    "Simulated: all parties are on this machine, and one person plays them.\n"
    "Real: a process, a home, keys, a ledger, a budget and data for each; TLS; signatures; masks; noise; `kill -9`."
)


def main() -> int:
    """The whole demo; 0 if everything held that must hold."""
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else RUN
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    print(SIMULATED, flush=True)
    try:
        with Stage(fresh(root)) as stage:
            play(stage)
            held = [check.print() for check in checks(stage)]
    except KeyboardInterrupt:
        print("\nStopped, with everything that was started. `make demo-deploy` begins anew.", file=sys.stderr)
        return 130
    print(f"\nThe demo took {time.monotonic() - stage.began:.0f} s. Everything of it is in {shown(root)}/.")
    print("All of it held." if all(held) else "Something did not hold.")
    return 0 if all(held) else 1


def fresh(root: Path) -> Path:
    """An empty folder for the demo. Only one that an earlier demo made is emptied."""
    if root.exists() and any(root.iterdir()) and not (root / FEDERATION / "federation.toml").exists():
        raise SystemExit(f"Expected {root} to be new, or of an earlier demo; got another folder. Name another one.")
    shutil.rmtree(root, ignore_errors=True)
    for name in ("data", "logs", "post", "screenshots"):
        (root / name).mkdir(parents=True)
    return root


def play(stage: Stage) -> None:
    """What the people do, in order."""
    archives(stage)
    found(stage)
    agree(stage)
    stage.up()
    train(stage)
    spoil_and_mend(stage)
    look_back(stage)


# ---- before anything runs ----


def archives(stage: Stage) -> None:
    """A file for each silo, with other newsgroups in each."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    from foedus.data import Columns, Partition, partition, read
    from foedus.treaty import load

    stage.heading("Three archives of Usenet, one for each silo")
    kept = load(stage.treaty).data.keep
    posts = read("20newsgroups", Columns(domain="domain"), base=ROOT)
    hierarchy = pc.list_element(pc.split_pattern(posts["domain"], "."), 0)
    posts = pa.table({"text": posts["text"], "domain": hierarchy}).filter(pc.is_in(hierarchy, pa.array(kept)))
    how = Partition(by="dirichlet", count=len(SILOS), alpha=1.0, names=SILOS)
    for name, mine in partition(posts, how, seed=1).items():
        pq.write_table(mine, stage.data(name))
        counts = sorted((x["values"], x["counts"]) for x in pc.value_counts(mine["domain"]).to_pylist())
        print(f"  {name}: {mine.num_rows:,} posts ({', '.join(f'{n:,} {of}' for of, n in counts)})", flush=True)


def found(stage: Stage) -> None:
    """Homes; cards one way, the invitation the other; each operator's charter."""
    stage.heading("Homes: each party makes its own keys; no secret travels")
    ports = free_ports(2 + len(SILOS))
    stage.foedus("init", FEDERATION, "--address", f"127.0.0.1:{ports[0]}")
    stage.write(FEDERATION, "federation.toml", {"dashboard": f"127.0.0.1:{ports[1]}"})
    for name, port in zip(SILOS, ports[2:], strict=True):
        stage.foedus("silo", "init", "--name", name, "--home", name)
        stage.write(name, "silo.toml", {"dashboard": f"127.0.0.1:{port}"})
    stage.foedus("coordinator", "admit", *(f"{name}/card.json" for name in SILOS), "--home", FEDERATION)
    invitation = stage.foedus("coordinator", "invite", "--home", FEDERATION, show=False)
    (stage.root / "post/invitation.json").write_text(invitation.stdout)
    for name in SILOS:
        stage.foedus("silo", "join", "post/invitation.json", "--home", name)
    stage.heading("Charters: each operator says what the silo permits")
    for name in SILOS:
        stage.write(name, "charter.toml", permitted(stage.treaty))


def permitted(treaty: Path) -> dict[str, Any]:
    """What an operator changes in a new charter, for this treaty: its model, and its columns."""
    from foedus.treaty import load

    asked = load(treaty)
    return {
        f'"{asked.model.base}"': "any",
        "columns": [*asked.data.text, *filter(None, [asked.data.domain])],
    }


def agree(stage: Stage) -> None:
    """Three treaties are proposed; all sign two of them, and one silo's charter refuses the third."""
    stage.heading("Treaties: proposed by the coordinator, read and signed by each silo")
    treaties = {MODEL: stage.treaty, **{str(v["name"]): variant(stage, v) for v in (HASTY, GREEDY)}}
    for file in treaties.values():
        stage.foedus("treaty", "propose", shown(file, stage.root), "--home", FEDERATION)
    stage.foedus("treaty", "show", stage.sent(MODEL), "--home", SILOS[0])
    for name in SILOS:
        stage.foedus("treaty", "sign", stage.sent(MODEL), "--home", name)
        stage.foedus("treaty", "sign", stage.sent(str(HASTY["name"])), "--home", name)
    stage.heading(f"{STRICT} is asked for more than its charter permits")
    stage.foedus("treaty", "sign", stage.sent(str(GREEDY["name"])), "--home", STRICT, fails=True)
    stage.foedus("silo", "ledger", "--home", STRICT)


def variant(stage: Stage, changes: Mapping[str, Any]) -> Path:
    """The demo's treaty with other values."""
    made = stage.root / f"{changes['name']}.toml"
    made.write_text(varied(stage.treaty.read_text(), changes))
    return made


def varied(text: str, changes: Mapping[str, Any]) -> str:
    """A TOML text with other values of these keys, each of which stands at a line's beginning; where a key stands in
    several sections, its last line is meant.
    """
    for key, value in changes.items():
        lines = list(re.finditer(rf"(?m)^{re.escape(key)} = [^#\n]*?(?= *(#.*)?$)", text))
        at = lines[0 if key == "name" else -1]
        text = f"{text[: at.start()]}{key} = {json.dumps(value)}{text[at.end() :]}"
    return text


def edited(text: str, key: str, value: Any) -> tuple[str, int]:
    """A text with another value in the line of this key, which may be commented out; and how many lines there were."""
    return re.subn(rf"(?m)^(# )?{re.escape(key)} = .*$", lambda _: f"{key} = {json.dumps(value)}", text)


# ---- a run, a death, a return ----


def train(stage: Stage) -> None:
    """The run, watched; in the middle of it a silo dies, and comes back."""
    stage.heading("The run: masked sums, shared noise, over TLS")
    run = stage.run(MODEL)
    with stage.started("run", "run", shown(stage.treaty, stage.root), "--engine", "flower", "--home", FEDERATION) as p:
        stage.until(p, "the first rounds", lambda: measured(run) >= DEADLY_ROUND)
        stage.shoot("live", stage.page(FEDERATION))
        stage.until(p, f"{FRAIL} has paid for the next round", lambda: charges(stage, FRAIL, MODEL) > DEADLY_ROUND)
        stage.kill(FRAIL)
        stage.until(p, "the coordinator to miss it", lambda: not stage.seen(FRAIL))
        stage.shoot("missing", stage.page(FEDERATION))
        stage.start_silo(FRAIL)
        stage.until(p, "the round after its return", lambda: rounds(run) > DEADLY_ROUND)
        stage.foedus("status", "--home", FEDERATION)
        stage.until(p, "the rest of the run", lambda: False)
    stage.shoot("silo", stage.page(STRICT))


def spoil_and_mend(stage: Stage) -> None:
    """The first version goes into production; a second, spoiled one is refused, forced in, and rolled back."""
    hasty = str(HASTY["name"])
    stage.heading("The first version goes into production")
    stage.foedus("registry", "promote", f"{MODEL}@1", "--why", "the first", "--home", FEDERATION)
    stage.heading("A second version, by a hasty treaty: one step, far too long")
    words = ("run", shown(stage.root / f"{hasty}.toml", stage.root), "--engine", "flower", "--home", FEDERATION)
    with stage.started("run-hasty", *words) as p:
        stage.until(p, "the hasty run", lambda: False)
    stage.foedus("registry", "register", f"{FEDERATION}/runs/{hasty}", "--model", MODEL, "--home", FEDERATION)
    stage.foedus("registry", "promote", f"{MODEL}@2", "--home", FEDERATION, fails=True)
    stage.heading("Somebody forces it in; then it is rolled back")
    forced = ("registry", "promote", f"{MODEL}@2", "--worse", "0.9", "--why", "in a hurry", "--home", FEDERATION)
    stage.foedus(*forced)
    stage.shoot("forced", stage.page(FEDERATION), height=4000)
    stage.foedus("rollback", f"{MODEL}@1", "--why", "worse on every domain", "--home", FEDERATION)
    stage.foedus("registry", "list", MODEL, "--home", FEDERATION)
    stage.shoot("versions", stage.page(FEDERATION), height=4000)


def look_back(stage: Stage) -> None:
    """What the parties can prove afterwards."""
    stage.heading("What was spent, and what everybody's ledger says")
    for name in SILOS:
        stage.foedus("silo", "budget", "--home", name)
    stage.foedus("ledger", "verify", f"{FEDERATION}/runs/{MODEL}", *SILOS, FEDERATION)
    stage.foedus("privacy", "statement", f"{FEDERATION}/runs/{MODEL}")


# ---- the stage: homes, processes, pages ----


@dataclass
class Stage:
    """A demo's folder, and the processes that are up in it. Leaving it stops all that it started."""

    root: Path
    treaty: Path = TREATY
    began: float = field(default_factory=time.monotonic)
    browser: str | None = field(default_factory=lambda: shutil.which("chromium") or shutil.which("google-chrome"))
    _up: dict[str, subprocess.Popen] = field(default_factory=dict)

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *_: object) -> None:
        """The silos first, so that they say good-bye; whoever does not end by itself is killed."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        for name in reversed(self._up):
            ended(self._up[name])
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def heading(self, words: str) -> None:
        print(f"\n== {words} ({time.monotonic() - self.began:.0f} s)", flush=True)

    def foedus(self, *words: str, show: bool = True, fails: bool = False) -> subprocess.CompletedProcess[str]:
        """Runs a command in the demo's folder, and prints what it says. `fails`: it must."""
        print(f"$ foedus {shlex.join(words)}", flush=True)
        done = subprocess.run(
            [*foedus(), *words], cwd=self.root, env=surroundings(), text=True, capture_output=True, check=False
        )
        said = (done.stdout + done.stderr).strip()
        if (show or done.returncode) and said:
            print("    " + said.replace("\n", "\n    "), flush=True)
        if (done.returncode != 0) != fails:
            raise SystemExit(f"Expected that command to {'fail' if fails else 'succeed'}; it ended {done.returncode}.")
        return done

    def write(self, home: str, file: str, changes: Mapping[str, Any]) -> None:
        """Changes lines of a party's own file, as its operator would with an editor."""
        path = self.root / home / file
        text = path.read_text()
        for key, value in changes.items():
            text, count = edited(text, key, value)
            if count != 1:
                raise SystemExit(f"Expected one line with {key} in {path}; got {count}.")
            print(f"> {home}/{file}: {key} = {json.dumps(value)}", flush=True)
        path.write_text(text)

    # processes

    def up(self) -> None:
        """The coordinator and the silos, until all are connected."""
        self.heading("Up: one process for each party")
        self._start(FEDERATION, "coordinator", "up", "--home", FEDERATION)
        for name in SILOS:
            self.start_silo(name)
        all_here = "all silos are connected"
        self.until(self._up[FEDERATION], all_here, lambda: all(self.connected(name) for name in SILOS))
        for name in (FEDERATION, *SILOS):
            print(f"  {name}: process {self._up[name].pid}, dashboard {self.page(name)}", flush=True)

    def start_silo(self, name: str) -> None:
        self._start(name, "silo", "up", "--home", name, "--data", shown(self.data(name), self.root))

    def kill(self, name: str) -> None:
        """What a power cut does."""
        print(f"$ kill -9 {self._up[name].pid}  # {name}", flush=True)
        self._up[name].kill()
        self._up.pop(name).wait()

    @contextmanager
    def started(self, log: str, *words: str) -> Iterator[subprocess.Popen]:
        """A command at work, until its block ends; its output goes to a log."""
        self._start(log, *words)
        try:
            yield self._up[log]
        finally:
            ended(self._up.pop(log))

    def until(self, process: subprocess.Popen, what: str, holds) -> None:
        """Waits for something while a process is at work, and says how it goes; for a run, until it has ended well.

        Raises `SystemExit` with the end of the log when the process fails, or when patience is at its end.
        """
        print(f"  waiting for {what} …", flush=True)
        deadline, name = time.monotonic() + PATIENCE_S, next(n for n, p in self._up.items() if p is process)
        log, told = self.log(name), ""
        while not holds():
            code = process.poll()
            now = last_line(log)
            if now != told and name.startswith("run"):
                print(f"    {now}", flush=True)
            told = now
            if code == 0 and name.startswith("run"):
                return
            if code is not None or time.monotonic() > deadline:
                end = "\n".join(log.read_text().splitlines()[-20:])
                raise SystemExit(f"{end}\nExpected {what}; {name} ended with {code}. Its log: {log}")
            time.sleep(0.1)

    def connected(self, name: str) -> bool:
        return bool(read(self.root / name / "status.json").get("connected"))

    def seen(self, name: str) -> bool:
        """Whether the coordinator believes that a silo is connected."""
        return bool(read(self.root / FEDERATION / "status.json").get("silos", {}).get(name, {}).get("connected"))

    def _start(self, name: str, *words: str) -> None:
        print(f"$ foedus {shlex.join(words)} &", flush=True)
        with self.log(name).open("ab") as log:
            self._up[name] = subprocess.Popen(
                [*foedus(), *words], cwd=self.root, env=surroundings(), stdout=log, stderr=log, start_new_session=True
            )

    # places

    def data(self, name: str) -> Path:
        return self.root / "data" / f"{name}.parquet"

    def log(self, name: str) -> Path:
        return self.root / "logs" / f"{name}.log"

    def run(self, name: str) -> Path:
        return self.root / FEDERATION / "runs" / name

    def sent(self, treaty: str) -> str:
        """A treaty as the coordinator sends it round: a copy, to which each silo adds its signature."""
        copy = self.root / "post" / f"{treaty}.treaty.json"
        if not copy.exists():
            [made] = (self.root / FEDERATION / "treaties").glob(f"*/{treaty}.treaty.json")
            shutil.copy(made, copy)
        return shown(copy, self.root)

    def page(self, home: str) -> str:
        import tomllib

        file = "federation.toml" if home == FEDERATION else "silo.toml"
        return f"http://{tomllib.loads((self.root / home / file).read_text())['dashboard']}/"

    def shoot(self, name: str, url: str, height: int = 2600) -> None:
        """A picture of a dashboard as a browser shows it; none where there is no browser."""
        if self.browser is None:
            return
        file, profile = self.root / "screenshots" / f"{name}.png", self.root / ".browser"
        words = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size=1280,{height}"]
        words += [f"--user-data-dir={profile}", f"--screenshot={file}", url]
        with suppress(subprocess.TimeoutExpired):
            subprocess.run([self.browser, *words], capture_output=True, timeout=120, check=False)
        shutil.rmtree(profile, ignore_errors=True)
        print(f"  screenshot: {shown(file)}" if file.exists() else f"  no screenshot of {url}", flush=True)


# ---- what must hold afterwards ----


def checks(stage: Stage) -> Iterator[Check]:
    """Parties that agree; a death that cost nothing twice; a refusal on record; the good version in use."""
    from foedus.deploy.home import FederationHome, SiloHome
    from foedus.governance import verify

    stage.heading("What must hold")
    federation = FederationHome.at(stage.root / FEDERATION)
    homes = {name: SiloHome.at(stage.root / name) for name in SILOS}
    ledgers = {name: verify(home.ledger, key=home.public.hex()) for name, home in homes.items()}
    run = verify(stage.run(MODEL) / "ledger.jsonl", key=federation.public.hex())
    yield from _signed(federation)
    yield _agreed(run, ledgers)
    yield _paid_once(stage)
    yield _refused(ledgers[STRICT])
    yield _in_use(federation)
    yield _results(stage)


def _signed(federation: Any) -> Iterator[Check]:
    signed = {one.name: one for one in federation.signed()}
    good, greedy = signed[MODEL], signed[str(GREEDY["name"])]
    parties = f"by the coordinator and {len(good.signatures)} silos"
    yield Check(good.binding, f"treaty {good.digest[:16]}… is signed {parties}")
    yield Check(STRICT in greedy.missing, f"treaty {greedy.digest[:16]}… is not signed by {STRICT}, and was never run")


def _agreed(run: Sequence[dict], ledgers: Mapping[str, Sequence[dict]]) -> Check:
    from foedus.governance.witness import compare

    planned = sum(record["kind"] == "round" for record in run)
    found = {name: compare(run, records, ("coordinator", name)) for name, records in ledgers.items()}
    held = planned > 0 and all(pair.same and len(pair.agreed) == planned for pair in found.values())
    counts = ", ".join(f"{name} {len(pair.agreed)}" for name, pair in found.items())
    return Check(held, f"signed ledgers verify; of {planned} rounds coordinator and silo saw the same: {counts}")


def _paid_once(stage: Stage) -> Check:
    """The silo that died in the middle of a round has paid for that round once."""
    paid = {name: [r["body"]["round"] for r in spent(stage, name, MODEL)] for name in SILOS}
    once = all(len(rounds) == len(set(rounds)) for rounds in paid.values()) and len({*map(len, paid.values())}) == 1
    return Check(once, f"each silo paid once for each of {len(paid[FRAIL])} rounds, {FRAIL} too, which was killed")


def _refused(ledger: Sequence[dict]) -> Check:
    clauses = [clause for r in ledger if r["kind"] == "refused" for clause in r["body"].get("clauses", ())]
    said = clauses[-1] if clauses else "nothing"
    return Check(bool(clauses), f"{STRICT}'s ledger has the attempt, with {len(clauses)} clauses; the last: {said}")


def _in_use(federation: Any) -> Check:
    from foedus.governance.registry import Registry

    registry = Registry(federation.registry, federation.store)
    try:
        now, spent = registry.production(MODEL), registry.spent(MODEL, 1e-5)
    finally:
        registry.close()
    paid = ", ".join(f"ε = {epsilon:.2f} for each {unit}" for unit, epsilon in spent.items())
    held = now is not None and now.version == 1
    return Check(held, f"in use: {now.name if now else 'nothing'}; all versions together cost {paid}")


def _results(stage: Stage) -> Check:
    summary = read(stage.run(MODEL) / "summary.json")
    before, after = (summary["evaluation"][phase]["perplexity"]["micro"] for phase in ("base", "federated"))
    sent = [x for silo in summary["bytes"]["up"].values() for x in silo if x]
    words = f"test perplexity {before:.0f} before, {after:.0f} after, with ε = {summary['privacy']['epsilon']:.2f}"
    return Check(after < before, f"{words}; {sum(sent) / len(sent):,.0f} bytes up a silo and round")


# ---- what lies in homes ----


def rounds(run: Path) -> int:
    """How many rounds a run has released."""
    return sum(row["kind"] == "round" for row in records(run / "metrics.jsonl"))


def measured(run: Path) -> int:
    """The last round after which a run's model was evaluated."""
    found = [r for r in records(run / "metrics.jsonl") if r["kind"] == "evaluation" and r["phase"] == "federated"]
    return found[-1]["round"] if found else 0


def spent(stage: Stage, silo: str, treaty: str) -> list[dict]:
    """What a silo has paid under a treaty."""
    [file] = (stage.root / FEDERATION / "treaties").glob(f"*/{treaty}.treaty.json")
    digest = read(file)["digest"]
    budget = records(stage.root / silo / "budgets" / f"{silo}.jsonl")
    return [r for r in budget if r["kind"] == "charge" and r["body"]["treaty"] == digest]


def charges(stage: Stage, silo: str, treaty: str) -> int:
    return len(spent(stage, silo, treaty))


def last_line(log: Path) -> str:
    lines = [line for line in re.split(r"[\r\n]+", log.read_text(errors="replace")) if line.strip()]
    return lines[-1].strip() if lines else ""


# ---- the machine ----


def surroundings() -> dict[str, str]:
    """Three parties share this machine's cores."""
    return {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "COLUMNS": "120", "HF_HUB_OFFLINE": "1"}


def ended(process: subprocess.Popen, patience_s: float = 20.0) -> None:
    """Tells a process to stop, and kills it when it does not."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(patience_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        listening = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in listening]


def shown(path: Path, below: Path | None = None) -> str:
    """A path as one would type it, from here or from the demo's folder."""
    return os.path.relpath(path, below or Path.cwd())


if __name__ == "__main__":
    sys.exit(main())
