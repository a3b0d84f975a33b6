"""Build the CUDA kernels for the host, and give the environment in which a process can load a sanitizer's build.

    folder = build("thread")
    subprocess.run([sys.executable, "-c", f"... torch.ops.load_library('{folder}/libtalib_fast_simt.so') ..."],
                   env=sanitizer_environment("thread"))

The process ends with a code other than 0 if the sanitizer found something. With SIMT_LOG=file in its environment,
``launches(file)`` gives the kernels that it ran.
"""

import contextlib
import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
KINDS = ("plain", "address", "thread")

# the properties of an H100 or an H200 that the kernels read
GPU = {"SIMT_MULTIPROCESSORS": "132", "SIMT_SHARED_BYTES": "232448", "SIMT_CACHE_BYTES": "52428800"}

RUNTIMES = {"plain": [], "address": ["libasan.so", "libubsan.so"], "thread": ["libtsan.so"]}


def library(name: str) -> str:
    """The path of one of g++'s libraries, or only its name if g++ does not have it."""
    return subprocess.run(
        ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()


def missing(kind: str) -> str:
    """What this machine lacks for that kind of build; empty if it has everything."""
    if not sys.platform.startswith("linux"):
        return "the harness needs Linux"
    for tool in ("g++", "cmake"):
        if not shutil.which(tool):
            return f"no {tool}"
    for name in RUNTIMES[kind]:
        if not os.path.isabs(library(name)):
            return f"g++ has no {name}"
    return ""


def sanitizer_environment(kind: str) -> dict[str, str]:
    """This process's environment with the variables that a Python process needs to load a library of that kind."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    if kind == "address":
        # with libstdc++, since AddressSanitizer intercepts __cxa_throw and Python would load it too late
        environment["LD_PRELOAD"] = f"{library('libasan.so')} {library('libstdc++.so')}"
        environment["ASAN_OPTIONS"] = "detect_leaks=0"  # Python and torch have leaks of their own
        environment["UBSAN_OPTIONS"] = "print_stacktrace=1"
    elif kind == "thread":
        environment["LD_PRELOAD"] = f"{library('libtsan.so')} {library('libstdc++.so')}"
        environment["TSAN_OPTIONS"] = "ignore_noninstrumented_modules=1"  # python and torch
    return environment


@functools.cache
def build(kind: str) -> Path:
    """Build libtalib_fast_simt.so and the self tests, if they are not up to date; returns their folder."""
    folder = ROOT / "build" / f"simt-{kind}"
    generator = ["-G", "Ninja"] if shutil.which("ninja") and not (folder / "CMakeCache.txt").exists() else []
    options = [f"-DSIMT_SANITIZER={kind}", f"-DPython_EXECUTABLE={sys.executable}"]
    environment = {"CMAKE_BUILD_PARALLEL_LEVEL": "2", **os.environ}
    with one_process(folder):
        for command in (
            ["cmake", "-S", ROOT / "tests" / "simt", "-B", folder, *generator, *options],
            ["cmake", "--build", folder],
        ):
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
            if done.returncode:
                raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}")
            if "warning: " in done.stdout:
                raise RuntimeError(f"the compiler warns:\n{done.stdout}")
    return folder


@contextlib.contextmanager
def one_process(folder: Path) -> Iterator[None]:
    """A context that only one process at a time can enter for a ``folder``."""
    import fcntl  # missing on some systems, but the harness needs Linux

    folder.parent.mkdir(exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class Launch(NamedTuple):
    """A launch of a kernel, with a name such as ``sliced_kernel<Forward<float, false>, 4, true>``."""

    kernel: str
    blocks: int
    threads: int  # per block
    shared_bytes: int  # dynamic shared memory per block


@functools.cache
def kernels(library: Path) -> dict[int, str]:
    """The names of the kernels in a library, by their offsets in it."""
    told = subprocess.run(["nm", "-C", library], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^(\w+) \w (?:void )?(?:\w+::)*(\w+_kernel(?:<.*?>)?)\(.*\)$", told, re.M)
    return {int(place, 16): re.sub(r"\w+::", "", name) for place, name in found}


def launches(log: Path) -> list[Launch]:
    """The launches that a process wrote to the file of its SIMT_LOG."""
    found = []
    for line in log.read_text().splitlines():
        blocks, threads, shared_bytes, place, library = line.split("\t")
        name = kernels(Path(library))[int(place, 16)]
        found.append(Launch(name, int(blocks), int(threads), int(shared_bytes)))
    return found
