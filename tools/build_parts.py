"""Decides which parts of the compiled library are built, with what, and says why a part is left out.

Everything but `find_toolkit` is pure. setup.py builds what is decided here; CMakeLists.txt and architectures.py take
the toolkit, the flags and the list of architectures from here.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# the oldest torch whose stable ABI the library keeps to, so that one binary serves every later one
STABLE_ABI = "0x020a000000000000"
# Machine code serves the later minor versions of its major version, but not from a graphics card to a system on a chip
# (8.7, and 11.0, which CUDA 12 calls 10.1). PTX serves every later GPU, which compiles it on its first use: that of
# an early architecture what has no machine code, and that of the last one what is yet to come.
ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "11.0", "12.0")
EARLY_PTX = "8.0"
OLDEST_CUDA = 12  # the first whose nvcc knows C++20

AUTOGRAD_FLAGS = ("-O2", "-std=c++20", "-fvisibility=hidden", "-g0")
CXX_FLAGS = ("-O3", "-std=c++20", "-fopenmp-simd", "-fvisibility=hidden", "-Werror=switch")
NVCC_FLAGS = (
    *("-O3", "-std=c++20", "-lineinfo", "-DUSE_CUDA", "--expt-relaxed-constexpr", "-Xcompiler=-fvisibility=hidden"),
    # torch defines these; without them half and bfloat16 convert as CUDA's own headers say, in every build alike
    *(f"-U__CUDA_NO_{what}__" for what in ("HALF_OPERATORS", "HALF_CONVERSIONS", "HALF2_OPERATORS")),
    "-U__CUDA_NO_BFLOAT16_CONVERSIONS__",
    "-Xfatbin=-compress-all",  # by itself it leaves machine code with line numbers as it is, ten times as large
)


class Impossible(Exception):
    """What was asked for by name cannot be built."""


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit, as its nvcc describes it."""

    nvcc: str
    root: str
    version: str  # like 13.0
    architectures: tuple[str, ...]  # like 9.0, all that it compiles for
    library_dirs: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """Why a part is left out; empty means that it is built.

    Attributes:
        without_library: the library of kernels, and with it everything.
        without_cuda: the CUDA kernels in it.
        without_autograd: the library of autograd nodes.
    """

    without_library: str = ""
    without_cuda: str = ""
    without_autograd: str = ""


def decide(
    environ: Mapping[str, str],
    *,
    compiler: str | None,
    torch_version: str,
    torch_cuda: str | None,
    toolkit: Toolkit | str,
    cuda_sources: Sequence[str],
    autograd_sources: Sequence[str],
) -> Plan:
    """What is built from ``cuda_sources``, ``autograd_sources`` and the other C++ sources.

    Args:
        environ: ``TALIB_FAST_NO_EXT=1`` builds nothing, ``TALIB_FAST_NO_AUTOGRAD=1`` leaves out the library that only
            this torch and this Python can load, ``FORCE_CUDA=1`` asks for CUDA kernels by name.
        compiler: path of the C++ compiler, if there is one.
        torch_version: the version of the torch that is built against.
        torch_cuda: the CUDA version of that torch, None for a CPU build.
        toolkit: the toolkit that was found, or a sentence that says why none was.
        cuda_sources: the ``.cu`` files.
        autograd_sources: the ``.cpp`` files of autograd nodes.

    Raises:
        Impossible: ``FORCE_CUDA=1`` asks for what cannot be built.
    """
    forced = environ.get("FORCE_CUDA") == "1"
    if environ.get("TALIB_FAST_NO_EXT") == "1":
        plan = Plan(without_library="TALIB_FAST_NO_EXT=1, so nothing is compiled")
    elif compiler is None:
        name = environ.get("CXX", "c++")
        plan = Plan(without_library=library_failed(f"there is no C++ compiler {name}"))
    else:
        plan = Plan(
            without_cuda=_without_cuda(forced, torch_version, torch_cuda, toolkit, cuda_sources),
            without_autograd=_without_autograd(environ, autograd_sources),
        )
    if forced and (plan.without_library or plan.without_cuda):
        raise Impossible(
            f"FORCE_CUDA=1 asks for CUDA kernels, which cannot be built: {plan.without_library or plan.without_cuda}"
        )
    return plan


