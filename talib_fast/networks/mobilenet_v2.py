"""MobileNetV2 with torchvision's parameter names, so that torchvision's weights fit."""

import torch
from torch import Tensor, nn

DELTA_LAYERS = ("features.6", "features.13", "features.17")  # the last maps of strides 8, 16 and 32
HEAD_NAME = "classifier.1"


class InvertedResidual(nn.Module):
    """A 1x1 convolution that expands, a 3x3 convolution per channel, and a 1x1 projection without activation."""

    def __init__(self, c_in: int, c_out: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = c_in * expansion
        expand = [conv_bn_relu(c_in, hidden, kernel=1)] if expansion > 1 else []
        self.conv = nn.Sequential(
            *expand,
            conv_bn_relu(hidden, hidden, kernel=3, stride=stride, groups=hidden),
            nn.Conv2d(hidden, c_out, 1, bias=False),
            nn.BatchNorm2d(c_out),
        )
        self.use_res_connect = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.use_res_connect else self.conv(x)


class MobileNetV2(nn.Module):
    """The convolutional part of MobileNetV2 (Sandler et al., 2018, table 2): [B, 3, S, S] -> [B, 1280, S/32, S/32]."""

    # expansion t, channels c, repeats n, stride of the first repeat s
    BLOCKS = (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )
    out_features = 1280

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [conv_bn_relu(3, 32, kernel=3, stride=2)]
        width = 32
        for expansion, channels, repeats, stride in self.BLOCKS:
            for repeat in range(repeats):
                layers.append(InvertedResidual(width, channels, stride if repeat == 0 else 1, expansion))
                width = channels
        layers.append(conv_bn_relu(width, self.out_features, kernel=1))
        self.features = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x)


class MobileNetV2Classifier(MobileNetV2):
    """MobileNetV2 with its head: [B, 3, S, S] -> [B, num_classes]."""

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(self.out_features, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        pooled = nn.functional.adaptive_avg_pool2d(self.features(x), 1)
        return self.classifier(torch.flatten(pooled, 1))


def conv_bn_relu(c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution without bias, batch norm and ReLU6."""
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(c_out),
        nn.ReLU6(inplace=True),
    )
