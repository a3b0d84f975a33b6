"""Compile the CPU sources with other C++ compilers, and for another processor.

    python tools/compilers.py [COMPILER ...]
    python tools/compilers.py --flags

Without arguments the tool uses every installed compiler of a list: the oldest and the newest supported GCC and clang,
and GCC for aarch64, the processor beside some GPUs. It fails on an error or a warning. It also fails if a named
compiler is missing, or if all compilers of the list are. It needs torch's headers. The second form prints the compiler
flags of the sources, for other tools.
"""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import build_parts

ROOT = Path(__file__).resolve().parent.parent
COMPILERS = ("g++-11", "g++-14", "clang++-14", "clang++-19", "aarch64-linux-gnu-g++")
# errors and warnings do not depend on optimisation, which would take most of the time
STRICT = ("-O0", "-Wall", "-Wextra", "-Werror")


def flags() -> list[str]:
    """The flags with which setup.py compiles the sources."""
    torch = importlib.util.find_spec("torch")
    assert torch is not None and torch.origin is not None
    headers = f"-isystem{Path(torch.origin).parent / 'include'}"
    return [*build_parts.CXX_FLAGS, f"-DTORCH_TARGET_VERSION={build_parts.STABLE_ABI}", headers]


def check(compiler: str, source: Path) -> str:
    """The first error of ``compiler`` for ``source``; empty if there is none."""
    words = [*shlex.split(compiler), "-c", "-o", os.devnull, *flags(), *STRICT, str(source)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if not done.returncode:
        return ""
    return build_parts.first_error(done.stderr.splitlines(), ROOT) or done.stderr


def main(compilers: Sequence[str]) -> int:
    if compilers == ["--flags"]:
        print(shlex.join(flags()))
        return 0
    asked = compilers or COMPILERS
    missing = [name for name in asked if not shutil.which(shlex.split(name)[0])]
    for name in missing:
        print(f"{name}: is not installed", file=sys.stderr)
    found = [name for name in asked if name not in missing]
    sources = sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
    status = int(bool(compilers and missing) or not found)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for name in found:
            faults = [fault for fault in pool.map(lambda source, name=name: check(name, source), sources) if fault]
            print(f"{name:<24}{faults[0] if faults else 'compiles'}", flush=True)
            status |= bool(faults)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
