"""Build the package in a copy of its tree."""

import importlib.metadata
import os
import subprocess
import sys
import zipfile
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import packages
import pytest

LIBRARY = packages.LIBRARY
NODES = f"talib_fast/_autograd{EXTENSION_SUFFIXES[0]}"


def copy_of_the_tree(folder: Path) -> Path:
    """A copy of the tree below ``folder``, which a test may build in and break."""
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
    """Build the wheel of ``source`` into its parent folder; returns the names in the wheel, and the build's output.

    The library of autograd nodes takes long, so it is left out unless ``TALIB_FAST_NO_AUTOGRAD="0"`` is given.
    """
    wheel, said = packages.build_wheel(source, source.parent, **{"TALIB_FAST_NO_AUTOGRAD": "1", **settings})
    return zipfile.ZipFile(wheel).namelist(), said


def wheel_of(source: Path) -> Path:
    (wheel,) = source.parent.glob("*.whl")
    return wheel


def info(source: Path, **settings: str) -> str:
    """The output of ``python -m talib_fast info`` with the wheel built from ``source``."""
    unpacked = source.parent / "unpacked"
    zipfile.ZipFile(wheel_of(source)).extractall(unpacked)
    done = subprocess.run(
        [sys.executable, "-m", "talib_fast", "info"],
        cwd=unpacked, capture_output=True, text=True, env={**os.environ, **settings},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout
