"""StochNorm and BSS with a network of timm.

Every batch norm of an EfficientNet becomes a StochNorm, fused with the activation behind it. BSS is added on the pooled
features. The state dict that is saved has timm's own names, so that timm loads it without this package.

    pip install timm
    python examples/timm_stochnorm.py
    python examples/timm_stochnorm.py --data photographs --pretrained --image-size 224 --epochs 20

Without options the images are generated and the weights are random. ``photographs`` holds ``train`` and ``val`` with a
folder for each class in both.

StochNorm: Stochastic Normalization, NeurIPS 2020. BSS: Catastrophic Forgetting Meets Negative Transfer, NeurIPS 2019.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from generated_images import generate
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from talib_fast.finetune.bss import BatchSpectralShrinkage
from talib_fast.finetune.stochnorm import convert_model, fuse_activations, restore_batch_norm

NETWORK = "efficientnet_b0"
BSS_TRADE_OFF = 1e-3
BATCH_SIZE, LR = 16, 3e-3


@torch.no_grad()
def accuracy(model: nn.Module, loader: DataLoader, device: torch.device) -> float:
    model.eval()
    right = sum((model(x.to(device)).argmax(1) == y.to(device)).sum().item() for x, y in loader)
    return right / len(loader.dataset)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="StochNorm and BSS with a network of timm.")
    parser.add_argument(
        "--data", type=Path, help="folder with train/CLASS and val/CLASS; generated images if not given"
    )
    parser.add_argument("--pretrained", action="store_true", help="start from timm's published weights")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/timm_stochnorm.pt"), help="the state dict")
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = args.data or generate()

    train = ImageFolder(data / "train")
    model = timm.create_model(NETWORK, pretrained=args.pretrained, num_classes=len(train.classes))
    config = timm.data.resolve_data_config({"img_size": args.image_size}, model=model)
    train.transform = timm.data.create_transform(**config, is_training=True)
    val = ImageFolder(data / "val", timm.data.create_transform(**config))
    train_loader = DataLoader(train, BATCH_SIZE, shuffle=True, drop_last=True, num_workers=2)
    val_loader = DataLoader(val, BATCH_SIZE, num_workers=2)

    # p is the share of channels that take the batch's statistics. The pretrained weights come first.
    model = fuse_activations(convert_model(model, p=0.5)).to(device)
    head = model.get_classifier()
    nn.init.normal_(head.weight, std=0.01)  # timm's own start is far larger for few classes
    bss = BatchSpectralShrinkage(k=1)
    backbone = [parameter for name, parameter in model.named_parameters() if not name.startswith("classifier.")]
    rates = [LR / 10 if args.pretrained else LR, LR]  # the head is new
    optimizer = torch.optim.AdamW([{"params": backbone}, {"params": head.parameters()}])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, args.epochs * len(train_loader))

    for epoch in range(args.epochs):
        model.train()
        total = 0.0
        for images, labels in train_loader:
            images, labels = images.to(device), labels.to(device)
            features = model.forward_head(model.forward_features(images), pre_logits=True)
            loss = nn.functional.cross_entropy(head(features), labels) + BSS_TRADE_OFF * bss(features)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        right = accuracy(model, val_loader, device)
        print(f"epoch {epoch + 1}: loss {total / len(train_loader):.3f}, accuracy {right:.3f}")

    restore_batch_norm(model)  # timm's own layers again; in evaluation they compute the same
    args.out.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), args.out)
    print(f"saved {args.out}")


if __name__ == "__main__":
    main()
