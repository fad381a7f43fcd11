"""A model of your own, trained by your own loop: where the push goes, and what it does.

A Swin and a ConvNeXt look at the same image, their maps are fused cell by cell, and a home-made head compares the cells
with prototypes. A push needs ``extract_features``, ``head.proj`` and ``head.proto_manager``, and two lines in the loop.
For each push: the distance of prototypes to their patches and the balanced accuracy on validation images. The backbones
are narrow and their weights random, so that a CPU trains them in minutes; on a GPU, give --pretrained.

    python examples/your_own_model.py images  # a folder of class folders, or a manifest
    python examples/your_own_model.py manifest.csv --classes bcc nv --per-class 150
"""

import argparse
from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional as F

import protopush
from protopush.data.dataset import ImageDataset
from protopush.data.sources import load_catalog
from protopush.data.transforms import EvalTransform, TrainTransform
from protopush.nn.losses import cluster_loss, grounding_loss

NARROW_SWIN = {"size": (96, 96), "embed_dim": 32, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8)}
NARROW_CONVNEXT = {"size": (96, 96), "dims": (32, 64, 128, 256), "depths": (1, 1, 2, 1)}


class Prototypes(nn.Module):
    def __init__(self, classes, each, dim):
        super().__init__()
        self.prototypes = nn.Parameter(F.normalize(torch.randn(classes * each, dim), dim=-1))
        self.register_buffer("valid_mask", torch.ones(classes * each, dtype=torch.bool))
        self.indices = [(c * each, (c + 1) * each) for c in range(classes)]

    def get_prototype_indices(self):
        return self.indices


class Head(nn.Module):
    def __init__(self, channels, classes, each=5, dim=64):
        super().__init__()
        self.proj, self.proto_manager = nn.Linear(channels, dim), Prototypes(classes, each, dim)

    def forward(self, patches):  # (B, L, C) to each prototype's cosine with the cell most like it, (B, classes, each)
        cosines = F.normalize(self.proj(patches), dim=-1) @ F.normalize(self.proto_manager.prototypes, dim=-1).T
        return cosines.amax(dim=1).unflatten(1, (len(self.proto_manager.indices), -1))


class SwinConvNeXt(protopush.PushMixin, nn.Module):
    def __init__(self, classes, pretrained):
        super().__init__()
        narrow = [{}, {}] if pretrained else [NARROW_SWIN, NARROW_CONVNEXT]
        swin = protopush.create_backbone("swin_tiny_patch4_window7_224", pretrained, **narrow[0])
        convnext = protopush.create_backbone("convnext_tiny", pretrained, **narrow[1])
        self.nets = nn.ModuleList([swin, convnext])
        self.norms = nn.ModuleList(nn.LayerNorm(net.channels) for net in self.nets)
        self.head = Head(swin.channels + convnext.channels, classes)

    def extract_features(self, images):  # x_fu (B, 1, C) and x_fu1 (B, L, C)
        x_fu1 = torch.cat([norm(net(images).patches) for net, norm in zip(self.nets, self.norms, strict=True)], dim=-1)
        return x_fu1.mean(dim=1, keepdim=True), x_fu1

    def forward(self, images):
        return 10 * self.head(self.extract_features(images)[1]).mean(dim=2)  # logits (B, classes)


def loader_of(catalog, split, classes, per_class, model):
    chosen, look = [], model.nets[0].preprocessing
    for label, name in enumerate(classes):
        own = [sample for sample in catalog.split(split) if catalog.classes[sample.label] == name]
        chosen += [replace(sample, label=label) for sample in own[:per_class]]
    dataset = ImageDataset(chosen, EvalTransform(look), TrainTransform(look) if split == "train" else None)
    return torch.utils.data.DataLoader(dataset, batch_size=16, shuffle=split == "train")


def main(args):
    schedule = protopush.PushSchedule(start=8, interval=4, total_epochs=args.epochs)
    catalog = load_catalog(args.data)
    classes = args.classes or list(catalog.classes)
    if not set(classes) <= set(catalog.classes) or args.per_class < 1:
        raise protopush.InputError(f"{args.per_class} images of {classes}; expected one or more of {catalog.classes}")
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = SwinConvNeXt(len(classes), args.pretrained).to(device)
    train_loader, val_loader = (loader_of(catalog, name, classes, args.per_class, model) for name in ("train", "val"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.05)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * len(train_loader))
    print(f"{len(train_loader.dataset)} training, {len(val_loader.dataset)} validation images: {', '.join(classes)}")
    print("epoch   min_dist      after  mean_dist      after   accuracy      after")
    for epoch in range(args.epochs):
        model.train()
        for images, labels, _ in train_loader:
            similar, labels = model.head(model.extract_features(images.to(device))[1]), labels.to(device)
            used = torch.ones_like(similar[0], dtype=torch.bool)
            near = cluster_loss(similar, labels, used) + grounding_loss(similar, labels, used)
            loss = F.cross_entropy(10 * similar.mean(dim=2), labels) + near
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            decay.step()
        if schedule.due(epoch, optimizer):
            report = model.push_prototypes(train_loader, device, optimizer=optimizer, val_loader=val_loader)
            least = min(pushed.distance_after for pushed in report.prototypes)
            scores = (score["balanced_accuracy"] for score in (report.guard.before, report.guard.after))
            row = report.min_dist, least, report.mean_dist, report.mean_dist_after, *scores
            print(f"{epoch + 1:5}", *(f"{number:10.4f}" for number in row), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], usage=argparse.SUPPRESS)
    parser.add_argument("data", help="a folder of class folders, or a manifest (CSV image,label[,split])")
    parser.add_argument("--pretrained", action="store_true", help="published weights and widths")
    parser.add_argument("--classes", nargs="+", help="only these")
    parser.add_argument("--per-class", type=int, default=10_000, help="at most so many images of each, in each split")
    parser.add_argument("--epochs", type=int, default=24, help="passes over the images (24)")
    try:
        main(parser.parse_args())
    except protopush.InputError as error:
        parser.error(str(error))  # one line, exit code 2
