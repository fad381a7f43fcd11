"""Clients of a service, in a process that imports nothing else: what each request took."""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path


def ask_all(port: str, clients: str, requests: str, *files: str) -> None:
    """Print the seconds of all requests, divided among the clients, and of each."""
    bodies = [Path(file).read_bytes() for file in files]

    def client(number: int) -> list[float]:
        connection, each = HTTPConnection("127.0.0.1", int(port), timeout=600), []
        for i in range(number, int(requests), int(clients)):
            started = time.perf_counter()
            connection.request("POST", "/predict", bodies[i % len(bodies)], {"Content-Type": "image/jpeg"})
            answer = connection.getresponse()
            data = answer.read()
            each.append(time.perf_counter() - started)
            if answer.status != 200:
                raise SystemExit(f"{answer.status}: {data.decode()}")
        return each

    client(int(requests) - 1)  # the first is not counted
    with ThreadPoolExecutor(int(clients)) as pool:
        started = time.perf_counter()
        each = [seconds for some in pool.map(client, range(int(clients))) for seconds in some]
        print(time.perf_counter() - started, *each)


if __name__ == "__main__":
    ask_all(*sys.argv[1:])
