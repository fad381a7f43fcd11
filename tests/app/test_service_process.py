"""The service as a process: stopped in the middle of requests, and 10,000 of them, most of them wrong."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.client import HTTPConnection
from pathlib import Path
from statistics import median

import pytest

from docs_blocks import ROOT, blocks
from forked import Forked
from test_app import BOMB, REFUSED, bytes_of, photo
from test_service import TOKEN, multipart

pytest.importorskip("gradio", reason="gradio is not installed: pip install protopush[app]")

DOCS = ROOT / "docs" / "serve.md"
PNG = bytes_of(photo(), "PNG")
HEAD = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: image/png\r\n"
HEAD += b"Content-Length: %d\r\n\r\n" % len(PNG)
PROGRAM = """
import sys, time
import protopush
from protopush.app.resident import run_service
from protopush.app.service import ServiceLimits
from protopush.app.upload import Limits

folder, seconds, body_seconds, grace = sys.argv[1], *map(float, sys.argv[2:])
run = protopush.open_run(folder, device="cpu", num_workers=0)
run.model.backbone.register_forward_pre_hook(lambda *_: time.sleep(seconds))
run_service(run, ServiceLimits(Limits(2), body_seconds=body_seconds, grace=grace), port=0)
"""


@contextmanager
def process(*words: object, **how: object) -> Iterator[tuple[Forked, int]]:
    """A process that answers, and its port."""
    found = Forked(*words, **how)
    try:
        while not (port := re.search(r"Service: http://\S+:(\d+) ", found.stdout)):
            assert found.poll() is None, found.stderr
            time.sleep(0.02)
        yield found, int(port[1])
    finally:
        if found.poll() is None:
            os.kill(found.pid, signal.SIGKILL)
            found.wait()


def read_all(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(65536), b""))


def answer(data: bytes) -> dict:
    head, _, body = data.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200"), data
    return json.loads(body)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_who_has_asked_before_the_end_is_answered(home, number):
    """Bodies of which a half is there, requests that nobody has read yet, and a steady stream of others."""
    lost, answered, stop = list[str](), list[int](), threading.Event()

    def stream(port: int) -> None:
        """Ask until nobody listens any more; who had asked before the signal is answered."""
        while True:
            early, data = False, b""
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=60) as one:
                one.sendall(HEAD + PNG)
                early = not stop.is_set()
                data = read_all(one)
            if not data:
                if early or not stop.is_set():
                    lost.append("a request")
                return
            assert answer(data)["predictions"]
            answered.append(1)

    with process("serve", home / "run", "--port", 0, "--device", "cpu") as (server, port):
        with ThreadPoolExecutor(6) as pool:
            streams = [pool.submit(stream, port) for _ in range(6)]
            halves = [socket.create_connection(("127.0.0.1", port), timeout=60) for _ in range(8)]
            for one in halves:
                one.sendall(HEAD + PNG[:100])
            time.sleep(0.5)
            fresh = [socket.create_connection(("127.0.0.1", port), timeout=60) for _ in range(8)]
            for one in fresh:
                one.sendall(HEAD + PNG)
            stop.set()
            os.kill(server.pid, number)
            time.sleep(0.5)
            assert server.poll() is None  # it waits for the halves
            for one in halves:
                one.sendall(PNG[100:])
            told = [answer(read_all(one)) for one in (*halves, *fresh)]
            for one in streams:
                one.result()
        assert server.wait(30) == 0
        assert all(one["predictions"][0]["probability"] > 0.3 for one in told)
        assert lost == []
        assert answered
        count = 16 + len(answered)
        assert server.stdout.splitlines()[-1] == f"Service ended; {count} requests were answered."
        assert "Traceback" not in server.stderr
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)


def test_who_takes_longer_than_the_grace_is_cut_off(home):
    slow = PROGRAM.replace("lambda *_: time.sleep(seconds)", "lambda _, x: time.sleep(seconds if x[0].any() else 0)")
    with process(home / "run", 30, 60, 1, program=slow) as (server, port):  # not when it starts
        with socket.create_connection(("127.0.0.1", port), timeout=60) as one:
            one.sendall(HEAD + PNG)
            time.sleep(0.5)
            started = time.monotonic()
            os.kill(server.pid, signal.SIGTERM)
            assert server.wait(30) == 0
            assert time.monotonic() - started < 10
            assert read_all(one).startswith(b"HTTP/1.1 500")
        assert server.stdout.splitlines()[-1] == "Service ended; 0 requests were answered; 1 were cut off after 1 s."


def test_a_service_for_other_computers_has_a_token(home, tmp_path):
    words = ("serve", home / "run", "--port", 0, "--host", "0.0.0.0", "--device", "cpu")
    with process(*words, PROTOPUSH_TOKEN=TOKEN) as (_, port):
        for headers, status in (({}, 401), ({"Authorization": f"Bearer {TOKEN}"}, 200)):
            connection = HTTPConnection("127.0.0.1", port, timeout=60)
            connection.request("GET", "/version", headers=headers | {"Host": "any.example"})
            assert connection.getresponse().status == status
            connection.close()


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_the_docs_call_it_as_it_is_called(home, tmp_path):
    lines = [line for block in blocks("bash", DOCS.read_text(encoding="utf-8")) for line in block.splitlines()]
    calls = [line for line in lines if line.startswith("curl")]
    (tmp_path / "images").symlink_to(home / "images")
    (tmp_path / "token").write_text(TOKEN)
    words = ("serve", home / "run", "--port", 0, "--device", "cpu", "--token_file", tmp_path / "token")
    answers = list[bytes]()
    with process(*words) as (_, port):
        for call in calls:
            assert "http://127.0.0.1:7861/" in call
            line = call.replace("7861", str(port)) + f' -sS -H "Authorization: Bearer {TOKEN}"'
            answers.append(subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, check=True).stdout)
    one, two, why, drawn, *_ = answers
    assert [len(json.loads(some)["predictions"]) for some in (one, two)] == [1, 2]
    assert len(json.loads(why)["classes"]) >= 2
    assert drawn == b""
    assert (tmp_path / "panel.png").read_bytes().startswith(b"\x89PNG")
    assert len(calls) == 7


# 10,000 requests.


def resident_megabytes(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def requests(number: int) -> list[tuple[str, int]]:
    """Kinds of requests, and what is answered to each."""
    kinds = {
        "good": (0.40, 200), "several": (0.05, 200), "explained": (0.05, 200), "drawn": (0.005, 200),
        "broken": (0.15, 422), "nonsense": (0.10, 422), "bomb": (0.02, 422), "declared": (0.02, 413),
        "huge": (0.01, 413), "other": (0.10, 415), "nowhere": (0.05, 404), "no_http": (0.04, 400), "slow": (0.004, 408),
    }  # fmt: skip
    some = [(kind, status) for kind, (share, status) in kinds.items() for _ in range(round(share * number))]
    some += [("good", 200)] * (number - len(some))
    random.Random(0).shuffle(some)
    return some


def bytes_for(kind: str, chance: random.Random) -> bytes:
    """A whole request; of a slow one, all that ever comes."""
    broken = [data for name, (data, _) in REFUSED.items() if name not in ("large.png", "heavy.png", "bomb.png")]
    noise = chance.randbytes(chance.randint(1, 3000))
    path, body, media = "/predict", PNG, "image/png"
    if kind == "several":
        body, media = multipart(("a.png", PNG), ("b.png", PNG))
    elif kind in ("explained", "drawn"):
        path = "/explain" + ("?panel=png" if kind == "drawn" else "?why_not=cat&top_classes=1")
    elif kind == "broken":
        body = chance.choice([*broken, PNG[: chance.randint(1, len(PNG) - 100)], b"\x89PNG\r\n\x1a\n" + noise])
    elif kind == "nonsense":
        whole, media = multipart(("a.png", noise))
        cut = chance.randint(0, len(whole) - 1)
        body = chance.choice([whole[:cut], noise, whole])
    elif kind == "bomb":
        body = BOMB
    elif kind == "huge":
        body = bytes(3_000_000)
    elif kind == "other":
        media = chance.choice(["application/json", "text/html", "", "video/mp4"])
    elif kind == "nowhere":
        path = chance.choice(["/", "/predict/", "/../secret", "/%00", "/index.php"])
    elif kind == "no_http":
        return (
            chance.choice([b"\x16\x03\x01" + noise, b"GET / X\r\n\r\n", b"POST /predict HTTP/1.1\r\nno: host\r\n\r\n"])
            + b"\r\n\r\n"
        )
    length = 10**9 if kind == "declared" else len(body)
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {media}\r\nContent-Length: {length}\r\n"
    sent = body[: len(body) // 2] if kind == "slow" else body
    return head.encode() + b"Connection: close\r\n\r\n" + sent


def status_of(port: int, data: bytes) -> int:
    """The status of the answer, whose body is what it says that it is."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as one:
        one.sendall(data)
        found = b""
        while b"\r\n\r\n" not in found:
            more = one.recv(65536)
            assert more, (data[:200], found)
            found += more
        head, _, body = found.partition(b"\r\n\r\n")
        length = int(re.search(rb"content-length: (\d+)", head, re.IGNORECASE)[1])
        while len(body) < length:
            body += one.recv(65536)
    status = int(head.split()[1])
    assert len(body) == length
    if status != 200:
        assert set(json.loads(body)) == {"error"}
        assert len(json.loads(body)["error"]) > 15
    return status


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_ten_thousand_requests_are_answered_or_refused_in_the_same_memory(home):
    chance, wrong, memory = random.Random(1), Counter[tuple[str, int]](), list[float]()
    with process(home / "run", 0, 1, 30, program=PROGRAM) as (server, port):

        def ask(asked: tuple[str, int]) -> None:
            kind, expected = asked
            status = status_of(port, bytes_for(kind, chance))
            if status != expected:
                wrong[kind, status] += 1

        with ThreadPoolExecutor(16) as pool:
            for _ in range(14):  # the first 4,000 warm up: the memory of each thread grows to what it needs at most
                list(pool.map(ask, requests(1000)))
                memory.append(resident_megabytes(server.pid))
        print("resident, MB:", *(f"{size:.1f}" for size in memory))
        assert wrong == {}
        # Freed memory that stays with a thread makes steps of 20 MB; a tensor kept of each request would make 400.
        assert max(memory[4:]) < 1.15 * max(memory[:4])
        assert median(memory[9:]) - median(memory[4:9]) < 0.05 * memory[3]
        os.kill(server.pid, signal.SIGTERM)
        assert server.wait(30) == 0
        count = sum(kind != "no_http" for kind, _ in requests(1000)) * 14
        assert server.stdout.splitlines()[-1] == f"Service ended; {count} requests were answered."
        assert "Traceback" not in server.stderr
