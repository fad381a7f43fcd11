"""Kill a training run at random moments, resume it each time, and compare it with one that was left alone.

    python tests/scripts/kill_twenty.py --kills 20 --seed 0

Prints a line per kill and exits with 1 if the last weights or the lines of metrics.jsonl differ.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import load_file

OPTIONS = shlex.split("""
--model.backbone test_resnet --model.pretrained false --model.num_prototypes 2 --train.epochs 40
--train.freeze_backbone false --train.head_epochs 4 --train.batch_size 8 --train.ema 0.9 --train.accumulate 2
--data.num_workers 1 --data.auto_augment rand-m9-mstd0.5-inc1 --push.start_epoch 2 --push.interval 2 --push.unique image
--push.anchoring live --trainer.device cpu""")


def make_images(root: Path) -> None:
    """Noise whose mean colour tells the class."""
    noise = np.random.default_rng(0)
    for number, name in enumerate(("bird", "cat", "dog")):
        (root / name).mkdir(parents=True)
        for index in range(14):
            pixels = noise.integers(0, 150, (32, 40, 3))
            pixels[..., number] += 60
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{index}.png")


def start(root: Path, name: str) -> subprocess.Popen[bytes]:
    """The training, in a process group of its own, so that its workers die with it."""
    command = [sys.executable, "-m", "protopush", "train", "--data.path", str(root / "images"), *OPTIONS]
    environment = os.environ | {"PROTOPUSH_CACHE": str(root / "cache"), "OMP_NUM_THREADS": "1"}
    with (root / f"{name}.log").open("ab") as log:
        return subprocess.Popen(
            [*command, "--out", str(root / name), "--resume"], env=environment, stderr=log, stdout=log,
            start_new_session=True,
        )  # fmt: skip


def rows(run: Path) -> list[dict[str, object]]:
    """The lines of metrics.jsonl without what the clock says."""
    text = re.sub(r'"(images_per_second|seconds)": [\d.e+-]+', r'"\1": 0', (run / "metrics.jsonl").read_text())
    return [json.loads(line) for line in text.splitlines()]


def epochs_done(run: Path) -> int:
    """Whole lines of epochs so far."""
    file = run / "metrics.jsonl"
    return file.read_text().count('"epoch"') if file.is_file() else 0


def main() -> int:
    """Train once undisturbed, once with kills, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_images(root / "images")
        process, times = start(root, "whole"), list[float]()
        began = time.monotonic()
        while process.poll() is None:
            time.sleep(0.01)
            times += [time.monotonic() - began] * (epochs_done(root / "whole") - len(times))
        if process.wait() != 0:
            print((root / "whole.log").read_text()[-2000:])
            return 1
        print(f"undisturbed: {len(times)} epochs in {times[-1]:.1f} s, the first in {times[0]:.1f} s", flush=True)
        longest = times[0] + (times[-1] - times[0]) / 8  # a few epochs from where it goes on
        killed, kills = root / "killed", 0
        while kills < options.kills:
            process, delay = start(root, "killed"), chance.uniform(0, longest)
            try:
                process.wait(timeout=delay)
                break
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                kills += 1
                print(f"kill {kills}: after {delay:.1f} s, {epochs_done(killed)} epochs", flush=True)
        else:
            process = start(root, "killed")
        if process.wait() != 0:
            print((root / "killed.log").read_text()[-2000:])
            return 1
        same = compare(root / "whole", killed)
        if kills < options.kills:
            print(f"the run came to its end after {kills} kills; give it more epochs")
        return 0 if same and kills == options.kills else 1


def compare(whole: Path, killed: Path) -> bool:
    """Whether two runs are the same."""
    weights, others = (load_file(run / "model.safetensors") for run in (whole, killed))
    apart = max(float(np.abs(weights[name].astype(float) - others[name]).max()) for name in weights)
    same = rows(whole) == rows(killed)
    print(f"largest difference of a weight: {apart:g}; same lines of metrics.jsonl: {same}")
    return same and apart <= 1e-6 and weights.keys() == others.keys()


if __name__ == "__main__":
    sys.exit(main())
