"""The server: it answers with the page and what that needs; nothing for other sites, nothing from other places.

One address, one folder for uploads, nothing left behind at the end.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from protopush.app.run_store import RunStore, UsageWorker
from protopush.app.upload import Limits
from protopush.errors import InputError, listing

if TYPE_CHECKING:
    from fastapi import FastAPI

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

    The server is known by the names ``hosts``; without, by any. A page of the ``proxies``, names of servers that hand
    requests on, may call under whatever name they know this one by.
    """

    def __init__(self, app: ASGIApp, hosts: Iterable[str] = (), proxies: Iterable[str] = ()) -> None:
        self.app, self.hosts, self.proxies = app, frozenset(hosts), frozenset(proxies)

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
        return origin is None or urlsplit(origin).netloc == host or _name(origin) in self.proxies


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


logger = logging.getLogger("protopush.training")

LOCAL = ("127.0.0.1", "localhost", "::1")
SETTINGS = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "GRADIO_RUN_HISTORY": "False",  # older versions have neither it nor an argument for it
    "GRADIO_ALLOWED_PATHS": "",
}


def serve(
    store: RunStore, limits: Limits, host: str = "127.0.0.1", port: int = 7860, root_path: str = "",
    allowed_host: Sequence[str] = (),
) -> None:  # fmt: skip
    """Show a run until somebody presses Ctrl-C; the page has no passwords.

    Args:
        host: the address to listen on.
        port: 0 for any that is free.
        root_path: where a reverse proxy shows the page: a path, or the whole address.
        allowed_host: names by which a browser may call the page, besides those of this computer.

    Raises:
        InputError: gradio isn't installed, the run can't be opened, or the address isn't free.
    """
    root_path, names = _public(root_path, allowed_host)
    if not limits.megabytes > 0:
        raise InputError(f"--max_megabytes {limits.megabytes:g}; expected a number above 0")
    store.run()
    uploads = tempfile.TemporaryDirectory(prefix="protopush-app-", ignore_cleanup_errors=True)
    with uploads as folder, listening(host, port) as door:
        app = build_app(store, limits, host, Path(folder), root_path, names)
        import uvicorn

        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1, lifespan="on")
        if names or not is_local(host):
            logger.warning(
                "Everybody who reaches %s may view and decide; there are no passwords", listing([*names]) or host
            )
        address = f"[{host}]" if ":" in host else host
        try:
            print(f"Review app: http://{address}:{door.getsockname()[1]} (Ctrl-C ends it)", flush=True)
            uvicorn.Server(config).run(sockets=[door])
        except KeyboardInterrupt:
            pass
        finally:
            still = not store.close()
    print("Review app ended; every decision is in the run.", flush=True)
    if still:  # a decision that is being worked out has changed nothing yet, and would keep the process for minutes
        os._exit(0)


def _public(root_path: str, allowed_host: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """A proxy's path or address without the last slash, and the names of hosts, checked."""
    if root_path and not root_path.startswith(("/", "http://", "https://")):
        raise InputError(
            f"--root_path {root_path}; expected a path (/review) or an address (https://example.org/review)"
        )
    names = tuple(_name(f"//{given}") for given in allowed_host)
    if wrong := [given for given, name in zip(allowed_host, names, strict=True) if not name or {*given} & {*"/*"}]:
        raise InputError(f"--allowed_host {listing(wrong)}; expected names of hosts, such as hub.example.org")
    return root_path.rstrip("/"), names


def build_app(
    store: RunStore, limits: Limits, host: str, folder: Path, root_path: str = "", allowed_host: Sequence[str] = ()
) -> FastAPI:
    """The application; uploads go to ``folder``, the others are those of :func:`serve`."""
    os.environ.update(SETTINGS, GRADIO_TEMP_DIR=str(folder))  # gradio reads them when it is imported, and later
    try:
        import gradio
        from fastapi import FastAPI, Response
        from starlette.middleware import Middleware
    except ImportError as error:
        raise InputError(f"the review app needs gradio ({error}); pip install protopush[app]") from error
    from protopush.app.page import HEAD, STYLES, theme
    from protopush.app.review_tabs import as_csv, as_json

    closed = is_local(host) or bool(allowed_host)
    guard = Middleware(Guard, hosts=(*LOCAL, *allowed_host) if closed else (), proxies=allowed_host)
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, middleware=[guard])

    def saved(kind: str, media: str, text: str) -> Response:
        headers = {"Content-Disposition": f'attachment; filename="decisions.{kind}"', "Cache-Control": "no-store"}
        return Response(text, media_type=media, headers=headers)

    app.add_api_route("/decisions.csv", lambda: saved("csv", "text/csv; charset=utf-8", as_csv(store.decisions())))
    app.add_api_route("/decisions.json", lambda: saved("json", "application/json", as_json(store.decisions())))
    off = dict.fromkeys(("show_error", "ssr_mode", "pwa", "mcp_server", "enable_monitoring"), False)
    size, files = int(limits.megabytes * 1e6), {"allowed_paths": [], "blocked_paths": [], "css_paths": STYLES}
    page: FastAPI = gradio.mount_gradio_app(
        app, build_page(store, limits), path="/", server_name=host, footer_links=[], max_file_size=size, theme=theme(),
        head=HEAD, root_path=root_path or None, **off, **files,
    )  # fmt: skip
    return page


def build_page(store: RunStore, limits: Limits) -> Any:
    """The page for a run (``gradio.Blocks``): three tabs."""
    import gradio as gr

    from protopush.app.explain_tab import explain_tab
    from protopush.app.page import OLD, render
    from protopush.app.review_tabs import decisions_tab, prototypes_tab

    title = f"Review of {store.run().folder.resolve().name}"
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=OLD, fill_width=True) as page:
        gr.HTML(render("heading", title))
        with gr.Tabs():
            with gr.Tab("Explain", id="explain"):
                explain_tab(store, limits)
            with gr.Tab("Prototypes", id="prototypes"):
                prototypes_tab(store, UsageWorker(store), page)
            with gr.Tab("Decisions", id="decisions") as tab:
                decisions_tab(store, tab)
    return page


def is_local(host: str) -> bool:
    """Whether only programs of this computer reach an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that is bound and heard already, so that what is wrong with the address is known first.

    Raises:
        InputError: it is taken, or none of this computer's.
    """
    if not 0 <= port <= 65535:
        raise InputError(f"--port {port}; expected 0 to 65535 (0: any that is free)")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        door = socket.socket(family)
        with suppress(OSError):
            door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        door.bind((host, port))
        door.listen(128)
    except OSError as error:
        why = error.strerror or str(error)
        raise InputError(f"cannot listen on {host} port {port} ({why}); choose another --port or --host") from error
    with door:
        yield door
