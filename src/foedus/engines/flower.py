"""Flower as transport, and nothing more. Read `line.py` first; this is the only file that imports Flower.

    coordinator: FlowerLine ── Unix socket ── SuperLink, a process of its own ══ TLS ══ serve() :silo

What is Flower's: the SuperLink's application with its state, its object store and its authentication of nodes; the
clients of its three APIs (Control, Runtime, Fleet); messages, and the objects that they are cut into. What is not used:
strategies, ServerApp and ClientApp, SuperNode and SuperExec, app bundles, the command line, telemetry, update checks.

- **No code is shipped.** A SuperNode runs what the SuperLink sends it, in a new process for each message. `serve`
  speaks the same Fleet API, and hands bytes to an `Answer` that lives in the silo's own process; it never asks for a
  bundle. A run must have one, so ours holds a description and no code, and the network cannot fetch even that.
- **The network sees the eight Fleet paths of a node, and nothing else**, over TLS 1.3, each request signed with a node
  key that the coordinator admitted. Control and Runtime (anybody who reaches a stock SuperLink may register nodes and
  start runs there) listen on a Unix socket of the coordinator's user.
- **News travel at once.** Pulls are held (`gate.py`) instead of repeated every few seconds.
- **Nothing of ours is lost with Flower's state.** A run ends for good when its SuperLink dies: messages of it fail, the
  next one begins a new run, and what was asked is asked again by `remote.py`. A node that returns gives its old session
  back, instead of waiting until its heartbeat expires, so that messages that it left unanswered fail at once.

Private API, hence `flwr>=1.41,<1.42`: `superlink.main.create_app` with its configuration, the three HTTP clients and
the `_client` inside them, `make_message`, and deflating and object trees in `supercore.inflatable`.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import io
import json
import logging
import os
import queue
import socket
import ssl
import subprocess
import sys
import threading
import time
import traceback
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..errors import FoedusError, RunError, WireError
from .frames import MOST_BODY, connect, listen
from .gate import Gate, News
from .line import Answer, Away

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"

try:
    import httpcore
    import httpx
    from cryptography.hazmat.primitives.serialization import load_ssh_public_key
    from flwr.app import ConfigRecord, Error, Message, Metadata, RecordDict
    from flwr.app.message import make_message, remove_content_from_message
    from flwr.common.constant import HEARTBEAT_MIN_INTERVAL, SUPERLINK_NODE_ID, ErrorCode
    from flwr.common.serde import message_from_proto, message_to_proto
    from flwr.proto import control_pb2, fab_pb2, fleet_pb2, heartbeat_pb2, message_pb2, node_pb2, runtime_pb2
    from flwr.supercore.constant import TaskType
    from flwr.supercore.control.control_http_client import ControlHttpClient
    from flwr.supercore.error import ApiErrorCode, FlowerError
    from flwr.supercore.inflatable.inflatable_object import (
        get_all_nested_objects,
        get_object_tree,
        iterate_object_tree,
        no_object_id_recompute,
    )
    from flwr.supercore.inflatable.inflatable_protobuf_utils import (
        make_pull_object_fn_protobuf,
        make_push_object_fn_protobuf,
    )
    from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, ObjectPushError, ObjectUnavailableError
    from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, RuntimeVersionHttpInterceptor
    from flwr.supercore.primitives.asymmetric import bytes_to_private_key, public_key_to_bytes
    from flwr.supercore.protobuf.client import ProtobufClient, ProtobufClientInterceptor
    from flwr.supercore.runtime import RuntimeHttpClient
    from flwr.supernode.fleet_http_client import FleetHttpClient
    from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
    from google.protobuf.message import DecodeError
    from httpcore._backends.sync import SyncStream
except ModuleNotFoundError as error:
    if error.name not in ("flwr", "httpx"):
        raise
    expected = "Flower, which carries what is said between organisations"
    raise RunError(expected, "none", 'Install it: pip install "foedus[flower]".') from error

log = logging.getLogger("foedus.engines.flower")
logging.getLogger("flwr").setLevel(logging.WARNING)
logging.getLogger("httpx").setLevel(logging.WARNING)

PIECE = 1 << 22
"""Bytes of a message that travel in one object: what each side holds beside the message itself."""
MOST = MOST_BODY + (1 << 20)
"""Bytes of a message: the largest frame, and what seals it."""
MOST_REQUEST = 1 << 24
"""Bytes of one request to the SuperLink: a piece, or the tree of the largest message."""
BEAT_S = 4.0
"""How often a node says that it lives; after two of Flower's shortest intervals (20 s) of silence it is gone."""
HOLD_NODE_S, HOLD_LINE_S = 15.0, 2.0
"""How long the SuperLink holds the pull of a node, and of the coordinator, for news."""
LOOK_S, RUN_BEAT_S = 1.0, 10.0
"""How often the coordinator looks who is connected, and says that its run goes on (Flower ends it after 60 s)."""
TIMEOUT_S = 30.0
"""For one request, held pulls included."""
TRANSFERS = 4
"""Messages that the coordinator sends or fetches at a time."""
STALLED_S = 240.0
"""How long a message may stop coming in; Flower gives up on one whose sender was silent for 180 s."""

