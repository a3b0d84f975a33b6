"""Progress bars, where tqdm is installed."""

import contextlib
import operator
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def progress(iterable: Iterable[T], description: str, total: int | None = None, show: bool = True) -> Iterator[T]:
    """Iterate over ``iterable`` once and show a progress bar on stderr, if that is a terminal and tqdm is installed."""
    if not show:
        yield from iterable
        return
    try:
        from tqdm.auto import tqdm
    except ImportError:
        yield from iterable
        return
    if total is None:
        with contextlib.suppress(Exception):  # a loader without a length may raise any error
            total = operator.length_hint(iterable) or None
    # updated by hand: tqdm.auto calls iter() one more time, which starts a data loader's workers twice
    with tqdm(desc=description, total=total, leave=False, disable=None) as bar:
        for item in iterable:
            yield item
            bar.update()
