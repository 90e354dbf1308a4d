"""A federation of real processes under random kills and cuts: that its run comes out as if nothing had happened.

    python -m benchmarks.chaos --rounds 20 --kills 20 --seed 1
    python -m benchmarks.chaos --rounds 20 --kills 20 --seed 1 --masked

A coordinator, three silos and the run, each a process as its operator starts it, on this machine, over TLS. Each silo
reaches the SuperLink through a proxy. While the run goes on, troubles happen at random moments of random rounds:

    silo, coordinator, run    SIGKILL of that process; started again a moment later, the run with `foedus resume`
    superlink                 SIGKILL of the coordinator's SuperLink, which it must notice by itself
    cut, silence              the network between a silo and the SuperLink: connections break, or carry nothing

A stranger, whose node nobody admitted, knocks all the time. Afterwards a silo is revoked, everything is stopped, and
the files are looked at: the run is over, ledgers verify and agree, no round was charged or released twice, and the
adapter is that of an undisturbed run in this process with the same silos in each round. The noise is simulated, so
that the two can be compared: nobody is protected.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from foedus import treaty as treaties
from foedus.deploy import certificates, signing
from foedus.deploy.home import FederationHome, Settings, SiloHome, SiloSettings, read_card
from foedus.engines import Ask, Engine
from foedus.engines.processes import round_of
from foedus.errors import FoedusError, SiloError
from foedus.governance import RunFolder, verify
from foedus.governance.budget import Budget
from foedus.governance.witness import compare
from foedus.privacy import accountant
from foedus.silo.handler import failed
from foedus.types import Report, Tree

SILOS = ("north", "east", "south")
DELTA = 1e-5
KINDS = ("silo", "run", "coordinator", "cut", "superlink", "silence")
LOOK_S = 0.05
STALLED_S = 600.0
"""A run of which no round has ended for so long has stalled."""
TREATY = """
[treaty]
name = "chaos"
seed = 3
[model]
base = "tiny:llama"
max_length = 16
[adapter]
rank = 2
targets = ["q_proj"]
[data]
source = "memory"
domain = "domain"
keep = ["law", "medicine", "sport"]
[silos]
names = ["north", "east", "south"]
[cohort]
minimum = {minimum}
[algorithm]
rounds = {rounds}
[local]
steps = 1
batch = 4
optimizer = "sgd"
lr = 0.5
[server]
weighting = "uniform"
[privacy]
unit = "example"
noise_multiplier = 1.0
rate = 0.3
randomness = "simulated"
[disclosure]
loss = false
holdings = false
[evaluation]
every = {every}
baselines = []
"""
MASKED = """
[secure]
sums = "masked"
range = 8.0
corrupt = 0.0
dropout = 0.0
"""
CHARTER = """
[models]
"tiny:llama" = "any"
[adapters]
kinds = ["lora"]
max_rank = 2
[training]
tasks = ["causal-lm"]
algorithms = ["fedavg"]
max_rounds = 1000
max_steps = 1
[data]
columns = ["text", "domain"]
[privacy]
unit = "example"
epsilon = 1000.0
epsilon_for_life = 1000.0
delta = 1e-5
placements = ["silo"]
simulated_noise = true
[secure]
sums = ["open", "masked"]
others = 0
[evaluation]
splits = ["validation", "test"]
baselines = []
[limits]
max_bytes = 10_000_000
"""
Told = Callable[[str], None]


# What happens


@dataclass(frozen=True)
class Trouble:
    """One kill or cut. `after`: rounds that are over. `late`: which share of the next round is, too. `lasts`: seconds
    until the process is started again, or the network is back.
    """

    kind: str
    silo: str
    after: int
    late: float
    lasts: float

    def __str__(self) -> str:
        match self.kind:
            case "cut":
                return f"the network to {self.silo} breaks for {self.lasts:.1f} s"
            case "silence":
                return f"the network to {self.silo} falls silent for {self.lasts:.1f} s"
            case "superlink":
                return "the SuperLink is killed"
        who = self.silo if self.kind == "silo" else f"the {self.kind}"
        return f"{who} is killed, and started again after {self.lasts:.1f} s"


def troubles(rounds: int, kills: int, seed: int) -> list[Trouble]:
    """As many troubles as `kills`, in the order in which they happen: of each kind equally many, up to one."""
    draw = random.Random(seed)
    kinds = [KINDS[i % len(KINDS)] for i in range(kills)]
    draw.shuffle(kinds)
    moments = sorted((draw.randrange(max(1, rounds - 1)), draw.random()) for _ in kinds)
    return [
        Trouble(kind, draw.choice(SILOS), after, late, draw.uniform(0.2, 4.0))
        for kind, (after, late) in zip(kinds, moments, strict=True)
    ]


class Proxy:
    """The network between one silo and the SuperLink at `target` (a port). `port`: the silo's end of it."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._pairs: set[socket.socket] = set()
        self._whole, self._carrying = threading.Event(), threading.Event()
        self.mend()
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Every connection breaks, and no new one comes about."""
        self._whole.clear()
        for end in list(self._pairs):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def silence(self) -> None:
        """Nothing arrives, and nobody is told."""
        self._carrying.clear()

    def mend(self) -> None:
        self._whole.set()
        self._carrying.set()

    def close(self) -> None:
        self._listener.close()
        self.cut()
        self._carrying.set()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                try:
                    if not self._whole.is_set():
                        raise OSError
                    far = socket.create_connection(("127.0.0.1", self._target), 5.0)
                except OSError:
                    near.close()
                    continue
                for source, sink in ((near, far), (far, near)):
                    source.settimeout(None)
                    self._pairs.add(source)
                    threading.Thread(target=self._carry, args=(source, sink), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while chunk := source.recv(1 << 16):
                self._carrying.wait()
                sink.sendall(chunk)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self._pairs.discard(source)
        source.close()


@dataclass
class Program:
    """A process of `foedus`, as its operator starts it; its output goes to `log`."""

    name: str
    words: Sequence[str]
    log: Path
    process: subprocess.Popen[bytes] | None = None
    starts: int = 0

    def start(self) -> None:
        code = "from foedus.cli import app; app()"
        surroundings = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code, *self.words], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=surroundings,
            )  # fmt: skip
        self.starts += 1

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def end(self, grace_s: float = 20.0) -> None:
        """Ends it as its operator would."""
        if self.process is not None:
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(grace_s)
            self.kill()


# Where it happens


@dataclass
class Scene:
    """A federation of three silos in `folder`, and its processes. `told`: gets a line for all that happens."""

    folder: Path
    rounds: int
    masked: bool
    told: Told
    happened: list[Trouble] = field(default_factory=list)
    unasked: Counter[str] = field(default_factory=Counter)
    """How often a process ended without having been killed, and was started again."""
    began: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.port = free_port()
        self.proxies = {name: Proxy(self.port) for name in (*SILOS, "stranger")}
        self.home = FederationHome.create(
            self.folder / "federation",
            Settings("chaos", f"127.0.0.1:{self.port}", dashboard="", deadline_s=60.0, backoff_s=0.2, patience_s=300.0),
        )
        self.silos = {name: self._silo(name) for name in SILOS}
        file = self.folder / "chaos.toml"
        minimum = 3 if self.masked else 2  # a sum of two would tell each of them what the other gave
        text = TREATY.format(rounds=self.rounds, every=max(4, self.rounds // 4), minimum=minimum)
        file.write_text(text + MASKED * self.masked)
        self.treaty = treaties.load(file)
        made, _ = signing.propose(self.home, self.treaty)
        for silo in self.silos.values():
            signing.sign(silo, made)
        self.run = RunFolder(self.home.runs / self.treaty.name)
        self.programs = {
            "coordinator": self._program("coordinator", "coordinator", "up", "--home", str(self.home.path)),
            "run": self._program("run", "run", str(file), "--engine", "flower", "--home", str(self.home.path)),
        }
        for name, silo in self.silos.items():
            words = "silo", "up", "--home", str(silo.path), "--data", str(self.data(name))
            self.programs[name] = self._program(name, *words)

    def data(self, name: str) -> Path:
        return self.folder / f"{name}.jsonl"

    def say(self, what: str) -> None:
        self.told(f"{time.monotonic() - self.began:6.1f} s  {what}")

    @property
    def done(self) -> int:
        """Rounds that are over."""
        return max((row["round"] for row in self.run.metrics() if row["kind"] == "round"), default=0)

    @property
    def over(self) -> bool:
        return (self.run.path / "summary.json").exists() and not self.programs["run"].alive

    def superlink(self) -> list[psutil.Process]:
        """The SuperLink's process, if the coordinator has one that is alive."""
        with suppress(psutil.NoSuchProcess, KeyError, TypeError):
            link = psutil.Process(self.home.read_status()["superlink"]["pid"])
            return [link] if link.status() != psutil.STATUS_ZOMBIE else []
        return []

    def connected(self, name: str) -> bool:
        return bool(self.home.read_status().get("silos", {}).get(name, {}).get("connected"))

    def close(self) -> None:
        """The run first, then the silos, so that they say good-bye."""
        for name in ("run", *SILOS, "coordinator"):
            self.programs[name].end()
        for proxy in self.proxies.values():
            proxy.close()

    def _silo(self, name: str) -> SiloHome:
        """A silo that joined, whose way to the SuperLink leads through its proxy."""
        silo = SiloHome.create(self.folder / name, SiloSettings(name, dashboard=""))
        self.home.admit(read_card(silo.card))
        silo.join(self.home.invitation())
        address, through = (json.dumps(f"127.0.0.1:{port}") for port in (self.port, self.proxies[name].port))
        silo.file.write_text(silo.file.read_text().replace(address, through))
        silo.charter.write_text(CHARTER)
        self.data(name).write_text("".join(json.dumps(row) + "\n" for row in rows_of(name)))
        return silo

    def _program(self, name: str, *words: str) -> Program:
        return Program(name, words, self.folder / f"{name}.log")


