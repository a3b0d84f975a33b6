"""Decode and prepare images in worker processes while the caller computes."""

import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import UserError, first_line
from ..progress import progress
from .decoding import ImageError, read
from .preprocessing import Preprocessing

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_WORKERS = 8
LOWEST_PRIORITY = 19

T = TypeVar("T")


def default_workers() -> int:
    """The default number of workers: one per usable CPU core, divided by torchrun's processes, at most eight."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST_WORKERS, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def in_workers(dataset: "Dataset[T]", keys: Iterable[Any], workers: int, device: str = "cpu") -> Iterator[T]:
    """``dataset[key]`` for every key, in order, computed by so many worker processes; 0: by this process.

    ``device`` is where the items are used. If it is the CPU, the workers run at the lowest priority, so that they do
    not slow training down. Raises UserError if a worker is ended from outside, for example because memory ran out.
    """
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=keys,
        num_workers=workers,
        collate_fn=unchanged,
        worker_init_fn=start_beside_others if device == "cpu" else start,
        pin_memory=device == "cuda",
        generator=torch.Generator().manual_seed(0),  # else the loader would draw from torch's global generator
    )
    try:
        yield from loader
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(f"a process that reads images has died ({first_line(error)}): lower --workers") from error


def unchanged(item: T) -> T:
    return item


def start(worker: int) -> None:
    # Ctrl-C reaches every process of a terminal; the parent process ends its workers itself
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def start_beside_others(worker: int) -> None:
    # The threads of one operator wait for each other. If a worker delays one of them, it delays all of them.
    os.nice(LOWEST_PRIORITY)
    start(worker)


@dataclass(frozen=True)
class Loaded:
    """A batch: ``images`` uint8 [n, 3, S, S] at ``indices``, and by index the errors of files that cannot be read."""

    indices: list[int]
    images: Tensor
    errors: dict[int, ImageError]


@dataclass(frozen=True)
class Files:
    """Reads the image file at an index."""

    paths: Sequence[str | PathLike]

    def __call__(self, index: int, at_least: int | None) -> "Image":
        return read(self.paths[index], at_least)


@dataclass(frozen=True)
class Prepared(Dataset[Loaded]):
    """A dataset of batches: for a list of indices, it reads and prepares these images and gives a :class:`Loaded`."""

    read_at: Callable[[int, int | None], "Image"]
    preprocessing: Preprocessing

    def __getitem__(self, indices: Sequence[int]) -> Loaded:
        found: dict[int, Tensor] = {}
        errors = {}
        for index in indices:
            try:
                found[index] = self.preprocessing(self.read_at(index, None))
            except ImageError as error:
                errors[index] = error
        size = self.preprocessing.size
        images = torch.stack(list(found.values())) if found else torch.empty(0, 3, size, size, dtype=torch.uint8)
        return Loaded(list(found), images, errors)


def loaded(
    sources: Sequence[str | PathLike],
    preprocessing: Preprocessing,
    batch_size: int = 32,
    workers: int = 0,
    show: str = "",
) -> Iterator[Loaded]:
    """Read and prepare image files, in batches and in order; ``show`` is the label of a progress bar (empty: none)."""
    batches = batched(range(len(sources)), batch_size)
    items = in_workers(Prepared(Files(sources), preprocessing), batches, min(workers, len(batches)))
    return progress(items, show, len(batches), show=bool(show))


def batched(indices: Sequence[int], batch_size: int) -> list[list[int]]:
    return [list(indices[first : first + batch_size]) for first in range(0, len(indices), batch_size)]
