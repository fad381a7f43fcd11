"""A million images and ten: ``python scale.py`` lists shards, pushes made features, and stores them.

The features are made from an image's number; all else is the code that a run goes through: the source, a DataLoader,
``push_prototypes``, the cache. Each measurement has a process of its own with one thread, whose peak memory is its
alone; seconds are the processor's, so that other work beside it doesn't count.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import save
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import protopush
from protopush.backbones import Features
from protopush.data.dataset import ImageDataset
from protopush.data.feature_shards import Format
from protopush.data.features import cache_features
from protopush.data.images import read_image
from protopush.data.manifest import Sample
from protopush.data.regions import Regions
from protopush.data.sources import load_catalog
from protopush.data.transforms import EvalTransform, Preprocessing

CLASSES, PROTOTYPES, CELLS, BATCH = 10, 10, 49, 256
PRECISIONS = ("float32", "float16", "float8")
BANK = 4096  # patches from which features are made
RESULTS = Path(__file__).parent / "results" / "scale.json"


class Numbers(Dataset[tuple[Tensor, int, int]]):
    """Images that are their number alone."""

    def __init__(self, count: int) -> None:
        self.count, self.labels = count, (np.arange(count) % CLASSES).tolist()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        return torch.tensor(index), index % CLASSES, index

    def eval_view(self) -> Numbers:
        """Itself."""
        return self


class Made(nn.Module):
    """Numbers (B,) to features (B, 49, C): two patches of a bank each, in a mixture that hardly ever comes twice."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        self.register_buffer("bank", torch.randn(BANK, channels, generator=random))
        self.channels, self.regions = channels, Regions.grid((7, 7), (224, 224))

    def forward(self, numbers: Tensor) -> Features:
        places = numbers.view(-1, 1) * CELLS + torch.arange(CELLS)
        first, second = places * 2654435761 % 4294967291 % BANK, places * 40503 % 1000003 % BANK
        patches = torch.lerp(self.bank[first], self.bank[second], 0.3)
        return Features(patches.mean(dim=1, keepdim=True), patches, self.regions)

    def regions_of(self, size: tuple[int, int]) -> Regions:
        """A grid of 7 x 7."""
        return self.regions


class Model(protopush.PushMixin, nn.Module):
    """Made features and a head."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.backbone = Made(channels)
        self.head = protopush.HeadOptimal(channels, CLASSES, num_prototypes=PROTOTYPES, embed_dim=64)

    def extract_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What the push reads."""
        return self.backbone(images)[:2]


def push(count: int, channels: int) -> dict[str, Any]:
    """A push over so many images; beside it, the seconds that making the features takes."""
    torch.manual_seed(0)
    model, started = Model(channels), time.process_time()
    with torch.no_grad():
        for start in range(0, min(count, 100_000), BATCH):
            model.backbone(torch.arange(start, start + BATCH))
    making = (time.process_time() - started) / min(count, 100_000) * count
    before, started = peak(), time.process_time()
    loader = DataLoader(Numbers(count), batch_size=BATCH, shuffle=True)
    report = model.push_prototypes(loader, "cpu", momentum=0.0, unique="image")
    seconds = time.process_time() - started
    assert sum(report.patches_per_class) == count * CELLS
    return {
        "patches": count * CELLS, "channels": channels, "seconds": seconds, "of it making features": making,
        "million images in seconds": seconds / count * 1e6, "MB before": before, "peak MB": peak(),
    }  # fmt: skip