_Api = TypeVar("_Api", bound=ProtobufClient)
_TROUBLE = (httpx.HTTPError, ObjectPullError, ObjectPushError, WireError, ValueError)
"""What can go wrong with an exchange: the network, a refusal, objects that are gone, bytes that are none of ours."""


# Messages: opaque bytes as Flower's objects, piece by piece


class _Piece(ConfigRecord):
    """A part of a message that becomes an object of Flower's only while it is hashed or sent. `mark`: of its message,
    for to Flower equal objects are one, and no two messages shall share any.
    """

    __qualname__ = "ConfigRecord"  # the type that its object names

    def __init__(self, mark: bytes, at: int, part: memoryview) -> None:
        super().__init__()
        self.__dict__.update(mark=mark, at=at, part=part)

    @property
    def is_dirty(self) -> bool:
        return False

    def deflate(self) -> bytes:
        mark, at, part = (self.__dict__[name] for name in ("mark", "at", "part"))
        return ConfigRecord({"mark": mark, "at": at, "bytes": bytes(part)}).deflate()


def _parcel(blob: bytes) -> RecordDict:
    """A message's content. Nothing is copied yet."""
    mark, view = os.urandom(8), memoryview(blob)
    return RecordDict({str(at): _Piece(mark, at, view[at : at + PIECE]) for at in range(0, max(1, len(view)), PIECE)})


class _Peer:
    """One end's way of sending and fetching messages. `api`: its client. `number`: the node that it is."""

    def __init__(self, api: FleetHttpClient | RuntimeHttpClient, number: int) -> None:
        self.api, self.node = api, node_pb2.Node(node_id=number)

    def send(self, message: Message, announce: Callable[[message_pb2.Message, message_pb2.ObjectTree], Any]) -> str:
        """Announces a message, sends the objects that the SuperLink does not have, and returns the message's name."""
        with no_object_id_recompute():
            name = message.metadata.__dict__["_message_id"] = message.object_id
            objects = get_all_nested_objects(message)
            known = announce(message_to_proto(remove_content_from_message(message)), get_object_tree(message))
            run = message.metadata.run_id
            push = make_push_object_fn_protobuf(self.api.PushObject, self.node, run, known.session_id)
            for number in sorted(known.objects_to_push, key=lambda number: isinstance(objects[number], _Piece)):
                push(number, objects[number].deflate())  # pieces last: who has them all confirms, and all is deleted
        return name

    def fetch(self, message: Message, tree: message_pb2.ObjectTree) -> bytes:
        """The bytes of a message, as its pieces come in. Raises `WireError` for what no peer of ours sends."""
        run, name = message.metadata.run_id, message.metadata.message_id
        pull = make_pull_object_fn_protobuf(self.api.PullObject, self.node, run)
        pieces = [part.object_id for part in iterate_object_tree(tree) if not part.children]
        held, size = io.BytesIO(), 0
        for number in pieces:
            at, part = _read(_patiently(pull, number), len(pieces) * PIECE)
            held.seek(at)
            size += held.write(part)
        request = message_pb2.ConfirmMessageReceivedRequest(node=self.node, run_id=run, message_object_id=name)
        self.api.ConfirmMessageReceived(request)
        if held.seek(0, io.SEEK_END) != size:
            raise _odd(f"{size:,} bytes in pieces that do not fit together")
        return held.getvalue()


def _read(content: bytes, end: int) -> tuple[int, bytes]:
    """Where a piece begins, and its bytes; all of them lie before `end`."""
    record = ConfigRecord.inflate(content)
    at, part = record.get("at"), record.get("bytes")
    if not isinstance(at, int) or not isinstance(part, bytes) or not 0 <= at <= at + len(part) <= min(end, MOST):
        raise _odd("an object that is none")
    return at, part


def _patiently(pull: Callable[[str], bytes], number: str) -> bytes:
    """An object that its sender may not have sent yet."""
    pause, until = 0.02, time.monotonic() + STALLED_S
    while time.monotonic() < until:
        try:
            return pull(number)
        except ObjectUnavailableError:
            time.sleep(pause)
            pause = min(1.5 * pause, 0.25)
    raise _odd(f"a message that stopped for {STALLED_S:g} s")


def _odd(came: str) -> WireError:
    return WireError("pieces of a message", came, "Both sides must run versions of foedus that speak the same format.")


# The SuperLink


class SuperLink:
    """Flower's SuperLink as a child process, which ends when this one does. `folder`: gets its state, its log, and the
    socket of the coordinator. `address`: "host:port" that silos reach, over TLS.

    Raises `RunError` when it does not answer within `start_s`.
    """

    def __init__(self, folder: Path, address: str, *, certificate: Path, key: Path, start_s: float = 120.0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        self.folder, self.address, self.socket = folder, address, folder / "socket"
        options = {"folder": folder, "address": address, "certificate": certificate, "key": key}
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        with (folder / "log").open("ab") as file:  # its own session, so that Ctrl-C reaches the coordinator alone
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, *words], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=file,
                start_new_session=True, env=_environment(folder),
            )  # fmt: skip
        try:
            self._wait(time.monotonic() + start_s)
        except BaseException:
            self.stop()
            raise

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    @property
    def pid(self) -> int:
        return self._process.pid

    def stop(self, grace_s: float = 5.0) -> None:
        """Ends it, and waits until it is gone. Any number of times."""
        if self._process.stdin:
            self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(grace_s)
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> SuperLink:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _wait(self, until: float) -> None:
        while time.monotonic() < until and self.alive:
            with suppress(RunError):
                nodes(self.socket)
                return
            time.sleep(0.05)
        said = (self.folder / "log").read_text(errors="replace").strip().splitlines()[-1:]
        came = f"none that answers ({said[0][:200]})" if said else "none that answers"
        do = f"Is the address free, and do certificate and key belong together? {self.folder / 'log'} says more."
        raise RunError(f"a SuperLink at {self.address}", came, do)


