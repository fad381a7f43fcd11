"""Shards of stored features: killed, shared, in each precision; each shard is computed once and is the same."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed, nn

from forked import Forked
from helpers import start_ranks
from protopush.backbones import Features
from protopush.data import feature_shards
from protopush.data.dataset import ImageDataset
from protopush.data.feature_shards import SHARD, Claims, Format, file_of
from protopush.data.features import CachedFeatures, cache_features, stored_features
from protopush.data.manifest import Sample
from protopush.data.regions import Regions
from protopush.data.transforms import EvalTransform, Preprocessing
from protopush.distributed import rank_and_size
from protopush.errors import InputError

CELLS, CHANNELS = 4, 8


class Made(nn.Module):
    """Features that depend on an image's number alone; each call is a line of a file, and may take a while."""

    def __init__(self, log: Path, seconds: float = 0.0, bad: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.log, self.seconds, self.bad = log, seconds, bad
        self.regions = Regions.grid((2, 2), (32, 32))

    def forward(self, numbers: torch.Tensor) -> Features:
        with self.log.open("a") as file:
            file.write(f"{os.getpid()} {' '.join(str(int(number)) for number in numbers)}\n")
        time.sleep(self.seconds)
        at = torch.arange(CELLS * CHANNELS).view(1, CELLS, CHANNELS)
        patches = torch.sin(numbers.view(-1, 1, 1) * 12.9898 + at * 78.233) * 3
        patches[torch.isin(numbers, torch.tensor(self.bad, dtype=numbers.dtype))] = torch.nan
        return Features(patches.mean(dim=1, keepdim=True), patches, self.regions)


class Numbers(ImageDataset):
    """Items whose image is their number."""

    def __init__(self, count: int) -> None:
        samples = [Sample(Path(f"{i}.png"), f"{i}.png", i % 3, "train") for i in range(count)]
        super().__init__(samples, EvalTransform(Preprocessing(size=(32, 32))))

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int, int]:
        return torch.tensor(float(index)), self.samples[index].label, index


COUNT = 6 * SHARD + 17  # seven shards, the last one short


def compute(folder: Path, log: Path, seconds: float = 0.0, **options: object) -> CachedFeatures:
    return cache_features(Made(log, seconds), Numbers(COUNT), ["x"], folder, batch_size=128, **options)


def computed(log: Path) -> list[int]:
    return [int(word) for line in log.read_text().splitlines() for word in line.split()[1:]]


