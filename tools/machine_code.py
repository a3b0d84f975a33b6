"""Check the machine code of the CUDA kernels: the width of their loads and stores, and the instructions per loop.

``python tools/machine_code.py`` compiles csrc/cuda/*.cu for one architecture and disassembles the machine code. It
fails if a loop moves its vectors in pieces, if a kernel uses local memory, or if architectures.py would fail.
``--write`` writes the figures to benchmarks/results/machine_code and their table to docs/kernels.md. The tool needs
nvcc, torch's headers, c++filt and nvdisasm (``pip install nvidia-cuda-nvdisasm``), but no GPU.

hot_loops.py defines what a hot loop is and what counts in it.
"""

import argparse
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import architectures
import build_parts
from hot_loops import FULL_BYTES, Kernel, Loop, loops_of, short, vectors_of
from sass import Instruction

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "machine_code"
PAGE = ROOT / "docs" / "kernels.md"
BEGIN, END = "<!-- machine code: begin -->", "<!-- machine code: end -->"

# An H100 SXM, by its data sheet. The latency of a load under full load is known only as a range.
BANDWIDTH = 3.35e12  # bytes per second
LATENCY = (600e-9, 1000e-9)  # seconds
MULTIPROCESSORS, CLOCK = 132, 1.98e9  # Hz
WARP, ISSUED = 32, 4  # threads; warp instructions that a multiprocessor issues per cycle
REGISTERS, REGISTERS_AT_ONCE = 65536, 256  # of a multiprocessor; the unit in which a warp gets them
THREADS = 2048  # the most threads on a multiprocessor of compute capability 9.0

# The tolerated difference from the recorded figures, which come from another build with the same compiler: relative for
# the instructions of a loop and the bytes in flight, absolute for registers.
TOLERANCE, REGISTERS_TOLERANCE = 0.1, 8


class Unavailable(Exception):
    """A program that is needed to read the machine code is missing."""


# ---- Compile and disassemble


def find_disassembler() -> str:
    """The path of nvdisasm, from its Python package or from the PATH.

    Raises:
        Unavailable: nvdisasm is not installed.
    """
    try:
        files = importlib.metadata.files("nvidia-cuda-nvdisasm") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    own = [str(file.locate()) for file in files if file.stem == "nvdisasm"]
    found = next((path for path in own if os.access(path, os.X_OK)), None) or shutil.which("nvdisasm")
    if found is None:
        raise Unavailable("nvdisasm is not installed: pip install nvidia-cuda-nvdisasm")
    return found


def read(listing: str) -> dict[str, list[Instruction]]:
    """The instructions of each kernel, by mangled name, from the output of ``nvdisasm -json``.

    Raises:
        ValueError: the output has another form.
    """
    try:
        _, functions = json.loads(listing)
        return {
            function["function-name"]: [
                Instruction(one["opcode"], one.get("operands", ""), one.get("predicate", ""))
                for one in function["sass-instructions"]
            ]
            for function in functions
        }
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"expected the list of functions of nvdisasm -json, got {listing[:200]!r}") from error


def bounds_of(ptx: str) -> dict[str, tuple[int, int]]:
    """The launch bounds of each kernel: threads per block, and blocks per multiprocessor; 0 if there is no bound."""
    found = {}
    for entry in re.finditer(r"\.entry (\w+)\(.*?\n\)(.*?)\{", ptx, re.S):
        most, least = (re.search(rf"\.{what} (\d+)", entry[2]) for what in ("maxntid", "minnctapersm"))
        found[entry[1]] = (int(most[1]) if most else 0, int(least[1]) if least else 0)
    return found


