"""Candidates that a run keeps answer as a full read does, and say where they do not reach."""

from __future__ import annotations

import csv
import json
import random
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from helpers import anchors, contents, refused
from protopush import InputError, ProtoModel, create_backbone
from protopush.cli import main
from protopush.data.dataset import ImageDataset
from protopush.data.manifest import DataConfig
from protopush.data.transforms import EvalTransform
from protopush.explain.neighbours import find_neighbours
from protopush.models.model_folder import Run, save_run
from protopush.runs import outcome
from protopush.runs.candidates import FILE, KeptCandidates, candidates_for, keep_candidates, load_candidates
from protopush.runs.decisions import in_force, load_decisions
from protopush.runs.outcome import Care, keep_shares
from protopush.runs.review import Wish, forbid
from protopush.runs.run import open_run
from protopush.runs.split_record import open_catalog
from protopush.runs.undo import undo
from test_forbid import forbid as forbid_by_command

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def home(masked_home) -> Path:
    return masked_home


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PROTOPUSH_CACHE", str(tmp_path / "cache"))


class Made(nn.Module):
    """Features of a picture's own pixels: four patches of 4x4 pixels, each times a random matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 4, stride=4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.patches(images).tanh()


def made_run(root: Path, seed: int) -> Run:
    """A run of made features, pushed onto its images, with few candidates; its images lie in ``root/images``."""
    choose = np.random.default_rng(seed)
    classes, rows = ["a", "b", "c"], []
    (root / "images").mkdir(parents=True)
    for number in range(int(choose.integers(14, 40))):
        pixels = choose.integers(0, 255, (8, 8, 3), dtype=np.uint8)
        if number and choose.random() < 0.15:
            pixels = np.asarray(Image.open(root / rows[-1][0]))  # a tie
        name = f"images/{number:02d}.png"
        Image.fromarray(pixels).save(root / name)
        split = "train" if number < 9 or choose.random() < 0.7 else "val"
        rows.append((name, classes[number % 3 if number < 9 else int(choose.integers(3))], split))
    with (root / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "label", "split"), *rows])
    torch.manual_seed(seed)
    backbone = create_backbone(Made(), size=(8, 8))
    live = bool(choose.random() < 0.5)
    model = ProtoModel.create(
        backbone, 3, num_prototypes=int(choose.integers(1, 4)), embed_dim=6, anchoring="live" if live else "off",
        top_patches=int(choose.integers(1, 3)),
    ).eval()  # fmt: skip
    folder = root / "run"
    folder.mkdir()
    unique = str(choose.choice(["none", "patch", "image"]))
    (folder / "config.yaml").write_text(yaml.safe_dump({"push": {"unique": unique}}))
    data = {"path": str(root / "manifest.csv"), "source": "manifest", "split_seed": 0, "max_megapixels": 100.0}
    run = Run(model, classes, EvalTransform(backbone.preprocessing), root, data, folder)
    train = train_of(run)
    model.push_prototypes(torch.utils.data.DataLoader(train, 4), "cpu", momentum=0.0, unique=unique)
    save_run(run)
    keep_candidates(run, train, None, CPU, 0, most=int(choose.integers(1, 9)))
    return run


def opened(run: Run) -> Run:
    """As it is on disk now: its backbone is a module of the test's own."""
    return replace(open_run(run.folder, backbone=run.model.backbone.model), data=run.data)


def _plain(made) -> dict:
    """A decision without its time."""
    dry = isinstance(made, tuple)
    return {**(made[0] if dry else made).to_dict(), "time": None, "dry": dry}


def train_of(run: Run) -> ImageDataset:
    return ImageDataset(open_catalog(DataConfig(**run.data), run.class_names, run.folder).split("train"), run.transform)


def state_of(run: Run) -> tuple[list, torch.Tensor]:
    return list(run.head.proto_manager.anchors), run.head.prototypes().detach()


def whole_reads(patch: pytest.MonkeyPatch) -> None:
    """No candidates: every decision reads the images of the class, as if there were no such thing."""
    patch.setattr(KeptCandidates, "bounds", lambda *_: None)