def listing(count: int, folder: Path) -> dict[str, Any]:
    """The samples of tar shards of 10,000 images, each with a label; and any of them found again and read."""
    pixel = io.BytesIO()
    Image.new("RGB", (1, 1)).save(pixel, "PNG")
    for shard in range(count // 10_000):
        with tarfile.open(folder / f"train-{shard:05d}.tar", "w") as tar:
            for number in range(10_000):
                for ending, data in ((".png", pixel.getvalue()), (".cls", str(number % CLASSES).encode())):
                    entry = tarfile.TarInfo(f"{number:06d}{ending}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
    before, started = peak(), time.process_time()
    catalog = load_catalog(str(folder))
    seconds = time.process_time() - started
    assert len(catalog.samples) == count
    some = np.random.default_rng(0).permutation(count)[:5000]
    opened = time.process_time()
    for place in some:
        read_image(catalog.samples[place].image)
    each = (time.process_time() - opened) / len(some)
    return {"seconds": seconds, "ms to read a 1 px image": each * 1e3, "MB before": before, "peak MB": peak()}


def reading(count: int, folder: Path) -> dict[str, Any]:
    """Milliseconds to read an image of 224 pixels (JPEG) from a folder, a tar and Parquet, in order and at random."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    random, jpegs = np.random.default_rng(0), list[bytes]()
    for _ in range(count):
        stream = io.BytesIO()
        small = Image.fromarray(random.integers(0, 255, (28, 28, 3), dtype=np.uint8))
        small.resize((224, 224), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
        jpegs.append(stream.getvalue())
    with tarfile.open(folder / "a.tar", "w") as tar:
        for number, data in enumerate(jpegs):
            (folder / f"{number:06d}.jpg").write_bytes(data)
            tar.add(folder / f"{number:06d}.jpg", f"{number:06d}.jpg")
    for rows in (1000, 10):
        pq.write_table(pa.table({"image": jpegs}), folder / f"{rows}.parquet", row_group_size=rows)
    places: dict[str, Callable[[int], Path]] = {
        "folder": lambda i: folder / f"{i:06d}.jpg",
        "tar": lambda i: folder / "a.tar" / f"{i:06d}.jpg",
        "Parquet, 1000 rows a group": lambda i: folder / "1000.parquet" / f"{i:06d}",
        "Parquet, 10 rows a group": lambda i: folder / "10.parquet" / f"{i:06d}",
    }
    found: dict[str, Any] = {}
    for name, place in places.items():
        orders = {"in order": range(count), "at random": random.permutation(count).tolist()[:500]}
        for how, order in orders.items():
            read_image(place(0))
            started = time.process_time()
            for i in order:
                read_image(place(i))
            found[f"{name}, {how}"] = (time.process_time() - started) / len(order) * 1e3
    transform, started = EvalTransform(Preprocessing(size=(224, 224))), time.process_time()
    for i in range(500):
        transform(read_image(places["tar"](i)))
    return found | {"tar, in order, with the transform": (time.process_time() - started) / 500 * 1e3}


class Made224(ImageDataset):
    """Samples whose image is their number."""

    def __init__(self, count: int) -> None:
        samples = [Sample(Path(f"{i}.png"), f"{i}.png", i % CLASSES, "train") for i in range(count)]
        super().__init__(samples, EvalTransform(Preprocessing(size=(224, 224))))

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        return torch.tensor(index), self.samples[index].label, index


def cache(count: int, channels: int, folder: Path) -> dict[str, Any]:
    """Bytes an image of the cache in each precision, by its shape and on the disk; the time to write and read them."""
    rows = {}
    for precision in PRECISIONS:
        place, images, backbone = folder / precision, Made224(count), Made(channels)
        started = time.process_time()
        stored = cache_features(backbone, images, [], place, batch_size=BATCH, precision=precision)
        writing, order = time.process_time() - started, np.random.default_rng(0).permutation(count)[:2000].tolist()
        started = time.process_time()
        for i in order:
            stored[i]
        each = (time.process_time() - started) / len(order)
        with torch.no_grad():
            exact = backbone(torch.tensor(order)).patches
        found = torch.stack([stored[i][0] for i in order]).float()
        cosines = nn.functional.cosine_similarity(found.double(), exact.double(), dim=-1)
        rows[precision] = {
            "bytes an image": Format(precision, (CELLS, channels)).size,
            "on the disk": sum(file.stat().st_size for file in place.rglob("*.npy")) / count,
            "seconds to write a million": writing / count * 1e6,
            "ms to read one at random": each * 1e3,
            "largest 1 - cosine of a patch": float(1 - cosines.min()),
        }
    return rows | {"channels": channels}


def peak() -> float:
    """The most memory that this process has had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def one(words: list[str]) -> None:
    """A measurement, printed as JSON."""
    torch.set_num_threads(1)
    what, count = words[0], int(words[1])
    with tempfile.TemporaryDirectory(dir=words[-1] if what != "push" else None) as name:
        found = {
            "push": lambda: push(count, int(words[2])),
            "listing": lambda: listing(count, Path(name)),
            "reading": lambda: reading(count, Path(name)),
            "cache": lambda: cache(count, int(words[2]), Path(name)),
        }[what]()
    print(json.dumps({"images": count} | found))


def main() -> None:
    """Measure all, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--scratch", default=tempfile.gettempdir(), help="a folder with 3 GB of room")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.one:
        one(options.one)
        return
    plan = {
        "listing": [["100000"], ["1000000"]],
        "reading": [["6000"]],
        "cache": [["8192", "64"], ["8192", "768"]],
        "push": [["100000", "64"], ["1000000", "64"], ["10000000", "16"]],
    }
    results: dict[str, list[dict[str, Any]]] = {}
    for what, rows in plan.items():
        for words in rows:
            command = [sys.executable, __file__, "--one", what, *words, options.scratch]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            row = json.loads(done.stdout.splitlines()[-1])
            print(what, json.dumps(row), flush=True)
            results.setdefault(what, []).append(row)
            save({"torch": torch.__version__, "threads": 1, "batch": BATCH, "classes": CLASSES} | results, options.out)


if __name__ == "__main__":
    main()
