"""What the command line tells its user, one sentence at a time."""

import errno
import os
from collections.abc import Sequence

__all__ = ["UsageError", "UserError"]


class UserError(ValueError):
    """Something the user can mend; its message is one sentence that says what is wrong and what to do."""


class UsageError(UserError):
    """The command itself is wrong: an option, or something it names that is not there."""


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def count(number: int, thing: str) -> str:
    """The number and its thing: 1 image, 2 images, 2 classes."""
    plural = f"{thing}es" if thing.endswith("s") else f"{thing}s"
    return f"{number:,} {thing if number == 1 else plural}"


def listing(names: Sequence[str], most: int = 10) -> str:
    """Some names, the first of many."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more:,} more" if more > 0 else "")


def told(error: Exception) -> str:
    """One sentence with a remedy; what was finished before an error of the system's is always kept."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    place = "a file" if error.filename is None else printable(error.filename)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return (
            f"{place} cannot be written ({error.strerror}), what was finished before is kept: make room, and give the "
            "same command again"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{place} cannot be used ({error.strerror}): change its permissions, or choose another place"
    return f"{place} cannot be used ({error.strerror})"


def printable(path: str | os.PathLike) -> str:
    """A path as text that any file and terminal can hold: bytes that are no UTF-8 become escapes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
