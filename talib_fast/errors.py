"""Errors of the command line, as one sentence each."""

import errno
import os
from collections.abc import Sequence

__all__ = ["UsageError", "UserError"]


class UserError(ValueError):
    """An error that the user can correct. Its message is one sentence that says what is wrong and what to do."""


class UsageError(UserError):
    """The command itself is wrong: an option, or something it names that does not exist."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class without one."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def count(number: int, thing: str) -> str:
    """A number with its noun: 1 image, 2 images, 2 classes."""
    plural = f"{thing}es" if thing.endswith("s") else f"{thing}s"
    return f"{number:,} {thing if number == 1 else plural}"


def listing(names: Sequence[str], most: int = 10) -> str:
    """The first names of a list, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more:,} more" if more > 0 else "")


def told(error: Exception) -> str:
    """An error as one sentence with a remedy."""
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
    """A path as text for any file and terminal. Bytes that are not UTF-8 become escapes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
