"""Asking an application without a server: one request at a time, with the cookies of those before."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx


class Client:
    """`get` and `post` as a browser on this machine would, without following redirections."""

    def __init__(self, app: Any) -> None:
        self.app, self.cookies = app, httpx.Cookies()

    def get(self, path: str, **how: Any) -> httpx.Response:
        return asyncio.run(self._ask("GET", path, **how))

    def post(self, path: str, **how: Any) -> httpx.Response:
        return asyncio.run(self._ask("POST", path, **how))

    async def _ask(self, method: str, path: str, **how: Any) -> httpx.Response:
        transport = httpx.ASGITransport(app=self.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", cookies=self.cookies) as client:
            answer = await client.request(method, path, **how)
            self.cookies.update(client.cookies)
            return answer