def rows_of(silo: str) -> Iterator[dict[str, str]]:
    """A silo's examples: random words."""
    draw = random.Random(silo)
    words = {"law": "court judge oath claim", "medicine": "fever dose heart nurse", "sport": "goal team puck ice"}
    for domain, own in words.items():
        for _ in range(8 + 2 * SILOS.index(silo)):
            yield {"text": " ".join(draw.choices(own.split(), k=12)), "domain": domain}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


class Conductor:
    """Lets troubles happen to a scene, and starts again what ended, until its run is over."""

    def __init__(self, scene: Scene, plan: Sequence[Trouble]) -> None:
        self.scene, self.plan = scene, list(plan)
        self._down: dict[str, tuple[float, Callable[[], None]]] = {}  # what does not work: until when; what mends it
        self._done, self._since, self._span = 0, time.monotonic(), 1.0

    def play(self) -> None:
        """Raises `TimeoutError` for a run that stalls."""
        scene = self.scene
        while not scene.over:
            self._look()
            self._restore()
            while self.plan and self._is_due(self.plan[0]):
                self._let_happen(self.plan.pop(0))
            if time.monotonic() - self._since > STALLED_S:
                raise TimeoutError(f"Expected round {self._done + 1} to end within {STALLED_S:g} s.")
            time.sleep(LOOK_S)

    def _look(self) -> None:
        done, now = self.scene.done, time.monotonic()
        if done != self._done:
            if done > self._done:
                self._span = min(now - self._since, 5.0)
                self.scene.say(f"round {done}")
            self._done, self._since = done, now

    def _is_due(self, trouble: Trouble) -> bool:
        begun = (self.scene.run.path / "treaty.toml").exists()
        late = self._done > trouble.after or time.monotonic() - self._since > trouble.late * self._span
        there = self._target(trouble) not in self._down and (trouble.kind != "superlink" or self.scene.superlink())
        return begun and self._done >= trouble.after and late and bool(there)

    def _target(self, trouble: Trouble) -> str:
        match trouble.kind:
            case "silo":
                return trouble.silo
            case "cut" | "silence":
                return f"the network to {trouble.silo}"
            case "superlink":
                return "coordinator"
        return trouble.kind

    def _let_happen(self, trouble: Trouble) -> None:
        scene, target = self.scene, self._target(trouble)
        match trouble.kind:
            case "superlink":
                for link in scene.superlink():
                    link.kill()
            case "cut" | "silence":
                proxy = scene.proxies[trouble.silo]
                (proxy.cut if trouble.kind == "cut" else proxy.silence)()
                self._again(trouble.lasts, target, proxy.mend)
            case _:
                scene.programs[target].kill()
                self._again(trouble.lasts, target, lambda: self._start(target))
        scene.happened.append(trouble)
        scene.say(f"after round {self._done}: {trouble}")

    def _again(self, later_s: float, target: str, mend: Callable[[], None]) -> None:
        self._down[target] = time.monotonic() + later_s, mend

    def _restore(self) -> None:
        """What is due, and what ended without having been killed, as a service manager does."""
        for target, (when, mend) in list(self._down.items()):
            if when <= time.monotonic():
                mend()
                del self._down[target]
        for name, program in self.scene.programs.items():
            if not program.alive and name not in self._down and not self.scene.over:
                self.scene.unasked[name] += 1
                self.scene.say(f"{name} ended by itself")
                self._again(1.0, name, lambda name=name: self._start(name))

    def _start(self, name: str) -> None:
        program = self.scene.programs[name]
        if name == "run":
            program.words = "resume", str(self.scene.run.path)
        program.start()


