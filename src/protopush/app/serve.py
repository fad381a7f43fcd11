"""The server: it answers with the page and what that needs; nothing for other sites, nothing from other places.

One address, one folder for uploads, nothing left behind at the end.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from protopush.app.address import address_of, check_public, is_local, known_as, listening, may_call
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
        return may_call(headers, self.hosts, self.proxies)


def _with_policy(message: Message) -> Message:
    if message["type"] == "http.response.start":
        headers = MutableHeaders(scope=message)
        headers["Content-Security-Policy"] = POLICY
        headers["X-Content-Type-Options"] = "nosniff"
        headers["Referrer-Policy"] = "no-referrer"
    return message


logger = logging.getLogger("protopush.training")

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
    root_path, names = check_public(root_path, allowed_host)
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
        try:
            print(f"Review app: {address_of(host, door)} (Ctrl-C ends it)", flush=True)
            uvicorn.Server(config).run(sockets=[door])
        except KeyboardInterrupt:
            pass
        finally:
            still = not store.close()
    print("Review app ended; every decision is in the run.", flush=True)
    if still:  # a decision that is being worked out has changed nothing yet, and would keep the process for minutes
        os._exit(0)


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

    guard = Middleware(Guard, hosts=known_as(host, allowed_host), proxies=allowed_host)
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
