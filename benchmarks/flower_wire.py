"""What our line adds to Flower's own floor, over TLS: `python -m benchmarks.flower_wire [--large]`.

The floor is the least that Flower can do with three nodes that stay: a stock `flower-superlink`, Flower's `HttpGrid`,
and in each silo Flower's own connection of a SuperNode, which echoes; all of them polled every 50 ms instead of every
3 s. (Flower as it comes starts a process for each message besides, which takes 5 to 9 s.) Ours is everything between
an ask and its report: frames, `Remote`, `FlowerLine`, the SuperLink behind our gate, and `serve`. Both carry the same
bytes down and up, with node authentication, state in SQLite, and every party in a process of its own; they take turns,
and who waits for his turn polls nothing.

A round is one of `foedus run --engine flower`, as between organisations, whose training takes no step: three homes with
their charters and a treaty that all signed, `Guard` and `Host` in each silo's process, `Seal`, loop, ledger and
checkpoint in the coordinator's. It takes as long as from one checkpoint to the next, in the open (one exchange) and
masked (two), beside one exchange of Flower's floor with as many bytes.

Bytes are counted by a proxy between the silos and our SuperLink: TLS, HTTP, heartbeats and all. `--large`: one message
of 500 MB, with the peak of memory of each process.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import psutil

from foedus import wire
from foedus.deploy import certificates, signing
from foedus.deploy.guard import Work
from foedus.deploy.home import FederationHome, Settings, SiloHome, SiloSettings, read_card
from foedus.deploy.host import Host
from foedus.deploy.run import begin_run, carry_out, over_flower
from foedus.engines import Ask, flower
from foedus.engines.frames import pack_report, unpack_ask, unpack_report
from foedus.engines.line import Line
from foedus.engines.remote import Plain, Remote
from foedus.execute import Event
from foedus.governance.envelope import OVERHEAD
from foedus.treaty import Treaty, parse
from foedus.treaty.signed import Signed
from foedus.types import Receipt, Report

from .overhead import NoSteps
from .table import Row, finish, machine, median, share

SILOS, PAYLOAD, TURNS, POLL_S = 3, 1 << 20, 5, 0.05
ABOVE, ROUND, BYTES = 1.10, 1.20, 1.01
RANK, ROUNDS = 256, 8  # of an adapter of tiny:llama with 1 MB; and how many are timed
SIZES = (1 << 20, 1 << 24)
LARGE = 500_000_000
FORK = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Ground:
    """What both sides stand on. `keys`: (private, public) of each node."""

    folder: Path
    keys: dict[str, tuple[bytes, str]]

    @property
    def authority(self) -> bytes:
        return (self.folder / "ca.crt").read_bytes()

    @property
    def members(self) -> dict[str, str]:
        return {name: public for name, (_, public) in self.keys.items()}


def rows() -> list[Row]:
    return [*exchange_rows(), *round_rows()]


def exchange_rows(payload: int = PAYLOAD, turns: int = TURNS) -> list[Row]:
    """Seconds of an exchange, ours beside the floor, and bytes on the wire beside those of the payloads."""
    with tempfile.TemporaryDirectory() as folder:
        certificates.make(Path(folder), ["127.0.0.1"], "benchmark")
        ground = Ground(Path(folder), {f"silo-{i}": certificates.node_key() for i in range(SILOS)})
        with floor(ground) as their, ours(ground) as our:  # in this order: forks first, threads last
            mine, theirs = _Times(our), _Times(their)
            for turn in range(turns + 1):
                for side in (mine, theirs):
                    side.take(os.urandom(payload), counted=turn > 0)
        what = f"flower_wire: {SILOS} silos, {payload / 1e6:.1f} MB down and up, over TLS"
        out = [
            share(f"{what}, median exchange", median(mine.wall), median(theirs.wall), "s", ABOVE),
            share(f"{what}, best exchange", min(mine.wall), min(theirs.wall), "s", ABOVE),
            share(f"{what}, the SuperLink's processor", median(mine.cpu), median(theirs.cpu), "s", ABOVE),
        ]
        for size in SIZES:
            out.append(
                share(f"flower_wire: bytes on the wire, {size / 1e6:.0f} MB", *carried(ground, size), "B", BYTES)
            )
        return out


class _Times:
    """Seconds of one side's exchanges: on the clock, and of its SuperLink's processor."""

    def __init__(self, exchange: Any) -> None:
        self.exchange, self.wall, self.cpu = exchange, list[float](), list[float]()
        self._link = psutil.Process(exchange.pids["SuperLink"])

    def take(self, blob: bytes, counted: bool) -> None:
        spent, began = sum(self._link.cpu_times()[:2]), time.perf_counter()
        self.exchange(blob)
        if counted:
            self.wall.append(time.perf_counter() - began)
            self.cpu.append(sum(self._link.cpu_times()[:2]) - spent)


def carried(ground: Ground, size: int) -> tuple[float, float]:
    """Bytes on the wire of one exchange, and those of its payloads."""
    with counting() as (through, count), ours(ground, through) as our:
        our(b"")
        before = count()
        our(os.urandom(size))
        time.sleep(0.5)
        return float(count() - before), 2.0 * SILOS * size


# A round


SUMS = {"in the open": 'sums = "open"', "masked": 'sums = "masked"\ncorrupt = 0.0\ndropout = 0.0'}
TREATY = """
[treaty]
name = "round-{sums}"
[model]
base = "tiny:llama"
max_length = 16
[adapter]
rank = {rank}
[data]
source = "memory"
keep = ["law"]
domain = "domain"
[silos]
names = ["silo-0", "silo-1", "silo-2"]
[cohort]
minimum = 3
[algorithm]
rounds = {rounds}
[local]
steps = 1
[server]
weighting = "uniform"
[secure]
{secure}
[disclosure]
holdings = false
[evaluation]
every = {rounds}
baselines = []
"""
CHARTER = """
[models]
"tiny:llama" = "any"
[adapters]
kinds = ["lora"]
max_rank = {rank}
[training]
tasks = ["causal-lm"]
algorithms = ["fedavg"]
max_rounds = {rounds}
max_steps = 1
[data]
columns = ["text", "domain"]
[privacy]
unit = "none"
epsilon = 8.0
epsilon_for_life = 10.0
delta = 1e-5
[secure]
sums = ["open", "masked"]
others = 0
[disclosure]
loss = true
[evaluation]
splits = ["validation", "test"]
baselines = ["base"]
[limits]
max_bytes = 1_000_000_000
"""
EXAMPLES = [{"text": f"clause {i}", "domain": "law"} for i in range(20)]


def treaty(sums: str, rank: int, rounds: int) -> Treaty:
    return parse(TREATY.format(sums=sums.split()[-1], rank=rank, rounds=rounds, secure=SUMS[sums]))


def round_rows(rank: int = RANK, turns: int = ROUNDS) -> list[Row]:
    """Seconds of a round beside those of one exchange of Flower's floor, in turns; and a round's bytes on the wire
    beside those of its payloads and its mail.
    """
    seconds: dict[str, list[float]] = {name: [] for name in (*SUMS, "floor")}
    scale, out = Scale(), []
    with tempfile.TemporaryDirectory() as folder:
        certificates.make(Path(folder), ["127.0.0.1"], "benchmark")
        ground = Ground(Path(folder), {f"silo-{i}": certificates.node_key() for i in range(SILOS)})
        with floor(ground) as exchange, federated(Path(folder), rank, turns + 3, scale) as one_round:
            for _ in range(2):  # models are loaded, and keys are dealt
                size = max(scale.of(step) for step in one_round.values()) // (2 * SILOS)
            exchange(os.urandom(size))
            for _ in range(turns):
                blob = os.urandom(size)
                for name, step in {**one_round, "floor": partial(exchange, blob)}.items():
                    began = time.perf_counter()
                    step()
                    seconds[name].append(time.perf_counter() - began)
    for sums in SUMS:
        name = f"flower_wire: a round {sums}, {SILOS} silos, {size / 1e6:.1f} MB down and up, beside one exchange"
        out.append(share(name, median(seconds[sums]), median(seconds["floor"]), "s", ROUND))
    with tempfile.TemporaryDirectory() as folder, counting() as (through, count):
        with federated(Path(folder), rank, 4, scale, through) as one_round:
            for sums, step in one_round.items():
                step()
                step()
                before, payloads = count(), scale.of(step)
                out.append(share(f"flower_wire: bytes of a round {sums}", count() - before, payloads, "B", BYTES))
    return out


class Scale:
    """Weighs what crosses lines, both ways: payloads and mail, without what frames and seals them."""

    bytes = 0

    def of(self, step: Callable[[], object]) -> int:
        """What crossed them during a step."""
        before = self.bytes
        step()
        return self.bytes - before

    def lines(self, home: FederationHome, nodes: Mapping[str, str]) -> Line:
        return _Weighed(over_flower(home, nodes), self)


@dataclass(frozen=True)
class _Weighed:
    line: Line
    scale: Scale

    def silos(self) -> frozenset[str]:
        return self.line.silos()

    def send(self, silo: str, blob: bytes) -> str:
        self._weigh(unpack_ask(blob[OVERHEAD:]))
        return self.line.send(silo, blob)

    def poll(self) -> Iterator[tuple[str, bytes | str]]:
        for name, answer in self.line.poll():
            if isinstance(answer, bytes):
                self._weigh(unpack_report(answer[OVERHEAD:]))
            yield name, answer

    def close(self) -> None:
        self.line.close()

    def _weigh(self, one: Ask | Report) -> None:
        self.scale.bytes += len(one.payload) + len(one.mail)


@contextmanager
def federated(
    folder: Path, rank: int, rounds: int, scale: Scale, through: Callable[[str], str] = str
) -> Iterator[dict[str, Callable[[], Event]]]:
    """A federation that is up, with a run for each way of summing: what carries out its next round."""
    address = free_address()
    home = FederationHome.create(folder / "federation", Settings("benchmark", address, dashboard=""))
    silos = [SiloHome.create(folder / name, SiloSettings(name)) for name in (f"silo-{i}" for i in range(SILOS))]
    for silo in silos:
        home.admit(read_card(silo.card))
        silo.join(home.invitation())
        silo.charter.write_text(CHARTER.format(rank=rank, rounds=rounds))
    treaties = {sums: treaty(sums, rank, rounds) for sums in SUMS}
    for made, _ in (signing.propose(home, one) for one in treaties.values()):
        for silo in silos:
            signing.sign(silo, made)
    with flower.SuperLink(
        home.flower, address, certificate=home.tls / "server.crt", key=home.tls / "server.key"
    ) as link:
        flower.admit(link.socket, {name: card.node for name, card in home.cards().items()})
        processes = [FORK.Process(target=idle_silo, args=(silo, through(address)), daemon=True) for silo in silos]
        with running(processes), ExitStack() as ends:
            until(lambda: all(node.online for node in flower.nodes(link.socket).values()))
            runs = {sums: carry_out(home, begin_run(home, one), lines=scale.lines) for sums, one in treaties.items()}
            for run in runs.values():
                ends.enter_context(closing(run))
            yield {sums: partial(_next_round, run) for sums, run in runs.items()}


def _next_round(run: Iterator[Event]) -> Event:
    return next(event for event in run if event.kind == "round")


def idle_silo(home: SiloHome, address: str) -> None:
    """A silo's process as `foedus silo up` has it, but that its training takes no step."""
    host = Host(home, EXAMPLES)

    def work(signed: Signed) -> Work:
        found = host.work(signed)
        found.engine.handler = replace(found.engine.handler, algorithm=NoSteps())
        return found

    host.guard.engine = work
    flower.serve(address, home.invitation.authority.encode(), home.node, host.guard)


