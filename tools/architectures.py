"""Compile CUDA sources for every architecture and check what ptxas reports about each kernel.

``python tools/architectures.py csrc/cuda/*.cu`` fails on a warning, a spilled register or a stack frame. It needs nvcc
and torch's headers, but no GPU.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import build_parts

FUNCTION = re.compile(
    r"""(?:\ for\ '(?P<architecture>\w+)'\n)?  # only for a kernel; its called functions follow without it
    ptxas\ info\s*:\ Function\ properties\ for\ (?P<name>\S+)\n
    \s*(?P<stack>\d+)\ bytes\ stack\ frame,\ (?P<stores>\d+)\ bytes\ spill\ stores,\ (?P<loads>\d+)\ bytes\ spill\ loads
    (?:\nptxas\ info\s*:\ Used\ (?P<registers>\d+)\ registers(?:.*?\ (?P<shared>\d+)\ bytes\ smem)?)?""",
    re.VERBOSE,
)


@dataclass(frozen=True)
class Function:
    """ptxas' report about one function (a kernel or a function that it calls) for one architecture.

    Attributes:
        name: the mangled name.
        architecture: such as sm_90.
        registers: per thread; None for a called function.
        stack, spill_stores, spill_loads: bytes.
        shared: bytes of static shared memory.
    """

    name: str
    architecture: str
    registers: int | None
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int = 0

    def faults(self) -> str:
        """The function's stack frame and spills in words; empty if it has none."""
        if self.stack or self.spill_stores or self.spill_loads:
            spills = f"{self.spill_stores} bytes stored and {self.spill_loads} loaded in spills"
            return f"{self.stack} bytes of stack frame, {spills}"
        return ""


def read(report: str) -> list[Function]:
    """All functions in the output of nvcc with ``-Xptxas -v``.

    Raises:
        ValueError: the output contains functions that this cannot read.
    """
    functions: list[Function] = []
    for found in FUNCTION.finditer(report):
        architecture = found["architecture"] or (functions[-1].architecture if functions else "")
        registers = None if found["registers"] is None else int(found["registers"])
        sizes = (int(found[size] or 0) for size in ("stack", "stores", "loads", "shared"))
        functions.append(Function(found["name"], architecture, registers, *sizes))
    if len(functions) != report.count("bytes stack frame"):
        expected = report.count("bytes stack frame")
        raise ValueError(f"expected {expected} functions in ptxas' report, could read {len(functions)}:\n{report}")
    return functions


def check(
    source: str, toolkit: build_parts.Toolkit, architectures: Sequence[str], keep: Path | None = None
) -> tuple[list[Function], list[str]]:
    """Compile ``source`` for all ``architectures``.

    Args:
        source: path of a ``.cu`` file.
        toolkit: the CUDA toolkit with the nvcc to use.
        architectures: such as 9.0; only one with ``keep``.
        keep: a folder for the ``.cubin`` and the ``.ptx``, which get the source's name; None: keep nothing.

    Returns:
        The functions, and one sentence for each fault.
    """
    torch = importlib.util.find_spec("torch")
    assert torch is not None and torch.origin is not None
    numbers = [name.replace(".", "") for name in architectures]
    into = ["-c", "-o", os.devnull]
    if keep is not None:
        into = ["-cubin", "-o", str(keep / f"{Path(source).stem}.cubin"), "--keep", "--keep-dir", str(keep)]
    done = subprocess.run(
        [
            *(toolkit.nvcc, source, *into, *build_parts.NVCC_FLAGS),
            *(f"-DTORCH_TARGET_VERSION={build_parts.STABLE_ABI}", f"-isystem={Path(torch.origin).parent / 'include'}"),
            *("-Xptxas=-v", "-Xcompiler=-Wall,-Wextra", "-Werror=all-warnings", "--threads=2"),
            *(f"-gencode=arch=compute_{number},code=sm_{number}" for number in numbers),
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    report = done.stdout + done.stderr
    if done.returncode:
        reason = build_parts.first_error(report.splitlines(), Path.cwd()) or report
        return [], [f"nvcc fails with exit status {done.returncode}: {reason}"]
    warnings = [line.strip() for line in report.splitlines() if re.search(r"\bwarning\b.*:", line)]
    functions = read(report)
    wrong = [f"{found.name} for {found.architecture}: {found.faults()}" for found in functions if found.faults()]
    missing = {f"sm_{number}" for number in numbers} - {found.architecture for found in functions}
    return functions, [*warnings, *wrong, *(f"no kernel for {name}" for name in sorted(missing))]


def table(functions: Iterable[Function]) -> str:
    """A table of the registers of each kernel on each architecture; called functions have no number of their own."""
    architectures = sorted({found.architecture for found in functions}, key=lambda name: (len(name), name))
    rows: dict[str, dict[str, int | None]] = {}
    for found in functions:
        rows.setdefault(found.name, {})[found.architecture] = found.registers
    lines = ["".join(f"{name:<8}" for name in architectures) + "registers of"]
    lines += [
        "".join(f"{row.get(name) or '':<8}" for name in architectures) + function for function, row in rows.items()
    ]
    return "\n".join(lines)


def demangled(text: str) -> str:
    """``text`` with demangled C++ names; unchanged if c++filt is missing."""
    if shutil.which("c++filt") is None:
        return text
    return subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True).stdout


def main(sources: Iterable[str]) -> int:
    toolkit = build_parts.find_toolkit(os.environ)
    if isinstance(toolkit, str):
        print(f"the kernels cannot be compiled: {toolkit}", file=sys.stderr)
        return 1
    architectures = [name for name in build_parts.ARCHITECTURES if name in toolkit.architectures]
    print(f"CUDA {toolkit.version} for {' '.join(architectures)}")
    status = 0
    for source in sources:
        functions, faults = check(source, toolkit, architectures)
        print(demangled(f"\n{source}\n{table(functions)}"), flush=True)
        for fault in faults:
            print(demangled(f"{source}: {fault}"), file=sys.stderr)
            status = 1
    print("faults were found" if status else "no faults", file=sys.stderr if status else sys.stdout)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
