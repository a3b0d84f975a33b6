import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def build_wheel(tmp_path: Path, **environment: str) -> tuple[list[str], str]:
    """The names in a wheel built from a copy of the tree, and what the build said."""
    source = tmp_path / "source"
    tracked = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    for name in tracked.stdout.split():
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "-w", tmp_path, source],
        capture_output=True, text=True, env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    return zipfile.ZipFile(wheel).namelist(), done.stdout + done.stderr


def test_the_wheel_holds_the_package_alone(tmp_path):
    names, _ = build_wheel(tmp_path)
    assert "talib_fast/_C.abi3.so" in names and "talib_fast/py.typed" in names
    assert all(name.startswith(("talib_fast/", "talib_fast-")) for name in names)


def test_a_missing_compiler_is_one_sentence(tmp_path):
    names, said = build_wheel(tmp_path, CXX="/nonexistent/g++")
    assert "talib_fast: the compiled library is not built" in said and "install g++ and ninja" in said
    assert "talib_fast/ops/stoch_norm.py" in names and "talib_fast/_C.abi3.so" not in names


def test_nothing_is_compiled_on_request(tmp_path):
    names, said = build_wheel(tmp_path, TALIB_FAST_NO_EXT="1")
    assert "TALIB_FAST_NO_EXT=1, so nothing is compiled" in said
    assert "talib_fast/_C.abi3.so" not in names
