"""Marks for tests that need a compiler: an installed wheel is tested where there is none."""

import os
import shlex
import shutil

import pytest


def needs(default: str) -> pytest.MarkDecorator:
    """Skip without the C++ compiler that ``CXX`` names, or else the ``default``."""
    compiler = shlex.split(os.environ.get("CXX") or default)[0]
    return pytest.mark.skipif(shutil.which(compiler) is None, reason=f"no C++ compiler {compiler}")


needs_compiler = needs("c++")  # as setup.py looks for one
needs_inductor = needs("g++")  # as torch's inductor does
