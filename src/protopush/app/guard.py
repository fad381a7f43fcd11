"""What the server answers at all: the page and what it needs; nothing for other sites, nothing from other places."""

from __future__ import annotations

from collections.abc import Iterable
from urllib.parse import unquote, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

EXACT = {
    "/", "/config", "/theme.css", "/favicon.ico", "/robots.txt", "/decisions.csv", "/decisions.json",
    "/gradio_api/startup-events", "/gradio_api/upload", "/gradio_api/upload_progress", "/gradio_api/reset",
    "/gradio_api/cancel",
}  # fmt: skip
BELOW = ("/assets/", "/static/", "/svelte/", "/gradio_api/file=/", "/gradio_api/queue/", "/gradio_api/heartbeat/")
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; media-src 'self' blob:; worker-src 'self' blob:; "
    "frame-ancestors 'none'; base-uri 'self'; form-action 'self'"
)


class Guard:
    """Refuses what the page doesn't need: other routes of the framework, proxies, remote files, calls of other sites.

    Args:
        app: what answers the rest.
        hosts: names that the server is known by; empty where it may be any.
    """

    def __init__(self, app: ASGIApp, hosts: Iterable[str] = ()) -> None:
        self.app, self.hosts = app, frozenset(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] != "http" or not self._lets(scope):
            await PlainTextResponse("Not here.", status_code=403)(scope, receive, send)
        else:
            await self.app(scope, receive, lambda message: send(_with_policy(message)))

    def _lets(self, scope: Scope) -> bool:
        path, headers = unquote(scope["path"]), Headers(scope=scope)
        if path not in EXACT and not path.startswith(BELOW):
            return False
        if "\\" in path or ".." in path.split("/"):
            return False
        host = headers.get("host", "")
        if self.hosts and _name(f"//{host}") not in self.hosts:
            return False  # a page of another site that has its name point here
        origin = headers.get("origin")
        return origin is None or urlsplit(origin).netloc == host


def _name(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _with_policy(message: Message) -> Message:
    if message["type"] == "http.response.start":
        headers = MutableHeaders(scope=message)
        headers["Content-Security-Policy"] = POLICY
        headers["X-Content-Type-Options"] = "nosniff"
        headers["Referrer-Policy"] = "no-referrer"
    return message