def blocks_by_registers(registers: int, threads: int) -> int:
    """The most blocks on a multiprocessor, by its registers and threads."""
    pieces = -(-registers * WARP // REGISTERS_AT_ONCE) * REGISTERS_AT_ONCE
    warps = -(-threads // WARP)
    return min(REGISTERS // (pieces * warps), THREADS // (warps * WARP))


def check(source: str, toolkit: build_parts.Toolkit, architecture: str) -> tuple[list[Kernel], list[str]]:
    """Compile ``source`` and read its machine code; returns its kernels, and one sentence for each fault.

    Raises:
        Unavailable: a program that this needs is missing.
    """
    disassembler = find_disassembler()
    if shutil.which("c++filt") is None:
        raise Unavailable("c++filt is not installed: it is part of binutils")
    with tempfile.TemporaryDirectory() as folder:
        functions, faults = architectures.check(source, toolkit, [architecture], keep=Path(folder))
        if not functions:
            return [], faults
        stem = Path(folder) / Path(source).stem
        done = subprocess.run([disassembler, "-json", f"{stem}.cubin"], capture_output=True, text=True, check=False)
        if done.returncode:
            return [], [*faults, f"nvdisasm fails with exit status {done.returncode}: {done.stderr.strip()}"]
        code, bounds = read(done.stdout), bounds_of(stem.with_suffix(".ptx").read_text())
    said = {function.name: function for function in functions}
    mangled = sorted(code)
    kernels = []
    names = architectures.demangled("\n".join(mangled)).splitlines()
    for symbol, name in sorted(zip(mangled, map(short, names), strict=True), key=lambda pair: pair[1]):
        loops, wrong = loops_of(code[symbol], name)
        threads, launched = bounds.get(symbol, (0, 0))
        registers = said[symbol].registers or 0
        blocks = blocks_by_registers(registers, threads or WARP)
        kernels.append(
            Kernel(
                name=name,
                operation=Path(source).stem,
                threads=threads,
                blocks=min(blocks, launched) if launched else blocks,
                registers=registers,
                shared_bytes=said[symbol].shared,
                loops=tuple(loops),
            )
        )
        faults += [f"{name}: {sentence}" for sentence in wrong]
    return kernels, faults


# ---- The recorded figures


@dataclass(frozen=True)
class Record:
    """The figures of all kernels, as in the committed file."""

    cuda: str  # the version of nvcc, such as 13.0
    architecture: str  # such as sm_90
    kernels: tuple[Kernel, ...]

    def text(self) -> str:
        """The record as JSON, one kernel per line; empty roles and elements are left out."""
        lines = []
        for kernel in self.kernels:
            entry = asdict(kernel)
            entry["loops"] = [{key: value for key, value in loop.items() if value != ""} for loop in entry["loops"]]
            lines.append(json.dumps(entry))
        head = f'"cuda": {json.dumps(self.cuda)}, "architecture": {json.dumps(self.architecture)}'
        kernels = ",\n".join(lines)
        return f'{{{head}, "kernels": [\n{kernels}\n]}}\n'

    @staticmethod
    def of(text: str) -> "Record":
        """The inverse of `text`."""
        entries = json.loads(text)
        kernels = [
            Kernel(**{**entry, "loops": tuple(Loop(**{"element": "", **loop}) for loop in entry["loops"])})
            for entry in entries["kernels"]
        ]
        return Record(entries["cuda"], entries["architecture"], tuple(kernels))


def differences(recorded: Record, found: Record) -> list[str]:
    """One sentence for each difference from the recorded figures that exceeds the tolerance."""
    sentences = []
    ours, theirs = ({kernel.name: kernel for kernel in record.kernels} for record in (found, recorded))
    for name in sorted(ours.keys() ^ theirs.keys()):
        sentences.append(f"{name}: {'not recorded' if name in ours else 'recorded, but does not exist'}")
    for name in sorted(ours.keys() & theirs.keys()):
        own, its = ours[name], theirs[name]
        if abs(own.registers - its.registers) > REGISTERS_TOLERANCE:
            sentences.append(f"{name}: {own.registers} registers, {its.registers} are recorded")
        if len(own.loops) != len(its.loops):
            sentences.append(f"{name}: {len(own.loops)} hot loops, {len(its.loops)} are recorded")
            continue
        for mine, other in zip(own.loops, its.loops, strict=True):
            for key, value in asdict(other).items():
                new = getattr(mine, key)
                loose = key in ("instructions", "in_flight_bytes")
                if abs(new - value) > TOLERANCE * value if loose else new != value:
                    sentences.append(f"{name}, {other.role}: {key} {new}, {value} recorded")
    return sentences


# ---- The table of the page


def asked_in_flight() -> tuple[float, float]:
    """The least and the most bytes that each multiprocessor must have in flight for full bandwidth (Little's law)."""
    least, most = (BANDWIDTH * latency / MULTIPROCESSORS for latency in LATENCY)
    return least, most


def issue_limit() -> float:
    """The instructions per 16 bytes above which instructions, not memory, limit a pass."""
    bytes_a_cycle = BANDWIDTH / MULTIPROCESSORS / CLOCK
    return ISSUED * FULL_BYTES * WARP / bytes_a_cycle


def per_sixteen(loop: Loop) -> float:
    """The instructions per 16 bytes moved."""
    return loop.instructions * FULL_BYTES / (loop.load_bytes + loop.store_bytes)


def rows_of(kernel: Kernel) -> dict[str, list[Loop]]:
    """The rows of a kernel in the table, with the loops of each row.

    Two passes share one row. Other kernels have one row for the shortest loop in float and one for bfloat16. If their
    loops have no dtype, the row is the loop with the most instructions per 16 bytes.
    """
    if vectors_of(kernel.name).tensors:
        return {f"`{kernel.name}`": list(kernel.loops)}
    found: dict[str, list[Loop]] = {}
    for loop in sorted(kernel.loops, key=per_sixteen, reverse=not vectors_of(kernel.name).bytes):
        if loop.element in ("", "float", "bfloat16"):
            label = ", ".join([f"`{kernel.name}`", *loop.role.split(", ")[1:], *filter(None, [loop.element])])
            found.setdefault(label, [loop])
    return found


def is_shown(kernel: Kernel, kernels: Sequence[Kernel]) -> bool:
    """Whether a kernel has a row in the table.

    Shown are, of stoch_norm, the kernels with the widest vectors in float and bfloat16, and, of kernels for lists,
    those for long lists. With an activation or a residual, only the sliced schedule is shown.
    """
    numbers = [
        [int(number) for number in re.findall(r"[<\s](\d+)\b", one.name)]
        for one in kernels
        if re.sub(r"\d+", "", one.name) == re.sub(r"\d+", "", kernel.name)
    ]
    widest = [int(number) for number in re.findall(r"[<\s](\d+)\b", kernel.name)] == max(numbers)
    return widest and not re.match(r".*<(double|half),|resident_kernel<\w+<\w+, true>", kernel.name)


def table(record: Record) -> str:
    """The table of the page.

    A figure is bold if it misses what full bandwidth needs: vectors too narrow, too few bytes in flight, or too many
    instructions.
    """
    _, asked = asked_in_flight()
    limit = issue_limit()
    lines = [
        "| loops | registers | blocks | bytes a vector | KB in flight | instructions per 16 bytes |",
        "|---|---:|---:|---:|---:|---:|",
        f"| *asked of full bandwidth* | | | {FULL_BYTES} | {asked / 1e3:.0f} | {limit:.0f} |",
    ]

    def cell(values: Iterable[tuple[float, bool]]) -> str:
        """Numbers with their separators: bold if they miss what is needed, and a dash for 0."""
        shown = ["–" if value == 0 else f"**{value:.0f}**" if misses else f"{value:.0f}" for value, misses in values]
        return " / ".join(shown)

    for kernel in record.kernels:
        for label, loops in rows_of(kernel).items() if is_shown(kernel, record.kernels) else ():
            flying = [loop.in_flight_bytes * kernel.threads * kernel.blocks for loop in loops]
            cells = (
                label,
                str(kernel.registers),
                str(kernel.blocks),
                cell((width, width < FULL_BYTES) for width in {loop.vector_bytes for loop in loops}),
                cell((size / 1e3, size < asked) for size in flying),
                cell((issued, issued > limit) for issued in map(per_sixteen, loops)),
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def written(page: str, record: Record) -> str:
    """The page with the record's table between its two marks.

    Raises:
        ValueError: a mark is missing in the page.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"expected {BEGIN} and {END} in the page, but at least one is missing")
    return f"{before}{BEGIN}\n{table(record)}\n{END}{after}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Check the machine code of the CUDA kernels.")
    parser.add_argument("sources", nargs="*", help=".cu files (default: all in csrc/cuda)")
    parser.add_argument("--architecture", default="9.0", help="a compute capability (default: %(default)s)")
    parser.add_argument("--write", action="store_true", help="record the figures; for 9.0 also in docs/kernels.md")
    given = parser.parse_args(arguments)
    every = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    sources = [Path(source) for source in given.sources] or every
    if given.write and {source.resolve() for source in sources} != set(every):
        parser.error("--write records all of csrc/cuda, so it takes no list of sources")
    toolkit = build_parts.find_toolkit(os.environ)
    if isinstance(toolkit, str):
        print(f"the kernels cannot be compiled: {toolkit}", file=sys.stderr)
        return 1
    try:
        find_disassembler()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            done = list(pool.map(lambda source: check(str(source), toolkit, given.architecture), sources))
    except Unavailable as reason:
        print(f"the machine code cannot be read: {reason}", file=sys.stderr)
        return 1
    name = f"sm_{given.architecture.replace('.', '')}"
    record = Record(toolkit.version, name, tuple(kernel for kernels, _ in done for kernel in kernels))
    print(f"CUDA {toolkit.version} for {name}\n{table(record)}")
    faults = [f"{source}: {fault}" for source, (_, faults) in zip(sources, done, strict=True) for fault in faults]
    for fault in faults:
        print(fault, file=sys.stderr)
    if given.write:
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / f"{name}.json").write_text(record.text())
        if given.architecture == "9.0":
            PAGE.write_text(written(PAGE.read_text(), record))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