@contextmanager
def stranger(scene: Scene) -> Iterator[list[str]]:
    """A node that nobody admitted, which knows address and certificate, and tries all the time. Yields what it met."""
    from foedus.engines import flower

    private, _ = certificates.node_key()
    met: list[str] = []
    stop = threading.Event()
    address, authority = f"127.0.0.1:{scene.proxies['stranger'].port}", scene.home.invitation().authority.encode()

    def answer(blob: bytes) -> bytes:
        met.append("a message")
        return blob

    options = {"stop": stop, "told": met.append}
    knocking = threading.Thread(target=flower.serve, args=(address, authority, private, answer), kwargs=options)
    knocking.start()
    try:
        yield met
    finally:
        stop.set()
        knocking.join(60.0)


def until(holds: Callable[[], bool], most_s: float = 240.0) -> bool:
    end = time.monotonic() + most_s
    while not holds() and time.monotonic() < end:
        time.sleep(LOOK_S)
    return holds()


# What must hold afterwards


@dataclass(frozen=True)
class Check:
    """Something that must hold, and what was found."""

    name: str
    held: bool
    found: str

    def __str__(self) -> str:
        return f"{'held' if self.held else 'NOT HELD':<9} {self.name}: {self.found}"


def chaos(folder: Path, rounds: int, kills: int, seed: int, masked: bool = False, told: Told = print) -> list[Check]:
    """Plays it in `folder`, which is new, and looks at what came of it."""
    scene = Scene(folder, rounds, masked, told)
    plan = troubles(rounds, kills, seed)
    with ExitStack() as ends:
        ends.callback(scene.close)
        for name in ("coordinator", *SILOS):
            scene.programs[name].start()
        if not until(lambda: all(map(scene.connected, SILOS))):
            raise TimeoutError(f"Expected all silos to connect; {folder} has their logs.")
        met = ends.enter_context(stranger(scene))
        scene.say("all silos are connected, and the run begins")
        scene.programs["run"].start()
        Conductor(scene, plan).play()
        scene.say("the run is over")
        revoked = _revoked(scene)
    return [_happened(scene, plan), _over(scene), *looked_at(scene), _unseen(met), revoked]


