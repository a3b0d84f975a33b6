"""Small classifiers in folders, and images for them."""

from dataclasses import asdict

import numpy as np
import torch
from network_support import library
from PIL import Image

from talib_fast.images.preprocessing import Preprocessing
from talib_fast.inference import model

CLASSES = ("apple", "Fruit/pear", "Äpfel", "plum")
SMALL = "timm:test_resnet.r160_in1k", "fc"
PREPROCESSING = Preprocessing(64, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bicubic", 0.9)


def make_network(name, classes):
    source, _, name = name.rpartition(":")
    if source == "timm":
        return library("timm").create_model(name, num_classes=classes)
    return library("torchvision").models.get_model(name, num_classes=classes)


def make_model(folder, network=SMALL, classes=CLASSES, preprocessing=PREPROCESSING, **entries):
    """Save a network with random weights and the running statistics of random images."""
    name, head = network
    net = make_network(name, len(classes)).train()
    with torch.no_grad():
        for _ in range(20):
            net(torch.randn(4, 3, preprocessing.size, preprocessing.size))
    config = {
        "architecture": name.rpartition(":")[2],
        "library": name.rpartition(":")[0],
        "network": name,
        "head": head,
        "num_classes": len(classes),
        "classes": list(classes),
        "preprocessing": asdict(preprocessing),
        "method": "bss",
        "seed": 0,
        **entries,
    }
    model.save(folder, net.eval().state_dict(), config)
    return net


def make_image(seed=0, width=90, height=70):
    """An artificial photograph, smooth in space, with a colour."""
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def make_images(folder, classes, each=3):
    """Write ``class/number.png``, all of them different images."""
    paths = []
    for place, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for number in range(each):
            paths.append(folder / name / f"{number}.png")
            make_image(seed=100 * place + number).save(paths[-1])
    return paths