def _environment(folder: Path) -> dict[str, str]:
    """Of a SuperLink's process, which faces the network: without the coordinator's secrets (a vault's key, the token of
    the dashboard, the password of a database).
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FOEDUS_", "PG"))}
    return kept | {"FLWR_HOME": str(folder)}


@dataclass(frozen=True)
class Node:
    """A silo's node as the SuperLink knows it. `since`: when it last connected, in ISO 8601; "" for never."""

    name: str
    online: bool
    since: str


def nodes(superlink: Path) -> dict[str, Node]:
    """The admitted nodes by silo. `superlink`: its socket. Raises `RunError` when it does not answer."""
    with _Control(superlink) as control:
        return {node.name: _node(node) for node in control.nodes()}


def admit(superlink: Path, members: Mapping[str, str | bytes]) -> None:
    """Makes the nodes that may connect exactly these: who is missing is registered, who is too many is revoked, at
    once. `members`: silo to the public key of its node. A key that was revoked stays so.

    Raises `RunError` for such a key, for one that is none, and when the SuperLink does not answer.
    """
    wanted = {_public(key): silo for silo, key in members.items()}
    with _Control(superlink) as control:
        known = {node.public_key: node for node in control.nodes()}
        for key in known.keys() - wanted.keys():
            control.ask("UnregisterNode", control_pb2.UnregisterNodeRequest(node_id=known[key].node_id))
        for key in sorted(wanted.keys() - known.keys()):
            control.ask("RegisterNode", control_pb2.RegisterNodeRequest(public_key=key, name=wanted[key]))


class _Control:
    """The Control API, over the SuperLink's socket."""

    def __init__(self, superlink: Path) -> None:
        self._api = _locally(ControlHttpClient, superlink)

    def __enter__(self) -> _Control:
        return self

    def __exit__(self, *_: object) -> None:
        self._api.close()

    def ask(self, what: str, request: Any) -> Any:
        try:
            return getattr(self._api, what)(request)
        except httpx.HTTPStatusError as error:
            raise RunError(f"a SuperLink that grants {what}", _said(error), _DO.get(_code(error), _ASK_LOG)) from error
        except httpx.HTTPError as error:
            raise _away(error) from error

    def nodes(self) -> list[Any]:
        found = self.ask("ListNodes", control_pb2.ListNodesRequest()).nodes_info
        return [node for node in found if node.status != "unregistered"]


_ASK_LOG = "Its log says more."
_DO = {
    ApiErrorCode.PUBLIC_KEY_ALREADY_IN_USE: "A key that was revoked stays so: the silo makes a new one.",
    ApiErrorCode.PUBLIC_KEY_NOT_VALID: "A node's key is an elliptic-curve key of NIST's, as OpenSSH or PEM.",
}


def _node(info: Any) -> Node:
    return Node(info.name, info.status == "online" and info.online_until > time.time(), info.last_activated_at)


def _public(key: str | bytes) -> bytes:
    """A node's public key as Flower writes it, from OpenSSH's text or PEM."""
    words = key.encode() if isinstance(key, str) else key
    if words.startswith(b"-----"):
        return words
    try:
        return public_key_to_bytes(load_ssh_public_key(words))
    except Exception as error:
        raise RunError("the public key of a node", "something else", _DO[ApiErrorCode.PUBLIC_KEY_NOT_VALID]) from error


# The SuperLink's own process


PULL, PUSH = "/v1/fleet/pull-messages", "/v1/fleet/push-messages"
NODE_PATHS = frozenset({
    "/v1/fleet/activate-node", "/v1/fleet/deactivate-node", "/v1/fleet/send-node-heartbeat", PULL, PUSH,
    "/v1/fleet/pull-object", "/v1/fleet/push-object", "/v1/fleet/confirm-message-received",
})  # fmt: skip
"""What the network may reach. Not among them: registering oneself, run and bundle, Control, Runtime, the docs."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Serves a SuperLink until standard input ends: the process that started it holds the other end."""
    options = argparse.ArgumentParser(prog="python -m foedus.engines.flower", description="Serve a SuperLink.")
    for name in ("folder", "certificate", "key"):
        options.add_argument(f"--{name}", required=True, type=Path)
    options.add_argument("--address", required=True)
    wished = options.parse_args(arguments)
    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s", level=logging.WARNING)
    logging.getLogger("flwr").handlers.clear()
    with suppress(KeyboardInterrupt):
        asyncio.run(_serve(wished.folder, wished.address, wished.certificate, wished.key))
    return 0


