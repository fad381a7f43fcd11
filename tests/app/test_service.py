"""The service over real sockets: its answers are the library's, whatever it is sent, and none is lost at its end."""

from __future__ import annotations

import csv
import io
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import CLASSES, refused
from protopush import open_run
from test_app import REFUSED, bytes_of, photo

pytest.importorskip("gradio", reason="gradio is not installed: pip install protopush[app]")

from protopush.app import entrance, resident
from protopush.app.address import listening
from protopush.app.answers import ExplanationAnswer, Predictions, Version
from protopush.app.entrance import Entrance
from protopush.app.service import FILES, Service, ServiceLimits, build_service
from protopush.app.upload import Limits

pytestmark = pytest.mark.usefixtures("one_thread")
TOKEN = "correct-horse-battery"
PNG = bytes_of(photo(), "PNG")


class Client:
    """A service in a thread of this process, and questions to it, each over a connection of its own."""

    def __init__(self, service: Service, port: int) -> None:
        self.service, self.port = service, port

    def __call__(self, method: str, path: str, body: object = None, kind: str = "image/png", **headers: str):
        """Status, headers and bytes of an answer."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        named = {"Content-Type": kind} if body is not None else {}
        connection.request(method, path, body, named | {key.replace("_", "-"): text for key, text in headers.items()})
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        return answer.status, answer.headers, data

    def json(self, *words: object, status: int = 200, **headers: str):
        found, _, data = self(*words, **headers)
        assert found == status, data
        return json.loads(data)

    def raw(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)


@contextmanager
def served(folder: Path, limits=None, threshold=None, token=None, hosts=(), root=""):
    limits = limits or ServiceLimits()
    run = open_run(folder, device="cpu")
    service = Service(run, limits, threshold)
    server = resident.Server(Entrance(build_service(service, token is not None, root), service, token, hosts), service)
    with listening("127.0.0.1", 0) as door:
        port = door.getsockname()[1]
        thread = threading.Thread(target=server.run, kwargs={"sockets": [door]})
        thread.start()
        yield Client(service, port)
        server.should_exit = True
        thread.join(30)
    assert not thread.is_alive()
    assert service.close()
    assert (service.requests, service.batcher._reserved) == (0, 0)


@pytest.fixture(scope="module")
def client(home) -> Iterator[Client]:
    with served(home / "run", ServiceLimits(Limits(2), body_seconds=0.7), threshold=0.9995) as found:
        yield found


@contextmanager
def held(service: Service) -> Iterator[list[int]]:
    """The model waits until the block ends; the sizes of its batches."""
    gate, sizes = threading.Event(), list[int]()

    def wait(_, images) -> None:
        sizes.append(len(images[0]))
        gate.wait(30)

    handle = service.run.model.backbone.register_forward_pre_hook(wait)
    try:
        yield sizes
    finally:
        gate.set()
        until(lambda: not service.requests)
        handle.remove()


def multipart(*files: tuple[str, bytes]) -> tuple[bytes, str]:
    """A body and its content type."""
    parts = [
        b'--xyz\r\nContent-Disposition: form-data; name="file"; filename="%s"\r\n\r\n%s\r\n' % (name.encode(), data)
        for name, data in files
    ]
    return b"".join([*parts, b"--xyz--\r\n"]), "multipart/form-data; boundary=xyz"


def until(true, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


# Answers.


def test_predictions_are_those_of_the_table(home, client, tmp_path, monkeypatch):
    files = sorted((home / "images").rglob("*.png"))
    open_run(home / "run", device="cpu", num_workers=0).predict(
        [str(file) for file in files], tmp_path / "p.csv", threshold=0.5
    )
    with (tmp_path / "p.csv").open(newline="") as table:
        rows = list(csv.DictReader(table))
    best = sorted(float(row["best_similarity"]) for row in rows)
    low, high = next((a, b) for a, b in pairwise(best[5:]) if b - a > 1e-5)
    limit = (low + high) / 2  # so that images lie on both sides
    monkeypatch.setattr(client.service, "threshold", limit)
    alone = [client.json("POST", "/predict", file.read_bytes())["predictions"][0] for file in files]
    together = client.json("POST", "/predict", *multipart(*((file.name, file.read_bytes()) for file in files)))
    Predictions.model_validate(together)
    assert [one["file"] for one in together["predictions"]] == [file.name for file in files]
    for found in (alone, together["predictions"]):
        for one, row in zip(found, rows, strict=True):
            assert one["predicted"] == row["predicted"]
            assert one["nothing_similar"] == (float(row["best_similarity"]) < limit)
            assert one["probability"] == one["probabilities"][one["predicted"]]
            for name in CLASSES:
                assert one["probabilities"][name] == pytest.approx(float(row[f"probability_{name}"]), abs=2e-6)
            assert one["best_similarity"] == pytest.approx(float(row["best_similarity"]), abs=2e-6)


def test_an_explanation_is_that_of_the_command(home, client, tmp_path):
    run, file = open_run(home / "run", device="cpu"), home / "images" / "cat" / "009.png"
    (told,) = run.explain([file], tmp_path, top_classes=2, why_not="dog")
    found = client.json("POST", "/explain?top_classes=2&why_not=dog", *multipart((str(file), file.read_bytes())))
    ExplanationAnswer.model_validate(found)
    assert found["file"] == "009.png"
    del told["panel"], told["why_not"]["panel"]
    same(found | {"file": told["file"]}, told)
    body = multipart((file.name, file.read_bytes()))  # whose name stands in the panel
    status, headers, picture = client("POST", "/explain?top_classes=2&panel=png", *body)
    assert (status, headers["Content-Type"]) == (200, "image/png")
    assert pixels(picture).tobytes() == pixels((tmp_path / "009.png").read_bytes()).tobytes()
    beside = client("POST", "/explain?top_classes=2&why_not=dog", *body, Accept="image/png")[2]
    assert pixels(beside).tobytes() == pixels((tmp_path / "009-why-not.png").read_bytes()).tobytes()
    predicted = client.json("POST", "/explain?why_not=cat", file.read_bytes())
    assert "why_not" not in predicted
    refusal = client.json("POST", "/explain?why_not=cat&panel=png", file.read_bytes(), status=422)
    assert refusal == {"error": "why_not 'cat' is the predicted class; expected another one"}


def pixels(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def same(found, told) -> None:
    """Equal, but for the noise of floats."""
    if isinstance(told, dict):
        assert list(found) == list(told)
        for key in told:
            same(found[key], told[key])
    elif isinstance(told, list):
        assert len(found) == len(told)
        for one, other in zip(found, told, strict=True):
            same(one, other)
    else:
        assert found == (pytest.approx(told, abs=1e-5) if isinstance(told, float) else told)


def test_images_that_wait_go_through_the_model_together_and_get_their_own_answers(home, client):
    files = sorted((home / "images").rglob("*.png"))[:24]
    run = open_run(home / "run", device="cpu")
    with torch.no_grad():
        told = [run.model(run.transform(Image.open(file).convert("RGB"))[None]).logits.softmax(1)[0] for file in files]
    with ThreadPoolExecutor(24) as pool, held(client.service) as sizes:
        asked = [pool.submit(client.json, "POST", "/predict", file.read_bytes()) for file in files[:20]]
        asked += [pool.submit(client.json, "POST", "/explain?top_classes=3", file.read_bytes()) for file in files[20:]]
        until(lambda: client.service.batcher._waiting.qsize() + sum(sizes) == 24)
    assert max(sizes) == client.service.limits.max_batch
    for one, expected in zip(asked[:20], told[:20], strict=True):
        (found,) = one.result()["predictions"]
        assert [found["probabilities"][name] for name in CLASSES] == pytest.approx(expected.tolist(), abs=1e-5)
    for one, expected in zip(asked[20:], told[20:], strict=True):
        found = {evidence["class_name"]: evidence["probability"] for evidence in one.result()["classes"]}
        assert [found[name] for name in CLASSES] == pytest.approx(expected.tolist(), abs=1e-5)


def test_answers_of_a_connection_that_stays_open_are_not_held_back(client):
    """By 40 ms each, where the second packet of an answer waits for the first one's acknowledgement."""
    connection, took = HTTPConnection("127.0.0.1", client.port, timeout=60), list[float]()
    for _ in range(20):
        started = time.monotonic()
        connection.request("GET", "/health")
        assert connection.getresponse().read() == b'{"ready":true}'
        took.append(time.monotonic() - started)
    connection.close()
    assert min(took[1:]) < 0.03


