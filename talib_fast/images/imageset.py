"""Labelled images that are read only when they are needed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import printable
from .folder import ImageFiles
from .loading import Files

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class ImageSet:
    """Images and their classes.

    Args:
        classes: names of the classes.
        labels: int64 [N], indices into ``classes``.
        names: one name per image, for files the printable path.
        read_at: ``read_at(index, at_least)`` gives an RGB Pillow image; see :func:`decoding.read`.
        small: whether all images, prepared, fit into memory.
    """

    classes: tuple[str, ...]
    labels: Tensor
    names: tuple[str, ...]
    read_at: Callable[[int, int | None], "Image"]
    small: bool = False

    def part(self, indices: Tensor) -> "ImageSet":
        """The images at ``indices``."""
        chosen = indices.tolist()
        names = tuple(self.names[index] for index in chosen)
        return ImageSet(self.classes, self.labels[indices], names, _Part(self.read_at, chosen), self.small)

    def joined(self, other: "ImageSet") -> "ImageSet":
        """These images followed by those of ``other``, which has the same classes."""
        labels, names = torch.cat([self.labels, other.labels]), self.names + other.names
        read_at = _Joined(self.read_at, len(self), other.read_at)
        return ImageSet(self.classes, labels, names, read_at, self.small and other.small)

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class _Joined:
    first: Callable[[int, int | None], "Image"]
    length: int
    second: Callable[[int, int | None], "Image"]

    def __call__(self, index: int, at_least: int | None) -> "Image":
        if index < self.length:
            return self.first(index, at_least)
        return self.second(index - self.length, at_least)


@dataclass(frozen=True)
class _Part:
    read_at: Callable[[int, int | None], "Image"]
    indices: Sequence[int]

    def __call__(self, index: int, at_least: int | None) -> "Image":
        return self.read_at(self.indices[index], at_least)


def from_files(files: ImageFiles) -> ImageSet:
    names = tuple(printable(path) for path in files.paths)
    return ImageSet(files.classes, files.labels, names, Files(files.paths))
