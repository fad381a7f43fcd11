"""What the service costs: latency and images a second of ``protopush serve`` against the bare forward pass.

    python benchmarks/serve_speed.py RUN FOLDER_OR_MANIFEST --requests 96 --repetitions 3

The service is a process of its own, with its own defaults; 1, 8 and 32 clients, threads of another process over local
connections that stay open, send the bytes of files that are in memory, each as soon as its last answer is there. The
bare side is the forward pass of the backbone alone over pixels that are decoded already, one by one and in batches of
the service's size, with as many threads, while no service runs. The time between a question and its whole answer
includes the other end of the connection: reading the body, decoding, resizing, waiting for the batch, the head, JSON.
On a machine that others use as well, the processors' time tells more than the clock; so does OMP_NUM_THREADS=1, where
threads of one pass would wait for each other.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from argparse import RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median, quantiles

import torch
from measuring import Comparison, save
from rich.console import Console
from showing import Parser, count, device_name, surroundings, table

from protopush.data.images import read_image
from protopush.errors import InputError
from protopush.models.model_folder import Run
from protopush.predict.inputs import list_inputs
from protopush.preserve_state import preserve_state
from protopush.runs.run import open_run

CLIENTS = (1, 8, 32)
BATCH = 16  # the default of --max_batch
CLIENTS_OF = Path(__file__).parent / "asking.py"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, show and save."""
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("images_of", metavar="FOLDER_OR_MANIFEST", help="images")
    parser.add_argument("--requests", type=count, default=96, metavar="N", help="a client and repetition (default: 96)")
    parser.add_argument("--repetitions", type=count, default=3, metavar="N", help="(default: 3)")
    parser.add_argument("--device", type=device_name, default="cpu", help="of both sides (default: cpu)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "serve_speed.json")
    options = parser.parse_args(argv)
    try:
        run, names = open_run(options.run), list_inputs([options.images_of]).names
    except InputError as error:
        parser.error(str(error))
    record = surroundings(options.device) | {"requests": options.requests, "max_batch": BATCH}
    files = [names[i] for i in range(min(options.requests, len(names)))]
    run.model.to(options.device)
    found = comparisons(run, files, options.requests, options.repetitions, options.device)
    Console(width=None if sys.stdout.isatty() else 120).print(table("the service", found))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    save(record | {"comparisons": [comparison.to_dict() for comparison in found]}, options.out)
    return 0


def comparisons(run: Run, files: Sequence[str], requests: int, repetitions: int, device: str) -> list[Comparison]:
    """The bare forward pass before and after each round of the service, and what both say together."""
    bare: dict[int, list[tuple[float, float]]] = {1: [], BATCH: []}
    latency: dict[int, list[list[float]]] = {clients: [] for clients in CLIENTS}
    took: dict[int, list[tuple[float, float]]] = {clients: [] for clients in CLIENTS}
    for _ in range(repetitions):
        for size in bare:
            bare[size].append(forward(run, files[: 2 * BATCH], size, device))
        with serving(run.folder, device) as (port, pid):
            for clients in CLIENTS:
                before = busy(pid)
                seconds, each = asked(port, files, clients, requests)
                took[clients].append((1000 * seconds / requests, 1000 * (busy(pid) - before) / requests))
                latency[clients].append(each)
    name = getattr(run.model.backbone, "name", "backbone")
    found = []
    for clients in CLIENTS:
        both = {f"forward, batches of {size}": values for size, values in bare.items()} | {"service": took[clients]}
        sides = {side: [clock for clock, _ in values] for side, values in both.items()}
        one = Comparison(f"{name}, {clients} client{'s' if clients > 1 else ''}", "ms/image", sides)
        one.add("images a second, service", lambda ms: 1000 / ms["service"], unit="/s")
        best = f"forward, batches of {BATCH if clients > 1 else 1}"
        one.add(f"service / {best}", lambda ms, best=best: ms["service"] / ms[best])  # type: ignore[misc]
        for words, of in (("median", median), ("95 of 100 below", lambda each: quantiles(each, n=20)[-1])):
            values = iter([1000 * of(each) for each in latency[clients]])
            one.add(f"latency, {words}", lambda _, values=values: next(values), unit="ms")  # type: ignore[misc]
        processors = {side: [cpu for _, cpu in values] for side, values in both.items()}
        two = Comparison(f"{one.setting}, processors", "ms/image", processors)
        two.add(f"service / {best}", lambda ms, best=best: ms["service"] / ms[best])  # type: ignore[misc]
        found += [one, two]
    return found


def forward(run: Run, files: Sequence[str], size: int, device: str) -> tuple[float, float]:
    """The milliseconds that an image takes in the backbone, in batches of a size, by the clock and of processors."""
    pixels = torch.stack([run.transform(read_image(file)) for file in files])
    with preserve_state(run.model):
        run.model.backbone(pixels[:size].to(device)).patches.sum().item()
        started = time.perf_counter(), time.process_time()
        for batch in pixels.split(size):
            run.model.backbone(batch.to(device)).patches.sum().item()  # .item() waits for a GPU
        clock, processors = time.perf_counter() - started[0], time.process_time() - started[1]
        return 1000 * clock / len(pixels), 1000 * processors / len(pixels)


@contextmanager
def serving(folder: Path, device: str) -> Iterator[tuple[int, int]]:
    """A service in a process of its own; its port, and the number of the process."""
    command = [sys.executable, "-m", "protopush", "serve", str(folder), "--port", "0", "--device", device]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            line = next((line for line in process.stdout or () if line.startswith("Service: ")), "")
            port = re.search(r":(\d+) ", line)
            if port is None:
                raise InputError(f"the service did not start; expected its address: {' '.join(command[1:])}")
            yield int(port[1]), process.pid
        finally:
            process.terminate()


def busy(pid: int) -> float:
    """The seconds that processors were busy with a process so far (Linux)."""
    times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return sum(map(int, times)) / os.sysconf("SC_CLK_TCK")


def asked(port: int, files: Sequence[str], clients: int, requests: int) -> tuple[float, list[float]]:
    """The seconds that a process of clients takes for all requests, and those of each."""
    command = [sys.executable, str(CLIENTS_OF), str(port), str(clients), str(requests), *files]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    first, *rest = map(float, done.stdout.split())
    return first, rest


if __name__ == "__main__":
    sys.exit(main())