def test_an_image_alone_waits_for_nobody(home):
    with served(home / "run", ServiceLimits(max_wait_ms=1000)) as slow:
        slow.json("POST", "/predict", PNG)
        started = time.monotonic()
        for _ in range(3):
            slow.json("POST", "/predict", PNG)
        assert time.monotonic() - started < 1.0


def test_unusual_files_are_read_as_the_app_reads_them(client):
    grey = Image.fromarray(np.linspace(0, 65535, 40 * 32).astype(np.uint16).reshape(32, 40))
    found = client.json("POST", "/predict", *multipart(("tief.png", bytes_of(grey, "PNG")), ("ä\\é.png", PNG)))
    deep, plain = found["predictions"]
    assert "scaled to 8" in deep["note"]
    assert (plain["file"], plain["note"]) == ("é.png", "")
    exact = client.json("POST", "/predict", PNG, "image/webp")["predictions"][0]  # what it is counts
    assert exact["probabilities"] == pytest.approx(plain["probabilities"], abs=1e-5)
    large = bytes_of(photo().resize((700, 700)), "BMP")  # beyond what is kept in memory
    assert len(large) > 1 << 20
    same(client.json("POST", "/predict", large), client.json("POST", "/predict", bytes_of(pixels(large), "PNG")))


def test_what_answers(home, client):
    found, config = client.json("GET", "/version"), json.loads((home / "run" / "config.json").read_text())
    Version.model_validate(found)
    assert (found["classes"], found["threshold"], found["device"]) == (CLASSES, 0.9995, "cpu")
    for name in ("weights_sha256", "prior", "preprocessing", "versions", "crop_pct"):
        assert found[name] == config[name]
    assert client.json("GET", "/health") == {"ready": True}


