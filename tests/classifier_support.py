"""Small parts that the classifiers' tests share."""

import torch
from torch import nn


class Backbone(nn.Module):
    out_features = 6

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.bn = nn.BatchNorm2d(6)

    def forward(self, x):
        return self.bn(self.conv(x))


class Vectors(nn.Module):
    """A backbone whose maps are its inputs."""

    out_features = 3

    def forward(self, x):
        return x


def images(batch=4, device="cpu", dtype=torch.float32):
    return torch.randn(batch, 3, 7, 5, device=device, dtype=dtype)


def bottleneck():
    return nn.Sequential(nn.Linear(6, 2), nn.ReLU())