def _without_cuda(
    forced: bool, torch_version: str, torch_cuda: str | None, toolkit: Toolkit | str, cuda_sources: Sequence[str]
) -> str:
    if not cuda_sources:
        return "csrc/cuda holds no .cu file"
    if torch_cuda is None and not forced:
        return f"torch {torch_version} is built without CUDA (FORCE_CUDA=1 builds them all the same)"
    wanted = torch_cuda.partition(".")[0] if torch_cuda else f"{OLDEST_CUDA} or later"
    if isinstance(toolkit, str):
        return f"{toolkit}: install the toolkit of CUDA {wanted} and put its nvcc on the PATH or set CUDA_HOME"
    major = int(toolkit.version.partition(".")[0])
    found = f"the nvcc found, {toolkit.nvcc}, is of CUDA {toolkit.version}"
    if torch_cuda is not None and major != int(wanted):
        return f"torch is built with CUDA {torch_cuda}, but {found}: set CUDA_HOME to a toolkit of CUDA {wanted}"
    if major < OLDEST_CUDA:
        return f"C++20 needs CUDA {OLDEST_CUDA} or later, but {found}: set CUDA_HOME to a newer toolkit"
    return ""


def _without_autograd(environ: Mapping[str, str], autograd_sources: Sequence[str]) -> str:
    if environ.get("TALIB_FAST_NO_AUTOGRAD") == "1":
        return "TALIB_FAST_NO_AUTOGRAD=1, so that any torch can load what is built"
    return "" if autograd_sources else "csrc/autograd holds no .cpp file"


def library_failed(why: str) -> str:
    """The sentence for a library that was not built."""
    return (
        f"the compiled library is not built ({why}); the package works without it. "
        "To get it, install g++ and ninja and install talib_fast again"
    )


def autograd_failed(why: str) -> str:
    """The sentence for a library of autograd nodes that was not built."""
    return (
        f"the library of autograd nodes is not built ({why}); the package works without it, "
        "but takes longer over small maps"
    )


def cuda_failed(why: str) -> str:
    """The reason for CUDA kernels that did not compile."""
    return f"compiling them failed ({why}); mend that or set CUDA_HOME to another toolkit, and install talib_fast again"


def find_toolkit(environ: Mapping[str, str], torch_home: str | None = None) -> Toolkit | str:
    """The toolkit of ``CUDA_HOME``, of the nvcc on the PATH, or else ``torch_home``; or why there is none.

    That nvcc may be a link or a wrapper, so it is asked for the place of its toolkit.
    """
    home = environ.get("CUDA_HOME") or environ.get("CUDA_PATH")
    nvcc = os.path.join(home, "bin", "nvcc") if home else shutil.which("nvcc", path=environ.get("PATH", os.defpath))
    if nvcc is None and torch_home:
        nvcc = os.path.join(torch_home, "bin", "nvcc")
    if nvcc is None or not os.access(nvcc, os.X_OK):
        return f"CUDA_HOME is {home}, which holds no bin/nvcc" if home else "no CUDA toolkit is found"

    def ask(*words: str) -> str:
        done = subprocess.run([nvcc, *words], capture_output=True, text=True, check=False)
        return done.stdout + done.stderr

    return read_toolkit(nvcc, ask("--version"), ask("--list-gpu-arch"), ask("--dryrun", "-x", "cu", "-c", os.devnull))


def read_toolkit(nvcc: str, version: str, architectures: str, dryrun: str) -> Toolkit | str:
    """The toolkit behind the answers of its nvcc to ``--version``, ``--list-gpu-arch`` and ``--dryrun``."""
    release = re.search(r"release (\d+\.\d+)", version)
    root = re.search(r"^#\$ TOP=(.+)$", dryrun, re.M)
    if release is None or root is None:
        return f"{nvcc} does not answer as an nvcc does"
    libraries = re.search(r"^#\$ LIBRARIES=(.+)$", dryrun, re.M)
    library_dirs = re.findall(r'-L([^"\s]+)', libraries[1] if libraries else "")
    capabilities = re.findall(r"compute_(\d+)(\d)$", architectures, re.M)
    return Toolkit(
        nvcc=nvcc,
        root=os.path.normpath(root[1]),
        version=release[1],
        architectures=tuple(f"{major}.{minor}" for major, minor in capabilities),
        library_dirs=tuple(os.path.normpath(path) for path in library_dirs),
    )


