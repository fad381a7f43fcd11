"""Pushes in Lightning's Trainer: against a loop by hand, resumed, in two processes, and what goes wrong."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from forked import Forked
from helpers import ToyNet, python
from protopush import InputError, PushSchedule, push_prototypes
from protopush._compat import ensure_torchvision

ensure_torchvision()
lightning = pytest.importorskip("lightning.pytorch")
PushCallback = importlib.import_module("protopush.integrations.lightning").PushCallback

CLASSES, EPOCHS = 3, 6


def data(count: int = 26) -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    return TensorDataset(torch.randn(count, 6, 3, 3, generator=generator), torch.arange(count) % CLASSES)


class Lit(lightning.LightningModule):
    """A module with somebody else's model inside; no dropout, so that every run of it is the same."""

    def __init__(self, momentum_of_sgd: float = 0.9) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = ToyNet(CLASSES, 2, channels=6, dim=8)
        self.net.head.proj = nn.Linear(6, 8)
        self.net.norm = nn.Identity()
        self.momentum = momentum_of_sgd

    def loss(self, images, labels):
        embeddings = F.normalize(self.net.head.proj(self.net.extract_features(images)[1]), dim=-1)
        similar = (embeddings @ self.net.head.proto_manager.unit().flatten(0, 1).T).amax(1)
        return F.cross_entropy(5 * similar.view(len(images), CLASSES, -1).mean(-1), labels)

    def training_step(self, batch, index):
        return self.loss(*batch)

    def validation_step(self, batch, index):
        self.log("val_loss", self.loss(*batch), sync_dist=True)

    def configure_optimizers(self):
        one = torch.optim.SGD(self.parameters(), lr=0.1, momentum=self.momentum)
        scheduler = torch.optim.lr_scheduler.MultiStepLR(one, [EPOCHS - 1], gamma=0.01)
        return {"optimizer": one, "lr_scheduler": scheduler}


def trainer(folder: Path, *callbacks, **options) -> lightning.Trainer:
    options = {"max_epochs": EPOCHS, "logger": False, "enable_checkpointing": False} | options
    return lightning.Trainer(
        accelerator="cpu", callbacks=list(callbacks), default_root_dir=folder, enable_progress_bar=False,
        enable_model_summary=False, log_every_n_steps=1, **options,
    )  # fmt: skip


def train_loader(shuffle: bool = False) -> DataLoader:
    return DataLoader(data(), 8, shuffle=shuffle)


def by_hand(schedule: PushSchedule, push: bool = True) -> tuple[Lit, list]:
    """The same training without Lightning; the distances of each push."""
    lit = Lit()
    made = lit.configure_optimizers()
    one, scheduler = made["optimizer"], made["lr_scheduler"]
    reports = []
    for epoch in range(EPOCHS):
        for images, labels in train_loader():
            one.zero_grad()
            lit.loss(images, labels).backward()
            one.step()
        if push and schedule.due(epoch, one):
            reports.append(push_prototypes(lit.net, train_loader(), "cpu", optimizer=one))
        scheduler.step()
    return lit, reports


def prototypes(lit: Lit) -> torch.Tensor:
    return lit.net.head.proto_manager.prototypes.detach()


# -- against a loop by hand -----------------------------------------------------------------------------------------


def test_trained_and_pushed_as_by_hand(tmp_path):
    callback, lit = PushCallback(PushSchedule(2, 2), find="net"), Lit()
    run = trainer(tmp_path, callback)
    run.fit(lit, train_loader(), DataLoader(data(), 8))
    hand, reports = by_hand(PushSchedule(2, 2))
    assert torch.equal(prototypes(lit), prototypes(hand))
    assert [row["epoch"] for row in callback.history] == [2, 4]  # 6 is in the final decay
    assert [r.prototypes for r in callback.reports] == [r.prototypes for r in reports]
    assert lit.net.head.proto_manager.anchors == hand.net.head.proto_manager.anchors
    without, _ = by_hand(PushSchedule(2, 2), push=False)
    assert not torch.equal(prototypes(without), prototypes(hand))  # the test can fail
    last = callback.reports[-1]
    for name in ("min_dist", "mean_dist", "mean_dist_after"):
        assert float(run.callback_metrics[f"push/{name}"]) == pytest.approx(getattr(last, name), abs=1e-6)
        assert callback.history[-1][name] == getattr(last, name)


def test_moments_of_the_pushed_prototypes_are_reset(tmp_path):
    callback, lit = PushCallback(PushSchedule(1, 1), find=lambda module: module.net), Lit()
    run = trainer(tmp_path, callback, max_epochs=1)
    run.fit(lit, train_loader())
    state = run.optimizers[0].state
    assert not state[lit.net.head.proto_manager.prototypes]["momentum_buffer"].any()
    assert state[lit.net.head.proj.weight]["momentum_buffer"].any()