def test_openapi_describes_all_and_its_page_fetches_nothing(client):
    api = client.json("GET", "/openapi.json")
    assert set(api["paths"]) == {"/health", "/version", "/predict", "/explain"}
    schemas = api["components"]["schemas"]
    for name in set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(api))):
        assert schemas[name]["properties"]
    assert set(api["paths"]["/explain"]["post"]["requestBody"]["content"]) == {"image/*", "multipart/form-data"}
    assert [one["name"] for one in api["paths"]["/explain"]["post"]["parameters"]] == [
        "top_classes",
        "why_not",
        "panel",
    ]
    status, headers, page = client("GET", "/docs")
    text = page.decode()
    assert status == 200
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert set(re.findall(r"https?://[^\s<\"]+", text)) == {f"http://127.0.0.1:{client.port}/predict"}
    assert not re.search(r"<script|<link|<img|@import|url\(", text)
    for word in (*api["paths"], *schemas, "best_similarity", "why_not", "Retry-After"):
        assert word in text
    assert "TOKEN" not in text


# Refusals.


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_fit_image_is_refused_in_the_words_of_the_app(client, name):
    data, expected = REFUSED[name]
    if len(data) > 2_000_000:
        assert "larger than 2 MB" in client.json("POST", "/predict", data, status=413)["error"]
        return
    for path in ("/predict", "/explain", "/explain?panel=png"):
        assert expected in client.json("POST", path, *multipart((name, data)), status=422)["error"]
    good = client.json("POST", "/predict", *multipart(("a.png", PNG), (name, data), ("b.png", PNG)), status=422)
    assert good["error"].startswith(name)


