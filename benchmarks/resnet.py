"""ResNet-50 (https://arxiv.org/abs/1512.03385), with modules named and strides placed as in torchvision."""

from torch import Tensor, nn

CHANNEL_LAYERS = ("layer1.2.conv3", "layer2.3.conv3", "layer3.5.conv3", "layer4.2.conv3")  # DELTA's: each stage's last


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int, first: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = (
            nn.Sequential(nn.Conv2d(inputs, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width))
            if first
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class ResNet50(nn.Module):
    """Images [B, 3, H, W] → logits [B, classes]; the first convolution gives ``width`` channels."""

    def __init__(self, width: int = 64, classes: int = 1000) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        self.layer1 = self._stage(width, width, 3, 1)
        self.layer2 = self._stage(4 * width, 2 * width, 4, 2)
        self.layer3 = self._stage(8 * width, 4 * width, 6, 2)
        self.layer4 = self._stage(16 * width, 8 * width, 3, 2)
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(32 * width, classes)

    @staticmethod
    def _stage(inputs: int, width: int, blocks: int, stride: int) -> nn.Sequential:
        rest = (Bottleneck(4 * width, width, 1, False) for _ in range(blocks - 1))
        return nn.Sequential(Bottleneck(inputs, width, stride, True), *rest)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))