async def _serve(folder: Path, address: str, certificate: Path, key: Path) -> None:
    from uvicorn import Config, Server

    host, port = _split(address)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    public = socket.create_server((host, port), family=family, backlog=128)
    private = listen(folder / "socket")
    app, news = _application(folder / "state.db"), News()
    outside = Gate(app, news, {PUSH: _the_coordinator, "/v1/fleet/deactivate-node": _who_leaves},
                   {PULL: (_who_pulls, HOLD_NODE_S)}, NODE_PATHS, MOST_REQUEST)  # fmt: skip
    inside = Gate(app, news, {"/v1/runtime/push-messages": _receivers, "/v1/control/unregister-node": _who_is_revoked},
                  {"/v1/runtime/pull-messages": (_the_coordinator, HOLD_LINE_S)}, most=MOST_REQUEST)  # fmt: skip
    common: dict[str, Any] = {
        "access_log": False, "log_config": None, "ws": "none", "server_header": False, "date_header": False,
        "timeout_keep_alive": 75, "timeout_graceful_shutdown": 1,
    }  # fmt: skip
    over_tls = Config(outside, ssl_certfile=certificate, ssl_keyfile=key, lifespan="off", **common)
    over_tls.load()
    assert over_tls.ssl is not None
    over_tls.ssl.minimum_version = ssl.TLSVersion.TLSv1_3
    servers = [Server(over_tls), Server(Config(inside, **common))]
    threading.Thread(target=_leave_with_parent, args=(servers,), daemon=True).start()
    await asyncio.gather(*(server.serve([end]) for server, end in zip(servers, (public, private), strict=True)))


def _application(database: Path) -> Any:
    """Flower's own, which starts no processes, keeps its state in a file, and knows nodes by their keys."""
    from flwr.superlink.auth_plugin import NoOpControlAuthnPlugin
    from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
    from flwr.superlink.config_loader import SuperLinkLifespanConfig
    from flwr.superlink.main import create_app

    nothing = (
        "health_server_address", "certificates", "superexec_auth_secret", "event_log_plugin", "fleet_event_log_plugin",
        "artifact_provider", "fleet_api_address", "ssl_ca_certfile", "ssl_certfile", "ssl_keyfile",
    )  # fmt: skip
    config = SuperLinkLifespanConfig(
        **dict.fromkeys(nothing), control_address="", host="", port=0, insecure=False, enable_event_log=False,
        authn_plugin=NoOpControlAuthnPlugin(), enable_supernode_auth=True, fleet_api_type="grpc-rere",
        simulation=False, database=str(database), isolation="process", runtime_dependency_install=False,
    )  # fmt: skip
    return create_app(config, SuperLinkLifespan)


def _receivers(body: bytes) -> Iterable[int]:
    with suppress(DecodeError):
        found = runtime_pb2.PushAppMessagesRequest.FromString(body).messages_list
        return [message.metadata.dst_node_id for message in found]
    return ()


def _who_pulls(body: bytes) -> Iterable[int]:
    with suppress(DecodeError):
        return (fleet_pb2.PullMessagesRequest.FromString(body).node.node_id,)
    return ()


def _who_leaves(body: bytes) -> Iterable[int]:
    with suppress(DecodeError):
        return (fleet_pb2.DeactivateNodeRequest.FromString(body).node_id,)
    return ()


def _who_is_revoked(body: bytes) -> Iterable[int]:
    with suppress(DecodeError):
        return (control_pb2.UnregisterNodeRequest.FromString(body).node_id,)
    return ()


def _the_coordinator(_: bytes) -> Iterable[int]:
    return (SUPERLINK_NODE_ID,)


def _leave_with_parent(servers: Sequence[Any]) -> None:
    sys.stdin.buffer.read()
    for server in servers:
        server.should_exit = True