def decide(run: Run, choose: random.Random, holding: list[int]):
    """A random decision; what it was, or the words of its refusal."""
    used = run.head.proto_manager.used_slots()
    c, k = choose.choice(used)
    what, care = choose.random(), Care(dry_run=choose.random() < 0.2)
    try:
        if holding and what < 0.3:
            return undo(run, choose.choice(holding), run.data, CPU, "why")
        image = run.head.proto_manager.anchor(c, k).file
        wish = {"image": image} if what < 0.5 else {"prototype": f"{run.class_names[c]}:{k}"}
        before = state_of(run) if care.dry_run else None
        made = forbid(run, Wish(reason="why", **wish), run.data, CPU, care=care)
        if before is not None:  # a dry run changes the model that it was given, never the folder
            for slot, one in ((one.slot, one) for one in made.replaced):
                run.head.proto_manager.set_anchor(*slot, one.old)
            return made, "dry"
        return made
    except InputError as error:
        return str(error)


@pytest.mark.parametrize("seed", [*range(4), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(4, 50))])
def test_decisions_and_neighbours_are_those_of_a_full_read(tmp_path, monkeypatch, seed):
    """Random runs, with ties, few candidates and every rule; the same decisions with and without candidates."""
    run = made_run(tmp_path / "few", seed)
    shutil.copytree(tmp_path / "few" / "run", tmp_path / "whole")
    whole = replace(run, folder=tmp_path / "whole")
    counted = Counter()
    for step in range(6):
        found = []
        for one, full in ((run, False), (whole, True)):
            reopened = opened(one)
            with monkeypatch.context() as patch:
                if full:
                    whole_reads(patch)
                choose = random.Random(1000 * seed + step)
                holding = [made.id for made in in_force(load_decisions(reopened.folder))]
                said = decide(reopened, choose, holding)
            found.append((said if isinstance(said, str) else _plain(said), *state_of(opened(one))))
        (said, anchored, vectors), (other, other_anchored, other_vectors) = found
        assert said == other
        counted[type(said).__name__] += 1
        assert anchored == other_anchored
        torch.testing.assert_close(vectors, other_vectors, atol=1e-6, rtol=0)
        now, train = opened(run), train_of(run)
        kept = load_candidates(now, train)
        known = kept.neighbours(now.model, train)
        if known is not None:
            assert known == find_neighbours(now.model, train, own=3, others=2)
            counted["neighbours"] += 1
    assert counted["dict"] + counted["str"] == 6


def decided(capsys, run: Path, *words: object) -> tuple[dict, str]:
    """A decision by command, and what is logged."""
    given = ["forbid", run, *words, "--reason", "why", "--json", "--device", "cpu", "--data.num_workers", "0"]
    capsys.readouterr()
    assert main([str(word) for word in given]) == 0
    out, err = capsys.readouterr()
    return json.loads(out), err


def test_a_second_decision_about_a_prototype_ranks_its_class_again_and_keeps_that(run, capsys):
    first = load_file(run / FILE)
    _, log = decided(capsys, run, "--prototype", "cat:1")
    assert "images settle it; the others cannot win" in log
    assert "No candidates" not in log
    assert torch.equal(load_file(run / FILE)["vectors"], first["vectors"])
    _, log = decided(capsys, run, "--prototype", "cat:1")
    assert "No candidates are kept for cat:1 as it is now: 6 images are read" in log
    again = load_file(run / FILE)
    assert (again["vectors"] != first["vectors"]).any(dim=2).nonzero().tolist() == [[1, 1]]
    assert again["others.similarities"][:, 1, 1].isnan().all()
    assert not again["others.similarities"][:, 1, 0].isnan().any()
    assert main(["verify", str(run)]) == 0


@pytest.mark.parametrize("damage", ["gone", "cut off", "other weights"])
def test_candidates_that_do_not_hold_are_left_aside(run, tmp_path, capsys, damage):
    good, _ = decided(capsys, Path(shutil.copytree(run, tmp_path / "whole")), "--prototype", "cat:1")
    file = run / FILE
    if damage == "gone":
        file.unlink()
    elif damage == "cut off":
        file.write_bytes(file.read_bytes()[:200])
    else:
        tensors = load_file(file)
        tensors["own.similarities"] -= 0.5  # would be seen as too low
        save_file(tensors, file, {"valid_for": damage, "names": "[]", "regions": "{}", "error": "0"})
    found, log = decided(capsys, run, "--prototype", "cat:1")
    assert found["replaced"] == good["replaced"]
    assert "No candidates are kept for cat:1" in log
    assert ("is left aside" in log) == (damage == "cut off")


