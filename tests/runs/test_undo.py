"""Undoing a decision brings back what it took, exactly, and forgets nothing; two who decide at once lose nothing."""

from __future__ import annotations

import json
import random
import shutil
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from forked import Forked
from helpers import SMALL, anchors, contents, refused
from protopush import InputError
from protopush.cli import main
from protopush.models.model_folder import save_run
from protopush.runs.decisions import FILE, Decision, alone, in_force, load_decisions
from protopush.runs.review import Wish, keep
from protopush.runs.review import forbid as forbid_in
from protopush.runs.run import open_run
from test_forbid import forbid, inside_share, next_best, place

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def home(masked_home) -> Path:
    return masked_home


def take_back(capsys, run: Path, number: int, *words: object) -> dict:
    return forbid(capsys, run, "--undo", number, *words)


def whole(run: Path) -> dict[Path, bytes]:
    """All that a run is, its log left out."""
    return {path: data for path, data in contents(run).items() if path.name != FILE}


def assert_same_model(run: Path, other: Path) -> None:
    one, two = open_run(run), open_run(other)
    assert one.head.proto_manager.anchors == two.head.proto_manager.anchors
    states = one.model.state_dict(), two.model.state_dict()
    assert states[0].keys() == states[1].keys()
    assert [key for key in states[0] if not torch.equal(states[0][key], states[1][key])] == []


@pytest.mark.parametrize("words", [["--prototype", "cat:1"], ["--image", "IMAGE"], ["--mask_column"]])
def test_it_is_as_if_nothing_had_been_forbidden(run, home, capsys, words):
    words = [anchors(run)["dog", 0]["file"] if word == "IMAGE" else word for word in words]
    made = forbid(capsys, run, *words)
    assert made["replaced"]
    assert whole(run) != whole(home / "run")
    undone = take_back(capsys, run, 1, "--reason", "no ruler after all", "--who", "dr. who")
    assert whole(run) == whole(home / "run")  # byte for byte
    assert_same_model(run, home / "run")
    assert main(["verify", str(run)]) == 0
    assert [json.loads(line) for line in (run / FILE).read_text().splitlines()] == [made, undone]
    told = {k: undone[k] for k in ("id", "kind", "undoes", "who", "reason")}
    assert told == {"id": 2, "kind": "undo", "undoes": 1, "who": "dr. who", "reason": "no ruler after all"}
    assert [(one["old"], one["new"]) for one in undone["replaced"]] == [
        (one["new"], one["old"]) for one in made["replaced"]
    ]
    assert undone["val_before"] == made["val_after"]
    assert undone["val_after"] == made["val_before"]
    assert in_force(load_decisions(run)) == []


@pytest.mark.parametrize("kind", ["momentum", "live", "global"])
def test_exactly_for_every_kind_of_prototype(home, tmp_path, capsys, monkeypatch, kind):
    monkeypatch.setenv("PROTOPUSH_CACHE", str(home / "cache"))
    more = {
        "momentum": ["--push.final", "momentum"],
        "live": ["--push.anchoring", "live", "--push.start_epoch", "0", "--push.unique", "image"],
        "global": ["--model.match", "global"],
    }[kind]
    words = ["train", "--data.path", home / "data" / "manifest.csv", "--out", tmp_path / "run", *SMALL]
    assert main([str(w) for w in (*words, "--train.epochs", "1", *more)]) == 0
    run = tmp_path / "run"
    before = Path(shutil.copytree(run, tmp_path / "before"))
    made = forbid(capsys, run, "--prototype", "cat:0")
    assert (made["replaced"][0]["old_features"] is not None) == (kind == "live")
    take_back(capsys, run, 1)
    assert whole(run) == whole(before)
    assert main(["verify", str(run)]) == 0

    if kind == "live":  # a log that an older version wrote
        forbid(capsys, run, "--prototype", "cat:0")
        log = [json.loads(line) for line in (run / FILE).read_text().splitlines()]
        for one in log[-1]["replaced"]:
            del one["old_features"], one["old_index"]
        (run / FILE).write_text("".join(json.dumps(one) + "\n" for one in log))
        take_back(capsys, run, 3)
        assert main(["verify", str(run)]) == 0
        assert anchors(run) == anchors(before)
        one, two = (open_run(folder).head.proto_manager for folder in (run, before))
        assert torch.equal(one.anchor_ids, two.anchor_ids)
        torch.testing.assert_close(
            one.anchor_features, two.anchor_features, atol=2e-3, rtol=2e-3
        )  # float16 in training


