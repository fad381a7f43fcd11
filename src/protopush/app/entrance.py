"""Entrance of the service: who may ask, and an answer that arrives although the rest of a body is not read."""

from __future__ import annotations

import asyncio
import secrets
from typing import TYPE_CHECKING

import anyio
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from protopush.app.address import may_call

if TYPE_CHECKING:
    from protopush.app.service import Service

OPEN = ("/health", "/docs", "/openapi.json")  # without a token: they hold nothing of the run
# Seconds in which the rest of a body is thrown away: an answer before its end would be lost with the connection.
LINGER = 2.0
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class Entrance:
    """Refuses who doesn't know the token, other names of the service, and pages of other sites.

    Args:
        token: what callers have to know, but for the pages in ``OPEN``; None: nothing.
        hosts, proxies: the service's names, as for :func:`protopush.app.address.may_call`.
    """

    def __init__(
        self, app: ASGIApp, service: Service, token: str | None = None, hosts: tuple[str, ...] = (),
        proxies: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        self.app, self.service = app, service
        self.token, self.hosts, self.proxies = token, hosts, proxies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        headers = Headers(scope=scope)
        whole = headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers

        async def reading() -> Message:
            nonlocal whole
            message = await receive()
            whole = whole or not message.get("more_body", False)
            return message

        async def answering(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer = MutableHeaders(scope=message)
                answer.update(HEADERS)
                if not whole or self.service.stopping:
                    answer["Connection"] = "close"
            elif not message.get("more_body", False):
                if not whole:
                    await send({**message, "more_body": True})
                    with anyio.move_on_after(LINGER):
                        while not whole:
                            await reading()
                    message = {"type": "http.response.body", "body": b""}
                self.service.answered += 1
            await send(message)

        try:
            await (self._refusal(scope["path"], headers) or self.app)(scope, reading, answering)
        except asyncio.CancelledError:
            self.service.cut += 1
            raise

    def _refusal(self, path: str, headers: Headers) -> ASGIApp | None:
        if not may_call(headers, self.hosts, self.proxies):
            return JSONResponse(
                {"error": "not here; expected a name of --allowed_host, and no page of another site"}, 403
            )
        if self.token is None or path in OPEN:
            return None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and secrets.compare_digest(given.strip().encode(), self.token.encode()):
            return None
        error = f"{'wrong token' if given else 'no token'}; expected Authorization: Bearer and the service's token"
        return JSONResponse({"error": error}, 401, {"WWW-Authenticate": "Bearer"})
