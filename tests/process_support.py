"""Child processes of tests, and the signal handlers of this process."""

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

PATIENCE = 1800  # seconds until a child process counts as hung; a loaded machine is many times slower than an idle one


def finish(process):
    """The exit code, stdout and stderr of a process; fails if it hangs."""
    try:
        out, err = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, out, err


@contextmanager
def handlers_kept() -> Iterator[None]:
    """A context that restores the signal handlers, which the command line changes."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
