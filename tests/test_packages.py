import email
import os
import re
import tarfile
import zipfile

import packages
import pytest
import torch
from build_support import LIBRARY, build_wheel, copy_of_the_tree, info, wheel_of
from compiler_support import needs_compiler


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return copy_of_the_tree(tmp_path_factory.mktemp("packages"))


@pytest.fixture(scope="module")
def sdist(source):
    return packages.build_sdist(source, source.parent)


@pytest.fixture(scope="module")
def pure(sdist):
    """The unpacked sdist, beside its wheel without a compiled library."""
    unpacked = packages.unpack(sdist, sdist.parent / "pure")
    build_wheel(unpacked, TALIB_FAST_NO_EXT="1")
    return unpacked


@pytest.fixture(scope="module")
def compiled(sdist):
    """The unpacked sdist beside its wheel with a compiled library, and what the build said."""
    unpacked = packages.unpack(sdist, sdist.parent / "compiled")
    for kernel in ("squared_distance.cpp", "stoch_norm.cpp"):  # which take long
        (unpacked / "csrc" / "cpu" / kernel).unlink()
    return unpacked, build_wheel(unpacked, CUDA_HOME="/nonexistent")[1]


def test_the_sdist_holds_what_a_build_takes(source, sdist):
    assert packages.sdist_faults(sdist, source) == []


def test_a_pure_wheel_is_for_every_machine(source, pure):
    assert packages.wheel_faults(wheel_of(pure), source, compiled=False) == []


@needs_compiler
def test_the_wheel_holds_the_package_alone(source, compiled):
    unpacked, said = compiled
    assert packages.wheel_faults(wheel_of(unpacked), source) == []
    assert said.count("talib_fast: the CUDA kernels are not built: ") == 1
    without_nodes = (
        "(TALIB_FAST_NO_AUTOGRAD=1 is set, so that any torch can load the build); the package works without it"
    )
    assert said.count(f"talib_fast: the library of autograd nodes is not built {without_nodes}") == 1
    if torch.version.cuda is None:
        assert f"torch {torch.__version__} is built without CUDA (FORCE_CUDA=1 builds them anyway)" in said
    assert re.search(r"^  for cuda  not built: ", info(unpacked), re.M)
    with zipfile.ZipFile(wheel_of(unpacked)) as archive:
        assert b".debug_info" not in archive.read(LIBRARY)  # four fifths of it otherwise


def metadata(sdist, wheel):
    """What both packages say of themselves, as two messages."""
    with tarfile.open(sdist) as archive:
        (name,) = [name for name in archive.getnames() if name.count("/") == 1 and name.endswith("/PKG-INFO")]
        of_the_sdist = archive.extractfile(name).read()
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return [email.message_from_string(text.decode()) for text in (of_the_sdist, archive.read(name))]


def test_both_say_what_pyproject_says(source, sdist, pure):
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((source / "pyproject.toml").read_text())["project"]
    for said in metadata(sdist, wheel_of(pure)):
        assert (said["Name"], said["Summary"]) == ("talib_fast", project["description"])
        assert said["Requires-Python"] == project["requires-python"] == ">=3.10"
        assert (said["License-Expression"], said.get_all("License-File")) == ("MIT", ["LICENSE"])
        assert said["Description-Content-Type"] == "text/markdown"
        assert said.get_payload().strip() == (source / "README.md").read_text().strip()
        required = [requirement for requirement in said.get_all("Requires-Dist") if "extra ==" not in requirement]
        assert required == project["dependencies"] and "torch>=2.10" in required
        assert said.get_all("Provides-Extra") == list(project["optional-dependencies"])


def test_the_version_is_the_same_everywhere(source, sdist, pure):
    version = packages.version(source)
    assert [said["Version"] for said in metadata(sdist, wheel_of(pure))] == [version] * 2
    assert sdist.name == f"talib_fast-{version}.tar.gz"
    assert wheel_of(pure).name == f"talib_fast-{version}-py3-none-any.whl"
    assert f"talib_fast  {version}" in info(pure).splitlines()


