"""DELTA in a LightningModule.

DELTA draws the feature maps of the trained network to those of the pretrained network, which runs as a frozen copy. A
checkpoint keeps a fingerprint of the frozen network, not its weights. The script loads its own checkpoint to show how.

    pip install lightning torchvision
    python examples/lightning_delta.py
    python examples/lightning_delta.py --data photographs --pretrained --image-size 224 --epochs 20

Without options the images are generated and the weights are random. ``photographs`` holds ``train`` and ``val`` with a
folder for each class in both.

DELTA: DEep Learning Transfer using Feature Map with Attention, ICLR 2019, https://openreview.net/forum?id=rkgbwsAcYm
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import lightning
import torch
from generated_images import generate
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.models import resnet18

from talib_fast.finetune.delta import BehavioralRegularization, IntermediateLayerGetter
from talib_fast.finetune.frozen import frozen

LAYERS = ["layer1.1.conv2", "layer2.1.conv2", "layer3.1.conv2", "layer4.1.conv2"]
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the images that the published weights have seen


class Delta(lightning.LightningModule):
    """Fine-tunes a ResNet with DELTA.

    Args:
        network: the pretrained ResNet; it gets a new head and is trained.
        num_classes: number of classes of the new task.
        lr: learning rate of the backbone; the head's is ten times as high.
        trade_off: weight of DELTA, whose distance is a sum over batch, channels and positions.
    """

    def __init__(self, network: nn.Module, num_classes: int, lr: float = 1e-3, trade_off: float = 1e-4):
        super().__init__()
        self.source = frozen(network, LAYERS)  # Lightning moves it; it is in no checkpoint and no optimizer
        self.network = network
        self.network.fc = nn.Linear(network.fc.in_features, num_classes)  # after frozen(): a head that no one else has
        self.outputs_of = IntermediateLayerGetter(self.network, LAYERS)
        self.behavior = BehavioralRegularization()
        self.lr, self.trade_off = lr, trade_off

    def training_step(self, batch):
        images, labels = batch
        outputs, logits = self.outputs_of(images)
        entropy = nn.functional.cross_entropy(logits, labels)
        delta = self.trade_off * self.behavior(self.source(images), outputs)
        self.log_dict({"entropy": entropy, "delta": delta}, on_step=False, on_epoch=True)
        return entropy + delta

    def validation_step(self, batch):
        images, labels = batch
        right = (self.network(images).argmax(1) == labels).float().mean()
        self.log("accuracy", right, batch_size=len(labels))

    def on_train_epoch_end(self):
        said = ", ".join(f"{name} {value:.3f}" for name, value in self.trainer.callback_metrics.items())
        print(f"epoch {self.current_epoch + 1}: {said}")

    def configure_optimizers(self):
        backbone = [parameter for name, parameter in self.network.named_parameters() if not name.startswith("fc.")]
        groups = [{"params": backbone}, {"params": self.network.fc.parameters(), "lr": 10 * self.lr}]
        return torch.optim.SGD(groups, lr=self.lr, momentum=0.9)


def pretrained_network(args: argparse.Namespace) -> nn.Module:
    torch.manual_seed(args.seed)  # the weights are the same in each call, random or not
    return resnet18(weights="DEFAULT" if args.pretrained else None)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="DELTA in a LightningModule.")
    parser.add_argument(
        "--data", type=Path, help="folder with train/CLASS and val/CLASS; generated images if not given"
    )
    parser.add_argument("--pretrained", action="store_true", help="start from torchvision's published weights")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/lightning_delta"), help="folder of both files")
    args = parser.parse_args(argv)
    data = args.data or generate()

    normalise = [transforms.ToTensor(), transforms.Normalize(MEAN, DEVIATION)]
    size = (args.image_size, args.image_size)
    plain = transforms.Compose([transforms.Resize(size), *normalise])
    augmented = transforms.Compose(
        [transforms.RandomResizedCrop(size, (0.5, 1)), transforms.RandomHorizontalFlip(), *normalise]
    )
    train, val = ImageFolder(data / "train", augmented), ImageFolder(data / "val", plain)
    train_loader = DataLoader(train, 16, shuffle=True, drop_last=True, num_workers=2, persistent_workers=True)
    val_loader = DataLoader(val, 16, num_workers=2, persistent_workers=True)

    network = pretrained_network(args)
    module = Delta(network, len(train.classes))
    trainer = lightning.Trainer(
        max_epochs=args.epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        log_every_n_steps=1,
        enable_model_summary=False,
    )
    trainer.fit(module, train_loader, val_loader)

    trainer.save_checkpoint(args.out / "last.ckpt")
    # Needs the pretrained network again; with another one it raises.
    restored = Delta.load_from_checkpoint(
        args.out / "last.ckpt", network=pretrained_network(args), num_classes=len(train.classes)
    )
    trainer.validate(restored, val_loader, verbose=False)
    print(f"accuracy of the checkpoint {trainer.callback_metrics['accuracy']:.3f}")
    torch.save(restored.network.state_dict(), args.out / "resnet18.pt")  # torchvision's names
    print(f"saved {args.out}")


if __name__ == "__main__":
    main()