# Ours


def echo(name: str) -> Callable[[bytes], bytes]:
    def answer(blob: bytes) -> bytes:
        ask = unpack_ask(blob)
        return pack_report(Report(name, 1, ask.payload, Receipt(name, 1, payload=wire.digest(ask.payload))))

    return answer


@contextmanager
def ours(ground: Ground, through: Callable[[str], str] = str) -> Iterator[Callable[[bytes], None]]:
    """An exchange of ours with all silos. `through`: from the SuperLink's address to the one that silos use."""
    home = Path(tempfile.mkdtemp(dir=ground.folder))
    address = free_address()
    with flower.SuperLink(
        home, address, certificate=ground.folder / "server.crt", key=ground.folder / "server.key"
    ) as link:
        flower.admit(link.socket, ground.members)
        silos = [
            FORK.Process(
                target=flower.serve, args=(through(address), ground.authority, private, echo(name)), daemon=True
            )
            for name, (private, _) in ground.keys.items()
        ]
        with running(silos), flower.FlowerLine(link.socket, ground.members) as line:
            engine = Remote(line, Plain(), deadline_s=600.0)
            until(lambda: len(line.silos()) == len(ground.keys))

            def exchange(blob: bytes) -> None:
                reports = list(engine.ask([Ask("train", name, blob) for name in ground.keys]))
                assert all(report.payload == blob for report in reports), reports[0].receipt.failure

            exchange.pids = {"SuperLink": link.pid, **{f"silo {i}": silo.pid for i, silo in enumerate(silos)}}
            yield exchange