def test_what_should_not_be_in_a_wheel_is_named(source, pure):
    wheel = wheel_of(pure)
    assert "the wheel lacks talib_fast/_C.abi3.so" in packages.wheel_faults(wheel, source)
    assert "the wheel's tag is py3-none-any" in packages.wheel_faults(wheel, source)
    changed = wheel.parent / "changed" / wheel.name
    changed.parent.mkdir()
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(changed, "w") as new:
        for name in old.namelist():
            if name != "talib_fast/py.typed":
                new.writestr(name, old.read(name))
        for name in ("tests/test_it.py", "talib_fast/cuda/it.cu", "talib_fast/_autograd.so"):
            new.writestr(name, "")
    assert packages.wheel_faults(changed, source, compiled=False) == [
        "the wheel lacks talib_fast/py.typed",
        "the wheel holds talib_fast/_autograd.so",
        "the wheel holds talib_fast/cuda/it.cu",
        "the wheel holds tests/test_it.py",
    ]


def test_what_should_not_be_in_an_sdist_is_named(source, sdist, tmp_path):
    unpacked = packages.unpack(sdist, tmp_path / "unpacked")
    (unpacked / "csrc" / "types.h").unlink()
    (unpacked / "tests").mkdir()
    (unpacked / "tests" / "test_it.py").touch()
    changed = tmp_path / sdist.name
    with tarfile.open(changed, "w:gz") as archive:
        archive.add(unpacked, unpacked.name)
    assert packages.sdist_faults(changed, source) == [
        f"the sdist lacks {unpacked.name}/csrc/types.h",
        f"the sdist holds {unpacked.name}/tests/test_it.py",
    ]


def test_a_path_without_compilers(tmp_path):
    kept = ["as", "bash", "c++filt", "git", "gcc-ar", "python3.11", "sccache"]
    hidden = ["c++", "cc", "c99", "clang++-17", "cmake", "g++", "gcc-12", "ninja", "nvcc", "x86_64-linux-gnu-g++-12"]
    for folder in ("bin", "other"):
        (tmp_path / folder).mkdir()
        for name in (*kept, *hidden):
            (tmp_path / folder / name).touch(0o755)
    path = f"{tmp_path / 'bin'}:{tmp_path / 'other'}:{tmp_path / 'nowhere'}"
    found = packages.path_without_compilers(path, tmp_path / "programs")
    assert sorted(os.listdir(found)) == sorted(kept)
    assert (tmp_path / "programs" / "git").resolve() == tmp_path / "bin" / "git"


JUNIT = """<?xml version="1.0"?>
<testsuites><testsuite name="pytest" errors="1" failures="2" skipped="30" tests="100"/></testsuites>
"""
INFO = """\
torch       2.14.1+cu130
python      3.13.0

cuda        no GPU is usable
kernels     _C.abi3.so is loaded
  for cpu   stoch_norm, by GCC 12.2.0
autograd    talib_fast was installed without it

stoch_norm        cpu   compiled  the compiled library holds a kernel for it
stoch_norm        cuda  PyTorch   it does not load
"""


def test_what_came_of_an_environment(tmp_path):
    (tmp_path / "junit.xml").write_text(JUNIT)
    outcome = packages.outcome(INFO, tmp_path / "junit.xml", ["g++ is on the PATH"])
    assert outcome.counts == {"passed": 67, "skipped": 30, "failed": 3}
    assert outcome.faults == ["g++ is on the PATH", "stoch_norm on cuda: PyTorch, it does not load", "3 tests failed"]
    line = packages.table([outcome]).splitlines()[1]
    assert line.split("  ")[0] == "CPython 3.13.0, torch 2.14.1+cu130" and " 67 " in line
    assert line.endswith("no GPU is usable | _C.abi3.so is loaded | stoch_norm, by GCC 12.2.0")
    nothing = packages.outcome(INFO.replace("PyTorch ", "compiled"), tmp_path / "none.xml", [])
    assert nothing.counts == {} and nothing.faults == ["no test passed"]