def architecture_list(environ: Mapping[str, str], supported: Sequence[str], visible: Iterable[str]) -> str:
    """For what CUDA kernels are built, as ``TORCH_CUDA_ARCH_LIST`` is written.

    That variable decides; without it the ``visible`` GPUs; without one, all `ARCHITECTURES` that the toolkit supports.
    """
    given = environ.get("TORCH_CUDA_ARCH_LIST", "")
    if given and given != "native":
        return " ".join(given.replace(";", " ").split())
    gpus = set(visible)
    chosen = sorted((gpus or set(ARCHITECTURES)) & set(supported), key=lambda name: tuple(map(int, name.split("."))))
    *earlier, last = chosen or supported[-1:]
    with_ptx = {last} if gpus else {EARLY_PTX, last}
    return " ".join(f"{name}+PTX" if name in with_ptx else name for name in (*earlier, last))


def nvcc_threads(environ: Mapping[str, str], cores: int, sources: int) -> int:
    """How many architectures each nvcc compiles at once, so that all of them together keep to ``MAX_JOBS``."""
    jobs = environ.get("MAX_JOBS", "")
    return max(1, (int(jobs) if jobs.isdigit() else cores) // max(1, sources))


def first_error(lines: Iterable[str], root: Path) -> str:
    """The first line in which a compiler or linker names an error, without the path of the tree; empty if none does."""
    for line in lines:
        if re.search(r"\b(error|fatal)\b\s*(#\S+)?\s*:|cannot find -l|undefined reference", line):
            return line.strip().replace(f"{root}{os.sep}", "").translate({0x2018: "'", 0x2019: "'"})[:300]
    return ""


def c_string(text: str) -> str:
    """``text`` as a C string literal that a shell, ninja and the preprocessor leave alone."""
    return json.dumps(text.encode("ascii", "replace").decode()).replace("$", "\\044")


def autograd_macro(torch_version: str) -> tuple[str, str]:
    """What the library of autograd nodes is told, to say for which torch it is built."""
    return "TALIB_FAST_TORCH", c_string(torch_version)


def sources_symbol(folder: Path) -> str:
    """A symbol that the library gets when it is linked, and that no library of other sources has.

    The linker is told, not the compiler: a change of one source would compile all of them anew.

    Args:
        folder: of the sources, all files in which count, with their names.
    """
    read = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        read.update(f"{path.relative_to(folder).as_posix()} {len(content)}\n".encode() + content)
    return f"talib_fast_sources_{read.hexdigest()[:16]}"


def build_text(torch_version: str, cpu: Iterable[str], cuda: Iterable[str], for_cuda: Mapping[str, str]) -> str:
    """What the library says of itself, a ``key=value`` a line: the operations with a kernel are the sources' names.

    Args:
        torch_version: of the headers.
        cpu: C++ sources with kernels.
        cuda: CUDA sources.
        for_cuda: ``nvcc`` and ``architectures``, or ``without_cuda``, the reason why there are no CUDA kernels.
    """
    says = {
        "torch": torch_version.partition("+")[0],
        "cpu": " ".join(sorted(Path(source).stem for source in cpu)),
        "cuda": " ".join(sorted(Path(source).stem for source in cuda)),
        **for_cuda,
    }
    return "".join(f"{key}={value}\n" for key, value in says.items())


def cmake() -> str:
    """What CMakeLists.txt needs from here and from torch, as CMake commands."""
    import torch

    says = {
        "ROOT": str(Path(torch.__file__).parent),
        "VERSION": torch.__version__.partition("+")[0],
        "FULL_VERSION": torch.__version__,
        "STABLE_ABI": STABLE_ABI,
        "AUTOGRAD_FLAGS": ";".join(AUTOGRAD_FLAGS),
        "CXX_FLAGS": ";".join(CXX_FLAGS),
        "NVCC_FLAGS": ";".join(NVCC_FLAGS),
    }
    return "".join(f'set(TORCH_{name} "{value}")\n' for name, value in says.items())


if __name__ == "__main__":
    print(cmake())