# The floor: Flower alone


@contextmanager
def floor(ground: Ground) -> Iterator[Callable[[bytes], None]]:
    """The same exchange through a stock SuperLink, with Flower's own classes at both ends."""
    address, folder = free_address(), Path(tempfile.mkdtemp(dir=ground.folder))
    words = {
        "ssl-ca-certfile": "ca.crt", "ssl-certfile": "server.crt", "ssl-keyfile": "server.key", "isolation": "process",
        "database": folder / "state.db", "host": "127.0.0.1", "port": address.rpartition(":")[2],
    }  # fmt: skip
    command = [Path(sys.executable).parent / "flower-superlink", "--enable-supernode-auth"]
    command += [f"--{name}={word}" for name, word in words.items()]
    command += ["--disable-runtime-dependency-installation"]
    environment = os.environ | {
        "FLWR_HOME": str(folder),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }
    with (folder / "log").open("wb") as log:
        link = subprocess.Popen(command, cwd=ground.folder, env=environment, stdout=log, stderr=log)
    turn = FORK.Event()
    try:
        run, token = begin(ground, address)
        silos = [
            FORK.Process(target=echo_node, args=(address, ground.authority, private, turn), daemon=True)
            for private, _ in ground.keys.values()
        ]
        with running(silos):
            exchange = grid_exchange(ground, address, run, token, turn)
            exchange.pids = {"SuperLink": link.pid}
            yield exchange
            exchange.close()
    finally:
        link.kill()
        link.wait()