def test_sanity_checking_is_left_alone_and_the_final_push_is_hard(tmp_path):
    callback, lit = PushCallback(PushSchedule(5, 5), find="net", final="hard"), Lit()
    pushed_in_sanity = []

    class Look(lightning.Callback):
        def on_sanity_check_end(self, trainer, module):
            pushed_in_sanity.append(len(callback.reports))

    run = trainer(tmp_path, callback, Look(), max_epochs=3, num_sanity_val_steps=2)
    run.fit(lit, train_loader(shuffle=True), DataLoader(data(), 8))
    assert pushed_in_sanity == [0]
    (report,) = callback.reports
    assert callback.history == [
        {"epoch": 3, "final": True, "min_dist": report.min_dist, "mean_dist": report.mean_dist,
         "mean_dist_after": report.mean_dist_after}
    ]  # fmt: skip
    patches = F.normalize(lit.net.head.proj(lit.net.extract_features(data().tensors[0])[1]), dim=-1)
    for row, anchor in enumerate(lit.net.head.proto_manager.anchors):  # each is the very patch that it names
        assert anchor.verified
        torch.testing.assert_close(prototypes(lit)[row], patches[anchor.sample_id, anchor.cell])
    none = PushCallback(PushSchedule(5, 5), find="net")
    trainer(tmp_path, none, max_epochs=3).fit(Lit(), train_loader())
    assert none.reports == []


def test_a_logger_sees_each_push(tmp_path):
    callback = PushCallback(PushSchedule(2, 2), find="net", final="hard")
    trainer(tmp_path, callback, logger=lightning.loggers.CSVLogger(tmp_path), max_epochs=4).fit(Lit(), train_loader())
    header, *rows = (next(tmp_path.rglob("metrics.csv"))).read_text().splitlines()
    place = header.split(",").index("push/min_dist")
    told = [float(row.split(",")[place]) for row in rows if row.split(",")[place]]
    assert told == pytest.approx([r.min_dist for r in callback.reports], abs=1e-6)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precisions(tmp_path, precision):
    callback, lit = PushCallback(PushSchedule(1, 1), find="net", final="hard"), Lit()
    trainer(tmp_path, callback, max_epochs=1, precision=precision).fit(lit, train_loader())
    assert len(callback.reports) == 2
    # the parameter itself is as coarse as its precision
    kind = {"bf16-mixed": torch.float32, "bf16-true": torch.bfloat16, "64-true": torch.float64}[precision]
    assert prototypes(lit).dtype == kind
    tolerance = 0.05 if precision.startswith("bf16") else 1e-6
    assert callback.reports[1].mean_dist_after == pytest.approx(0.0, abs=tolerance)


# -- checkpoints ----------------------------------------------------------------------------------------------------


def test_resumed_is_as_if_never_interrupted(tmp_path):
    whole, callback = Lit(), PushCallback(PushSchedule(1, 2), find="net")
    save = lightning.callbacks.ModelCheckpoint(
        tmp_path, "{epoch}", save_top_k=-1, every_n_epochs=1, save_on_train_epoch_end=True
    )
    trainer(tmp_path, save, callback, enable_checkpointing=True).fit(whole, train_loader())
    plain = torch.load(tmp_path / "epoch=3.ckpt", weights_only=True)  # nothing is ever unpickled
    assert plain["callbacks"]["PushCallback"]["schedule"] == {"peaks": [0.1]}
    again, other = Lit(), PushCallback(PushSchedule(1, 2), find="net")
    run = trainer(tmp_path, other)
    run.fit(again, train_loader(), ckpt_path=tmp_path / "epoch=3.ckpt")
    assert torch.equal(prototypes(again), prototypes(whole))
    assert other.history == callback.history
    assert [row["epoch"] for row in callback.history] == [2, 4]
    assert other.reports == []  # the pushes were before; in the decay after them there is none
    assert other.schedule.peaks == [0.1]
    assert again.net.head.proto_manager.anchors == whole.net.head.proto_manager.anchors
    assert any(again.net.head.proto_manager.anchors)


# -- two processes --------------------------------------------------------------------------------------------------


