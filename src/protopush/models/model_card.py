"""Model card: what a model is, what it is worth, what its prototypes stand for, and what it is not."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCardData

from protopush import __version__
from protopush.data.files import read_rows
from protopush.metrics.glossary import metric_name, metric_text
from protopush.nn.priors import prior_in_words

if TYPE_CHECKING:
    from protopush.models.model import ProtoModel
    from protopush.nn.prototypes import PrototypeManager

MARK = "<!-- written by protopush; remove this line and the text is yours: it won't be written again -->"
SHOWN = ("accuracy", "balanced_accuracy", "macro_f1", "auroc", "ece")


def card(model: ProtoModel, metrics: Path | None = None) -> str:
    """A model card in Markdown, with YAML before it; ``metrics`` is the ``metrics.jsonl`` of this very model.

    Names are escaped: a class or a file may be called anything. The licence is left to whoever shares the model.
    """
    manager = model.head.proto_manager
    names = class_names_of(model)
    front = ModelCardData(
        library_name="protopush",
        pipeline_tag="image-classification",
        tags=["protopush", "prototypes", "interpretability", "explainable-ai"],
    ).to_yaml()
    parts = [
        f"---\n{front}\n---\n{MARK}",
        f"# {escaped(model.backbone.name)} with prototypes of {len(names)} classes",
        _what_it_is(model),
        *_numbers(metrics),
        "## Classes\n\n" + "\n".join(f"{number}. {escaped(name)}" for number, name in enumerate(names)),
        "## Prototypes\n\n" + _prototypes(manager, names),
        USE,
        LIMITS,
    ]
    return "\n\n".join(parts) + "\n"


def class_names_of(model: ProtoModel) -> list[str]:
    """The names of a model's classes, or their numbers."""
    return list(model.class_names) or [f"class {c}" for c in range(model.head.proto_manager.num_classes)]


def escaped(text: object) -> str:
    """Text that Markdown shows as it is, on one line.

    Example:
        >>> print(escaped("a|b_<i>[x](y)"))
        a\\|b\\_\\<i\\>\\[x\\]\\(y\\)
    """
    return re.sub(r"([\\`*_{}\[\]<>()#+\-.!|~&$^=:@])", r"\\\1", " ".join(str(text).split()))


def _what_it_is(model: ProtoModel) -> str:
    height, width = model.backbone.preprocessing.size
    count = len(model.backbone.regions)
    parts = f"each of {count} parts of a picture" if model.head.match == "local" else "a picture as a whole"
    prototypes, names = len(model.head.proto_manager.used_slots()), list(map(escaped, class_names_of(model)))
    prior = prior_in_words(model.prior, model.train_shares, names)
    return (
        f"An image classifier made with protopush {__version__}. It compares {parts} ({width} x {height} pixels) with "
        f"{prototypes} prototypes; each prototype belongs to one class, and the logit of a class is exactly "
        "the sum of what its prototypes contribute, plus a bias. A prototype that was pushed stands for a real patch "
        f"of a real training image, listed below. {prior}\n\n**A research model, not a medical device.**"
    )


def _numbers(metrics: Path | None) -> Iterator[str]:
    measured = _last_validation(metrics) if metrics is not None else None
    if measured:
        named = {"images": measured.get("n")} | {metric_name(key): measured.get(key) for key in SHOWN}
        rows = [f"| {name} | {metric_text(value)} |" for name, value in named.items() if value is not None]
        table = "\n".join(["| on the validation images | |", "| --- | --- |", *rows])
        yield f"## Numbers\n\n{table}\n\nThese images chose the best epoch: on others the model is likely to be worse."


def _last_validation(metrics: Path) -> dict[str, Any] | None:
    """The last recorded metrics of validation images."""
    for row in reversed(read_rows(metrics, skip_damaged=True)):
        for key in ("val_prior", "val_refitted", "val_after", "val"):
            if isinstance(row.get(key), dict):
                return dict(row[key])
    return None


def _prototypes(manager: PrototypeManager, names: list[str]) -> str:
    rows = [
        "| class | prototype | training image | box (x0, y0, x1, y1) | similarity |",
        "| --- | --- | --- | --- | --- |",
    ]
    for c, k in manager.used_slots():
        anchor = manager.anchor(c, k)
        cells = ["never pushed", "", ""]
        if anchor is not None:
            file = anchor.file if anchor.file is not None else f"sample {anchor.sample_id}"
            box = ", ".join(map(str, anchor.box)) if anchor.box is not None else f"cell {anchor.cell}"
            cells = [escaped(file), box, f"{anchor.similarity_after:.4f}"]
        rows.append(f"| {escaped(names[c])} | {k} | {' | '.join(cells)} |")
    return (
        "\n".join(rows)
        + "\n\n`prototypes.json` has their SHA-256; `prototypes/` their pictures, where they are shared."
    )


USE = """## How to use it

```python
import protopush
from huggingface_hub import snapshot_download
from protopush.explain import explain_image

run = protopush.open_run(snapshot_download("NAME/OF-THIS-REPOSITORY"))  # or the folder
found = explain_image(run.model, "photo.jpg", run.transform, run.class_names)
print(found.predicted_name, found.probability)
for match in found.classes[0].matches[:3]:
    print(match.contribution, match.box, match.anchor)
```

`protopush.ProtoModel.from_pretrained("NAME/OF-THIS-REPOSITORY")` is the model alone. Nothing is unpickled."""

LIMITS = """## Limits

- A research model, not a medical device: it must not be used to diagnose or treat anybody.
- It was measured on images like those that it was trained on, if at all; other cameras, clinics or
  populations are another matter.
- A prototype shows what the model compares with, not that the comparison is right.
- Where you use it, classes may have other shares than those that the probabilities assume.
- The licence of the training images may restrict what may be done with the model and the pictures."""