def looked_at(scene: Scene) -> list[Check]:
    """What the files say."""
    try:
        ledgers = {path: verify(path) for path in _ledgers(scene)}
    except FoedusError as error:
        return [Check("all ledgers verify", False, str(error))]
    own = ledgers[scene.run.path / "ledger.jsonl"]
    took = participants(own)
    count = sum(len(records) for records in ledgers.values())
    return [
        Check("all ledgers verify", True, f"{len(ledgers)} files, {count} records"),
        _agree(scene, ledgers, took),
        _once(scene, ledgers),
        _charged(scene, took),
        *_as_undisturbed(scene, took),
    ]


def participants(records: Sequence[Mapping[str, Any]]) -> dict[int, frozenset[str]]:
    """Who took part in each round, by the run's ledger; of a round that was redone, the last time."""
    return {r["body"]["round"]: frozenset(r["body"]["reports"]) for r in records if r["kind"] == "round"}


def _ledgers(scene: Scene) -> list[Path]:
    silos = scene.silos.values()
    budgets = [path for silo in silos for path in silo.budgets.glob("*.jsonl")]
    return [scene.run.path / "ledger.jsonl", scene.home.ledger, *(silo.ledger for silo in silos), *budgets]


def _happened(scene: Scene, plan: Sequence[Trouble]) -> Check:
    counts = Counter(trouble.kind for trouble in scene.happened)
    said = ", ".join(f"{count} × {kind}" for kind, count in sorted(counts.items()))
    by_itself = ", ".join(f"{name} {count} ×" for name, count in scene.unasked.items()) or "nothing"
    return Check("all troubles happened", len(scene.happened) == len(plan), f"{said}; ended by itself: {by_itself}")