def begin(ground: Ground, address: str) -> tuple[Any, str]:
    """Registers the nodes and begins a run; its number, and the token of its task."""
    from flwr.proto import control_pb2, fab_pb2, runtime_pb2
    from flwr.supercore.control.control_http_client import ControlHttpClient
    from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
    from flwr.supercore.runtime import RuntimeHttpClient

    bundle = flower._bundle()
    control = ControlHttpClient.from_server_address(address, False, ground.authority, [])
    until(lambda: _answers(lambda: control.ListNodes(control_pb2.ListNodesRequest())))
    for name, public in ground.members.items():
        control.RegisterNode(control_pb2.RegisterNodeRequest(public_key=flower._public(public), name=name))
    fab = fab_pb2.Fab(hash_str=sha256(bundle).hexdigest(), content=bundle)
    run = control.StartRun(control_pb2.StartRunRequest(fab=fab)).run_id
    version = RuntimeVersionHttpInterceptor(component_name="flwr-serverapp")
    runtime = RuntimeHttpClient.from_server_address(address, False, ground.authority, [version])
    return run, runtime.AcquireTask(runtime_pb2.AcquireTaskRequest(supported_task_types=["flwr-serverapp"])).token


def _answers(ask: Callable[[], Any]) -> bool:
    import httpx

    with suppress(httpx.HTTPError):
        ask()
        return True
    return False


def grid_exchange(ground: Ground, address: str, run: int, token: str, turn: Any) -> Callable[[bytes], None]:
    from flwr.app import ConfigRecord, Message, RecordDict
    from flwr.proto import runtime_pb2
    from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
    from flwr.supercore.run import Run
    from flwr.supercore.task_identity import TaskIdentity
    from flwr.superlink.grid.http_grid import HttpGrid

    grid = HttpGrid(address, False, ground.authority, token=token)
    grid._runtime_client.PullTaskInput(runtime_pb2.PullTaskInputRequest())
    grid.set_run(Run.create_empty(run))
    heart = HeartbeatSender(make_task_heartbeat_fn_http(grid._runtime_client))
    heart.start()
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run, 1, 1
    until(lambda: len(list(grid.get_node_ids())) == SILOS)
    nodes = list(grid.get_node_ids())

    def exchange(blob: bytes) -> None:
        turn.set()
        waiting = set(grid.push_messages([
            Message(RecordDict({"": ConfigRecord({"bytes": blob, "to": str(node)})}), node, "query") for node in nodes
        ]))  # fmt: skip
        while waiting:
            for reply in grid.pull_messages(waiting):
                assert reply.content[""]["bytes"] == blob
                waiting.discard(reply.metadata.reply_to_message_id)
            time.sleep(POLL_S)
        turn.clear()

    exchange.close = heart.stop
    return exchange