def test_a_chain_comes_back_in_any_order(run, home, capsys):
    seen = [place(anchors(run)["bird", 0])]
    for _ in range(3):
        forbid(capsys, run, "--prototype", "bird:0")
        seen.append(place(anchors(run)["bird", 0]))
    take_back(capsys, run, 2)  # the first place is still forbidden, the second is free again
    assert place(anchors(run)["bird", 0]) == seen[1]
    take_back(capsys, run, 1)
    assert place(anchors(run)["bird", 0]) == seen[0]
    assert take_back(capsys, run, 3)["replaced"] == []  # it stands before that place
    assert_same_model(run, home / "run")
    assert main(["verify", str(run)]) == 0
    assert len(load_decisions(run)) == 6


class Oracle:
    """Slow and by hand: every place that a prototype ever had, and who forbids what."""

    def __init__(self, run: Path) -> None:
        self.places = {key: [place(anchor)] for key, anchor in anchors(run).items()}
        self.vectors = {key: [vector] for key, vector in self.prototypes(run).items()}
        self.forbids: dict[int, set] = {}

    @staticmethod
    def prototypes(run: Path) -> dict[tuple[str, int], torch.Tensor]:
        opened = open_run(run)
        vectors = opened.head.prototypes().detach()
        return {(name, k): vectors[opened.class_names.index(name), k] for name, k in anchors(run)}

    def forbidden(self, where: tuple[str, int]) -> bool:
        return any(where in barred or (where[0], None) in barred for barred in self.forbids.values())

    def follow(self, run: Path) -> None:
        vectors = self.prototypes(run)
        for key, anchor in anchors(run).items():
            if place(anchor) not in self.places[key]:
                self.places[key].append(place(anchor))
                self.vectors[key].append(vectors[key])

    def expected(self, key: tuple[str, int]) -> int:
        """The first place that nobody forbids any more."""
        return next(i for i, where in enumerate(self.places[key]) if not self.forbidden(where))


