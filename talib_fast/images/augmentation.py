"""Augmentation of training images, drawn again for every step."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .preprocessing import Preprocessing, transforms, without_far_ends

if TYPE_CHECKING:
    from PIL.Image import Image

SHIFTS = ("none", "shift", "shift_flip")  # applied to prepared images, a whole batch at a time
CROPS = ("standard", "randaugment")  # applied to images as they were read, one at a time
SHIFT = 1 / 16  # the largest shift, as a fraction of the side
SCALE = (0.08, 1.0)  # share of an image's area in the crop, torchvision's and timm's default
JITTER = 0.4  # of brightness, contrast and saturation, timm's default


class RandomCrops:
    """An RGB Pillow image → uint8 ``[3, S, S]``: a random crop, flipped at random, with changed colours.

    ``standard`` is torchvision's RandomResizedCrop, RandomHorizontalFlip and ColorJitter. ``randaugment`` has
    RandAugment instead of ColorJitter. The random numbers come from torch's global generator.
    """

    def __init__(self, how: str, preprocessing: Preprocessing) -> None:
        v2 = transforms()
        size, interpolation = preprocessing.size, v2.InterpolationMode(preprocessing.interpolation)
        colours = v2.ColorJitter(JITTER, JITTER, JITTER) if how == "standard" else v2.RandAugment()
        crop = v2.RandomResizedCrop(size, SCALE, interpolation=interpolation)
        self.transform: Any = v2.Compose([crop, v2.RandomHorizontalFlip(), colours, v2.PILToTensor()])
        # with sides of this length, the smallest crop of a square image has at least size × size pixels
        self.at_least = round(size / SCALE[0] ** 0.5)

    def __call__(self, image: "Image") -> Tensor:
        return self.transform(without_far_ends(image))


def shifted(
    images: Tensor, how: str, generator: torch.Generator, batch_size: int | None = None, part: slice = slice(None)
) -> Tensor:
    """Shift each image of uint8 [B, 3, S, S] by a few random pixels, fill with black, and mirror some images.

    Args:
        images: uint8 [B, 3, S, S]; they may be a ``part`` of a batch of ``batch_size``.
        how: one of SHIFTS.
        generator: source of the random numbers.
        batch_size: size of the whole batch; None: that of ``images``.
        part: the place of ``images`` in the batch. They change in the same way as in the whole batch.
    """
    if how == "none":
        return images
    count, _, size, _ = images.shape
    batch_size = count if batch_size is None else batch_size
    reach = max(1, round(size * SHIFT))
    offsets = torch.randint(0, 2 * reach + 1, (2, batch_size, 1), generator=generator)
    rows, columns = offsets[:, part] + torch.arange(size)
    if how == "shift_flip":
        mirrored = torch.rand(batch_size, 1, generator=generator)[part] < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    padded = F.pad(images, (reach, reach, reach, reach)).permute(0, 2, 3, 1)
    picked = padded[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2)
