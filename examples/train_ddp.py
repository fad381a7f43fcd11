"""Training and pushing in several processes, in plain PyTorch: each of them calls the push, all end alike.

    torchrun --nproc_per_node 2 examples/train_ddp.py images  # gloo on CPUs; NCCL (not run yet) where each has a GPU
    python examples/train_ddp.py images  # the same in one process

``images`` is a folder of class folders, or a manifest (CSV image,label[,split]). What to look at: the loader has a
DistributedSampler, as DDP wants it, and goes into the push as it is (which divides the images itself, each counted
once); the model goes in with its DDP wrapper; nothing is sent around by hand. Rank 0 reports; at the end the ranks
compare a hash of their prototypes.
"""

import argparse
import hashlib
import os

import torch
from torch import distributed
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import protopush
from protopush.data.dataset import ImageDataset
from protopush.data.sources import load_catalog
from protopush.data.transforms import EvalTransform, Preprocessing


def start() -> torch.device:
    """Join the other processes, where torchrun has started some; this process's device."""
    here, beside = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    gpus = torch.cuda.device_count() >= beside  # one for each process, or none for all
    if gpus:
        torch.cuda.set_device(here)
    if "WORLD_SIZE" in os.environ:
        distributed.init_process_group("nccl" if gpus else "gloo")
    return torch.device("cuda", here) if gpus else torch.device("cpu")


def main(args: argparse.Namespace) -> None:
    device = start()
    rank, world = (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
    catalog = load_catalog(args.data)
    torch.manual_seed(args.seed)
    model = protopush.ProtoModel.create(args.backbone, len(catalog.classes), args.pretrained, num_prototypes=3)
    images = ImageDataset(catalog.split("train"), EvalTransform(Preprocessing(size=(args.size, args.size))))
    sampler = DistributedSampler(images, world, rank, shuffle=True, seed=args.seed)
    loader = DataLoader(images, args.batch_size, sampler=sampler)
    model = model.to(device)
    wrapped = DistributedDataParallel(model) if distributed.is_initialized() else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = protopush.PushSchedule(args.push_start, args.push_interval, total_epochs=args.epochs)
    for epoch in range(args.epochs):
        sampler.set_epoch(epoch)
        wrapped.train()
        for pictures, labels, _ in loader:
            loss = F.cross_entropy(wrapped(pictures.to(device)).logits, labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if schedule.due(epoch, optimizer):  # on every rank alike: the push is the work of all of them
            report = protopush.push_prototypes(wrapped, loader, device, optimizer=optimizer)
            if rank == 0:
                looked = f"{sum(report.images_per_class)} images, {sum(report.patches_per_class)} patches"
                print(
                    f"epoch {epoch + 1}: {looked}, mean distance {report.mean_dist:.4f} -> {report.mean_dist_after:.4f}"
                )
    prototypes = model.head.proto_manager.prototypes.detach().cpu()
    told = [hashlib.sha256(prototypes.numpy().tobytes()).hexdigest()] * world
    if distributed.is_initialized():
        distributed.all_gather_object(told, told[rank])
    if len(set(told)) > 1:
        raise RuntimeError(f"the ranks have different prototypes: {told}")
    if rank == 0:
        print(f"{world} process{'es' if world > 1 else ''}, the same prototypes on each: sha256 {told[0][:16]}")


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], usage=argparse.SUPPRESS)
    parser.add_argument("data", help="a folder of class folders, or a manifest (CSV image,label[,split])")
    # Layer norms: batch norms would keep statistics of their own in each process
    parser.add_argument("--backbone", default="convnext_atto", help="any of timm's")
    parser.add_argument("--pretrained", action="store_true", help="published weights")
    numbers = {"size": 128, "batch-size": 16, "epochs": 20, "push-start": 10, "push-interval": 5, "seed": 1}
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=positive, default=default, help=f"default: {default}")
    try:
        main(parser.parse_args())
    except protopush.InputError as error:
        parser.error(str(error))  # one line, exit code 2
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
