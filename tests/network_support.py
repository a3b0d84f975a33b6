"""Networks of other packages, and small networks with unusual layers."""

import importlib.util
from collections import OrderedDict

import pytest
from torch import nn

from talib_fast.libraries import import_library


def small_net(classes=4):
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(3, 6, 3, padding=1),
            norm1=nn.BatchNorm2d(6),
            act1=nn.ReLU(inplace=True),
            conv2=nn.Conv2d(6, 8, 3, padding=1),
            norm2=nn.BatchNorm2d(8),
            act2=nn.ReLU(inplace=True),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            head=nn.Linear(8, classes),
        )
    )


class Branching(nn.Module):
    """Runs its layers in another order than that of their declaration, one of them twice and one never."""

    def __init__(self):
        super().__init__()
        self.late, self.early, self.twice, self.never = (nn.Linear(3, 3) for _ in range(4))

    def forward(self, x, scale=1.0):
        return self.late(self.twice(self.twice(self.early(x)))) * scale


def library(name):
    """A package that the tests can do without; if torchvision's operators are missing, packages that use them fail."""
    if importlib.util.find_spec(name.partition(".")[0]) and importlib.util.find_spec("torchvision"):
        import_library("torchvision")
    return pytest.importorskip(name)
