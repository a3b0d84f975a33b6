"""Child processes of tests."""

import subprocess

PATIENCE = 1800  # seconds until a child process counts as hung; a loaded machine takes many times what an idle one does


def finish(process):
    """Exit code, output and errors of a process that must not hang."""
    try:
        out, err = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, out, err