@pytest.mark.parametrize(("method", "path", "body", "kind", "status", "error"), [
    ("GET", "/nothing", None, "", 404, "nothing at this address"),
    ("POST", "/predict/", PNG, "image/png", 404, "nothing at this address"),
    ("GET", "/../../etc/passwd", None, "", 404, "nothing at this address"),
    ("GET", "/predict", None, "", 405, "GET is not for this address; expected POST"),
    ("DELETE", "/predict", None, "", 405, "expected POST"),
    ("POST", "/predict", b"a=b", "application/x-www-form-urlencoded", 415, "Content-Type is application/x-www-form"),
    ("POST", "/predict", b"{}", "application/json", 415, "expected an image as the body"),
    ("POST", "/predict", PNG, "", 415, "Content-Type is missing"),
    ("POST", "/predict", b"", "image/png", 422, "image is empty"),
    ("POST", "/predict", b"", "multipart/form-data", 422, "Missing boundary"),
    ("POST", "/predict", b"no parts", "multipart/form-data; boundary=xyz", 422, "multipart body"),
    ("POST", "/predict", multipart(("a.png", PNG))[0][:-9], multipart()[1], 422, "multipart body"),
    ("POST", "/predict", *multipart(), 422, "has no files; expected 1 to 32 image files"),
    ("POST", "/predict", *multipart(*[("a.png", PNG)] * (FILES + 1)), 422, "Too many files"),
    ("POST", "/explain", *multipart(*[("a.png", PNG)] * 2), 422, "expected one image file"),
    ("POST", "/predict", b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\nb\r\n--x--\r\n',
     "multipart/form-data; boundary=x", 422, "Too many fields"),
    ("POST", "/explain?top_classes=0", PNG, "image/png", 422, "top_classes is '0'"),
    ("POST", "/explain?top_classes=many", PNG, "image/png", 422, "top_classes is 'many'"),
    ("POST", "/explain?top_class=1", PNG, "image/png", 422, "top_class is '1'"),
    ("POST", "/explain?panel=svg", PNG, "image/png", 422, "panel is 'svg'"),
    ("POST", "/explain?why_not=horse", PNG, "image/png", 422, "unknown class 'horse' in why_not; expected one of"),
])  # fmt: skip
def test_wrong_questions_are_refused(client, method, path, body, kind, status, error):
    found, headers, data = client(method, path, body, kind)
    assert found == status, data
    assert headers["Content-Type"] == "application/json"
    assert set(json.loads(data)) == {"error"}
    assert error in json.loads(data)["error"]
    assert str(Path(resident.__file__).parent) not in data.decode()
    assert client.json("POST", "/predict", PNG)["predictions"]


def test_bodies_that_are_encoded_are_refused(client):
    assert "Content-Encoding" in client.json("POST", "/predict", PNG, status=415, Content_Encoding="gzip")["error"]


def test_a_body_that_is_too_large_is_refused_before_it_is_read(client):
    """Who goes on sending still gets the answer; how large it is, may be said before or not."""

    def pieces() -> Iterator[bytes]:
        for _ in range(80):
            yield bytes(100_000)

    for body in (bytes(8_000_000), pieces()):
        status, headers, data = client("POST", "/predict", body)
        assert (status, headers["Connection"]) == (413, "close")
        assert json.loads(data) == {"error": "the body is larger than 2 MB; expected at most that"}
    files = multipart(("a.png", PNG), ("b.png", bytes(3_000_000)))
    assert client("POST", "/predict", *files)[0] == 413
    with client.raw() as told:  # nothing is sent but the head
        told.sendall(
            b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 99999999999\r\n\r\n"
        )
        assert told.recv(4096).startswith(b"HTTP/1.1 413")


def test_a_body_that_never_ends_is_refused(client, monkeypatch):
    monkeypatch.setattr(entrance, "LINGER", 0.2)
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: %s\r\nContent-Length: 1000\r\n\r\n"
    for kind in (b"image/png", b"multipart/form-data; boundary=xyz"):
        with client.raw() as slow:
            slow.sendall(head % kind + b"--xyz\r\n")
            answer = b"".join(iter(lambda here=slow: received(here), b""))
            assert answer.startswith(b"HTTP/1.1 408")
            assert b"the body was not there after 0.7 s" in answer
    until(lambda: client.service.requests == 0)


