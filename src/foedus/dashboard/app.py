"""The web application: pages for reading, and, with a token, one button that changes something.

Read-only without a token. With one, signing in gives a cookie for this site alone, and every form carries a word that
only this site's pages know. A program sends the token as `Authorization: Bearer` instead. Nothing is loaded from
elsewhere, and no answer may be framed, stored, or made to run what is not ours.
"""

from __future__ import annotations

import hmac
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route

from ..errors import FoedusError, RunError
from . import files
from .view import CoordinatorView, Federation, Silo, SiloView, View

Rollback = Callable[[str], str]
"""Makes a version ("notes@3") the one in production, and says what it did. Raises `FoedusError` where it cannot."""

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
SHORTEST = 16
"""Characters of a token."""

IDLE = 3600.0  # seconds until a session ends
TRIES = 5  # wrong tokens in a minute
MOST_FORM = 4096
COOKIE = "foedus"
STATIC = {
    "report.css": (Path(__file__).parent.parent / "report" / "templates" / "report.css", "text/css"),
    "dashboard.css": (Path(__file__).parent / "static" / "dashboard.css", "text/css"),
    "live.js": (Path(__file__).parent / "static" / "live.js", "text/javascript"),
}
HEADERS = {
    # Drawings carry style attributes, which can load nothing: all other sources are closed.
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; style-src-attr 'unsafe-inline';"
    " script-src 'self'; connect-src 'self'; img-src data:; form-action 'self'; frame-ancestors 'none';"
    " base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Cache-Control": "no-store",
}


def coordinator_app(
    home: Path, *, token: str = "", rollback: Rollback | None = None, hosts: Sequence[str] = ()
) -> Starlette:
    """The coordinator's dashboard. `token`: what allows a rollback, "" for nobody; `hosts`: by which names it may be
    asked for, beside this machine's own. Raises `RunError` for a token that is too short.
    """
    return _App(CoordinatorView(home), token, rollback).starlette(hosts)


def silo_app(home: Path, *, hosts: Sequence[str] = ()) -> Starlette:
    """A silo's dashboard, for reading only."""
    return _App(SiloView(home), "", None).starlette(hosts)


@dataclass
class Sessions:
    """Who signed in. Only hashes of cookies are kept; `wrong`: when wrong tokens came."""

    token: str
    until: dict[str, float] = field(default_factory=dict)
    wrong: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.token and len(self.token) < SHORTEST:
            do = "Make one with `foedus dashboard --new-token`."
            raise RunError(f"a token of at least {SHORTEST} characters", f"one of {len(self.token)}", do)

    def fits(self, said: str) -> bool:
        """Whether this is the token, in a time that does not tell."""
        return bool(self.token) and hmac.compare_digest(sha256(said.encode()).digest(), _hashed(self.token))

    def open(self) -> str:
        """A new session's cookie."""
        cookie = secrets.token_urlsafe(32)
        self.until[_hashed(cookie).hex()] = time.monotonic() + IDLE
        return cookie

    def knows(self, cookie: str) -> bool:
        """Whether a session with this cookie is open; it then stays so for another hour."""
        now, key = time.monotonic(), _hashed(cookie).hex()
        self.until = {k: end for k, end in self.until.items() if end > now}
        if key not in self.until:
            return False
        self.until[key] = now + IDLE
        return True

    def close(self, cookie: str) -> None:
        """Ends it."""
        self.until.pop(_hashed(cookie).hex(), None)

    def word(self, cookie: str) -> str:
        """What the forms of this session carry, and no other site can know."""
        return hmac.new(_hashed(self.token), cookie.encode(), sha256).hexdigest()

    def guessing(self) -> bool:
        """Whether too many wrong tokens came in the last minute."""
        self.wrong = [at for at in self.wrong if at > time.monotonic() - 60]
        return len(self.wrong) >= TRIES


