"""The peak memory of a process that pushes maps: ``python peak_memory.py COUNT [DEVICE]`` prints megabytes.

On a GPU it is the memory that tensors took there.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from ready_maps import GeneratedMaps, ReadyMaps, training_loader

import protopush

CLASSES, PROTOTYPES, CELLS, DIM = 7, 10, 49, 64
WARM_UP = 512


def push_generated(count: int, device: str = "cpu") -> None:
    """Push maps of which none is kept."""
    dataset = GeneratedMaps(count, CLASSES, CELLS, DIM)
    model = ReadyMaps(CLASSES, PROTOTYPES, DIM).to(device)
    protopush.push_prototypes(model, training_loader(dataset), device)


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


def in_fresh_process(count: int, device: str = "cpu") -> float:
    """The peak of a process of its own that pushes ``count`` maps."""
    done = subprocess.run([sys.executable, __file__, str(count), device], stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout)


if __name__ == "__main__":
    device = sys.argv[2] if len(sys.argv) > 2 else "cpu"
    push_generated(WARM_UP, device)
    push_generated(int(sys.argv[1]), device)
    print(peak_megabytes() if device == "cpu" else torch.cuda.max_memory_allocated(device) / 2**20)
