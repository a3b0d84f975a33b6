"""DELTA with attention on a ResNet of torchvision.

DELTA draws the feature maps of the trained network to those of the pretrained network. A channel counts more if the
loss of the new task rises more without it. To learn that, the script trains a new head on the pretrained features, and
``channel_attention`` removes each channel once. The pretrained network runs as ``frozen(model, layers)``, a copy that
computes the feature maps alone.

    pip install torchvision
    python examples/torchvision_delta.py
    python examples/torchvision_delta.py --data photographs --pretrained --image-size 224 --epochs 20

Without options the images are generated and the weights are random. ``photographs`` holds ``train`` and ``val`` with a
folder for each class in both.

DELTA: DEep Learning Transfer using Feature Map with Attention, ICLR 2019, https://openreview.net/forum?id=rkgbwsAcYm
"""

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from generated_images import generate
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.models import get_model

from talib_fast.finetune.delta import (
    AttentionBehavioralRegularization,
    IntermediateLayerGetter,
    channel_attention,
)
from talib_fast.finetune.frozen import frozen

NETWORK, LAYERS = "resnet18", ["layer1.1.conv2", "layer2.1.conv2", "layer3.1.conv2", "layer4.1.conv2"]
# or "resnet50", ["layer1.2.conv3", "layer2.3.conv3", "layer3.5.conv3", "layer4.2.conv3"]
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the images that the published weights have seen
DELTA_TRADE_OFF = 0.01
BATCH_SIZE, LR = 16, 0.01


def train_head(model: nn.Module, loader: DataLoader, epochs: int, device: torch.device) -> None:
    """Train ``model.fc`` alone, on the features of the network as it is."""
    model.eval()
    optimizer = torch.optim.Adam(model.fc.parameters(), lr=1e-3)
    for _ in range(epochs):
        for images, labels in loader:
            loss = nn.functional.cross_entropy(model(images.to(device)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def attention_of(
    model: nn.Module, data: ImageFolder, device: torch.device, batches: int, cache: Path
) -> dict[str, Tensor]:
    """How much the loss of the new task depends on each channel of the pretrained network."""
    probe = copy.deepcopy(model).requires_grad_(False)
    probe.fc = nn.Linear(probe.fc.in_features, len(data.classes)).to(device)
    loader = DataLoader(data, BATCH_SIZE, shuffle=True, generator=torch.Generator().manual_seed(0))
    train_head(probe, loader, epochs=2, device=device)
    loader.generator.manual_seed(0)  # the same batches in every run, for the cache
    return channel_attention(probe, loader, LAYERS, max_batches=batches, cache=cache, progress=False)


@torch.no_grad()
def accuracy(model: nn.Module, loader: DataLoader, device: torch.device) -> float:
    model.eval()
    right = sum((model(x.to(device)).argmax(1) == y.to(device)).sum().item() for x, y in loader)
    return right / len(loader.dataset)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="DELTA with attention on a ResNet of torchvision.")
    parser.add_argument(
        "--data", type=Path, help="folder with train/CLASS and val/CLASS; generated images if not given"
    )
    parser.add_argument("--pretrained", action="store_true", help="start from torchvision's published weights")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/torchvision_delta.pt"), help="the state dict")
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = args.data or generate()
    args.out.parent.mkdir(parents=True, exist_ok=True)

    normalise = [transforms.ToTensor(), transforms.Normalize(MEAN, DEVIATION)]
    size = (args.image_size, args.image_size)
    plain = transforms.Compose([transforms.Resize(size), *normalise])
    augmented = transforms.Compose(
        [transforms.RandomResizedCrop(size, (0.5, 1)), transforms.RandomHorizontalFlip(), *normalise]
    )
    train = ImageFolder(data / "train", augmented)
    train_loader = DataLoader(train, BATCH_SIZE, shuffle=True, drop_last=True, num_workers=2)
    val_loader = DataLoader(ImageFolder(data / "val", plain), BATCH_SIZE, num_workers=2)

    model = get_model(NETWORK, weights="DEFAULT" if args.pretrained else None)
    model = model.to(device, memory_format=torch.channels_last)
    cache = args.out.with_suffix(".attention.safetensors")
    attention = attention_of(model, ImageFolder(data / "train", plain), device, 10 if args.pretrained else 1, cache)
    source = frozen(model, LAYERS)  # the pretrained network as it is now; dtype=torch.bfloat16 is faster still
    model.fc = nn.Linear(model.fc.in_features, len(train.classes)).to(device)  # after frozen(), which needs no new head
    outputs_of = IntermediateLayerGetter(model, LAYERS)
    delta = AttentionBehavioralRegularization(attention)

    backbone = [parameter for name, parameter in model.named_parameters() if not name.startswith("fc.")]
    groups = [{"params": backbone, "lr": LR / 10 if args.pretrained else LR}, {"params": model.fc.parameters()}]
    optimizer = torch.optim.SGD(groups, lr=LR, momentum=0.9)
    for epoch in range(args.epochs):
        model.train()
        entropies, distances = 0.0, 0.0
        for images, labels in train_loader:
            images = images.to(device, memory_format=torch.channels_last)
            outputs, logits = outputs_of(images)
            entropy = nn.functional.cross_entropy(logits, labels.to(device))
            distance = DELTA_TRADE_OFF * delta(source(images), outputs)
            optimizer.zero_grad()
            (entropy + distance).backward()
            optimizer.step()
            entropies, distances = entropies + entropy.item(), distances + distance.item()
        steps, right = len(train_loader), accuracy(model, val_loader, device)
        print(
            f"epoch {epoch + 1}: cross-entropy {entropies / steps:.3f}, DELTA {distances / steps:.3f}, "
            f"accuracy {right:.3f}"
        )

    torch.save(model.state_dict(), args.out)  # torchvision's names
    print(f"saved {args.out}")


if __name__ == "__main__":
    main()