class _App:
    """One dashboard. A picture is taken anew only when a file changed, and one at a time."""

    def __init__(self, view: View, token: str, rollback: Rollback | None) -> None:
        self.view, self.rollback = view, rollback
        self.sessions = Sessions(token if rollback else "")
        self._taken: tuple[str, Any] = ("", None)
        self._lock = threading.Lock()

    def starlette(self, hosts: Sequence[str]) -> Starlette:
        routes = [
            Route("/", self.page),
            Route("/metrics", self.metrics),
            Route("/healthz", self.health),
            Route("/static/{name}", self.static),
        ]
        if self.rollback:
            posts = {"/sign-in": self.sign_in, "/sign-out": self.sign_out, "/rollback": self.roll_back}
            routes += [Route(path, do, methods=["POST"]) for path, do in posts.items()]
        trusted = [*LOOPBACK, *hosts]
        guards = [
            Middleware(_Closed),
            Middleware(TrustedHostMiddleware, allowed_hosts=trusted, www_redirect=False),
        ]
        return Starlette(routes=routes, middleware=guards)

    # Reading

    async def page(self, request: Request) -> Response:
        cookie = self._cookie(request)
        run = request.query_params.get("run", "")
        tag = f'"{files.stamp((), self.view.stamp(), run, cookie and self.sessions.word(cookie))}"'
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers={"ETag": tag})
        html = await run_in_threadpool(self._page, run, self._session(cookie, request.query_params.get("did", "")))
        if html is None:
            return PlainTextResponse("There is no run of that name.\n", status_code=404)
        return Response(html, media_type="text/html", headers={"ETag": tag})

    def _page(self, run: str, session: Mapping[str, Any]) -> str | None:
        from .pages import coordinator_page, silo_page  # brings matplotlib

        found = self._look()
        if isinstance(found, Silo):
            return silo_page(found)
        shown = found.run(run)
        return None if run and shown is None else coordinator_page(found, shown, session)

    async def metrics(self, request: Request) -> Response:
        return await run_in_threadpool(self._metrics)

    def _metrics(self) -> Response:
        from . import numbers

        found = self._look()
        text = numbers.of_federation(found) if isinstance(found, Federation) else numbers.of_silo(found)
        return Response(text, headers={"Content-Type": numbers.TYPE})

    async def health(self, request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def static(self, request: Request) -> Response:
        if (known := STATIC.get(request.path_params["name"])) is None:
            return PlainTextResponse("There is no such file.\n", status_code=404)
        return Response(known[0].read_bytes(), media_type=known[1])

    def _look(self) -> Federation | Silo:
        with self._lock:
            stamp = self.view.stamp()
            if self._taken[0] != stamp:
                self._taken = stamp, self.view.look()
            return self._taken[1]

    # Doing

    async def sign_in(self, request: Request) -> Response:
        form = await _form(request)
        if self.sessions.guessing():
            return PlainTextResponse("Too many wrong tokens: wait a minute.\n", status_code=429)
        if not self.sessions.fits(form.get("token", "")) or _crossed(request):
            self.sessions.wrong.append(time.monotonic())
            return PlainTextResponse("That is not the token. Go back and try again.\n", status_code=403)
        answer = _back("signed-in")
        secure = request.url.scheme == "https"
        answer.set_cookie(COOKIE, self.sessions.open(), httponly=True, samesite="strict", secure=secure, path="/")
        return answer

    async def sign_out(self, request: Request) -> Response:
        if not self._may(request, await _form(request)):
            return _forbidden()
        self.sessions.close(request.cookies.get(COOKIE, ""))
        answer = _back("signed-out")
        answer.delete_cookie(COOKIE, path="/")
        return answer

    async def roll_back(self, request: Request) -> Response:
        assert self.rollback is not None
        form = await _form(request)
        if not self._may(request, form):
            return _forbidden()
        try:
            said = await run_in_threadpool(self.rollback, form.get("version", ""))
        except FoedusError as error:
            return PlainTextResponse(f"Nothing was changed: {error}\n", status_code=409)
        self._taken = ("", None)
        return PlainTextResponse(f"{said}\n") if _bearer(request) else _back("rolled-back")

    def _may(self, request: Request, form: Mapping[str, str]) -> bool:
        if self.sessions.guessing():
            return False
        if bearer := _bearer(request):  # no other site can make a browser send this
            if not self.sessions.fits(bearer):
                self.sessions.wrong.append(time.monotonic())
                return False
            return True
        cookie = self._cookie(request)
        return bool(cookie) and not _crossed(request) and hmac.compare_digest(
            form.get("csrf", "").encode(), self.sessions.word(cookie).encode()
        )  # fmt: skip

    def _cookie(self, request: Request) -> str:
        """The cookie of an open session, or ""."""
        cookie = request.cookies.get(COOKIE, "")
        return cookie if cookie and self.sessions.token and self.sessions.knows(cookie) else ""

    def _session(self, cookie: str, did: str) -> dict[str, Any]:
        word = self.sessions.word(cookie) if cookie else ""
        return {"signed_in": bool(cookie), "csrf": word, "may_sign_in": bool(self.sessions.token),
                "said": _DID.get(did, "") if cookie or did == "signed-out" else ""}  # fmt: skip


_DID = {
    "signed-in": "You are signed in, for an hour after your last look.",
    "signed-out": "You are signed out.",
    "rolled-back": "The rollback is done; the ledger has it.",
}


class _Closed:
    """Puts the headers that close a page on every answer, whatever made it."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def sent(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                closed = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message["headers"], *closed]
            await send(message)

        await self.app(scope, receive, sent)


async def _form(request: Request) -> dict[str, str]:
    """The fields of a form, the first of each name; {} for what is too long or is none."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MOST_FORM:
            return {}
    with suppress(ValueError):
        return {name: values[0] for name, values in parse_qs(body.decode(), max_num_fields=8).items()}
    return {}


def _crossed(request: Request) -> bool:
    """Whether a browser says that another site made it send this."""
    origin = request.headers.get("origin")
    site = request.headers.get("sec-fetch-site", "same-origin")
    here = f"{request.url.scheme}://{request.headers.get('host', '')}"
    return site not in ("same-origin", "none") or (origin is not None and origin != here)


def _bearer(request: Request) -> str:
    kind, _, value = request.headers.get("authorization", "").partition(" ")
    return value.strip() if kind.lower() == "bearer" else ""


def _back(did: str) -> RedirectResponse:
    return RedirectResponse(f"/?did={did}#versions", status_code=303)


def _forbidden() -> Response:
    return PlainTextResponse("This needs the token: sign in on the page first.\n", status_code=403)


def _hashed(text: str) -> bytes:
    return sha256(text.encode()).digest()


class Served:
    """An app that is being served, in a thread of this process, until `stop`. `url`: where."""

    def __init__(self, server: Any, thread: threading.Thread, taken: socket.socket, url: str) -> None:
        self._server, self._thread, self._taken, self.url = server, thread, taken, url

    @property
    def alive(self) -> bool:
        """Whether it still answers."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """Ends it; returns when it has ended."""
        self._server.should_exit = True
        self._thread.join(timeout=10)
        self._taken.close()

    def wait(self) -> None:
        """Until it ends."""
        while self._thread.is_alive():
            self._thread.join(timeout=0.5)

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def serve(app: Starlette, address: str, *, certificate: Path | None = None, key: Path | None = None) -> Served:
    """Serves an app at "host:port", port 0 for any that is free; over TLS where a certificate and its key are given.

    Raises `RunError` when the address cannot be taken.
    """
    import uvicorn

    taken = _socket(address)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, lifespan="off", ws="none", http="h11",
        loop="asyncio", timeout_keep_alive=5,
        limit_concurrency=64, ssl_certfile=certificate, ssl_keyfile=key, timeout_graceful_shutdown=1,
    )  # fmt: skip
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]}, daemon=True, name="dashboard")
    thread.start()
    for _ in range(2000):
        if server.started or not thread.is_alive():
            break
        time.sleep(0.005)
    host, port = taken.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    return Served(server, thread, taken, f"{'https' if certificate else 'http'}://{shown}:{port}")


def _socket(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    host = host.strip("[]") or "127.0.0.1"
    taken = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind((host, int(port)))
    except (OSError, ValueError, OverflowError) as error:
        taken.close()
        do = "Name another with --address, such as 127.0.0.1:8800, or 127.0.0.1:0 for any."
        raise RunError('an address "host:port" that is free', f"{address} ({error})", do) from error
    return taken