def fit_in(folder: Path, world: int) -> None:
    """What each of ``world`` processes does: a run under DDP with batches that are together the one process's."""
    callback, lit = PushCallback(PushSchedule(2, 2), find="net", final="hard"), Lit()
    strategy = {"strategy": "ddp", "devices": world} if world > 1 else {}
    run = trainer(folder, callback, max_epochs=4, num_sanity_val_steps=1, **strategy)
    loader = DataLoader(data(24), 24 // world)  # Lightning's sampler shuffles: one batch is the same in any order
    run.fit(lit, loader, DataLoader(data(24), 8))
    logged = float(run.callback_metrics["push/min_dist"])
    sampler = type(run.train_dataloader.sampler).__name__
    anchors = [(a.sample_id, a.cell) for a in lit.net.head.proto_manager.anchors]
    told = {"prototypes": prototypes(lit), "anchors": anchors, "logged": logged, "sampler": sampler,
            "distances": [(row["min_dist"], row["mean_dist_after"]) for row in callback.history]}  # fmt: skip
    torch.save(told, folder / f"{world}-{run.global_rank}.pt")


@pytest.mark.ddp
def test_two_processes_end_with_the_prototypes_of_one(tmp_path):
    fit_in(tmp_path, 1)
    # the second process is started by Lightning, as this file
    start = f"import runpy, sys; sys.path[:], sys.argv[0] = {sys.path}, {__file__!r}\n"
    start += "runpy.run_path(sys.argv[0], run_name='__main__')"
    done = Forked(tmp_path, 2, program=start, PYTHONPATH=os.pathsep.join(sys.path))
    done.wait()
    assert done.returncode == 0, done.stderr[-2000:]
    alone, first, second = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1"))
    assert first["sampler"] == second["sampler"] == "DistributedSampler"
    assert torch.equal(first["prototypes"], second["prototypes"])
    assert first["anchors"] == second["anchors"] == alone["anchors"]
    assert first["distances"] == second["distances"]
    assert len(alone["distances"]) == 3  # after epochs 2 and 4, and the final one
    # gradients are summed in another order by two processes than by one
    torch.testing.assert_close(first["prototypes"], alone["prototypes"], atol=1e-5, rtol=1e-5)
    assert torch.tensor(first["distances"]) == pytest.approx(torch.tensor(alone["distances"]), abs=1e-3)
    assert first["logged"] == second["logged"] == pytest.approx(first["distances"][1][0], abs=1e-6)


# -- what goes wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"final": "soft"}, "final is 'soft'; expected one of: hard, none"),
        ({"momentun": 0.5}, "takes no momentun; expected options of a push: use_local, momentum,"),
        ({"device": "cpu"}, "takes no device"),
        ({"momentum": 1.5}, "momentum is 1.5"),
        ({"unique": "lesion"}, "lesion"),
        ({"guard": "rollback"}, "needs a val_loader"),
        ({"guard": "maybe"}, "guard is 'maybe'"),
    ],
)
def test_options_that_make_no_sense_are_refused_at_once(options, told):
    with pytest.raises(InputError, match=told) as caught:
        PushCallback(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("find", "told"),
    [
        (None, "Lit has no extract_features, no head.proj"),
        ("net.nothing", "Lit has no module at find='net.nothing'"),
        ("momentum", "Lit has no module at find='momentum'"),
        (lambda module: module.net.head, "no extract_features"),
    ],
)
def test_a_module_without_a_model_is_refused_before_the_first_epoch(tmp_path, find, told):
    lit = Lit()
    lit.training_step = lambda *_: pytest.fail("it trained")
    with pytest.raises(InputError, match=told):
        trainer(tmp_path, PushCallback(find=find)).fit(lit, train_loader())


def test_training_data_that_is_no_loader_is_refused_unless_one_is_given(tmp_path):
    class Two(Lit):
        def training_step(self, batch, index):
            return self.loss(*batch["a"])

    loaders = {"a": train_loader(), "b": train_loader()}
    with pytest.raises(InputError, match="training data is a dict; expected one DataLoader"):
        trainer(tmp_path, PushCallback(find="net")).fit(Two(), loaders)
    callback = PushCallback(PushSchedule(1, 1), find="net", loader=loaders["a"])
    trainer(tmp_path, callback, max_epochs=1).fit(Two(), loaders)
    assert len(callback.reports) == 1


def test_the_older_package_takes_the_callback_too(tmp_path):
    old = pytest.importorskip("pytorch_lightning")

    class Old(old.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.momentum = Lit().net, 0.9

        loss, training_step, configure_optimizers = Lit.loss, Lit.training_step, Lit.configure_optimizers

    callback = PushCallback(PushSchedule(1, 1), find="net")
    run = old.Trainer(accelerator="cpu", max_epochs=1, callbacks=[callback], logger=False, enable_checkpointing=False,
                      enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path)  # fmt: skip
    run.fit(Old(), train_loader())
    assert len(callback.reports) == 1


def test_protopush_does_not_import_lightning():
    names = "[n for n in sys.modules if n.split('.')[0] in ('lightning', 'pytorch_lightning')]"
    check = f"import sys, protopush; protopush.PushSchedule; protopush.push_prototypes; print({names})"
    assert python("-c", check).stdout.strip() == "[]"


def test_without_lightning_one_line_says_what_to_install(monkeypatch):
    for name in ("lightning", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "protopush.integrations.lightning")
    with pytest.raises(ImportError, match=r"pip install protopush\[lightning\]") as caught:
        importlib.import_module("protopush.integrations.lightning")
    assert "\n" not in str(caught.value)


if __name__ == "__main__":  # one of the two processes
    torch.set_num_threads(1)
    fit_in(Path(sys.argv[1]), int(sys.argv[2]))
