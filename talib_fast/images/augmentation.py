"""Changes of training images, drawn anew for every step."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .preprocessing import Preprocessing, transforms, without_far_ends

if TYPE_CHECKING:
    from PIL.Image import Image

SHIFTS = ("none", "shift", "shift_flip")  # of prepared images, a whole batch at a time
CROPS = ("standard", "randaugment")  # of images as they were read, one at a time
SHIFT = 1 / 16  # largest shift, as a fraction of the side
SCALE = (0.08, 1.0)  # share of an image's area that is cut out, torchvision's and timm's default
JITTER = 0.4  # of brightness, contrast and saturation: timm's default


class RandomCrops:
    """An RGB image of Pillow's → uint8 ``[3, S, S]``: a random part of it, maybe mirrored, its colours changed.

    ``standard``: RandomResizedCrop, RandomHorizontalFlip and ColorJitter of torchvision; ``randaugment``: RandAugment
    in the last one's place. Draws from torch's global generator.
    """

    def __init__(self, how: str, preprocessing: Preprocessing) -> None:
        v2 = transforms()
        size, interpolation = preprocessing.size, v2.InterpolationMode(preprocessing.interpolation)
        colours = v2.ColorJitter(JITTER, JITTER, JITTER) if how == "standard" else v2.RandAugment()
        crop = v2.RandomResizedCrop(size, SCALE, interpolation=interpolation)
        self.transform: Any = v2.Compose([crop, v2.RandomHorizontalFlip(), colours, v2.PILToTensor()])
        # how long a side must be for the smallest part of a square image to be as large as what is made of it
        self.at_least = round(size / SCALE[0] ** 0.5)

    def __call__(self, image: "Image") -> Tensor:
        return self.transform(without_far_ends(image))


def shifted(
    images: Tensor, how: str, generator: torch.Generator, batch_size: int | None = None, part: slice = slice(None)
) -> Tensor:
    """Shift every image (uint8 [B, 3, S, S]) by a few pixels of its own, filling with black; maybe mirror it.

    The images may be ``part`` of a batch of ``batch_size``; they are changed as they would be in the whole batch.
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