def _over(scene: Scene) -> Check:
    summary = scene.run.read_json("summary.json")
    done = [row["round"] for row in scene.run.metrics() if row["kind"] == "round"]
    spent = f"{len(done)} rounds, {len(summary['failures'])} reports missing, {time.monotonic() - scene.began:.0f} s"
    return Check("the run is over", done == list(range(1, scene.rounds + 1)), spent)


def _agree(scene: Scene, ledgers: Mapping[Path, Any], took: Mapping[int, frozenset[str]]) -> Check:
    """Each silo's ledger shows the rounds in which it took part as the run's does."""
    own, said, held = ledgers[scene.run.path / "ledger.jsonl"], [], True
    for name, silo in scene.silos.items():
        found = compare(own, ledgers[silo.ledger], ("run", name))
        mine = {round for round, silos in took.items() if name in silos}
        held &= found.same and mine <= {round for _, round in found.agreed}
        said.append(f"{name} in {len(mine)} rounds{''.join(f'; {parting}' for parting in found.parted)}")
    return Check("run and silos saw the same rounds", held, ", ".join(said))


def _once(scene: Scene, ledgers: Mapping[Path, Any]) -> Check:
    """Whatever left a silo in a round is the same however often it left; and no sum was opened for two sets of silos,
    which is what matters of masked payloads, for no two of them are alike.
    """
    own = ledgers[scene.run.path / "ledger.jsonl"]
    given = {
        (name, r["body"]["round"], r["body"]["payload"])
        for name, silo in scene.silos.items()
        for r in ledgers[silo.ledger]
        if r["kind"] == "answered" and r["body"]["ask"] == "train" and not r["body"]["failure"]
    }
    opened = {(r["body"]["purpose"], *r["body"]["survivors"]) for r in own if r["kind"] == "survivors"}
    places = Counter(place[0] for place in opened) if scene.masked else Counter(place[:2] for place in given)
    twice = [place for place, count in places.items() if count > 1]
    redone = sum(bool(r["body"].get("redone")) for r in own if r["kind"] == "round")
    said = f"{len(given)} payloads, {len(opened)} sums opened, {redone} rounds redone with another outcome"
    return Check("nothing was given twice", not twice, said + "".join(f"; {place}" for place in twice))


def _charged(scene: Scene, took: Mapping[int, frozenset[str]]) -> Check:
    """In budgets and in the run's ledger each round stands once; each that was given was charged and released."""
    held, said = True, []
    most = accountant.upper(_plan(scene).event(), DELTA)
    for name, silo in scene.silos.items():
        budget = Budget(silo.budgets, name)
        kept = {kind: [r["body"]["round"] for r in budget.ledger.records if r["kind"] == kind]
                for kind in ("charge", "released")}  # fmt: skip
        mine = {round - 1 for round, silos in took.items() if name in silos}
        spent = accountant.upper(budget.spent(), DELTA)
        held &= all(len(rounds) == len(set(rounds)) and mine <= set(rounds) for rounds in kept.values())
        held &= spent <= most and (len(kept["charge"]) < scene.rounds or spent == most)
        said.append(f"{name} {len(kept['charge'])} charged, {len(kept['released'])} released, ε = {spent:.3f}")
    records = verify(scene.run.path / "ledger.jsonl")
    charged = [r["body"]["round"] for r in records if r["kind"] == "charge"]
    held &= charged == list(range(1, scene.rounds + 1))
    return Check("no round was counted twice", held, f"{', '.join(said)}; by the plan ε = {most:.3f}")


