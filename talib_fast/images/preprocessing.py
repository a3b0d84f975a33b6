"""The preprocessing that a network needs: size, scaling, cropping, mean and standard deviation."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..libraries import needed

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Preprocessing"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
CROP_MODES = ("center", "squash")
LONGEST = 8  # a longer image (long side / short side) is cropped before scaling, which would take much memory


@dataclass(frozen=True)
class Preprocessing:
    """An RGB Pillow image → uint8 ``[3, size, size]``, scaled and cropped as timm and torchvision do in evaluation.

    Args:
        size: side of the result in pixels.
        mean, std: mean and standard deviation of the three channels, for values in [0, 1].
        interpolation: Pillow's name of the interpolation.
        crop_pct: the image is scaled to ``floor(size / crop_pct)`` pixels, and the centre is cropped.
        crop_mode: ``center`` scales the shorter side to that length, ``squash`` both sides.
    """

    size: int
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = "bilinear"
    crop_pct: float = 0.875
    crop_mode: str = "center"

    def __call__(self, image: "Image") -> Tensor:
        return self._transform(without_far_ends(image))

    @cached_property
    def _transform(self) -> Any:
        v2 = transforms()
        sides = [self.scaled] * (2 if self.crop_mode == "squash" else 1)
        resize = v2.Resize(sides, v2.InterpolationMode(self.interpolation))
        return v2.Compose([resize, v2.CenterCrop(self.size), v2.PILToTensor()])

    @property
    def at_least(self) -> int:
        """The side that an image may be reduced to before preprocessing, so that the result stays about as sharp."""
        return 2 * self.scaled

    @property
    def scaled(self) -> int:
        return math.floor(self.size / self.crop_pct + 1e-6)

    def normalize(self, images: Tensor) -> Tensor:
        """Normalise uint8 [B, 3, S, S] by mean and std → float32 on the same device, in channels_last."""
        mean = torch.tensor(self.mean, device=images.device).view(3, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(3, 1, 1)
        images = images.contiguous(memory_format=torch.channels_last)
        return (images.float() / 255 - mean) / std

    def __getstate__(self) -> dict[str, Any]:
        return asdict(self)  # workers and copies create their own transform


def transforms() -> Any:
    """The module torchvision.transforms.v2; raises UserError if torchvision is missing."""
    return needed("torchvision.transforms.v2", "preparing images")


def without_far_ends(image: "Image") -> "Image":
    """The image, or its middle if its longer side is more than ``LONGEST`` times its shorter side."""
    width, height = image.size
    most = LONGEST * min(width, height)
    if max(width, height) <= most:
        return image
    left, top = max(0, (width - most) // 2), max(0, (height - most) // 2)
    return image.crop((left, top, left + min(width, most), top + min(height, most)))


def as_floats(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
