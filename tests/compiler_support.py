"""Marks for tests that need a compiler; the tests of an installed wheel run without one."""

import os
import shlex
import shutil

import pytest


def needs(default: str) -> pytest.MarkDecorator:
    """A mark that skips without the C++ compiler that ``CXX`` names; without ``CXX``, without the ``default``."""
    compiler = shlex.split(os.environ.get("CXX") or default)[0]
    return pytest.mark.skipif(shutil.which(compiler) is None, reason=f"no C++ compiler {compiler}")


needs_compiler = needs("c++")  # the default of setup.py
needs_inductor = needs("g++")  # the default of torch's inductor
