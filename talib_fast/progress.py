"""A progress bar where tqdm is installed, silence where it is not."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def progress(iterable: Iterable[T], description: str, total: int | None = None, show: bool = True) -> Iterator[T]:
    """Iterate over ``iterable`` behind a progress bar on stderr, if that is a terminal."""
    if show:
        try:
            from tqdm.auto import tqdm
        except ImportError:
            pass
        else:
            return iter(tqdm(iterable, desc=description, total=total, leave=False, disable=None))
    return iter(iterable)