def _split(address: str) -> tuple[str, int]:
    """Host and port; an IPv6 address stands in brackets."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise RunError('an address, "host:port"', f'"{address}"', "An IPv6 address stands in brackets.")
    return host.strip("[]"), int(port)


# The coordinator's end


class FlowerLine:
    """A line to silos through a SuperLink of this machine. It lives on when that is restarted.

    `superlink`: its socket. `silos`: to the public keys of their nodes, which `admit` has admitted. `ttl_s`: how long a
    message may wait for its answer. Raises `RunError` when the SuperLink does not answer.
    """

    def __init__(self, superlink: Path, silos: Mapping[str, str | bytes], *, ttl_s: float = 86400.0) -> None:
        self._superlink, self._ttl_s = superlink, ttl_s
        self._keys = {_public(key): silo for silo, key in silos.items()}
        self._found: queue.SimpleQueue[tuple[str, bytes | str]] = queue.SimpleQueue()
        self._sent: dict[str, _Sent] = {}  # by the name that Flower gave it
        self._names = iter(range(1 << 62))
        self._nodes: dict[str, Any] = {}  # silo to its node, of those that are connected
        self._changed, self._closed = threading.Event(), threading.Event()
        self._work = ThreadPoolExecutor(TRANSFERS, "flower")
        self._over: list[_Run] = []  # runs that were lost, which a transfer may still speak to
        self._run: _Run | None = self._begun()
        self._watcher = threading.Thread(target=self._watch, name="flower", daemon=True)
        self._watcher.start()

    def silos(self) -> frozenset[str]:
        return frozenset(self._nodes)

    def send(self, silo: str, blob: bytes) -> str:
        name = str(next(self._names))
        self._work.submit(self._send, name, silo, blob)
        return name

    def poll(self) -> Iterator[tuple[str, bytes | str]]:
        while True:
            try:
                yield self._found.get_nowait()
            except queue.Empty:
                return

    def close(self) -> None:
        if not self._closed.is_set():
            self._closed.set()
            self._changed.set()
            self._work.shutdown(cancel_futures=True)
            self._watcher.join(HOLD_LINE_S + 1)
            if self._run:
                self._run.end()
            for run in self._over:
                run.drop()

    def __enter__(self) -> FlowerLine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send(self, name: str, silo: str, blob: bytes) -> None:
        run, node = self._run, self._nodes.get(silo)
        if run is None or node is None:
            return self._found.put((name, f"{silo} is not connected"))
        try:
            number = run.send(node.node_id, blob, self._ttl_s)
        except _TROUBLE as error:
            return self._found.put((name, f"it could not be sent: {_said(error)}"))
        self._sent[number] = _Sent(name, silo, run, node.last_activated_at)
        self._changed.set()

    def _fetch(self, sent: _Sent, message: Message, tree: message_pb2.ObjectTree) -> None:
        try:
            self._found.put((sent.name, sent.run.answer(message, tree)))
        except _TROUBLE as error:
            self._found.put((sent.name, f"its answer could not be fetched: {_said(error)}"))

    def _watch(self) -> None:
        """Looks who is connected and what has come, and begins a new run when one has ended."""
        looked = pause = 0.0
        while not self._closed.is_set():
            try:
                run = self._run = self._run or _Run(self._superlink)
                if time.monotonic() - looked >= LOOK_S:
                    self._look(run)
                    looked = time.monotonic()
                run.beat()
                self._pull(run)
                pause = 0.0
            except (*_TROUBLE, FoedusError) as error:
                self._lose(_said(error))
                pause = min(2 * pause + 0.1, 5.0)
                self._closed.wait(pause)

    def _pull(self, run: _Run) -> None:
        """Hands out the answers that have come, after some waiting for them."""
        numbers = [number for number, sent in list(self._sent.items()) if sent.run is run]
        if not numbers:
            self._changed.wait(LOOK_S)
            self._changed.clear()
            return
        for message, tree in run.replies(numbers):
            if sent := self._sent.pop(message.metadata.reply_to_message_id, None):
                self._work.submit(self._fetch, sent, message, tree)

    def _begun(self) -> _Run:
        """A run, and a first look at who is there. Raises `Away` where the SuperLink does not answer."""
        try:
            run = _Run(self._superlink)
        except httpx.HTTPError as error:
            raise _away(error) from error
        try:
            self._look(run)
        except httpx.HTTPError as error:
            run.end()
            raise _away(error) from error
        return run

    def _look(self, run: _Run) -> None:
        """Who is connected. What a silo has not answered before it came back, it will not answer any more."""
        found = run.nodes()
        self._nodes = {self._keys[node.public_key]: node for node in found if node.public_key in self._keys}
        for number, sent in list(self._sent.items()):
            node = self._nodes.get(sent.silo)
            if node is not None and node.last_activated_at != sent.since:
                self._sent.pop(number, None)
                self._found.put((sent.name, f"{sent.silo} has connected anew since"))

    def _lose(self, why: str) -> None:
        """The run is over, and what was sent in it will have no answers."""
        log.warning("Flower's run has ended: %s", why)
        self._over += [self._run] if self._run else []
        self._run, self._nodes = None, {}
        for number in list(self._sent):
            if sent := self._sent.pop(number, None):
                self._found.put((sent.name, f"the SuperLink lost it ({why})"))


class _Run:
    """A run of Flower's, which is what a coordinator needs to send messages. Nothing runs in it."""

    def __init__(self, superlink: Path) -> None:
        self._superlink = superlink
        bundle = _bundle()
        fab = fab_pb2.Fab(hash_str=hashlib.sha256(bundle).hexdigest(), content=bundle)
        with _Control(superlink) as control:
            self.number = control.ask("StartRun", control_pb2.StartRunRequest(fab=fab)).run_id
        version = RuntimeVersionHttpInterceptor(component_name="flwr-serverapp")
        with _locally(RuntimeHttpClient, superlink, version) as api:
            token = self._claim(api)
        self._api = _locally(RuntimeHttpClient, superlink, version, RuntimeTokenHttpInterceptor(token))
        try:
            self._api.PullTaskInput(runtime_pb2.PullTaskInputRequest())  # from now on the run is running
        except BaseException:
            self.drop()
            raise
        self._peer, self._beaten = _Peer(self._api, SUPERLINK_NODE_ID), time.monotonic()

    def _claim(self, api: RuntimeHttpClient) -> str:
        """The token of this run's task. A task of a run whose coordinator died before it claimed it is skipped."""
        request = runtime_pb2.AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP])
        while (claimed := api.AcquireTask(request)).token:
            if claimed.task.run_id == self.number:
                return str(claimed.token)
        raise RunError("a run that nobody else claims", "one that is gone", _ASK_LOG)

    def send(self, node: int, blob: bytes, ttl_s: float) -> str:
        facts = Metadata(self.number, "", SUPERLINK_NODE_ID, node, "", "", time.time(), ttl_s, "query")
        message = make_message(facts, content=_parcel(blob))

        def announce(proto: message_pb2.Message, tree: message_pb2.ObjectTree) -> Any:
            request = runtime_pb2.PushAppMessagesRequest(messages_list=[proto], message_object_trees=[tree])
            known = self._api.PushMessages(request)
            if not all(known.message_ids):
                raise WireError("a message that the SuperLink takes", "a refusal", "Is the silo still admitted?")
            return known

        return self._peer.send(message, announce)

    def replies(self, numbers: Iterable[str]) -> Iterator[tuple[Message, message_pb2.ObjectTree]]:
        found = self._api.PullMessages(runtime_pb2.PullAppMessagesRequest(message_ids=numbers))
        for proto, tree in zip(found.messages_list, found.message_object_trees, strict=True):
            yield message_from_proto(proto), tree

    def answer(self, message: Message, tree: message_pb2.ObjectTree) -> bytes | str:
        """The answer in a reply, or why there is none."""
        if message.has_error():
            code = message.error.code
            return _WHY.get(code, f"its node failed ({message.error.reason or f'Flower says {code}'})")
        return self._peer.fetch(message, tree)

    def nodes(self) -> Sequence[Any]:
        """The nodes that are connected."""
        return self._api.GetNodes(runtime_pb2.GetNodesRequest()).nodes

    def beat(self) -> None:
        """Says that it goes on, when it is time to. Raises `RunError` when it does not."""
        if time.monotonic() - self._beaten < RUN_BEAT_S:
            return
        self._beaten = time.monotonic()
        if not self._api.SendTaskHeartbeat(runtime_pb2.SendTaskHeartbeatRequest()).success:
            raise RunError("a run that goes on", "one that has ended", _ASK_LOG)

    def end(self) -> None:
        """Ends it, and has the SuperLink forget its messages."""
        with suppress(RunError), _Control(self._superlink) as control:
            control.ask("StopRun", control_pb2.StopRunRequest(run_id=self.number))
        self.drop()

    def drop(self) -> None:
        """Closes what leads to it, and leaves it to itself."""
        self._api.close()


