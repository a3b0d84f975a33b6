"""Batches of images for training, validation and test.

A batch is a pure function of the seed and the step's number, so an interrupted run resumes without sampler state.
Worker processes read a file each time it is needed, so memory holds only a few batches. Small sets that are read in
order again and again stay in memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..images.augmentation import SHIFTS, RandomCrops, shifted
from ..images.decoding import ImageError
from ..images.imageset import ImageSet
from ..images.loading import Prepared, batched, in_workers
from ..images.preprocessing import Preprocessing
from . import parallel
from .splits import Splits, mixed_seed, seeded_generator

READ_PIXELS = 2_000_000  # the most pixels of a batch that is read in order, to test or to prepare
HELD_BYTES = 2**27  # the largest prepared set that stays in memory after it was read in order


@dataclass(frozen=True)
class Batch:
    """One training step's images: views (float32 [B, 3, S, S] each), labels [B] and indices in the training set [B]."""

    views: tuple[Tensor, ...]
    labels: Tensor
    indices: Tensor

    @property
    def images(self) -> Tensor:
        return self.views[0]


class InOrder:
    """A loader of (images, labels) in order and without augmentation; it can be iterated many times."""

    def __init__(self, images: ImageSet, preprocessing: Preprocessing, device: torch.device, workers: int = 0) -> None:
        self.images, self.preprocessing, self.device, self.workers = images, preprocessing, device, workers
        self.labels = images.labels
        self.batch_size = max(1, min(100, READ_PIXELS // preprocessing.size**2))
        self._batches: list[Tensor] | None = None  # all prepared batches, once they were read
        self._parts: dict[str, InOrder] = {}

    def __len__(self) -> int:
        return -(-len(self.labels) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        batches = batched(range(len(self.labels)), self.batch_size)
        for batch, images in zip(batches, self._prepared(batches), strict=True):
            labels = self.labels[batch].to(self.device)
            yield self.preprocessing.normalize(images.to(self.device, non_blocking=True)), labels

    def _prepared(self, batches: list[list[int]]) -> Iterator[Tensor]:
        if self.images.small:
            yield from (self.held[batch] for batch in batches)
            return
        if self._batches is not None:
            yield from self._batches
            return
        dataset, read = Prepared(self.images.read_at, self.preprocessing), []
        fits = 3 * self.preprocessing.size**2 * len(self.labels) <= HELD_BYTES
        for item in in_workers(dataset, batches, min(self.workers, len(batches)), self.device.type):
            for error in item.errors.values():
                raise error
            if fits:
                read.append(item.images)
            yield item.images
        if fits:
            self._batches = read

    @cached_property
    def held(self) -> Tensor:
        """All images, prepared: uint8 [N, 3, S, S]."""
        return torch.stack([self.preprocessing(self.images.read_at(i, None)) for i in range(len(self.images))])

    def part(self, rows: slice) -> "InOrder":
        """A loader of some of the images; equal ``rows`` give the same object."""
        part = self._parts.get(str(rows))
        if part is None:
            chosen = self.images.part(torch.arange(len(self.images))[rows])
            part = self._parts[str(rows)] = InOrder(chosen, self.preprocessing, self.device, self.workers)
            if self.images.small:
                part.held = self.held[rows]
        return part


@dataclass(frozen=True)
class Steps(Dataset["tuple[list[Tensor], Tensor] | ImageError"]):
    """A dataset of steps: ``[step]`` is (views, indices of the images), or the error of an image.

    Each view is uint8 [B, 3, S, S]. With several ranks, each rank takes its share of every batch.
    """

    train: InOrder
    seed: int
    batch_size: int
    augmentation: str
    views: int
    share: slice

    def __getitem__(self, step: int) -> tuple[list[Tensor], Tensor] | ImageError:
        indices = self._indices(step)[self.share]
        try:
            views = self._shifted(step, indices) if self.augmentation in SHIFTS else self._cropped(step, indices)
        except ImageError as error:
            return error
        return views, indices

    def _shifted(self, step: int, indices: Tensor) -> list[Tensor]:
        images = self.train.held[indices] if self.train.images.small else self._prepared(indices)
        generator = seeded_generator(self.seed, "augment", step)
        return [
            shifted(images, self.augmentation, generator, self.batch_size, self.share).contiguous()
            for _ in range(self.views)
        ]

    def _prepared(self, indices: Tensor) -> Tensor:
        prepare, images = self.train.preprocessing, self.train.images
        return torch.stack([prepare(images.read_at(index, prepare.at_least)) for index in indices.tolist()])

    def _cropped(self, step: int, indices: Tensor) -> list[Tensor]:
        crops = self._crops
        views: list[list[Tensor]] = [[] for _ in range(self.views)]
        with torch.random.fork_rng(devices=[]):
            for place, index in enumerate(indices.tolist(), self.share.start or 0):
                image = self.train.images.read_at(index, crops.at_least)
                for number, view in enumerate(views):
                    torch.manual_seed(mixed_seed(self.seed, "augment", step, number, place))
                    view.append(crops(image))
        return [torch.stack(view) for view in views]

    @cached_property
    def _crops(self) -> RandomCrops:
        return RandomCrops(self.augmentation, self.train.preprocessing)

    def _indices(self, step: int) -> Tensor:
        # The training set, shuffled again for every epoch, forms one long stream. A step takes the next part of it.
        count = len(self.train.labels)
        first = step * self.batch_size
        epochs = range(first // count, (first + self.batch_size - 1) // count + 1)
        stream = torch.cat(
            [torch.randperm(count, generator=seeded_generator(self.seed, "order", epoch)) for epoch in epochs]
        )
        start = first - epochs.start * count
        return stream[start : start + self.batch_size]


class TaskData:
    """The training, validation and test images of one seed's runs; ``test`` is None in a trial.

    ``knowledge`` holds, by method name, what :meth:`Method.prepare` found about the training images.

    Args:
        augmentation: how training images are changed: one of SHIFTS or CROPS.
        workers: number of processes that read files.
    """

    def __init__(
        self,
        splits: Splits,
        preprocessing: Preprocessing,
        *,
        seed: int,
        batch_size: int,
        augmentation: str,
        device: torch.device,
        workers: int = 0,
    ) -> None:
        self.num_classes = len(splits.train.classes)
        self.knowledge: dict[str, dict[str, Tensor]] = {}
        self.seed, self.batch_size, self.augmentation = seed, batch_size, augmentation
        self.device, self.workers = device, workers
        self.train = InOrder(splits.train, preprocessing, device, workers)
        self.val = None if splits.val is None else InOrder(splits.val, preprocessing, device, workers)
        self.test = None if splits.test is None else InOrder(splits.test, preprocessing, device, workers)

    def batches(self, first: int, last: int, views: int = 1) -> Iterator[Batch]:
        """The batches of the steps in [first, last), or this rank's shares of them.

        Every image occurs once per epoch. Each view of an image has its own augmentation.
        """
        workers = 0 if self.train.images.small and self.augmentation in SHIFTS else self.workers
        for item in in_workers(self._steps(views), range(first, last), workers, self.device.type):
            yield self._on_device(item)

    def batch(self, step: int, views: int = 1) -> Batch:
        """The batch of one step, read by this process."""
        return self._on_device(self._steps(views)[step])

    def _steps(self, views: int) -> Steps:
        share = parallel.share(self.batch_size)
        return Steps(self.train, self.seed, self.batch_size, self.augmentation, views, share)

    def _on_device(self, item: tuple[list[Tensor], Tensor] | ImageError) -> Batch:
        if isinstance(item, ImageError):
            raise item
        images, indices = item
        normalize = self.train.preprocessing.normalize
        return Batch(
            tuple(normalize(view.to(self.device, non_blocking=True)) for view in images),
            self.train.labels[indices].to(self.device),
            indices.to(self.device),
        )
