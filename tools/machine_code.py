"""Reads the machine code of the CUDA kernels: how wide their loops load and store, and in how many instructions.

``python tools/machine_code.py`` compiles csrc/cuda/*.cu for one architecture, takes the machine code apart and fails
where a loop moves its vectors in pieces, where a kernel uses local memory, and on whatever architectures.py fails on.
``--write`` puts the figures into benchmarks/results/machine_code and their table into docs/kernels.md. It needs nvcc,
torch's headers, c++filt and nvdisasm (``pip install nvidia-cuda-nvdisasm``), but no GPU.

What a hot loop is, and what counts in it: hot_loops.py.
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

# An H100 SXM, by its data sheet; of a load's latency under full load no more than the range is known.
BANDWIDTH = 3.35e12  # bytes a second
LATENCY = (600e-9, 1000e-9)  # seconds
MULTIPROCESSORS, CLOCK = 132, 1.98e9  # the latter in Hz
WARP, ISSUED = 32, 4  # threads; warp instructions that a multiprocessor issues in a cycle
REGISTERS, REGISTERS_AT_ONCE = 65536, 256  # of a multiprocessor; given to a warp in such pieces
THREADS = 2048  # that a multiprocessor of compute capability 9.0 holds

# What may differ from the recorded figures, which are another build's of the same compiler: instructions of a loop and
# bytes in flight as a share, registers as they are.
TOLERANCE, REGISTERS_TOLERANCE = 0.1, 8


class Unavailable(Exception):
    """A program is missing that the machine code is read with."""


# ---- Compiling and taking apart


def find_disassembler() -> str:
    """The path of nvdisasm: that of its Python package, or the one on the PATH.

    Raises:
        Unavailable: there is none.
    """
    try:
        files = importlib.metadata.files("nvidia-cuda-nvdisasm") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    own = [str(file.locate()) for file in files if file.stem == "nvdisasm"]
    found = next((path for path in own if os.access(path, os.X_OK)), None) or shutil.which("nvdisasm")
    if found is None:
        raise Unavailable("no nvdisasm is found: pip install nvidia-cuda-nvdisasm brings it")
    return found


def read(listing: str) -> dict[str, list[Instruction]]:
    """The instructions of each kernel, by its mangled name, in what ``nvdisasm -json`` prints.

    Raises:
        ValueError: it prints something else.
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
    """The launch bounds of each kernel: threads of a block, and blocks on a multiprocessor; 0 where there are none."""
    found = {}
    for entry in re.finditer(r"\.entry (\w+)\(.*?\n\)(.*?)\{", ptx, re.S):
        most, least = (re.search(rf"\.{what} (\d+)", entry[2]) for what in ("maxntid", "minnctapersm"))
        found[entry[1]] = (int(most[1]) if most else 0, int(least[1]) if least else 0)
    return found


