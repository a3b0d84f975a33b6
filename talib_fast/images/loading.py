"""Images decoded and prepared by worker processes while the caller computes."""

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
    """One for each CPU core that this process may use, shared among the processes of torchrun, eight at most."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST_WORKERS, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def in_workers(dataset: "Dataset[T]", keys: Iterable[Any], workers: int, device: str = "cpu") -> Iterator[T]:
    """``dataset[key]`` for every key, in their order, by so many processes; by this one if there are none.

    ``device`` is where the items are used: on the CPU the processes leave it to whoever else can use it. Raises
    UserError where one of them is ended from outside, as it is when memory runs out.
    """
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=keys,
        num_workers=workers,
        collate_fn=unchanged,
        worker_init_fn=start_beside_others if device == "cpu" else start,
        pin_memory=device == "cuda",
        generator=torch.Generator().manual_seed(0),  # else it would draw a number from torch's own
    )
    try:
        yield from loader
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(f"a process that reads images has ended ({first_line(error)}): lower --workers") from error


def unchanged(item: T) -> T:
    return item


def start(worker: int) -> None:
    # Ctrl-C reaches every process of a terminal; the one that asked for the images ends its workers itself
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def start_beside_others(worker: int) -> None:
    # the threads of one operator wait for each other: where a worker takes the place of one, all of them stand still
    os.nice(LOWEST_PRIORITY)
    start(worker)


@dataclass(frozen=True)
class Loaded:
    """Some images: ``images`` uint8 [n, 3, S, S] of those at ``indices``, and the errors of others by index."""

    indices: list[int]
    images: Tensor
    errors: dict[int, ImageError]


@dataclass(frozen=True)
class Files:
    """Reads images in files, by their places."""

    paths: Sequence[str | PathLike]

    def __call__(self, index: int, at_least: int | None) -> "Image":
        return read(self.paths[index], at_least)


@dataclass(frozen=True)
class Prepared(Dataset[Loaded]):
    """Images read and prepared: asked for some indices it gives these, as :class:`Loaded`."""

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
    """The images in files, prepared, in batches and in order; behind a progress bar with the words ``show``."""
    batches = batched(range(len(sources)), batch_size)
    items = in_workers(Prepared(Files(sources), preprocessing), batches, min(workers, len(batches)))
    return progress(items, show, len(batches), show=bool(show))


def batched(indices: Sequence[int], batch_size: int) -> list[list[int]]:
    return [list(indices[first : first + batch_size]) for first in range(0, len(indices), batch_size)]