def echo_node(address: str, authority: bytes, private: bytes, turn: Any) -> None:
    """What a SuperNode's loop does, without the process that it starts for each message."""
    from flwr.app import ConfigRecord, Message, RecordDict
    from flwr.supercore.inflatable.inflatable_object import (
        get_all_nested_objects,
        get_object_tree,
        no_object_id_recompute,
    )
    from flwr.supercore.inflatable.inflatable_utils import pull_and_inflate_object_from_tree, push_objects
    from flwr.supercore.primitives.asymmetric import bytes_to_private_key
    from flwr.supernode.fleet_http_connection import http_request_response

    key = bytes_to_private_key(private)
    with http_request_response(address, False, authority, (key, key.public_key())) as connection:
        _, receive, send, _, _, pull, push, confirm = connection
        while turn.wait():
            if (found := receive()) is None:
                time.sleep(POLL_S)
                continue
            message, tree = found
            run = message.metadata.run_id
            asked = pull_and_inflate_object_from_tree(
                tree, partial(pull, run), partial(confirm, run), return_type=Message, initial_backoff=POLL_S
            )
            reply = Message(RecordDict({"": ConfigRecord(dict(asked.content[""]))}), reply_to=message)
            with no_object_id_recompute():
                reply.metadata.__dict__["_message_id"] = reply.object_id
                missing, session = send(reply, get_object_tree(reply), 0.0)
                objects = get_all_nested_objects(reply)
                push_objects(objects, partial(push, run, session), object_ids_to_push=missing)


# Around them


def until(holds: Callable[[], bool], most_s: float = 300.0) -> None:
    end = time.monotonic() + most_s
    while not holds():
        if time.monotonic() > end:
            raise TimeoutError(f"Expected it within {most_s:g} s.")
        time.sleep(0.05)


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"127.0.0.1:{free.getsockname()[1]}"


@contextmanager
def running(processes: list[Any]) -> Iterator[None]:
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


@contextmanager
def counting() -> Iterator[tuple[Callable[[str], str], Callable[[], int]]]:
    """A proxy that counts: a function from an address to one that leads there, and the bytes of both ways so far."""
    counts = [0]
    listener = socket.create_server(("127.0.0.1", 0))

    def carry(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while chunk := source.recv(1 << 16):
                counts[0] += len(chunk)  # the interpreter's lock makes it one step
                sink.sendall(chunk)
            sink.shutdown(socket.SHUT_WR)

    def accept(address: str) -> None:
        host, _, port = address.rpartition(":")
        with suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = socket.create_connection((host, int(port)))
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=carry, args=pair, daemon=True).start()

    def through(address: str) -> str:
        threading.Thread(target=accept, args=(address,), daemon=True).start()
        return f"127.0.0.1:{listener.getsockname()[1]}"

    try:
        yield through, lambda: counts[0]
    finally:
        listener.close()


def large(size: int = LARGE) -> list[Row]:
    """One message of `size` bytes down and its echo up: seconds, and the peak of memory of each process above what it
    held before, beside the message.
    """
    with tempfile.TemporaryDirectory() as folder:
        certificates.make(Path(folder), ["127.0.0.1"], "benchmark")
        ground = Ground(Path(folder), {"silo-0": certificates.node_key()})
        with ours(ground) as our:
            our(b"x")
            pids = {"coordinator": os.getpid(), **our.pids}
            before = {who: peak(pid) for who, pid in pids.items()}
            blob = os.urandom(1 << 20) * (size >> 20)
            began = time.perf_counter()
            our(blob)
            seconds = time.perf_counter() - began
            rows = [Row(f"flower_wire: {size / 1e6:.0f} MB down and up", seconds, None, None, None, "s", machine())]
            for who, pid in pids.items():
                name = f"flower_wire: peak memory of {who} above its start, messages of {size / 1e6:.0f} MB"
                rows.append(share(name, (peak(pid) - before[who]) / 1e6, size / 1e6, "MB"))
            return rows


def peak(pid: int) -> int:
    """The most memory that a process has held, in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--large", action="store_true", help="one message of 500 MB instead")
    wished = options.parse_args()
    finish("flower_wire_large", large()) if wished.large else finish("flower_wire", rows())
