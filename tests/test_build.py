import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
LIBRARY = "talib_fast/_C.abi3.so"


@pytest.fixture
def source(tmp_path):
    """A copy of the tree, to build in and to break."""
    tracked = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    for name in tracked.stdout.split():
        if (ROOT / name).exists():
            (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "source" / name).write_bytes((ROOT / name).read_bytes())
    return tmp_path / "source"


def build(source: Path, **environment: str) -> subprocess.CompletedProcess:
    environ = {name: value for name, value in os.environ.items() if name not in ("FORCE_CUDA", "TORCH_CUDA_ARCH_LIST")}
    return subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "-w", source.parent, source],
        capture_output=True, text=True, check=False, env={**environ, **environment},
    )  # fmt: skip


def build_wheel(source: Path, **environment: str) -> tuple[list[str], str]:
    """The names in the wheel built from ``source``, and what the build said."""
    done = build(source, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = source.parent.glob("*.whl")
    return zipfile.ZipFile(wheel).namelist(), done.stdout + done.stderr


def info(source: Path) -> str:
    """What ``python -m talib_fast info`` prints with the wheel built from ``source``."""
    (wheel,) = source.parent.glob("*.whl")
    unpacked = source.parent / "unpacked"
    zipfile.ZipFile(wheel).extractall(unpacked)
    done = subprocess.run([sys.executable, "-m", "talib_fast", "info"], cwd=unpacked, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def needed(library: Path) -> set[str]:
    """The shared libraries that a library asks the loader for."""
    if shutil.which("readelf") is None:
        pytest.skip("no readelf")
    said = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"NEEDED.*\[(.+)\]", said))


def test_the_wheel_holds_the_package_alone(source):
    names, said = build_wheel(source, CUDA_HOME="/nonexistent")
    assert LIBRARY in names and "talib_fast/py.typed" in names
    assert all(name.startswith(("talib_fast/", "talib_fast-")) for name in names)
    assert not [name for name in names if name.endswith((".cpp", ".cu", ".cuh", ".h"))]
    assert said.count("talib_fast: the CUDA kernels are not built: ") == 1
    if torch.version.cuda is None:
        assert f"torch {torch.__version__} is built without CUDA (FORCE_CUDA=1 builds them all the same)" in said
    assert re.search(r"^  for cuda  not built: ", info(source), re.M)


def test_the_sources_are_packed(source):
    done = subprocess.run([sys.executable, "setup.py", "-q", "sdist"], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (packed,) = (source / "dist").glob("*.tar.gz")
    shutil.unpack_archive(packed, source / "unpacked")
    (unpacked,) = (source / "unpacked").iterdir()
    for folder in ("csrc", "tools"):
        for path in (source / folder).rglob("*.*"):
            assert (unpacked / path.relative_to(source)).exists() == (path.suffix != ".pyc"), path


def test_a_missing_compiler_is_one_sentence(source):
    names, said = build_wheel(source, CXX="/nonexistent/g++")
    assert said.count("talib_fast: the compiled library is not built") == 1
    assert "(there is no C++ compiler /nonexistent/g++)" in said and "install g++ and ninja" in said
    assert "talib_fast/ops/stoch_norm.py" in names and LIBRARY not in names


def test_a_failing_compiler_is_one_sentence(source):
    shutil.rmtree(source / "csrc" / "cpu")  # which takes long
    (source / "csrc" / "build_info.cpp").write_text("int x = y;\n")
    names, said = build_wheel(source)
    assert re.search(
        r"not built \(csrc/build_info\.cpp:1:9: error: .y. was not declared in this scope\); the pack", said
    )
    assert LIBRARY not in names


def test_nothing_is_compiled_on_request(source):
    names, said = build_wheel(source, TALIB_FAST_NO_EXT="1")
    assert said.count("TALIB_FAST_NO_EXT=1, so nothing is compiled") == 1
    assert LIBRARY not in names


def test_cuda_kernels_asked_for_by_name_must_be_there(source):
    (source / "csrc" / "cuda").mkdir(exist_ok=True)
    (source / "csrc" / "cuda" / "another.cu").touch()
    done = build(source, FORCE_CUDA="1", CUDA_HOME="/nonexistent")
    assert done.returncode and re.search(
        r"talib_fast: FORCE_CUDA=1 asks for CUDA kernels, which cannot be built: "
        r"CUDA_HOME is /nonexistent, which holds no bin/nvcc: install the toolkit of CUDA \d+ ",
        done.stdout + done.stderr,
    )
    assert not list(source.parent.glob("*.whl"))


class TestCuda:
    """Against any torch, also one without CUDA; no GPU is needed."""

    @pytest.fixture(autouse=True)
    def _one_kernel(self, source, toolkit):
        """One small kernel in place of the package's own, which take long and are compiled by other tests."""
        for folder in ("cpu", "cuda"):
            shutil.rmtree(source / "csrc" / folder, ignore_errors=True)
        (source / "csrc" / "cuda").mkdir()
        (source / "csrc" / "cuda" / "fill.cu").write_text(
            "__global__ void fill(float* x) { x[threadIdx.x] = 1; }\nvoid launch(float* x) { fill<<<1, 32>>>(x); }\n"
        )

    def test_they_are_built_on_request(self, source):
        _, said = build_wheel(source, FORCE_CUDA="1", TORCH_CUDA_ARCH_LIST="8.0;9.0")
        assert not re.search(r"^ *talib_fast: ", said, re.M)
        assert re.search(r"^  for cuda  fill, by nvcc \d+\.\d+ for 8\.0 9\.0$", info(source), re.M)
        library = source.parent / "unpacked" / LIBRARY
        assert b"sm_90" in library.read_bytes() and b"_Z4fillPf" in library.read_bytes()
        # of torch only what every build of it has, so that one binary serves them all; CUDA's runtime is inside
        torch_libraries = {name for name in needed(library) if re.match("libtorch|libc10|libcu", name)}
        assert torch_libraries == {"libtorch.so", "libtorch_cpu.so", "libc10.so"}

    def test_when_they_fail_the_rest_is_built(self, source):
        (source / "csrc" / "cuda" / "wrong.cu").write_text("__global__ void f(float* x) { x[0] = y; }\n")
        done = build(source, FORCE_CUDA="1", TORCH_CUDA_ARCH_LIST="9.0")
        sentence = (
            r'compiling them failed \(csrc/cuda/wrong\.cu\(1\): error: identifier "y" is undefined\); mend that or '
        )
        assert done.returncode and re.search(
            f"talib_fast: FORCE_CUDA=1 asks for CUDA kernels, but {sentence}", done.stdout + done.stderr
        )
        # the same, but not asked for by name: a torch that says it was built with CUDA
        setup = (source / "setup.py").read_text()
        (source / "setup.py").write_text(setup.replace("torch_cuda=torch.version.cuda", "torch_cuda=toolkit.version"))
        _, said = build_wheel(source, TORCH_CUDA_ARCH_LIST="9.0")
        assert re.search(f"^ *talib_fast: the CUDA kernels are not built: {sentence}", said, re.M)
        assert re.search(f"^  for cuda  not built: {sentence}", info(source), re.M)