def shards(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*/*")) if file.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A cache that was computed without an interruption."""
    root = tmp_path_factory.mktemp("whole")
    compute(root / "cache", root / "log")
    assert sorted(computed(root / "log")) == list(range(COUNT))
    return root / "cache"


def start(folder: Path, log: Path, seconds: float) -> Forked:
    """A process that computes the cache, with another one that reads."""
    code = f"import sys; sys.path[:] = {sys.path}; from pathlib import Path; import {__name__} as test; "
    code += f"test.compute(Path({str(folder)!r}), Path({str(log)!r}), {seconds}, num_workers=1)"
    return Forked(program=code)


def test_items_are_read_alone_from_their_shard(whole, tmp_path):
    found = compute(whole, tmp_path / "log")
    assert not (tmp_path / "log").exists()
    assert [*shards(whole)] == [*(f"{number:06d}.npy" for number in range(7)), "layout.json"]
    expected = Made(tmp_path / "other")(torch.arange(COUNT, dtype=torch.float32)).patches.half()
    for i in (0, 1, SHARD - 1, SHARD, 3 * SHARD + 5, COUNT - 1):
        patches, label, index = found[i]
        assert torch.equal(patches, expected[i])
        assert (label, index) == (i % 3, i)
    arrays = [np.load(file, mmap_mode="r") for file in sorted(found.folder.glob("*.npy"))]
    assert np.array_equal(np.concatenate(arrays), expected.numpy())
    assert found.regions == Made(tmp_path / "log").regions


def test_a_killed_computation_goes_on_with_its_whole_shards(whole, tmp_path):
    folder, log = tmp_path / "cache", tmp_path / "log"
    process = start(folder, log, 0.05)
    while not (there := list(folder.glob("*/*.npy"))) or len(there) < 2:
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(0.07)  # within the next shard
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = {int(file.stem) for file in folder.glob("*/*.npy")}
    assert 2 <= len(done) < 7
    assert list(folder.glob("*/.*.tmp"))
    inodes = {file: file.stat().st_ino for file in folder.glob("*/*.npy")}
    log.unlink()
    counts: list[int] = []
    compute(folder, log, advance=counts.append)
    again = computed(log)
    assert sorted(again) == [i for i in range(COUNT) if i // SHARD not in done]
    assert {file: file.stat().st_ino for file in inodes} == inodes
    assert sum(counts) == COUNT
    assert shards(folder) == shards(whole)  # also that nothing is left beside the shards


def test_two_processes_at_once_compute_each_shard_once(whole, tmp_path):
    folder, log = tmp_path / "cache", tmp_path / "log"
    processes = [start(folder, log, 0.03) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert sorted(computed(log)) == list(range(COUNT))
    shares = [[line for line in log.read_text().splitlines() if int(line.split()[0]) == p.pid] for p in processes]
    assert all(shares)
    assert shards(folder) == shards(whole)


def test_what_another_process_computes_is_waited_for(tmp_path):
    folder, log = tmp_path / "cache", tmp_path / "log"
    process = start(folder, log, 0.4)
    while not log.exists() or not log.read_text():
        time.sleep(0.02)
    place = next(folder.iterdir())
    for number in range(1, 7):  # all but the one that the other process has
        (place / f"{number:06d}.npy").write_bytes(b"")
    compute(folder, tmp_path / "own")
    assert not (tmp_path / "own").exists()
    assert (place / "000000.npy").stat().st_size
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def rank_main(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    assert rank_and_size() == (rank, world)
    compute(Path(folder) / "cache", Path(folder) / "log", 0.02)
    distributed.destroy_process_group()


@pytest.mark.ddp
def test_ranks_share_the_shards(whole, tmp_path):
    start_ranks(rank_main, 2, tmp_path)
    assert sorted(computed(tmp_path / "log")) == list(range(COUNT))
    assert len({line.split()[0] for line in (tmp_path / "log").read_text().splitlines()}) == 2
    assert shards(tmp_path / "cache") == shards(whole)


def test_shards_with_nan_are_not_kept_and_the_others_are(tmp_path):
    bad = (5, SHARD + 1, SHARD + 200, COUNT - 1)
    with pytest.raises(InputError, match=rf"in 4 samples: 5.png, {SHARD + 1}.png, {SHARD + 200}.png, {COUNT - 1}.png;"):
        cache_features(Made(tmp_path / "log", bad=bad), Numbers(COUNT), ["x"], tmp_path / "cache", batch_size=100)
    assert [file.stem for file in sorted(tmp_path.glob("cache/*/*.npy"))] == [f"{n:06d}" for n in (2, 3, 4, 5)]
    assert not list(tmp_path.glob("cache/*/.*"))
    (tmp_path / "log").unlink()
    compute(tmp_path / "cache", tmp_path / "log")
    assert {number // SHARD for number in computed(tmp_path / "log")} == {0, 1, 6}


def test_a_full_disk_is_refused_before_it_is_full(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": COUNT * CELLS * CHANNELS * 2 - 1})
    monkeypatch.setattr(feature_shards.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InputError, match=r"the features need 0.0 GiB but .* free; make room, choose .* float8, or off"):
        compute(tmp_path / "cache", tmp_path / "log")
    assert shards(tmp_path / "cache") == {}
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot make .*; choose another --trainer\.cache_dir"):
        compute(tmp_path / "file", tmp_path / "log")


class TestPrecisions:
    @pytest.mark.parametrize("shape", [(49, 64), (3, 4, 5)])
    def test_float8_is_right_to_a_sixteenth_and_float32_to_the_bit(self, tmp_path, shape):
        torch.manual_seed(3)
        outputs = torch.randn(64, *shape) * 10.0 ** torch.randint(-6, 6, (64, *[1] * len(shape)))
        outputs[7] = 0
        for precision, size in (("float32", 4), ("float16", 2), ("float8", 1)):
            form = Format(precision, shape)
            stored = outputs.clamp(-6e4, 6e4) if precision == "float16" else outputs
            data, finite = form.pack(stored)
            assert finite.all()
            assert len(data) == 64 * form.size == 64 * (outputs[0].numel() * size + (4 if precision == "float8" else 0))
            with (tmp_path / precision).open("wb") as file:
                form.write_header(file, 64)
                file.write(data)
            found = torch.stack([form.read(tmp_path / precision, i, 64) for i in range(64)]).float()
            assert np.load(tmp_path / precision, mmap_mode="r").shape[0] == 64
            if precision == "float32":
                assert torch.equal(found, outputs)
            elif precision == "float8":
                largest = outputs.abs().flatten(1).amax(dim=1).view(-1, *[1] * len(shape))
                # 3 bits behind the point: half a step is 1/16; below 2^-6 steps are even, 2^-10 of 448 at most.
                assert ((found - outputs).abs() <= outputs.abs() / 16 + largest / 448 * 2.0**-10 + 1e-30).all()
                cosine = nn.functional.cosine_similarity(found, outputs, dim=-1)
                assert shape != (49, 64) or float(cosine[:7].min()) > 0.998

    def test_infinite_values_are_found_in_each(self):
        outputs = torch.ones(4, 2, 3)
        outputs[1, 0, 0], outputs[2, 1, 1] = torch.nan, torch.inf
        for precision in ("float32", "float16", "float8"):
            assert Format(precision, (2, 3)).pack(outputs)[1].tolist() == [True, False, False, True]
        assert Format("float16", (2, 3)).pack(outputs * 1e5)[1].tolist() == [False] * 4  # beyond its range

    def test_views_and_float8_through_the_cache(self, tmp_path):
        class Turned(Made):
            name, recipe, layout = "turned", None, ""

            def forward(self, images: torch.Tensor) -> Features:
                patches = images.mean(dim=1).flatten(1).view(len(images), CELLS, -1)
                return Features(patches.mean(dim=1, keepdim=True), patches, self.regions)

        class Pixels(Numbers):
            def __getitem__(self, index: int) -> tuple[torch.Tensor, int, int]:
                return torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(index)), 0, index

        images, backbone = Pixels(SHARD + 3), Turned(tmp_path / "log")
        found = cache_features(backbone, images, ["x"], tmp_path, views=4, precision="float8")
        assert found[0][0].dtype == torch.float32
        for i in (0, SHARD - 1, SHARD + 2):
            pixels = images[i][0].unsqueeze(0)
            four = [pixels, pixels.flip(-1), pixels.flip(-2), pixels.flip(-1, -2)]
            expected = torch.stack([backbone(one).patches[0] for one in four])
            stored = torch.stack([found.patches(i, view) for view in range(4)])
            assert min((one - stored[0]).abs().max() for one in expected) < 0.15
            assert {int((expected - one).abs().amax(dim=(1, 2)).argmin()) for one in stored} == {0, 1, 2, 3}
        assert torch.equal(found.eval_view()[5][0], found.patches(5, 0))
        assert len({tuple(found[5][0].flatten().tolist()) for _ in range(50)}) == 4


def test_a_claim_of_a_dead_process_is_free(tmp_path):
    claims = Claims(tmp_path, [0], 10, 4)
    assert claims.claim(0)
    assert not Claims(tmp_path, [0], 10, 4).claim(0)
    claims.release(0)
    with Claims(tmp_path, [0], 10, 4) as other:
        assert [list(batch) for batch in other] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    file_of(tmp_path, 0).touch()
    assert not claims.claim(0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000.npy"]


def test_features_of_other_images_are_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("PROTOPUSH_CACHE", str(tmp_path))
    assert stored_features(Made(tmp_path / "log"), Numbers(3)) is None  # no such files
