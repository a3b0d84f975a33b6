"""The CPU sources for other compilers than the machine's own, and for another processor, as far as these are there."""

import shutil
from pathlib import Path

import compilers
import pytest
from compiler_support import needs_compiler

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
@pytest.mark.parametrize("compiler", compilers.COMPILERS)
def test_they_compile(compiler, source):
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    assert compilers.check(compiler, source) == ""


@needs_compiler
def test_faults_are_found(tmp_path):
    source = tmp_path / "source.cpp"
    for code, fault in (
        ("int f() { return 1; }", ""),
        ("int f() { return a; }", ":1:18: error: "),
        ("static int f() { return 1; }", ":1:12: error: "),  # a warning
    ):
        source.write_text(f"{code}\n")
        found = compilers.check("c++", source)
        assert found.startswith(fault and f"{source}{fault}") and bool(found) == bool(fault)


def test_a_compiler_that_was_named_must_be_there(capsys):
    assert compilers.main(["no-such-compiler"]) == 1
    assert capsys.readouterr().err == "no-such-compiler: is not installed\n"
