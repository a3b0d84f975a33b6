"""What compiles the autograd nodes for other versions of torch, on small sources; nothing is downloaded."""

import re
import sys
import zipfile
from pathlib import Path

import autograd_versions
import build_parts
import pytest
from compiler_support import needs_compiler

SOURCE = """\
#include <answer.h>
int answer(int question) { return ANSWER; }
const char* torch = TALIB_FAST_TORCH;
"""


@pytest.fixture
def headers(tmp_path):
    """A folder with headers of three versions, of which the first suits `SOURCE`."""
    for version, answer in {"1.0": "question", "2.0": "42", "3.0": "question + wrong"}.items():
        include = tmp_path / version / "torch" / "include"
        include.mkdir(parents=True)
        (include / "answer.h").write_text(f"#define ANSWER {answer}\n")
    return tmp_path


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A tree with `SOURCE` in place of the package's own, which takes long."""
    monkeypatch.setattr(autograd_versions, "ROOT", tmp_path)
    (tmp_path / "csrc" / "autograd").mkdir(parents=True)
    (tmp_path / "csrc" / "autograd" / "answer.cpp").write_text(SOURCE)


def test_the_command_is_that_of_the_build_but_for_the_headers():
    words = autograd_versions.command("2.12.1+cu130", Path("/headers"), [Path("a.cpp"), Path("b.cpp")])
    assert {*build_parts.AUTOGRAD_FLAGS, "-Wall", "-Wextra", "-fsyntax-only"} < set(words)
    assert '-DTALIB_FAST_TORCH="2.12.1+cu130"' in words and words[-2:] == ["a.cpp", "b.cpp"]
    assert [word for word in words if word.startswith("-isystem/headers")] == [
        "-isystem/headers",
        "-isystem/headers/torch/csrc/api/include",
    ]


@needs_compiler
def test_errors_and_warnings_are_said_by_version(headers, source, capsys):
    assert autograd_versions.main(["--headers", str(headers), "1.0"]) == 0
    assert autograd_versions.main(["--headers", str(headers), "1.0", "2.0", "3.0", "4.0"]) == 1
    alone, good, *bad = capsys.readouterr().out.splitlines()
    assert alone == good == "1.0     compiles"
    faults = {"2.0": "unused parameter 'question'", "3.0": "'wrong'", "4.0": "answer.h"}
    for line, (version, fault) in zip(bad, faults.items(), strict=True):
        assert re.match(rf"{version}     csrc/autograd/answer\.cpp:\d+:\d+: (fatal )?error: .*{fault}", line)


def test_of_a_wheel_the_headers_are_kept(tmp_path, monkeypatch):
    commands = []

    def run(words, **_):
        commands.append(list(map(str, words)))
        folder = Path(words[words.index("-d") + 1])
        folder.mkdir()
        with zipfile.ZipFile(folder / "torch-2.12.1-cp311-cp311-manylinux_2_28_x86_64.whl", "w") as wheel:
            for name in ("torch/include/ATen/Tensor.h", "torch/lib/libtorch.so", "torch/__init__.py"):
                wheel.writestr(name, "")

    monkeypatch.setattr(autograd_versions.subprocess, "run", run)
    autograd_versions.download("2.12.1", tmp_path / "2.12.1")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / "2.12.1/torch/include/ATen/Tensor.h"]
    (words,) = commands
    assert words[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "torch==2.12.1"} < set(words) and not any("index" in word for word in words)


def test_a_compiler_is_needed(monkeypatch, capsys):
    monkeypatch.setattr(autograd_versions, "COMPILER", ["/nonexistent/g++"])
    assert autograd_versions.main(["2.12.1"]) == 1
    assert "there is no C++ compiler /nonexistent/g++" in capsys.readouterr().err
