"""What stands before an ASGI application that is polled: it shows the network some paths only, bounds what it takes in,
and holds a request for news until there are some.

Whoever polls asks again and again, and each look costs the server a query. A gate lets the look wait instead: the
request is repeated inside as soon as somebody brought news for the one who asks, so that idle peers cost nothing and
news travel at once. The one who asks notices nothing but the time that it takes. `flower.py` says for which paths.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]
Whom = Callable[[bytes], Iterable[int]]
"""Whom a request's body is for: the addresses of those that it brings news, or of the one that asks for some."""


class News:
    """For whom something came since they last looked."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self._bells: dict[int, asyncio.Event] = {}

    def count(self, whom: int) -> int:
        return self._counts.get(whom, 0)

    def tell(self, whom: int) -> None:
        self._counts[whom] = self.count(whom) + 1
        if bell := self._bells.pop(whom, None):
            bell.set()

    async def since(self, seen: int, whom: int) -> None:
        """Waits until there is more than was `seen`."""
        if self.count(whom) == seen:
            await self._bells.setdefault(whom, asyncio.Event()).wait()


@dataclass(frozen=True)
class Gate:
    """One way into `app`. `paths`: those that this way shows; None for all. `brings`: paths whose requests bring news.
    `holds`: paths whose requests ask for news, with the seconds that they may be held; an answer that has none is
    empty. `most`: bytes of a request; a larger one is refused before it is read.
    """

    app: App
    news: News
    brings: Mapping[str, Whom] = field(default_factory=dict)
    holds: Mapping[str, tuple[Whom, float]] = field(default_factory=dict)
    paths: frozenset[str] | None = None
    most: int = 1 << 25

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path = scope["path"]
        if self.paths is not None and path not in self.paths:
            return await _refuse(send, 404)
        body = await self._body(receive)
        if body is None:
            return await _refuse(send, 413)
        if path in self.holds:
            return await self._hold(scope, body, receive, send, *self.holds[path])
        statuses = []

        async def watched(message: Message) -> None:
            statuses.append(message.get("status", 200))
            await send(message)

        await self.app(scope, _replay(body), watched)
        if path in self.brings and all(status == 200 for status in statuses):
            for whom in self.brings[path](body):
                self.news.tell(whom)

    async def _body(self, receive: Receive) -> bytes | None:
        """The request's body; None when there is too much of it."""
        parts, size, more = [], 0, True
        while more:
            message = await receive()
            part = message.get("body", b"")
            parts.append(part)
            size, more = size + len(part), message.get("more_body", False)
            if size > self.most:
                return None
        return b"".join(parts)

    async def _hold(
        self, scope: Message, body: bytes, receive: Receive, send: Send, whom: Whom, patience_s: float
    ) -> None:
        """Asks on behalf of the one who asks; and once more when there was nothing and news came. Not when it is gone
        by then: news that are given out are given once.
        """
        (who,) = whom(body) or (0,)
        seen, answer = self.news.count(who), list[Message]()
        await self.app(dict(scope), _replay(body), _keep(answer))
        if _is_empty(answer) and await self._news(seen, who, receive, patience_s):
            answer.clear()
            await self.app(dict(scope), _replay(body), _keep(answer))
        for message in answer:
            await send(message)

    async def _news(self, seen: int, who: int, receive: Receive, patience_s: float) -> bool:
        """Whether news came, while the one who waits for them was there."""
        news, gone = asyncio.ensure_future(self.news.since(seen, who)), asyncio.ensure_future(receive())
        try:
            await asyncio.wait({news, gone}, timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
            return news.done() and not gone.done()
        finally:
            news.cancel()
            gone.cancel()


def _replay(body: bytes) -> Receive:
    """A request's body, read again; then silence, as of a peer that waits for its answer."""
    unread = [body]

    async def receive() -> Message:
        if unread:
            return {"type": "http.request", "body": unread.pop(), "more_body": False}
        return await asyncio.get_running_loop().create_future()

    return receive


def _keep(answer: list[Message]) -> Send:
    async def send(message: Message) -> None:
        answer.append(message)

    return send


def _is_empty(answer: Iterable[Message]) -> bool:
    """Whether an answer went well and says nothing."""
    return all(message.get("status", 200) == 200 and not message.get("body") for message in answer)


async def _refuse(send: Send, status: int) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})