@dataclass(frozen=True)
class _Sent:
    """A message under way. `since`: when its silo had connected."""

    name: str
    silo: str
    run: _Run
    since: str


_WHY = {
    ErrorCode.NODE_UNAVAILABLE: "its node is not connected any more",
    ErrorCode.MESSAGE_UNAVAILABLE: "it waited too long, or was lost",
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE: "its answer was lost",
}


def _bundle() -> bytes:
    """The app bundle that Flower wants of a run: a description, and no code. The same bytes always."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(zipfile.ZipInfo("pyproject.toml"), _NOTHING)
    return file.getvalue()


_NOTHING = """[project]
name = "foedus"
version = "1.0.0"
description = "No app: a run that carries sealed messages"
[tool.flwr.app]
publisher = "foedus"
[tool.flwr.app.components]
serverapp = "no:code"
clientapp = "no:code"
"""


# A silo's end


Told = Callable[[str], None]


def serve(
    address: str, authority: bytes, key: bytes, answer: Answer, *, memory: Path | None = None,
    stop: threading.Event | None = None, told: Told = log.info,
) -> None:  # fmt: skip
    """Answers the coordinator's messages, one after the other, until `stop` is set. Whatever happens to the network or
    to the SuperLink, it comes back.

    `authority`: the federation's CA certificate, PEM. `key`: the node's private key, PEM. `memory`: a file that keeps
    the number that the SuperLink gave this node, so that a new process need not wait until the old one has expired.
    `told`: gets "connected", and "waiting: WHY" when it is not. Raises `RunError` for a certificate or a key that is
    none.
    """
    _split(address)
    stop = stop or threading.Event()
    try:
        trust = ssl.create_default_context(cadata=authority.decode("ascii"))
        trust.minimum_version = ssl.TLSVersion.TLSv1_3
        private = bytes_to_private_key(key)
        signs = NodeAuthHttpInterceptor(private, private.public_key())
    except (ValueError, TypeError, AttributeError, ssl.SSLError) as error:
        raise RunError("a CA certificate and a node's key, in PEM", type(error).__name__,
                       "Join anew with the coordinator's invitation.") from error  # fmt: skip
    pause = 0.0
    while not stop.is_set():
        try:
            with _reaching(FleetHttpClient, f"https://{address}", httpx.HTTPTransport(verify=trust), signs) as api:
                session = _Session(api, public_key_to_bytes(private.public_key()), memory, stop)
                told("connected")
                pause = 0.0
                session.work(answer)
        except Exception as error:  # a SuperLink that has gone mad included
            pause = min(2 * pause + 0.25, 5.0)
            told(f"waiting: {_said(error)}")
        stop.wait(pause)


class _Session:
    """A node that is connected, and beats until it leaves. Raises `httpx.HTTPError` as soon as it is not any more."""

    def __init__(self, api: FleetHttpClient, public: bytes, memory: Path | None, stop: threading.Event) -> None:
        self._api, self._public, self._memory, self._stop = api, public, memory, stop
        self._peer = _Peer(api, self._activate())
        if memory is not None:
            memory.write_text(json.dumps({"node": self._peer.node.node_id}))
        self._over, self._left = threading.Event(), False
        self._beating = threading.Thread(target=self._beat, name="flower-beat", daemon=True)

    def work(self, answer: Answer) -> None:
        """Answers one message after the other."""
        self._beating.start()
        try:
            while not (self._stop.is_set() or self._over.is_set()):
                for message, tree in self._pull():
                    self._answer(message, tree, answer)
        finally:
            self._over.set()
            self._leave()

    def _activate(self) -> int:
        """This node's number. A session that the SuperLink still holds is given back first, if it is known."""
        request = fleet_pb2.ActivateNodeRequest(public_key=self._public, heartbeat_interval=HEARTBEAT_MIN_INTERVAL)
        try:
            return int(self._api.ActivateNode(request).node_id)
        except httpx.HTTPStatusError as error:
            known = self._known()
            if _code(error) != ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED or known is None:
                raise
        self._give_back(known)
        return int(self._api.ActivateNode(request).node_id)

    def _known(self) -> int | None:
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            return int(json.loads(self._memory.read_text())["node"])  # type: ignore[union-attr]
        return None

    def _leave(self) -> None:
        if not self._left:
            self._left = True
            self._give_back(self._peer.node.node_id)

    def _give_back(self, number: int) -> None:
        with suppress(httpx.HTTPError):
            self._api.DeactivateNode(fleet_pb2.DeactivateNodeRequest(node_id=number))

    def _pull(self) -> Iterator[tuple[Message, message_pb2.ObjectTree]]:
        """What has come, after some waiting for it: the SuperLink holds the request."""
        asked = time.monotonic()
        found = self._api.PullMessages(fleet_pb2.PullMessagesRequest(node=self._peer.node))
        for proto, tree in zip(found.messages_list, found.message_object_trees, strict=True):
            yield message_from_proto(proto), tree
        if not found.messages_list and time.monotonic() - asked < 0.05:
            self._stop.wait(0.05)

    def _answer(self, message: Message, tree: message_pb2.ObjectTree, answer: Answer) -> None:
        try:
            asked = self._peer.fetch(message, tree)
        except (ObjectPullError, WireError) as error:
            log.warning("A message did not come in whole: %s", _said(error))
            return self._reply(Message(Error(ErrorCode.MESSAGE_UNAVAILABLE, "not whole"), reply_to=message))
        self._reply(_replied(message, answer, asked, _parcel))

    def _reply(self, reply: Message) -> None:
        """Sends a reply. One that comes too late for its run is dropped: what it answers is asked again."""

        def announce(proto: message_pb2.Message, tree: message_pb2.ObjectTree) -> Any:
            return self._api.PushMessages(fleet_pb2.PushMessagesRequest(
                node=self._peer.node, messages_list=[proto], message_object_trees=[tree], clientapp_runtime_list=[0.0],
            ))  # fmt: skip

        try:
            self._peer.send(reply, announce)
        except httpx.HTTPStatusError as error:
            if _code(error) != ApiErrorCode.FLEET_RUN_STATUS_NOT_ALLOWED:
                raise
            log.info("A reply came too late for its run.")
        except ObjectPushError:
            log.info("A reply came too late for its message.")

    def _beat(self) -> None:
        """Says again and again that the node lives, whatever it is doing; and leaves when it shall."""
        request = heartbeat_pb2.SendNodeHeartbeatRequest(
            node=self._peer.node, heartbeat_interval=HEARTBEAT_MIN_INTERVAL
        )
        while not self._over.is_set():
            if self._stop.wait(BEAT_S):
                return self._leave()  # ends a pull that is held
            with suppress(httpx.TransportError):
                try:
                    known = self._api.SendNodeHeartbeat(request).success
                except httpx.HTTPStatusError as error:
                    known = error.response.status_code >= 500
                except RuntimeError:  # its client was closed meanwhile
                    return
                if not known:
                    self._over.set()


