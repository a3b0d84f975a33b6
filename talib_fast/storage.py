"""Write files so that no half-written file is ever seen."""

import errno
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import IO

# how file systems on networks and in user space say that they have no such operation
UNSUPPORTED = (errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)


def synchronize(descriptor: int) -> None:
    """Have the disk hold an open file or folder, where the file system can do that."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


def write_atomically(path: str | os.PathLike, write: Callable[[IO[bytes]], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then move it to ``path`` in one step.

    A failure or an interrupt leaves the file at ``path`` as it was. Missing folders are made.

    Raises:
        OSError: the file can't be written. The error names ``path``, also where a writer such as torch's raises another
            error for it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file:
            write(file)
            file.flush()
            synchronize(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(cause, OSError) and cause.errno is not None:
            raise OSError(cause.errno, cause.strerror, str(path)) from error
        raise