@pytest.mark.parametrize("seed", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_any_sequence_of_decisions_ends_where_a_slow_look_says(run, capsys, seed):
    choose, oracle, kinds = random.Random(seed), Oracle(run), Counter()
    for number in range(1, 8):
        holding = [made.id for made in in_force(load_decisions(run))]
        if holding and choose.random() < 0.45:
            back = choose.choice(holding)
            take_back(capsys, run, back)
            del oracle.forbids[back]
            kinds["undo"] += 1
        else:
            key = choose.choice(["bird", "cat", "dog"]), choose.choice([0, 1])
            file, cell = place(anchors(run)[key])
            whole_image = choose.random() < 0.3
            forbid(capsys, run, *(["--image", file] if whole_image else ["--prototype", f"{key[0]}:{key[1]}"]))
            oracle.forbids[number] = {(file, None if whole_image else cell)}
            kinds["forbid"] += 1
        oracle.follow(run)
        now = {key: place(anchor) for key, anchor in anchors(run).items()}
        vectors = oracle.prototypes(run)
        for key in now:
            i = oracle.expected(key)
            assert now[key] == oracle.places[key][i]
            assert torch.equal(vectors[key], oracle.vectors[key][i])
    assert min(kinds["undo"], kinds["forbid"]) >= 2
    assert main(["verify", str(run)]) == 0


def test_what_another_decision_forbids_stays_forbidden(run, capsys):
    file = anchors(run)["cat", 0]["file"]
    forbid(capsys, run, "--prototype", "cat:0")
    forbid(capsys, run, "--image", file)
    there = anchors(run)
    assert take_back(capsys, run, 1)["replaced"] == []
    assert anchors(run) == there
    assert file not in {anchor["file"] for anchor in anchors(run).values()}
    take_back(capsys, run, 2)
    assert place(anchors(run)["cat", 0])[0] == file
    assert main(["verify", str(run)]) == 0


def test_an_image_that_another_prototype_has_taken_is_left_to_it(run, capsys):
    config = (run / "config.yaml").read_text().replace("unique: none", "unique: image")
    (run / "config.yaml").write_text(config)
    if anchors(run)["cat", 0]["file"] == anchors(run)["cat", 1]["file"]:  # trained without that rule
        forbid(capsys, run, "--prototype", "cat:1")
    old, number = anchors(run)["cat", 0]["file"], len(load_decisions(run)) + 1
    forbid(capsys, run, "--prototype", "cat:0")
    while anchors(run)["cat", 1]["file"] != old:  # there are six images
        forbid(capsys, run, "--image", anchors(run)["cat", 1]["file"])
    now = anchors(run)
    assert take_back(capsys, run, number)["replaced"] == []
    assert anchors(run) == now
    assert main(["verify", str(run)]) == 0


def test_what_a_push_has_moved_since_stays_there_but_may_go_back(run, home, tmp_path, capsys):
    old = place(anchors(run)["cat", 0])
    forbid(capsys, run, "--prototype", "cat:0")
    words = ["push", run, "--momentum", "0.5", "--data.num_workers", "0", "--out", tmp_path / "pushed"]
    assert main([str(w) for w in words]) == 0
    pushed = tmp_path / "pushed"
    now = anchors(pushed)
    assert take_back(capsys, pushed, 1)["replaced"] == []
    assert anchors(pushed) == now
    opened, former = open_run(pushed), open_run(home / "run")
    opened.head.proto_manager.prototypes.data[2] = former.head.proto_manager.prototypes.data[2]
    save_run(replace(opened, folder=pushed))
    assert next_best(pushed, "cat", 0, set()) == old
    words = ["push", pushed, "--momentum", "0", "--data.num_workers", "0", "--out", tmp_path / "again"]
    assert main([str(w) for w in words]) == 0
    assert place(anchors(tmp_path / "again")["cat", 0]) == old


def test_masks_hold_again_less(run, capsys):
    forbid(capsys, run, "--mask_column")
    at_half = anchors(run)
    forbid(capsys, run, "--mask_column", "--min_share", "1.0")
    take_back(capsys, run, 2)
    assert anchors(run) == at_half
    assert all(inside_share(a) >= 0.5 or a["file"].endswith("000.png") for a in at_half.values())


@pytest.mark.parametrize(("words", "message"), [
    (["--undo", "7"], "no decision 7; expected one of: 2"),
    (["--undo", "1"], "decision 1 was undone already (decision 3,"),
    (["--undo", "3"], "decision 3 forbids nothing, it is of the kind 'undo'; expected one of: 2"),
    (["--undo", "4"], "decision 4 forbids nothing, it is of the kind 'keep'"),
    (["--undo", "2", "--prototype", "cat:0"], "--undo takes back one decision"),
    (["--undo", "2", "--reason", " "], "no reason given"),
    (["--undo", "two"], 'key "undo"'),
])  # fmt: skip
def test_bad_input_gets_one_line_and_writes_nothing(decided, capsys, words, message):
    before = contents(decided)
    given = words if "--reason" in words else [*words, "--reason", "r"]
    assert message in refused(capsys, "forbid", decided, *given)
    assert contents(decided) == before


@pytest.fixture(scope="module")
def decided(home, tmp_path_factory) -> Path:
    """A run with a forbid that was undone, another that holds, and a prototype that is kept."""
    run = Path(shutil.copytree(home / "run", tmp_path_factory.mktemp("decided") / "run"))
    for words in (["--prototype", "cat:0"], ["--prototype", "dog:0"], ["--undo", "1"]):
        assert main([str(w) for w in ("forbid", run, *words, "--reason", "r", "--data.num_workers", "0")]) == 0
    with alone(run):
        made = keep(open_run(run), "bird:1", " a typical wing ", "dr. who")
    assert (made.id, made.kind, made.reason, made.class_name, made.prototype) == (
        4,
        "keep",
        "a typical wing",
        "bird",
        1,
    )
    return run


def test_keeping_changes_the_log_alone(decided):
    assert load_decisions(decided)[3].file == anchors(decided)["bird", 1]["file"]
    assert main(["verify", str(decided)]) == 0
    with pytest.raises(InputError, match="no reason given"):
        keep(open_run(decided), "bird:1", "  ")
    assert Decision.from_dict(json.loads(json.dumps(load_decisions(decided)[2].to_dict()))).undoes == 1


def test_a_former_image_that_changed_is_not_gone_back_to(run, home, tmp_path, capsys):
    data = Path(shutil.copytree(home / "data", tmp_path / "data"))
    words = ["--data.path", data / "manifest.csv"]
    old = anchors(run)["cat", 0]["file"]
    forbid(capsys, run, "--image", old, *words)
    before = contents(run)
    shutil.copyfile(data / "images" / "dog" / "000.png", data / old)
    line = refused(capsys, "forbid", run, "--undo", "1", "--reason", "r")
    assert "missing or changed" in line
    assert old in line
    assert contents(run) == before
    lines = (run / FILE).read_text().replace(old, "../../../etc/passwd")
    (run / FILE).write_text(lines)
    assert "missing or changed" in refused(capsys, "forbid", run, "--undo", "1", "--reason", "r")


def decide(run: Path, which: str, failed: list[BaseException], gate: threading.Barrier) -> None:
    try:
        gate.wait()
        with alone(run):
            opened = open_run(run)
            forbid_in(opened, Wish(prototype=which, reason=f"{which} shows a ruler", who=which), opened.data, CPU)
    except BaseException as error:
        failed.append(error)


def test_two_threads_at_once_lose_nothing(run, capsys):
    old, failed, gate = anchors(run), list[BaseException](), threading.Barrier(2)
    threads = [threading.Thread(target=decide, args=(run, which, failed, gate)) for which in ("cat:0", "dog:1")]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert failed == []
    made = load_decisions(run)
    assert [one.id for one in made] == [1, 2]
    assert {one.who for one in made} == {"cat:0", "dog:1"}
    new = anchors(run)
    assert {key for key in new if new[key] != old[key]} == {("cat", 0), ("dog", 1)}
    assert main(["verify", str(run)]) == 0


def test_two_processes_at_once_lose_nothing(run):
    words = ["forbid", run, "--prototype", "dog:1", "--reason", "r", "--data.num_workers", "0", "--device", "cpu"]
    with alone(run):
        opened = open_run(run)
        other = Forked(*words)
        while "\n" not in other.stderr:
            assert other.poll() is None
            time.sleep(0.01)
        assert "Somebody else decides about" in other.stderr.splitlines()[0]
        forbid_in(opened, Wish(prototype="cat:0", reason="first", who="this one"), opened.data, CPU)
    assert other.wait(120) == 0
    assert [(one.id, one.class_name) for one in load_decisions(run)] == [(1, "cat"), (2, "dog")]
    assert main(["verify", str(run)]) == 0


def test_who_waits_too_long_is_told(run):
    told = []
    with alone(run):
        thread_failed: list[BaseException] = []

        def wait() -> None:
            try:
                with alone(run, lambda: told.append("waiting"), patience=0.1):
                    pass
            except InputError as error:
                thread_failed.append(error)

        thread = threading.Thread(target=wait)
        thread.start()
        thread.join()
    assert told == ["waiting"]
    assert "another decision about" in str(thread_failed[0])
    with alone(run):
        pass
