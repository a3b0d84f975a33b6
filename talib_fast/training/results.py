"""The finished runs of an output folder, and the lock that lets one process write into it."""

import json
import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from ..errors import UserError, printable
from ..storage import UNSUPPORTED, write_atomically
from . import parallel
from .recipes import canonical

LOCK, HOLDER = ".lock", ".holder"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """A context in which no other process writes into the folder; raises UserError if another one has the lock."""
    try:
        lock = acquired(folder)
    except Timeout as error:
        raise UserError(
            f"{printable(folder)} is in use by {holder(folder)}: wait until that process has ended, or choose another "
            "--out"
        ) from error
    try:
        write_atomically(folder / HOLDER, lambda file: file.write(json.dumps(myself()).encode()))
        yield
    finally:
        (folder / HOLDER).unlink(missing_ok=True)
        lock.release()


def acquired(folder: Path) -> BaseFileLock:
    """Acquire the lock of the folder; raises Timeout if another process holds it.

    A network file system may have no locks. There, a file that only one process can create is used instead.
    """
    lock: BaseFileLock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise
    except (NotImplementedError, OSError) as error:  # filelock raises the former for a missing lock
        if isinstance(error, OSError) and error.errno not in UNSUPPORTED:
            raise
        lock = SoftFileLock(folder / f"{LOCK}.made")
        lock.acquire(timeout=0)
    return lock


def myself() -> dict[str, Any]:
    return {"process": os.getpid(), "host": platform.node(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}


def holder(folder: Path) -> str:
    try:
        held = json.loads((folder / HOLDER).read_text())
        return f"process {held['process']} on {held['host']} since {held['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # it has just taken the lock, or has just ended
        return "another process"


def name_of(method: str, seed: int, **result: Any) -> str:
    """The name of a run's files and folders."""
    return f"{method}-seed{seed}"


def predictions_file(folder: Path, run: dict[str, Any]) -> Path:
    """The CSV file of a run's predictions for the test images: file, class, predicted class and its probability."""
    return folder / "predictions" / f"{name_of(**run)}.csv"


class Results:
    """The runs and trials of an output folder, kept in its ``results.json``.

    Every rank holds them; only rank 0 writes the file.

    Args:
        folder: the output folder.
        settings: the settings that all its runs share.
        environment: further entries of ``results.json``: command, device, versions and images.

    Raises:
        UserError: the folder holds results of other settings, or a file that cannot be read as results.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], environment: dict[str, Any]) -> None:
        self.path = folder / "results.json"
        self.content: dict[str, Any] = {**environment, "settings": settings, "trials": [], "runs": []}
        if not self.path.exists():
            return
        try:
            previous = json.loads(self.path.read_text())
            self.content["runs"], self.content["trials"] = previous["runs"], previous.get("trials", [])
            difference = differences(previous["settings"], settings)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.path} cannot be read as results: remove it or choose another --out") from error
        if difference:
            shown = printable(folder)
            raise UserError(
                f"{shown} holds results of other settings ({difference}): choose another --out or remove {shown}"
            )

    @property
    def runs(self) -> list[dict[str, Any]]:
        return self.content["runs"]

    @property
    def trials(self) -> list[dict[str, Any]]:
        return self.content["trials"]

    def has(self, method: str, seed: int) -> bool:
        return any((canonical(run["method"]), run["seed"]) == (canonical(method), seed) for run in self.runs)

    def add(self, run: dict[str, Any]) -> None:
        self.runs.append(run)
        self.write()

    def forget(self, methods: tuple[str, ...], seeds: tuple[int, ...]) -> None:
        """Remove the runs of these methods and seeds, their kept models, and the methods' trials."""
        names = {canonical(method) for method in methods}
        gone = [run for run in self.runs if canonical(run["method"]) in names and run["seed"] in seeds]
        self.content["trials"] = [trial for trial in self.trials if canonical(trial["method"]) not in names]
        self.content["runs"] = [run for run in self.runs if run not in gone]
        self.write()
        for run in gone:
            if run.get("model"):  # the next training may keep another method's model
                shutil.rmtree(self.path.parent / run["model"], ignore_errors=True)

    def write(self) -> None:
        text = json.dumps(self.content, indent=1) + "\n"
        parallel.from_first(lambda: write_atomically(self.path, lambda file: file.write(text.encode())))


def differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The differences of two sets of settings, in words; empty if they are equal."""
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return ", ".join(f"{name} was {show(old.get(name))} and is now {show(new.get(name))}" for name in names)


def show(value: Any) -> str:
    return "not given" if value is None else str(value)
