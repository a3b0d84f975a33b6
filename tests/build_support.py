"""Builds of the package in a copy of its tree."""

import importlib.metadata
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import packages
import pytest

LIBRARY = packages.LIBRARY


def copy_of_the_tree(folder: Path) -> Path:
    """A copy below ``folder``, to build in and to break."""
    for package, oldest in (("pip", 21), ("setuptools", 77)):
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"no {package}")
        if int(found.partition(".")[0]) < oldest:
            pytest.skip(f"{package} {found} is older than {oldest}")
    try:
        packages.copy_sources(packages.ROOT, folder / "source")
    except packages.Failed as failed:
        pytest.skip(str(failed))
    return folder / "source"


def build_wheel(source: Path, **settings: str) -> tuple[list[str], str]:
    """The names in the wheel built from ``source``, which lies beside it then, and what the build said."""
    wheel, said = packages.build_wheel(source, source.parent, **settings)
    return zipfile.ZipFile(wheel).namelist(), said


def info(source: Path, **settings: str) -> str:
    """What ``python -m talib_fast info`` prints with the wheel built from ``source``."""
    (wheel,) = source.parent.glob("*.whl")
    unpacked = source.parent / "unpacked"
    zipfile.ZipFile(wheel).extractall(unpacked)
    done = subprocess.run(
        [sys.executable, "-m", "talib_fast", "info"],
        cwd=unpacked, capture_output=True, text=True, env={**os.environ, **settings},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout
