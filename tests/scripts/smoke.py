"""Smoke test of an installed protopush: made images, a random ResNet, each command once, as a user would call it.

    python smoke.py FOLDER             train, push, evaluate, explain, report, verify, predict, compare, in FOLDER
    python smoke.py FOLDER app export  what these extras are for, on the run in FOLDER/run
    python smoke.py FOLDER --together  the first, with the commands in one process: most are quicker than their imports

It needs protopush alone and runs it with the interpreter that runs this. The first command that fails ends it with
what that printed and exit code 1; so does a deprecation warning that is about protopush's own code.
"""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from urllib.request import urlopen

CLASSES = ("bird", "cat", "dog")
MODEL = [
    "--model.backbone", "test_resnet", "--model.pretrained", "false", "--model.num_prototypes", "2",
    "--train.epochs", "2", "--train.batch_size", "8", "--trainer.device", "cpu", "--data.path", "images",
]  # fmt: skip
TOGETHER = "--together" in sys.argv
OURS = re.compile(r"protopush[/\\][\w/\\]+\.py:\d+: \w*(?:Deprecation|Future)Warning.*")


def make_images(folder: Path) -> None:
    """JPEG images whose mean colour is their class's."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    for number, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for index in range(10):
            pixels = random.integers(0, 60, (96, 120, 3))
            pixels[..., number] += 120
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{index}.jpg")


def python(*words: str) -> str:
    """The output of a command of this interpreter; ends the test where it fails."""
    environment = {**os.environ, "PYTHONWARNINGS": "default", "PROTOPUSH_CACHE": "cache", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment, check=False)
    own = OURS.findall(done.stderr)
    if done.returncode or own:
        sys.exit(f"FAILED ({done.returncode}): {' '.join(words)}\n{done.stdout}\n{done.stderr}\n" + "\n".join(own))
    return done.stdout


def protopush(*words: str) -> str:
    """The output of a command of protopush."""
    if not TOGETHER:
        return python("-m", "protopush", *words)
    from protopush.cli import main

    with redirect_stdout(io.StringIO()) as out:
        code = main(list(words))
    expect(code == 0, f"exit code {code} of {' '.join(words)}")
    return out.getvalue()


def expect(holds: object, what: str) -> None:
    """End the test where something does not hold (an assert would be gone under -O)."""
    if not holds:
        sys.exit(f"FAILED: {what}")


def core() -> None:
    """All commands that need no extra."""
    make_images(Path("images"))
    expect(re.fullmatch(r"protopush \S+\s+", python("-m", "protopush", "--version")), "protopush --version")
    if not TOGETHER:
        import_orders()
    protopush("train", *MODEL, "--out", "run")
    protopush("train", *MODEL, "--out", "live", "--push.anchoring", "live", "--train.freeze_backbone", "false")
    protopush("push", "run", "--momentum", "0", "--unique", "image", "--out", "pushed", "--json")
    for run in ("run", "live", "pushed"):
        expect(json.loads(protopush("verify", run, "--json"))["holds"], f"anchors of {run}")
    accuracy = json.loads(protopush("evaluate", "run", "--json"))["accuracy"]
    expect(accuracy == 1, f"accuracy {accuracy} on images of one colour a class")
    protopush("explain", "run", "images/cat/0.jpg", "--why_not", "dog", "--out", "explained")
    protopush("report", "run", "--resamples", "50", "--faithfulness", "2")
    protopush("predict", "run", "images", "--out", "predictions.csv")
    protopush("compare", "run", "live", "--resamples", "0", "--faithfulness", "0")
    expect(len(Path("predictions.csv").read_text().splitlines()) == 31, "a row for each of 30 images")
    for file in ("explained/0.png", "explained/0-why-not.png", "run/report.html", "run/prototypes.png"):
        expect(Path(file).stat().st_size > 1000, f"{file} is written")
    missing_extras()


def import_orders() -> None:
    """Whichever of protopush and torchvision comes first, if torchvision can be imported at all."""
    if subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True, check=False).returncode == 0:
        for first, second in (("protopush", "torchvision"), ("torchvision", "protopush")):
            python("-c", f"import {first}, {second}; protopush.ProtoModel; import timm")


def missing_extras() -> None:
    """A command whose extra is not installed says which one is."""
    from importlib.util import find_spec

    for extra, module, words in (
        ("app", "gradio", ["app", "run"]),
        ("app", "gradio", ["serve", "run"]),
        ("export", "onnxscript", ["export", "run"]),
        ("demo", "elpv_dataset", ["demo", "--out", "demo"]),
        ("hf", "transformers", ["train", *MODEL, "--model.backbone", "hf:x/y", "--out", "hf"]),
    ):
        if find_spec(module) is None:
            command = [sys.executable, "-m", "protopush", *words]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            advice = f"protopush[{extra}]"
            expect(done.returncode == 2 and advice in done.stderr, f"{words[0]} names {advice}: {done.stderr}")


def app() -> None:
    """The review app answers with its page and ends when it is asked to."""
    command = [sys.executable, "-m", "protopush", "app", "run", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            lines = iter(process.stdout or ())
            found = (
                re.search(r"Review app: (http://\S+)", line) for line in lines
            )  # gradio 6.0 prints a line of its own
            address = next(filter(None, found), None)
            expect(address, "the app says where it is")
            with urlopen(address[1], timeout=60) as answer:  # type: ignore[index]
                expect(answer.status == 200 and b"gradio" in answer.read(), "the app's page")
        finally:
            process.terminate()
            process.wait(60)


def demo() -> None:
    """The demo, for two epochs, without the report's slow part."""
    protopush("demo", "--train.epochs", "2", "--out", "demo")
    expect(json.loads(protopush("verify", "demo", "--json"))["holds"], "anchors of the demo")