def test_a_client_that_goes_in_the_middle_of_its_body_leaves_nothing(client):
    for _ in range(20):
        gone = client.raw()
        gone.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 1000\r\n\r\nabc")
        gone.close()
    until(lambda: client.service.requests == 0)
    assert client.json("POST", "/predict", PNG)


def test_what_is_no_request_is_refused(client, monkeypatch):
    for words in (b"GET / NONSENSE\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00", b"GET /" + b"a" * 70_000):
        with client.raw() as wrong:
            wrong.sendall(words + b"\r\n\r\n")
            answer = b"".join(iter(lambda here=wrong: received(here), b""))
            assert answer.startswith(b"HTTP/1.1 400 Bad Request")
            assert b'{"error": "this is no HTTP request' in answer
    monkeypatch.setattr(resident, "HEAD_SECONDS", 0.3)
    with client.raw() as slow:
        for word in (b"GET ", b"/health ", b"HTTP/1.1\r\n"):
            slow.sendall(word)
            time.sleep(0.05)
        assert slow.recv(4096).startswith(b"HTTP/1.1 408 Request Timeout")
        assert slow.recv(4096) == b""


def received(connection: socket.socket) -> bytes:
    try:
        return connection.recv(4096)
    except ConnectionResetError:  # it was sent more than it has read
        return b""


def test_more_than_it_can_hold_is_refused_until_there_is_room(home):
    limits = ServiceLimits(requests=6, max_batch=2)
    with served(home / "run", limits) as few, ThreadPoolExecutor(8) as pool:
        assert few.service.batcher.most == 4 * FILES
        with held(few.service) as sizes:
            asked = [pool.submit(few.json, "POST", "/predict", PNG) for _ in range(6)]
            until(lambda: few.service.batcher._waiting.qsize() + sum(sizes) == 6)
            status, headers, data = few("POST", "/predict", PNG)
            assert (status, headers["Retry-After"]) == (503, "1")
            assert "too many requests at once; expected fewer" in json.loads(data)["error"]
            assert few.json("GET", "/health") == {"ready": True}
        assert all(one.result()["predictions"] for one in asked)
        assert few.json("POST", "/predict", PNG)["predictions"]
        few.service.batcher.most = 3  # images, however few requests
        assert few("POST", "/predict", *multipart(*[("a.png", PNG)] * 4))[0] == 503
        assert few("POST", "/predict", *multipart(*[("a.png", PNG)] * 3))[0] == 200


def test_a_model_that_fails_says_so_and_goes_on(home, caplog):
    with served(home / "run") as client:
        handle = client.service.run.model.backbone.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("uvicorn.protocols.http.h11_impl.logging.Logger.error", lambda *_, **__: None)
            told = client.json("POST", "/predict", PNG, status=500)
        assert told == {"error": "the service failed; its log says why"}
        assert client.json("GET", "/health", status=503) == {"ready": False}
        handle.remove()
        assert client.json("POST", "/predict", PNG)["predictions"]
        assert client.json("GET", "/health") == {"ready": True}
        with torch.no_grad():
            client.service.run.head.bias.fill_(float("nan"))
        assert "not finite" in client.json("POST", "/predict", PNG, status=500)["error"]
        assert "not finite" in client.json("POST", "/explain", PNG, status=500)["error"]


# Who may ask.


