"""Child processes of tests, and the signals of this one."""

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

PATIENCE = 1800  # seconds until a child process counts as hung; a loaded machine takes many times what an idle one does


def finish(process):
    """Exit code, output and errors of a process that must not hang."""
    try:
        out, err = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, out, err


@contextmanager
def handlers_kept() -> Iterator[None]:
    """Put back the signal handlers that the command line leaves."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