def _replied(message: Message, answer: Answer, asked: bytes, pack: Callable[[bytes], RecordDict]) -> Message:
    """The reply to a message. An answer never raises; if one does, its words stay here, for they could quote data."""
    try:
        return Message(pack(answer(asked)), reply_to=message)
    except Exception as error:
        kind = type(error).__name__
        log.error("An answer raised %s\n%s", kind, "".join(traceback.format_tb(error.__traceback__)).rstrip())
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, kind), reply_to=message)


# Flower's simulation


class SimulatedLine:
    """A line to silos in Flower's simulation: its grid, its state and its engine, in this process. Instead of Ray, for
    which Flower copies the app of each node into processes of its own, a backend of ours asks the silos themselves, one
    after the other. Flower looks for messages every 0.1 s.
    """

    def __init__(self, answers: Mapping[str, Answer]) -> None:
        from flwr.server.superlink.fleet.vce import vce_api
        from flwr.server.superlink.fleet.vce.metrics import VceMetrics
        from flwr.superlink.grid import InMemoryGrid

        states, run = _simulated_run()
        places = vce_api._register_nodes(len(answers), states)
        self._nodes = dict(zip(answers, places, strict=True))
        backend = _backend({node: answers[silo] for silo, node in self._nodes.items()})
        stores = vce_api._register_node_info_stores(places, run)
        self._grid, self._run = InMemoryGrid(states), run.run_id
        self._grid.set_run(run)
        self._waiting: set[str] = set()
        self._refused: dict[str, str] = {}
        self._stop = threading.Event()
        work = (lambda: None, lambda: backend, places, states, stores, self._stop, VceMetrics())
        self._engine = threading.Thread(target=vce_api.run_api, args=work, name="flower-simulation", daemon=True)
        self._engine.start()

    def silos(self) -> frozenset[str]:
        return frozenset(self._nodes)

    def send(self, silo: str, blob: bytes) -> str:
        if silo not in self._nodes:
            name = f"refused {len(self._refused)}"
            self._refused[name] = f"{silo} is not connected"
            return name
        node = self._nodes[silo]
        facts = Metadata(self._run, "", SUPERLINK_NODE_ID, node, "", "", time.time(), 86400.0, "query")
        message = make_message(facts, content=_whole(blob))
        (name,) = self._grid.push_messages([message])
        self._waiting.add(name)
        return str(name)

    def poll(self) -> Iterator[tuple[str, bytes | str]]:
        while self._refused:
            yield self._refused.popitem()
        for reply in self._grid.pull_messages(self._waiting) if self._waiting else ():
            name = reply.metadata.reply_to_message_id
            self._waiting.discard(name)
            why = f"its node failed ({reply.error.reason})" if reply.has_error() else ""
            yield name, why or reply.content[""]["bytes"]

    def close(self) -> None:
        self._stop.set()
        self._engine.join(5.0)