def test_images_that_were_added_to_training_make_candidates_hold_no_more(tmp_path):
    run = made_run(tmp_path, 3)
    train = train_of(run)
    keep_candidates(run, train, None, CPU, 0)
    assert load_candidates(run, train) is not None
    fewer = ImageDataset(train.samples[1:], train.eval_transform)
    other_label = ImageDataset(
        [replace(train.samples[0], label=2 - train.samples[0].label), *train.samples[1:]], run.transform
    )
    turned = ImageDataset(train.samples[::-1], train.eval_transform)  # the same images in another order
    assert load_candidates(run, fewer) is None
    assert train.samples[0].label == 1 or load_candidates(run, other_label) is None
    assert load_candidates(run, turned).neighbours(run.model, turned) is not None
    with torch.no_grad():
        run.head.proj[0].weight.add_(1e-3)
    assert load_candidates(run, train) is None


@pytest.mark.parametrize("seed", range(4))
def test_a_class_without_images_is_asked_nothing(tmp_path, seed):
    run = made_run(tmp_path, seed)
    manager, train, slots = run.head.proto_manager, train_of(run), run.head.proto_manager.used_slots()
    few = ImageDataset([sample for sample in train.samples if sample.label], train.eval_transform)

    def allow(ids, regions):
        assert len(ids)
        return torch.ones(len(ids), len(regions), dtype=torch.bool)

    bounds = candidates_for(run, few, slots, CPU, 0).bounds(slots, allow)
    assert bounds.rest[0].isneginf().all()
    assert bounds.similarity[:, 0].isneginf().all()
    assert bounds.similarity[0, 1, 0] > -1
    with torch.no_grad():
        for vectors in (manager.prototypes, manager.anchor_features):
            if vectors is not None:
                vectors[0] += 1.0
    moved = candidates_for(run, few, [(0, 0)], CPU, 0)  # ranked again, over no image
    assert moved.ranked.regions == run.model.backbone.regions
    assert moved.bounds(slots, allow).similarity[:, 1:].equal(bounds.similarity[:, 1:])


def test_a_dry_run_says_what_would_be_and_writes_nothing(run, capsys):
    before = contents(run)
    would = forbid_by_command(capsys, run, "--prototype", "cat:1", "--dry_run")
    assert contents(run) == before
    assert would.pop("dry_run") is True
    made = forbid_by_command(capsys, run, "--prototype", "cat:1")
    assert {**made, "time": would["time"]} == would
    back = forbid_by_command(capsys, run, "--undo", "1", "--dry_run")
    assert back["replaced"][0]["new"] == made["replaced"][0]["old"]
    assert len(load_decisions(run)) == 1
    assert main(["forbid", str(run), "--prototype", "dog:0", "--reason", "x", "--dry_run", "--device", "cpu"]) == 0
    assert "Nothing was written; leave --dry_run out" in capsys.readouterr().out


@pytest.mark.parametrize("seed", range(4))
def test_the_answers_that_change_are_named(tmp_path, seed):
    """Image by image, with the models alone."""
    run, changed = made_run(tmp_path, seed), 0
    val = open_catalog(DataConfig(**run.data), run.class_names, run.folder).split("val")
    for c, k in run.head.proto_manager.used_slots():
        before, wish = opened(run), Wish(prototype=f"{run.class_names[c]}:{k}", reason="why")
        made, expected = forbid(opened(run), wish, run.data, CPU), []
        after, right = opened(run), [0, 0]
        for sample in val:
            image = ImageDataset([sample], run.transform)[0][0][None]
            with torch.no_grad():
                old, new = (int(one.model(image).logits.argmax()) for one in (before, after))
            right = [count + (said == sample.label) for count, said in zip(right, (old, new), strict=True)]
            if old != new:
                expected.append((sample.name, *(run.class_names[i] for i in (sample.label, old, new))))
        assert [(flip.file, flip.label, flip.before, flip.after) for flip in made.flips] == expected
        if expected:
            assert f"{len(expected)} of them get another answer ({right[1] - right[0]:+d} right)" in made.effect
        changed += len(expected)
    assert changed


