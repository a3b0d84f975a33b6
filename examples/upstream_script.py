"""A script of the Transfer-Learning-Library, faster by one line.

The script is written for ``tllib``, with StochNorm and BSS. Its first line, ``import talib_fast; talib_fast.patch()``,
replaces upstream's classes by those of talib_fast as the script imports them.

    git clone https://github.com/thuml/Transfer-Learning-Library
    pip install torchvision
    PYTHONPATH=Transfer-Learning-Library python examples/upstream_script.py
    PYTHONPATH=Transfer-Learning-Library python examples/upstream_script.py --data photographs --pretrained

Without options the images are generated and the weights are random. ``photographs`` holds ``train`` and ``val`` with a
folder for each class in both.
"""

import talib_fast

talib_fast.patch()  # before the imports from tllib; the rest of the script knows nothing of talib_fast

import argparse
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from generated_images import generate
from tllib.modules.classifier import Classifier
from tllib.normalization.stochnorm import convert_model
from tllib.regularization.bss import BatchSpectralShrinkage
from torch.optim import SGD
from torch.utils.data import DataLoader
from torchvision import models, transforms
from torchvision.datasets import ImageFolder

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def main(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    root = args.data or generate()
    transform = transforms.Compose(
        [
            transforms.Resize((args.image_size, args.image_size)),
            transforms.ToTensor(),
            transforms.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
        ]
    )
    train_dataset, val_dataset = ImageFolder(root / "train", transform), ImageFolder(root / "val", transform)
    train_loader = DataLoader(train_dataset, batch_size=16, shuffle=True, num_workers=2, drop_last=True)
    val_loader = DataLoader(val_dataset, batch_size=16, num_workers=2)

    resnet = models.resnet18(weights="DEFAULT" if args.pretrained else None)
    backbone = nn.Sequential(*list(resnet.children())[:-2])
    backbone.out_features = resnet.fc.in_features
    classifier = Classifier(backbone, len(train_dataset.classes), finetune=args.pretrained).to(device)
    classifier = convert_model(classifier, p=0.5)
    bss_module = BatchSpectralShrinkage(k=1)
    print("Classifier and BSS come from", Classifier.__module__, "and", BatchSpectralShrinkage.__module__)

    optimizer = SGD(classifier.get_parameters(0.01), 0.01, momentum=0.9, weight_decay=5e-4, nesterov=True)
    for epoch in range(args.epochs):
        classifier.train()
        total = 0.0
        for x, labels in train_loader:
            x, labels = x.to(device), labels.to(device)
            y, f = classifier(x)
            loss = F.cross_entropy(y, labels) + 1e-3 * bss_module(f)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()

        classifier.eval()
        with torch.no_grad():
            right = sum((classifier(x.to(device)).argmax(1) == y.to(device)).sum().item() for x, y in val_loader)
        accuracy = right / len(val_dataset)
        print(f"epoch {epoch + 1}: loss {total / len(train_loader):.3f}, accuracy {accuracy:.3f}")

    args.out.parent.mkdir(parents=True, exist_ok=True)
    torch.save(classifier.state_dict(), args.out)
    print(f"saved {args.out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="StochNorm and BSS for Finetuning")
    parser.add_argument("--data", type=Path, help="root path of dataset, with train/CLASS and val/CLASS")
    parser.add_argument("--pretrained", action="store_true")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/upstream_script.pt"))
    main(parser.parse_args())
