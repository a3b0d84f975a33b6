"""A progress bar where tqdm is installed, silence where it is not."""

import contextlib
import operator
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def progress(iterable: Iterable[T], description: str, total: int | None = None, show: bool = True) -> Iterator[T]:
    """Iterate over ``iterable``, once, behind a progress bar on stderr, if that is a terminal."""
    if not show:
        yield from iterable
        return
    try:
        from tqdm.auto import tqdm
    except ImportError:
        yield from iterable
        return
    if total is None:
        with contextlib.suppress(Exception):  # a loader that has no length may say so by any error
            total = operator.length_hint(iterable) or None
    # driven by hand, as tqdm.auto calls iter() once more than it iterates, which starts a data loader's workers twice
    with tqdm(desc=description, total=total, leave=False, disable=None) as bar:
        for item in iterable:
            yield item
            bar.update()