def docs() -> None:
    """The packages of the guide."""
    python("-c", "import mkdocs, material, mkdocstrings_handlers.python")
    python("-m", "mkdocs", "--version")


def export() -> None:
    """An ONNX file that computes what the run does."""
    protopush("export", "run", "--out", "run.onnx")


def hf() -> None:
    """A backbone of transformers, from a folder."""
    python(
        "-c",
        "import torch\nfrom protopush import create_backbone\n"
        "from protopush._compat import ensure_torchvision; ensure_torchvision()\n"
        "import transformers\n"
        "config = transformers.ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, "
        "intermediate_size=64, image_size=64, patch_size=16)\n"
        "transformers.ViTModel(config).save_pretrained('vit')\n"
        "assert create_backbone('hf:vit', size=(64, 64))(torch.zeros(1, 3, 64, 64)).regions.raster == (4, 4)\n",
    )


def lightning() -> None:
    """The callback, with the package that it is a callback of."""
    python(
        "-c",
        "from protopush.integrations.lightning import PushCallback; from protopush import PushSchedule\n"
        "import lightning.pytorch as L\n"
        "assert issubclass(PushCallback, L.Callback)\n",
    )


def track() -> None:
    """Numbers for TensorBoard and, offline, for W&B."""
    os.environ["WANDB_MODE"] = "offline"
    protopush("train", *MODEL, "--out", "tracked", "--overwrite", "--trainer.track", '["tensorboard","wandb"]')
    expect(list(Path("tracked").rglob("events.out.tfevents.*")), "events of TensorBoard")


EXTRAS: dict[str, Callable[[], None]] = {
    "app": app, "demo": demo, "docs": docs, "export": export, "hf": hf, "lightning": lightning, "track": track,
}  # fmt: skip


def main() -> None:
    """Run what the words ask for and print how long each took."""
    folder, extras = Path(sys.argv[1]), [word for word in sys.argv[2:] if word != "--together"]
    if TOGETHER:
        for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
            warnings.filterwarnings("error", category=category, module="protopush")
        os.environ |= {"PROTOPUSH_CACHE": "cache", "HF_HUB_OFFLINE": "1"}
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    for name, step in [("core", core)] if not extras else [(name, EXTRAS[name]) for name in extras]:
        started = time.perf_counter()
        step()
        print(f"{name} {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
