"""Check all image files before any work is done: find damaged files, and files with the same content."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch.utils.data import Dataset

from ..progress import progress
from .decoding import ImageError, read
from .loading import batched, in_workers

BATCH = 16


@dataclass(frozen=True)
class Checked:
    """One file: the SHA-256 of its content, and why it cannot be read as an image (None if it can)."""

    digest: str
    damage: str | None


@dataclass(frozen=True)
class _Files(Dataset[list[Checked]]):
    paths: Sequence[Path]

    def __getitem__(self, indices: Sequence[int]) -> list[Checked]:
        return [check_file(self.paths[index]) for index in indices]


def check_file(path: Path) -> Checked:
    """Read and decode a file."""
    try:
        content = path.read_bytes()
    except OSError as error:
        return Checked("", error.strerror or str(error))
    damage = None
    try:
        read(content)
    except ImageError as error:
        damage = error.reason
    return Checked(hashlib.sha256(content).hexdigest(), damage)


def check_files(paths: Sequence[Path], workers: int, show: bool) -> list[Checked]:
    """Read and decode every file with so many worker processes; ``show`` shows a progress bar."""
    batches = batched(range(len(paths)), BATCH)
    items = in_workers(_Files(paths), batches, min(workers, len(batches)))
    return [checked for batch in progress(items, "Checking images", len(batches), show) for checked in batch]


def duplicates(checked: Sequence[Checked]) -> list[list[int]]:
    """Groups of two or more files with the same content, as lists of indices, in order."""
    groups: dict[str, list[int]] = {}
    for index, file in enumerate(checked):
        if file.damage is None:
            groups.setdefault(file.digest, []).append(index)
    return [group for group in groups.values() if len(group) > 1]