def test_accuracy_is_kept_within_the_budget_where_an_anchor_can(run, capsys):
    plain = forbid_by_command(capsys, run, "--prototype", "cat:1", "--dry_run")
    kept = forbid_by_command(capsys, run, "--prototype", "cat:1", "--dry_run", "--keep_accuracy", "0.0")
    loose = forbid_by_command(capsys, run, "--prototype", "cat:1", "--dry_run", "--keep_accuracy", "0.99")
    assert loose["replaced"] == plain["replaced"]  # nothing to keep: the nearest

    def fall(made: dict) -> float:
        names = ("balanced_accuracy", "auroc")
        return max(made["val_before"][name] - made["val_after"][name] for name in names)

    assert fall(kept) <= fall(plain)


def test_biases_that_were_moved_go_back_with_an_undo(run, home, capsys, monkeypatch):
    """Whatever is found, with biases: the fall is made to be too large without them."""
    falls = iter([1.0, 0.0])
    monkeypatch.setattr(outcome, "fall", lambda _: next(falls))
    monkeypatch.setattr(outcome, "keep_shares", lambda before, after: torch.tensor([0.1, -0.3, 0.2]))
    made = forbid_by_command(capsys, run, "--prototype", "cat:1", "--keep_accuracy", "0.0")
    old, new = (open_run(folder).head.bias for folder in (home / "run", run))
    assert made["biases"] == {name: [float(old[c]), float(new[c])] for c, name in enumerate(("bird", "cat", "dog"))}
    torch.testing.assert_close(new - old, torch.tensor([0.1, -0.3, 0.2]))
    forbid_by_command(capsys, run, "--undo", "1")
    assert torch.equal(open_run(run).head.bias, old)
    assert main(["verify", str(run)]) == 0


def test_where_none_keeps_to_it_the_smallest_fall_is_taken(run, capsys, monkeypatch):
    seen: list[tuple[float, str]] = []

    def fall(made) -> float:
        seen.append((0.5 - 0.1 * (len(seen) == 4), made.replaced[0].new.file))
        return seen[-1][0]

    monkeypatch.setattr(outcome, "fall", fall)
    made = forbid_by_command(capsys, run, "--image", anchors(run)["cat", 1]["file"], "--keep_accuracy", "0.0")
    files = [file for _, file in seen]
    assert len(dict.fromkeys(files)) == len(files) // 2  # another image each, without and with biases
    assert made["replaced"][0]["new"]["file"] == files[4]
    assert anchors(run)["cat", made["replaced"][0]["prototype"]]["file"] == files[4]
    assert main(["verify", str(run)]) == 0


@pytest.mark.parametrize("seed", range(5))
def test_classes_are_as_probable_as_before(seed):
    random = torch.Generator().manual_seed(seed)
    before, after = (3 * torch.randn(40, 4, generator=random) for _ in range(2))
    after += torch.tensor([2.0, 0.0, -1.0, 0.0])
    shift = keep_shares(before, after)
    torch.testing.assert_close((after + shift).softmax(1).mean(0), before.softmax(1).mean(0), atol=1e-4, rtol=0)
    assert abs(float(shift.sum())) < 1e-5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--keep_accuracy", "-0.1"), "--keep_accuracy -0.1; expected the fall that is allowed"),
        (("--keep_accuracy", "2"), "--keep_accuracy 2.0; expected the fall that is allowed"),
        (("--undo", "1", "--keep_accuracy", "0.1"), "--undo brings back what was there; expected no --keep_accuracy"),
    ],
)
def test_wrong_words_are_refused(run, capsys, words, message):
    target = () if "--undo" in words else ("--prototype", "cat:1")
    before = contents(run)
    assert message in refused(capsys, "forbid", run, *target, "--reason", "x", *words)
    assert contents(run) == before
