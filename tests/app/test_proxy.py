"""The review app behind a reverse proxy that strips a prefix, as JupyterHub's and nginx's do: a real one, in small."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urljoin, urlsplit

import pytest

from forked import Forked
from helpers import refused
from test_app import bytes_of, photo

pytest.importorskip("gradio", reason="gradio is not installed: pip install protopush[app]")

from fastapi.testclient import TestClient

from protopush.app.run_store import RunStore
from protopush.app.serve import build_app
from protopush.app.upload import Limits

PREFIX = "/user/ada/proxy/7860"
HUB = "hub.example.org"


class Proxy(ThreadingHTTPServer):
    """Hands requests below ``PREFIX`` on to ``port``, without it; where it ``rewrites``, under the app's own name."""

    daemon_threads = True

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.port, self.rewrites = port, False


class Handler(BaseHTTPRequestHandler):
    server: Proxy

    def do_GET(self) -> None:
        if not self.path.startswith(f"{PREFIX}/"):
            self.send_error(404)
            return
        headers = dict(self.headers.items())
        if self.server.rewrites:
            headers["Host"] = f"127.0.0.1:{self.server.port}"
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        behind = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=60)
        behind.request(self.command, self.path.removeprefix(PREFIX), body, headers)
        answer = behind.getresponse()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("connection", "transfer-encoding", "date", "server"):
                self.send_header(name, value)
        self.end_headers()
        with suppress(http.client.HTTPException, OSError):  # either side may go
            while block := answer.read1(65536):  # events come one by one
                self.wfile.write(block)
                self.wfile.flush()
        behind.close()

    do_POST = do_GET

    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture(scope="module")
def proxy(masked_home) -> Iterator[Proxy]:
    """A proxy in front of ``protopush app``, which knows where it is shown."""
    with tempfile.TemporaryDirectory() as temporary:
        words = ["app", masked_home / "run", "--port", "0", "--device", "cpu", "--root_path", f"{PREFIX}/"]
        process = Forked(*words, "--allowed_host", HUB, "lab.example.org", TMPDIR=temporary)
        while "\n" not in process.stdout:
            assert process.poll() is None, process.stderr
            time.sleep(0.05)
        found = re.search(r"http://127\.0\.0\.1:(\d+)", process.stdout)
        assert found
        with Proxy(int(found[1])) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield server
            server.shutdown()
        os.kill(process.pid, signal.SIGKILL)


def ask(proxy: Proxy, path: str, host: str = HUB, method: str = "GET", body: bytes = b"", **headers: str):
    """Status, headers and text of an answer to a browser that knows the proxy as ``host``."""
    connection = http.client.HTTPConnection("127.0.0.1", proxy.server_address[1], timeout=60)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, {"Host": host, **named})
    answer = connection.getresponse()
    text = answer.read().decode(errors="replace")
    connection.close()
    return answer.status, answer.headers, text


def test_the_page_and_all_that_it_names_come_through_the_proxy(proxy):
    status, headers, page = ask(proxy, f"{PREFIX}/")
    assert status == 200
    assert "default-src 'self'" in headers["Content-Security-Policy"]
    config = json.loads(re.search(r"window\.gradio_config = (\{.*?\});</script>", page, re.DOTALL)[1])
    assert config["root"] == f"http://{HUB}{PREFIX}"
    named = set(re.findall(r'(?:src|href)="([^"#]+)"', page.partition("</head>")[0]))
    named.remove("/manifest.json")  # of an installed app, which the page is none of: it is not served
    places = {urljoin(f"http://{HUB}{PREFIX}/", name) for name in named}
    own = {place for place in places if urlsplit(place).hostname == HUB}
    assert len(own) >= 2
    assert any(place.endswith(".js") for place in own)
    for place in own | {f"http://{HUB}{PREFIX}/{name}" for name in ("theme.css", "decisions.csv", "decisions.json")}:
        assert place.startswith(f"http://{HUB}{PREFIX}/")
        assert ask(proxy, urlsplit(place).path)[0] == 200, place
    secure = ask(proxy, f"{PREFIX}/config", X_Forwarded_Proto="https")[2]
    assert json.loads(secure)["root"] == f"https://{HUB}{PREFIX}"


def test_names_that_nobody_allowed_are_refused(proxy):
    for host in (HUB, HUB.upper(), f"{HUB}:8000", "lab.example.org", "localhost", "127.0.0.1"):
        assert ask(proxy, f"{PREFIX}/decisions.json", host)[0] == 200
    for host in ("evil.example", f"{HUB}.evil.example", "example.org", f"evil.example/{HUB}", ""):
        assert ask(proxy, f"{PREFIX}/decisions.json", host)[0] in (400, 403)


@pytest.mark.parametrize(("origin", "status"), [
    (f"https://{HUB}", 200), ("https://evil.example", 403), ("null", 403), (f"https://{HUB}.evil.example", 403),
    ("http://localhost:3000", 403),
])  # fmt: skip
def test_a_proxy_that_names_the_app_itself_lets_only_its_own_pages_call(proxy, origin, status):
    proxy.rewrites = True
    try:
        assert ask(proxy, f"{PREFIX}/decisions.json", Origin=origin)[0] == status
        body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
        body += bytes_of(photo(), "PNG") + b"\r\n--x--\r\n"
        given = {"Origin": origin, "Content_Type": "multipart/form-data; boundary=x"}
        assert ask(proxy, f"{PREFIX}/gradio_api/upload", method="POST", body=body, **given)[0] == status
    finally:
        proxy.rewrites = False


def test_an_image_is_explained_through_the_proxy(browser, proxy):
    address = f"http://127.0.0.1:{proxy.server_address[1]}{PREFIX}/"
    context = browser.new_context()
    page, asked = context.new_page(), []
    page.set_default_timeout(60_000)
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    page.wait_for_selector("#pp-upload input[type=file]", state="attached")
    page.set_input_files("#pp-upload input[type=file]",
                         {"name": "a.png", "mimeType": "image/png", "buffer": bytes_of(photo(), "PNG")})  # fmt: skip
    page.wait_for_selector("#pp-panel img")
    assert page.evaluate("document.querySelector('#pp-panel img').naturalWidth") == 1480
    assert "The model says" in page.inner_text(".pp-said")
    assert {url for url in asked if not url.startswith((address, "data:", "blob:"))} == set()
    context.close()


def test_a_path_alone_opens_nothing_and_names_close_a_server_for_all(masked_home, tmp_path):
    store = RunStore(masked_home / "run")
    for host, names, known in (("127.0.0.1", (), "127.0.0.1"), ("0.0.0.0", (HUB,), HUB)):
        app = build_app(store, Limits(), host, tmp_path, PREFIX, names)
        with TestClient(app, base_url=f"http://{known}") as client:
            assert client.get("/config").json()["root"] == f"http://{known}{PREFIX}"
            assert client.get("/decisions.json", headers={"Host": "evil.example"}).status_code == 403


@pytest.mark.parametrize(("words", "message"), [
    (["--root_path", "review"], "--root_path review; expected a path (/review) or an address"),
    (["--allowed_host", "*"], "--allowed_host *; expected names of hosts, such as hub.example.org"),
    (["--allowed_host", HUB, "https://x.org/a"], "--allowed_host https://x.org/a; expected names of hosts"),
])  # fmt: skip
def test_words_that_name_nothing_are_refused(masked_home, capsys, words, message):
    assert message in refused(capsys, "app", masked_home / "run", "--port", 0, *words, logged=True)
