"""Data-parallel fine-tuning with StochNorm and BSS, which see the batch of all processes.

Batch norms become synchronised StochNorms: all processes share mask and statistics. BSS joins the features of all
processes. N processes then compute what one process with the whole batch does, up to rounding.

    pip install torchvision
    torchrun --nproc-per-node 2 examples/torchrun_stochnorm.py
    torchrun --nproc-per-node 8 examples/torchrun_stochnorm.py --data photographs --pretrained --image-size 224

It runs on GPUs by NCCL, and on a CPU by gloo. Without options the images are generated and the weights are random.
``photographs`` holds ``train`` and ``val`` with a folder for each class in both.

StochNorm: Stochastic Normalization, NeurIPS 2020. BSS: Catastrophic Forgetting Meets Negative Transfer, NeurIPS 2019.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from generated_images import generate
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.models import resnet18

from talib_fast.finetune.bss import BatchSpectralShrinkage
from talib_fast.finetune.delta import IntermediateLayerGetter
from talib_fast.finetune.stochnorm import convert_model, convert_sync, restore_batch_norm

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the images that the published weights have seen
BATCH_SIZE = 16  # of all processes together
BSS_TRADE_OFF = 1e-3


def train(args: argparse.Namespace, device: torch.device) -> None:
    """What each process does."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(args.seed)  # the same new head in all processes
    data = args.data or generate()
    size = (args.image_size, args.image_size)
    prepare = transforms.Compose(
        [transforms.Resize(size), transforms.ToTensor(), transforms.Normalize(MEAN, DEVIATION)]
    )
    images, val = ImageFolder(data / "train", prepare), ImageFolder(data / "val", prepare)
    sampler = DistributedSampler(images, seed=args.seed, drop_last=True)
    train_loader = DataLoader(images, BATCH_SIZE // world_size, sampler=sampler, drop_last=True)
    share = torch.utils.data.Subset(val, range(rank, len(val), world_size))
    val_loader = DataLoader(share, BATCH_SIZE)

    network = resnet18(weights="DEFAULT" if args.pretrained else None)
    network.fc = nn.Linear(network.fc.in_features, len(images.classes))
    network = convert_sync(convert_model(network, p=0.5)).to(device)
    bss = BatchSpectralShrinkage(k=1, all_ranks=True)
    model = DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None)
    outputs_of = IntermediateLayerGetter(model, ["avgpool"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    for epoch in range(args.epochs):
        sampler.set_epoch(epoch)
        model.train()
        total = torch.zeros((), device=device)
        for x, labels in train_loader:
            outputs, logits = outputs_of(x.to(device))
            loss = nn.functional.cross_entropy(logits, labels.to(device))
            loss = loss + BSS_TRADE_OFF * bss(outputs["avgpool"].flatten(1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach() / len(train_loader) / world_size

        network.eval()
        right = torch.zeros((), device=device)
        with torch.no_grad():
            for x, labels in val_loader:
                right += (network(x.to(device)).argmax(1) == labels.to(device)).sum()
        dist.all_reduce(total)
        dist.all_reduce(right)
        if rank == 0:
            print(f"epoch {epoch + 1}: loss {total.item():.4f}, accuracy {right.item() / len(val):.3f}", flush=True)

    if rank == 0:
        restore_batch_norm(network)  # torchvision's names; in evaluation it computes the same
        args.out.parent.mkdir(parents=True, exist_ok=True)
        torch.save(network.state_dict(), args.out)
        print(f"saved {args.out}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Data-parallel fine-tuning with StochNorm and BSS; start with torchrun."
    )
    parser.add_argument(
        "--data", type=Path, help="folder with train/CLASS and val/CLASS; generated images if not given"
    )
    parser.add_argument("--pretrained", action="store_true", help="start from torchvision's published weights")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/torchrun_stochnorm.pt"), help="the state dict")
    args = parser.parse_args(argv)
    if not dist.is_torchelastic_launched():
        parser.error(f"start this with torchrun: torchrun --nproc-per-node 2 {parser.prog}")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        train(args, device)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