def blocks_by_registers(registers: int, threads: int) -> int:
    """How many blocks a multiprocessor has registers and threads for."""
    pieces = -(-registers * WARP // REGISTERS_AT_ONCE) * REGISTERS_AT_ONCE
    warps = -(-threads // WARP)
    return min(REGISTERS // (pieces * warps), THREADS // (warps * WARP))


def check(source: str, toolkit: build_parts.Toolkit, architecture: str) -> tuple[list[Kernel], list[str]]:
    """Compile ``source`` and read its machine code; its kernels, and in a sentence each what is wrong.

    Raises:
        Unavailable: a program is missing that this takes.
    """
    disassembler = find_disassembler()
    if shutil.which("c++filt") is None:
        raise Unavailable("no c++filt is found: binutils brings it")
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


# ---- What is recorded


@dataclass(frozen=True)
class Record:
    """The figures of all kernels, as the committed file has them."""

    cuda: str  # the version of nvcc, like 13.0
    architecture: str  # like sm_90
    kernels: tuple[Kernel, ...]

    def text(self) -> str:
        """JSON, a kernel a line; roles and elements that say nothing are left out."""
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
    """In a sentence each, where kernels differ from the recorded ones by more than the tolerance."""
    sentences = []
    ours, theirs = ({kernel.name: kernel for kernel in record.kernels} for record in (found, recorded))
    for name in sorted(ours.keys() ^ theirs.keys()):
        sentences.append(f"{name}: {'not recorded' if name in ours else 'recorded, but not there'}")
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


# ---- The page's table


def asked_in_flight() -> tuple[float, float]:
    """Little's law: bytes that each multiprocessor has to have in flight for all of the bandwidth, least and most."""
    least, most = (BANDWIDTH * latency / MULTIPROCESSORS for latency in LATENCY)
    return least, most


def issue_limit() -> float:
    """Instructions per 16 bytes from which on they, not memory, limit a pass at full bandwidth."""
    bytes_a_cycle = BANDWIDTH / MULTIPROCESSORS / CLOCK
    return ISSUED * FULL_BYTES * WARP / bytes_a_cycle


def per_sixteen(loop: Loop) -> float:
    return loop.instructions * FULL_BYTES / (loop.load_bytes + loop.store_bytes)


def rows_of(kernel: Kernel) -> dict[str, list[Loop]]:
    """The rows of a kernel in the table, with the loops of each: two passes in one, and of others the shortest loop in
    float and in bfloat16, or where loops have no dtype the one that takes most instructions for what it moves."""
    if vectors_of(kernel.name).tensors:
        return {f"`{kernel.name}`": list(kernel.loops)}
    found: dict[str, list[Loop]] = {}
    for loop in sorted(kernel.loops, key=per_sixteen, reverse=not vectors_of(kernel.name).bytes):
        if loop.element in ("", "float", "bfloat16"):
            label = ", ".join([f"`{kernel.name}`", *loop.role.split(", ")[1:], *filter(None, [loop.element])])
            found.setdefault(label, [loop])
    return found


def is_shown(kernel: Kernel, kernels: Sequence[Kernel]) -> bool:
    """Whether a kernel has a row: of stoch_norm those with the widest vectors in float and bfloat16, of kernels for
    lists those for long ones. With what follows the norm the sliced schedule alone is shown."""
    numbers = [
        [int(number) for number in re.findall(r"[<\s](\d+)\b", one.name)]
        for one in kernels
        if re.sub(r"\d+", "", one.name) == re.sub(r"\d+", "", kernel.name)
    ]
    widest = [int(number) for number in re.findall(r"[<\s](\d+)\b", kernel.name)] == max(numbers)
    return widest and not re.match(r".*<(double|half),|resident_kernel<\w+<\w+, true>", kernel.name)


def table(record: Record) -> str:
    """The table of the page: bold where vectors are narrower, or less is in flight, or more instructions are issued,
    than a pass at full bandwidth asks for."""
    _, asked = asked_in_flight()
    limit = issue_limit()
    lines = [
        "| loops | registers | blocks | bytes a vector | KB in flight | instructions per 16 bytes |",
        "|---|---:|---:|---:|---:|---:|",
        f"| *asked of full bandwidth* | | | {FULL_BYTES} | {asked / 1e3:.0f} | {limit:.0f} |",
    ]

    def cell(values: Iterable[tuple[float, bool]]) -> str:
        """Numbers, those that miss what is asked in bold, and a dash for 0."""
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
    """The page with the record's table between its marks.

    Raises:
        ValueError: it has no such marks.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"expected {BEGIN} and {END} in the page, which has not both")
    return f"{before}{BEGIN}\n{table(record)}\n{END}{after}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Read the machine code of the CUDA kernels.")
    parser.add_argument("sources", nargs="*", help=".cu files (default: all in csrc/cuda)")
    parser.add_argument("--architecture", default="9.0", help="a compute capability (default: %(default)s)")
    parser.add_argument("--write", action="store_true", help="record the figures, for 9.0 in docs/kernels.md as well")
    given = parser.parse_args(arguments)
    every = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    sources = [Path(source) for source in given.sources] or every
    if given.write and {source.resolve() for source in sources} != set(every):
        parser.error("--write records all of csrc/cuda, so it takes no other list of sources")
    toolkit = build_parts.find_toolkit(os.environ)
    if isinstance(toolkit, str):
        print(f"the kernels are not compiled: {toolkit}", file=sys.stderr)
        return 1
    try:
        find_disassembler()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            done = list(pool.map(lambda source: check(str(source), toolkit, given.architecture), sources))
    except Unavailable as reason:
        print(f"the machine code is not read: {reason}", file=sys.stderr)
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