def _whole(blob: bytes) -> RecordDict:
    """A message's content that never leaves this process."""
    return RecordDict({"": ConfigRecord({"bytes": blob})})


def _simulated_run() -> tuple[Any, Any]:
    """State in memory, and a run that it knows."""
    from flwr.proto.task_pb2 import Task
    from flwr.server.superlink.linkstate import LinkStateFactory
    from flwr.server.superlink.linkstate.in_memory_linkstate import RunRecord
    from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION_ID
    from flwr.supercore.object_store import ObjectStoreFactory
    from flwr.supercore.run import Run
    from flwr.superlink.federation import NoOpFederationManager

    states = LinkStateFactory(FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager(), ObjectStoreFactory())
    state, run = states.state(), Run.create_empty(1)
    run.primary_task_id, run.federation_id = 1, NOOP_FEDERATION_ID
    state.run_ids[1], state.task_store[1] = RunRecord(run=run), Task(task_id=1, run_id=1)
    return states, run


def _backend(answers: Mapping[int, Answer]) -> Any:
    """What Flower's simulation hands messages to."""
    from flwr.server.superlink.fleet.vce.backend.backend import Backend

    class Here(Backend):
        num_workers = 1

        def __init__(self) -> None:
            super().__init__({})

        def build(self, app_fn: Callable[[], Any]) -> None:
            """There is nothing to start."""

        def is_worker_idle(self) -> bool:
            return True

        def terminate(self) -> None:
            """There is nothing to end."""

        def process_message(self, message: Message, context: Any) -> tuple[Message, Any]:
            answer, asked = answers[message.metadata.dst_node_id], message.content[""]["bytes"]
            return _replied(message, answer, asked, _whole), context

    return Here()


# Clients


def _locally(kind: type[_Api], superlink: Path, *interceptors: ProtobufClientInterceptor) -> _Api:
    """A client of the SuperLink's over its socket, however deep that lies."""
    transport = httpx.HTTPTransport()
    transport._pool.close()
    transport._pool = httpcore.ConnectionPool(uds=str(superlink), network_backend=_Unix())
    return _reaching(kind, "http://superlink", transport, *interceptors)


class _Unix(httpcore.SyncBackend):
    """The way to a Unix socket, with our own care for long addresses and for sockets that nobody listens on."""

    def connect_unix_socket(self, path: str, *_: object, **__: object) -> httpcore.NetworkStream:
        try:
            return SyncStream(connect(Path(path)))
        except OSError as error:
            raise httpcore.ConnectError(error.strerror) from error


def _reaching(
    kind: type[_Api], url: str, transport: httpx.HTTPTransport, *interceptors: ProtobufClientInterceptor
) -> _Api:
    """A client of Flower's that speaks through this transport."""
    api = kind(url, interceptors=interceptors, verify=False)
    api._client.close()
    api._client = httpx.Client(transport=transport, timeout=TIMEOUT_S)
    api._client.headers.clear()  # those of httpx: a message of several requests would carry them in each
    return api


def _code(error: httpx.HTTPStatusError) -> int | None:
    """Flower's own code of a refusal."""
    refusal = FlowerError.from_json(error.response.text)
    return refusal.code if refusal else None


def _away(error: httpx.HTTPError) -> RunError:
    """A SuperLink that cannot be reached; or one that refuses, for which nobody need wait."""
    do = "Is the coordinator up? `foedus coordinator up` starts it."
    kind = RunError if isinstance(error, httpx.HTTPStatusError) else Away
    return kind("a SuperLink that answers", _said(error), do)


def _said(error: BaseException) -> str:
    """What went wrong, in one line."""
    if isinstance(error, httpx.HTTPStatusError):
        status, code = error.response.status_code, _code(error)
        if status == httpx.codes.UNAUTHORIZED or code == ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED:
            return "the coordinator has not admitted this key, or has revoked it, or still holds its last connection"
        return f"the SuperLink refused it ({status}{f', code {code}' if code else ''})"
    if isinstance(error, httpx.TransportError):
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            return "the SuperLink's certificate is not of the federation's CA, is out of date, or names another host"
        return f"the SuperLink cannot be reached ({type(error).__name__})"
    if isinstance(error, ObjectPullError | ObjectPushError):
        return str(error)
    return error.came if isinstance(error, FoedusError) else type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