def test_a_token_opens_what_holds_anything_of_the_run(home):
    with served(home / "run", token=TOKEN) as client:
        for path, body in (("/predict", PNG), ("/explain", PNG), ("/version", None), ("/nothing", None)):
            method = "GET" if body is None else "POST"
            for given in (None, "Bearer", "Bearer wrong", f"Basic {TOKEN}", TOKEN, f"Bearer {TOKEN}x", "Bearer \xe4"):
                headers = {} if given is None else {"Authorization": given}
                status, answer, data = client(method, path, body, **headers)
                assert (status, answer["WWW-Authenticate"]) == (401, "Bearer")
                assert "expected Authorization: Bearer" in json.loads(data)["error"]
            assert client(method, path, body, Authorization=f"Bearer {TOKEN}")[0] in (200, 404)
        assert client("POST", "/predict", bytes(5_000_000))[0] == 401
        for path in ("/health", "/docs", "/openapi.json"):
            assert client("GET", path)[0] == 200
        api = client.json("GET", "/openapi.json")
        assert [path for path, calls in api["paths"].items() if "security" in str(calls)] == [
            "/version", "/predict", "/explain"
        ]  # fmt: skip
        assert b"Authorization: Bearer TOKEN" in client("GET", "/docs")[2]


@pytest.mark.parametrize(("text", "status"), [
    ("127.0.0.1", 200), ("localhost:80", 200), ("[::1]:80", 200), ("evil.example", 403),
    ("localhost.evil.example", 403), ("[", 403),
])  # fmt: skip
def test_other_names_and_pages_of_other_sites_are_refused(home, own, text, status):
    assert own("GET", "/version", Host=text)[0] == status
    assert own("GET", "/version", Origin=f"http://{text}")[0] in (403, status)
    if status == 403:
        assert "error" in own.json("POST", "/predict", PNG, status=403, Origin=f"http://{text}")


@pytest.fixture(scope="module")
def own(home) -> Iterator[Client]:
    with served(home / "run", hosts=("127.0.0.1", "localhost", "::1"), root="https://hub.example.org/model") as found:
        yield found


def test_the_page_says_where_a_proxy_shows_it(own):
    assert own.json("GET", "/openapi.json")["servers"] == [{"url": "https://hub.example.org/model"}]
    assert b"https://hub.example.org/model/predict" in own("GET", "/docs")[2]


@pytest.mark.parametrize(("words", "message"), [
    (["--host", "0.0.0.0"], "other computers reach --host 0.0.0.0; expected a token that callers have to know"),
    (["--max_batch", 0], "--max_batch is 0; expected at least 1"),
    (["--max_wait_ms", -1], "--max_wait_ms is -1.0; expected 0 to 1000"),
    (["--max_megabytes", 0], "--max_megabytes 0; expected a number above 0"),
    (["--port", 70000], "--port 70000; expected 0 to 65535"),
    (["--root_path", "model"], "--root_path model; expected a path"),
    (["--allowed_host", "*"], "--allowed_host *; expected names of hosts"),
    (["--token_file", "missing"], "--token_file missing can't be read"),
    (["--token_file", "short"], "--token_file short holds no token; expected one word of 16 characters or more"),
    (["--token_file", "words"], "--token_file words holds no token"),
])  # fmt: skip
def test_wrong_options_are_refused_in_one_line(home, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(resident.TOKEN, raising=False)
    Path("short").write_text("abc\n")
    Path("words").write_text("one two three four five six\n")
    assert message in refused(capsys, "serve", home / "run", "--device", "cpu", *words)


@pytest.mark.parametrize(("command", "what"), [("serve", "the service"), ("app", "the review app")])
def test_without_its_extra_it_says_which(home, monkeypatch, capsys, command, what):
    monkeypatch.setattr("protopush.app.find_spec", lambda _: None)
    told = refused(capsys, command, home / "run")
    assert told == f"protopush: error: {what} needs gradio; pip install protopush[app]"


def test_a_token_comes_from_the_file_before_the_variable(tmp_path, monkeypatch):
    monkeypatch.delenv(resident.TOKEN, raising=False)
    assert resident.read_token("") is None
    monkeypatch.setenv(resident.TOKEN, f" {TOKEN}\n")
    assert resident.read_token("") == TOKEN
    (tmp_path / "token").write_text(f"{TOKEN}-of-the-file\n")
    assert resident.read_token(str(tmp_path / "token")) == f"{TOKEN}-of-the-file"
