"""Decide which parts of the compiled library are built and with what; give the reason if a part is left out.

All functions except `find_toolkit` are pure. setup.py builds what this module decides. CMakeLists.txt and
architectures.py take the toolkit, the flags and the list of architectures from here.
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

# torch 2.10: the library keeps to its stable ABI, so one binary works with this and every later torch
STABLE_ABI = "0x020a000000000000"
# Machine code runs on later minor versions of its major version, with one exception: code for graphics cards does not
# run on systems on a chip (8.7, and 11.0, which CUDA 12 calls 10.1). PTX runs on every later GPU, where the driver
# compiles it at first use. So the library has PTX of an early architecture, for GPUs without machine code, and PTX of
# the last architecture, for future GPUs.
ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "11.0", "12.0")
EARLY_PTX = "8.0"
OLDEST_CUDA = 12  # the first CUDA version whose nvcc supports C++20

AUTOGRAD_FLAGS = ("-O2", "-std=c++20", "-fvisibility=hidden", "-g0")
CXX_FLAGS = ("-O3", "-std=c++20", "-fopenmp-simd", "-fvisibility=hidden", "-Werror=switch")
NVCC_FLAGS = (
    *("-O3", "-std=c++20", "-lineinfo", "-DUSE_CUDA", "--expt-relaxed-constexpr", "-Xcompiler=-fvisibility=hidden"),
    # torch defines these macros; undefined, half and bfloat16 convert by CUDA's own headers in every build
    *(f"-U__CUDA_NO_{what}__" for what in ("HALF_OPERATORS", "HALF_CONVERSIONS", "HALF2_OPERATORS")),
    "-U__CUDA_NO_BFLOAT16_CONVERSIONS__",
    "-Xfatbin=-compress-all",  # by default, machine code with line numbers is not compressed and ten times as large
)


class Impossible(Exception):
    """A part that the user asked for by name cannot be built."""


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit, as its nvcc describes it."""

    nvcc: str
    root: str
    version: str  # such as 13.0
    architectures: tuple[str, ...]  # all that nvcc compiles for, such as 9.0
    library_dirs: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """For each part the reason why it is left out; an empty reason means that the part is built.

    Attributes:
        without_library: for the library of kernels, and so for everything.
        without_cuda: for the CUDA kernels in it.
        without_autograd: for the library of autograd nodes.
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
    """Decide what is built from ``cuda_sources``, ``autograd_sources`` and the other C++ sources.

    Args:
        environ: ``TALIB_FAST_NO_EXT=1`` builds nothing. ``TALIB_FAST_NO_AUTOGRAD=1`` leaves out the library of autograd
            nodes, which only this torch and this Python can load. ``FORCE_CUDA=1`` asks for CUDA kernels by name.
        compiler: path of the C++ compiler; None if there is none.
        torch_version: version of the torch to build against.
        torch_cuda: CUDA version of that torch; None for a CPU build.
        toolkit: the CUDA toolkit, or a sentence that says why there is none.
        cuda_sources: the ``.cu`` files.
        autograd_sources: the ``.cpp`` files of autograd nodes.

    Raises:
        Impossible: ``FORCE_CUDA=1`` is set, and the CUDA kernels cannot be built.
    """
    forced = environ.get("FORCE_CUDA") == "1"
    if environ.get("TALIB_FAST_NO_EXT") == "1":
        plan = Plan(without_library="TALIB_FAST_NO_EXT=1 is set, so nothing is compiled")
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
            f"FORCE_CUDA=1 asks for CUDA kernels, but they cannot be built: {plan.without_library or plan.without_cuda}"
        )
    return plan


def _without_cuda(
    forced: bool, torch_version: str, torch_cuda: str | None, toolkit: Toolkit | str, cuda_sources: Sequence[str]
) -> str:
    if not cuda_sources:
        return "csrc/cuda holds no .cu file"
    if torch_cuda is None and not forced:
        return f"torch {torch_version} is built without CUDA (FORCE_CUDA=1 builds them anyway)"
    wanted = torch_cuda.partition(".")[0] if torch_cuda else f"{OLDEST_CUDA} or later"
    if isinstance(toolkit, str):
        return f"{toolkit}: install the toolkit of CUDA {wanted} and put its nvcc on the PATH or set CUDA_HOME"
    major = int(toolkit.version.partition(".")[0])
    found = f"{toolkit.nvcc} is of CUDA {toolkit.version}"
    if torch_cuda is not None and major != int(wanted):
        return f"torch is built with CUDA {torch_cuda}, but {found}: set CUDA_HOME to a toolkit of CUDA {wanted}"
    if major < OLDEST_CUDA:
        return f"C++20 needs CUDA {OLDEST_CUDA} or later, but {found}: set CUDA_HOME to a newer toolkit"
    return ""


def _without_autograd(environ: Mapping[str, str], autograd_sources: Sequence[str]) -> str:
    if environ.get("TALIB_FAST_NO_AUTOGRAD") == "1":
        return "TALIB_FAST_NO_AUTOGRAD=1 is set, so that any torch can load the build"
    return "" if autograd_sources else "csrc/autograd holds no .cpp file"


def library_failed(why: str) -> str:
    """The sentence for a library of kernels that is not built."""
    return (
        f"the compiled library is not built ({why}); the package works without it. "
        "To get it, install g++ and ninja and install talib_fast again"
    )


def autograd_failed(why: str) -> str:
    """The sentence for a library of autograd nodes that is not built."""
    return (
        f"the library of autograd nodes is not built ({why}); the package works without it, "
        "but is slower on small feature maps"
    )


def cuda_failed(why: str) -> str:
    """The reason why CUDA kernels are left out if they did not compile."""
    return f"compiling them failed ({why}); fix that or set CUDA_HOME to another toolkit, and install talib_fast again"


def find_toolkit(environ: Mapping[str, str], torch_home: str | None = None) -> Toolkit | str:
    """The toolkit of ``CUDA_HOME``, else of the nvcc on the PATH, else of ``torch_home``; or why there is none.

    The nvcc may be a link or a wrapper, so this asks it for the folder of its toolkit.
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
    """The toolkit that nvcc describes in its output of ``--version``, ``--list-gpu-arch`` and ``--dryrun``."""
    release = re.search(r"release (\d+\.\d+)", version)
    root = re.search(r"^#\$ TOP=(.+)$", dryrun, re.M)
    if release is None or root is None:
        return f"{nvcc} does not behave like nvcc"
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
    """The architectures to build CUDA kernels for, in the format of ``TORCH_CUDA_ARCH_LIST``.

    If that variable is set, it decides. Otherwise the ``visible`` GPUs decide. Without a GPU, the result is all
    `ARCHITECTURES` that the toolkit supports.
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
    """How many architectures each nvcc compiles in parallel, so that all nvcc together keep to ``MAX_JOBS``."""
    jobs = environ.get("MAX_JOBS", "")
    return max(1, (int(jobs) if jobs.isdigit() else cores) // max(1, sources))


def first_error(lines: Iterable[str], root: Path) -> str:
    """The first error line of a compiler or linker, without the path of the tree; empty if there is none."""
    for line in lines:
        if re.search(r"\b(error|fatal)\b\s*(#\S+)?\s*:|cannot find -l|undefined reference", line):
            return line.strip().replace(f"{root}{os.sep}", "").translate({0x2018: "'", 0x2019: "'"})[:300]
    return ""


def c_string(text: str) -> str:
    """``text`` as a C string literal that passes unchanged through a shell, ninja and the preprocessor."""
    return json.dumps(text.encode("ascii", "replace").decode()).replace("$", "\\044")


def autograd_macro(torch_version: str) -> tuple[str, str]:
    """The macro (name, value) that tells the library of autograd nodes for which torch it is built."""
    return "TALIB_FAST_TORCH", c_string(torch_version)


def sources_symbol(folder: Path) -> str:
    """A symbol that identifies the sources of a library; the linker defines it.

    The compiler must not define it, since then a change of one source would recompile all of them.

    Args:
        folder: the folder of sources; the names and contents of all files in it count.
    """
    read = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        read.update(f"{path.relative_to(folder).as_posix()} {len(content)}\n".encode() + content)
    return f"talib_fast_sources_{read.hexdigest()[:16]}"


def build_text(torch_version: str, cpu: Iterable[str], cuda: Iterable[str], for_cuda: Mapping[str, str]) -> str:
    """The library's description of itself, one ``key=value`` per line; operations are named as their source files.

    Args:
        torch_version: version of torch's headers.
        cpu: C++ sources with kernels.
        cuda: CUDA sources with kernels.
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
    """The values that CMakeLists.txt needs from this module and from torch, as CMake commands."""
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
