"""The peak memory of a process that pushes a given number of maps: ``python peak_memory.py COUNT`` prints megabytes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from ready_maps import GeneratedMaps, ReadyMaps, training_loader

import protopush

CLASSES, PROTOTYPES, CELLS, DIM = 7, 10, 49, 64
WARM_UP = 512


def push_generated(count: int) -> None:
    """Push maps of which none is kept."""
    dataset = GeneratedMaps(count, CLASSES, CELLS, DIM)
    protopush.push_prototypes(ReadyMaps(CLASSES, PROTOTYPES, DIM), training_loader(dataset), "cpu")


def peak_megabytes() -> float:
    """The most memory that this process ever had.

    ``ru_maxrss`` starts at what the parent had when it called us (Linux hands it over), ``VmHWM`` starts at nothing.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 * 1024 if sys.platform == "darwin" else 1024)


def in_fresh_process(count: int) -> float:
    """The peak of a process of its own that pushes ``count`` maps."""
    done = subprocess.run([sys.executable, __file__, str(count)], stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout)


if __name__ == "__main__":
    push_generated(WARM_UP)
    push_generated(int(sys.argv[1]))
    print(peak_megabytes())
