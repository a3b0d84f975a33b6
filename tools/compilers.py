"""Compiles the CPU sources with other C++ compilers, and for another processor.

    python tools/compilers.py [COMPILER ...]
    python tools/compilers.py --flags

Without arguments that is every compiler of a list that is there: the oldest and the newest of GCC and clang that serve,
and GCC for aarch64, the processor beside some GPUs. It fails on an error or a warning, and where a compiler that was
named, or all of the list, are missing. It needs torch's headers. The second form prints what the sources are compiled
with, for other tools.
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
# what compiles does not depend on how it is optimised, which would take most of the time
STRICT = ("-O0", "-Wall", "-Wextra", "-Werror")


def flags() -> list[str]:
    """What setup.py compiles the sources with."""
    torch = importlib.util.find_spec("torch")
    assert torch is not None and torch.origin is not None
    headers = f"-isystem{Path(torch.origin).parent / 'include'}"
    return [*build_parts.CXX_FLAGS, f"-DTORCH_TARGET_VERSION={build_parts.STABLE_ABI}", headers]


def check(compiler: str, source: Path) -> str:
    """What is wrong with ``source`` for ``compiler``, if anything is."""
    words = [*shlex.split(compiler), "-c", "-o", os.devnull, *flags(), *STRICT, str(source)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if not done.returncode:
        return ""
    return build_parts.first_error(done.stderr.splitlines(), ROOT) or done.stderr


def main(compilers: Sequence[str]) -> int:
    if compilers == ["--flags"]:
        print(shlex.join(flags()))
        return 0
    found = list(compilers) or [name for name in COMPILERS if shutil.which(name)]
    missing = [name for name in compilers or COMPILERS if not shutil.which(shlex.split(name)[0])]
    for name in missing:
        print(f"{name}: is not there", file=sys.stderr)
    found = [name for name in found if name not in missing]
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