def _plan(scene: Scene) -> Any:
    from foedus.build import privacy_plan

    return privacy_plan(scene.treaty, len(SILOS))


class Present:
    """All silos in this process, of which only some take part in each round. `took`: round, from 1, to who did."""

    def __init__(self, engine: Engine, took: Mapping[int, frozenset[str]]) -> None:
        self.engine, self.took = engine, took

    @property
    def memory(self) -> dict[str, Tree]:
        return self.engine.memory

    def ask(self, asks: Sequence[Ask]) -> Iterator[Report]:
        away = [ask for ask in asks if ask.kind == "train" and ask.silo not in self.took[round_of(ask) + 1]]
        yield from self.engine.ask([ask for ask in asks if ask not in away])
        for ask in away:
            yield failed(ask.silo, round_of(ask), SiloError("a silo that took part", "one that did not", "Nothing."))


def _as_undisturbed(scene: Scene, took: Mapping[int, frozenset[str]]) -> Iterator[Check]:
    """The same treaty in this process, with the same silos in each round."""
    from foedus.build import build
    from foedus.execute import begin, execute

    place = build(scene.treaty, {name: scene.data(name) for name in SILOS})
    undisturbed = begin(scene.treaty, scene.folder / "undisturbed")
    for _ in execute(undisturbed, place, engine=Present(place.engine(), took)):
        pass
    ours, theirs = (run.read_json("summary.json") for run in (scene.run, undisturbed))
    one, other = (summary["adapter"]["sha256"] for summary in (ours, theirs))
    whole = sum(silos == set(SILOS) for silos in took.values())
    said = f"{one[:16]} and {other[:16]}, with all silos in {whole} of {len(took)} rounds"
    yield Check("the adapter is that of an undisturbed run", one == other, said)
    said = f"ε = {ours['privacy']['epsilon']:.3f}"
    yield Check("and so is what is said of privacy", ours["privacy"] == theirs["privacy"], said)


def _unseen(met: Sequence[str]) -> Check:
    messages, refusals = met.count("a message"), sum("not admitted" in word for word in met)
    held = not messages and "connected" not in met and refusals > 0
    said = f"{refusals} times refused, {len(met) - refusals} times not reached, {messages} messages seen"
    return Check("a stranger's node sees nothing", held, said)


def _revoked(scene: Scene) -> Check:
    """A silo that is put out is not on the line any more, and is told so, again and again."""
    from foedus.engines import flower

    name = SILOS[-1]
    log, nodes = scene.programs[name].log, {one: card.node for one, card in scene.home.cards().items()}
    before = len(verify(scene.silos[name].ledger))
    scene.home.revoke(name)
    told = until(lambda: "has not admitted this key" in log.read_text().splitlines()[-1], 60.0)
    with flower.FlowerLine(scene.home.flower / "socket", nodes) as line:
        here = line.silos()
        line.send(name, b"not for you")
        time.sleep(1.0)
    after = len(verify(scene.silos[name].ledger))
    said = f"connected: {', '.join(sorted(here)) or 'nobody'}; {after - before} messages reached it"
    return Check("a revoked silo sees nothing", told and name not in here and after == before, said)


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=20)
    options.add_argument("--kills", type=int, default=20)
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--masked", action="store_true", help="the coordinator sees sums only")
    options.add_argument("--folder", type=Path, help="where everything lies afterwards; a new one")
    wished = options.parse_args()
    folder = wished.folder or Path(tempfile.mkdtemp(prefix="chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    print(f"Everything lies in {folder}.", flush=True)

    def told(line: str) -> None:
        print(line, flush=True)

    found = chaos(folder, wished.rounds, wished.kills, wished.seed, wished.masked, told)
    print("", *found, sep="\n")
    return 0 if all(check.held for check in found) else 1


if __name__ == "__main__":
    sys.exit(main())
