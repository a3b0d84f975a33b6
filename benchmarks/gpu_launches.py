"""What is known of the CUDA kernels on a GPU that is not at hand: how their launches look, and their machine code.

gpu_times.py predicts times from it. The kernels' own ``choose_plan`` and ``plan`` decide about launches (gpu_plans.cu,
which needs g++ and no GPU). The table of tools/machine_code.py has instructions, bytes in flight and registers.
"""

import json
import math
import os
import shlex
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import report

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Gpu:
    """A GPU: the numbers that decide a launch, and its speeds."""

    name: str
    cache_bytes: int  # of L2, as the driver reports it
    copy: float  # bytes a second, read and written, of a large copy_: nine tenths of the memory's peak
    kept_bytes: float  # L2 keeps this much of the last bytes used: it has two halves, and may evict newer bytes first
    multiprocessors: int = 132
    threads_per_block: int = 1024
    shared_bytes: int = 227 << 10  # most that a block can have
    clock: float = 1.98e9  # Hz, boost
    fabric: float = 5.6e12  # bytes a second between L2 and the multiprocessors
    memory_latency: int = 1150  # cycles of a load from DRAM while it is as busy as in a copy
    cache_latency: int = 600  # cycles of a load from L2, likewise
    shared_latency: int = 150  # cycles of a load from shared memory, with the overhead of the loop

    @property
    def device(self) -> tuple[int, int, int, int]:
        """The arguments of gpu_plans."""
        return self.multiprocessors, self.threads_per_block, self.shared_bytes, self.cache_bytes

    def blocks_per_multiprocessor(self, threads: int, registers: int, shared_bytes: int) -> int:
        """How many blocks of a kernel a multiprocessor holds at once, by the rules of compute capability 9.0."""
        by_registers = 65536 // (-(-registers // 8) * 8 * threads)
        return min(by_registers, (228 << 10) // (shared_bytes + 1024), 2048 // threads, 32)


GPUS = (
    Gpu("H100", cache_bytes=50 << 20, copy=3.0e12, kept_bytes=34e6),
    Gpu("H200", cache_bytes=60 << 20, copy=4.3e12, kept_bytes=40e6),
)


@dataclass(frozen=True)
class Loop:
    """A kernel's innermost loop over vectors, from its machine code."""

    role: str
    element: str  # dtype of its vectors if the kernel has loops for several dtypes, otherwise empty
    instructions: int  # of an iteration
    vectors: int  # of each tensor, or of all tensors if the loop stores none
    vector_bytes: int
    load_bytes: int  # by a thread in an iteration
    store_bytes: int
    in_flight_bytes: int  # loaded before any of it is used

    def cycles(self, vectors: int, latency: float, share: Callable[[float, float], float]) -> dict[str, float]:
        """Cycles of a thread with ``vectors`` vectors; ``share(waiting, instructions)`` gives those of an iteration."""
        iterations, waiting = math.ceil(vectors / self.vectors), self.waits * latency
        took = share(waiting, self.instructions)
        return {"loads": iterations * waiting, "instructions": iterations * (took - waiting)}

    @property
    def moved_bytes(self) -> int:
        return self.load_bytes + self.store_bytes

    @property
    def waits(self) -> int:
        """How often an iteration waits for loads."""
        return math.ceil(self.load_bytes / self.in_flight_bytes) if self.in_flight_bytes else 1


@dataclass(frozen=True)
class Kernel:
    name: str
    registers: int  # of a thread
    shared_bytes: int  # static shared memory
    loops: tuple[Loop, ...]

    def of_pass(self, role: str) -> Loop:
        """stoch_norm's loop of a pass, the most unrolled one if there are several.

        Raises:
            ValueError: the kernel has no such loop.
        """
        found = [loop for loop in self.loops if loop.role == role]
        if not found:
            raise ValueError(f"the table of machine code has no {role} of {self.name}")
        return max(found, key=lambda loop: loop.vectors)

    def without_residual(self) -> "Kernel":
        """The kernel with loops that load no residual and no signs: the table has fused loops as they are with them."""
        return replace(self, loops=tuple(replace(loop, in_flight_bytes=loop.load_bytes) for loop in self.loops))

    def of_list(self, element: str, sources: bool, weights: bool) -> Loop:
        """squared_distance's loop over elements of a dtype: the version with the fewest instructions for a byte.

        With weights, which come from caches, it has as many instructions for a byte as the longest version, and the
        same loads.

        Raises:
            ValueError: the kernel has no such loop.
        """
        role = "pass, with sources" if sources else "pass, no sources"
        costs = {
            loop.instructions / loop.moved_bytes: loop
            for loop in self.loops
            if (loop.role, loop.element) == (role, element)
        }
        if not costs:
            raise ValueError(f"the table of machine code has no {role}, over {element} in {self.name}")
        plain = costs[min(costs)]
        return replace(plain, instructions=round(max(costs) * plain.moved_bytes)) if weights else plain


def read_machine_code(file: Path) -> tuple[dict[str, Kernel], str]:
    """The kernels by name, and which compiler made them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no table of machine code.
    """
    if not file.exists():
        raise FileNotFoundError(
            f"expected the table of machine code at {report.without_folders(str(file))}: "
            "python tools/machine_code.py makes it"
        )
    try:
        table = json.loads(file.read_text())
        kernels = {
            found["name"]: Kernel(
                found["name"], found["registers"], found["shared_bytes"], tuple(map(_loop, found["loops"]))
            )
            for found in table["kernels"]
        }
        return kernels, f"CUDA {table['cuda']} for {table['architecture']}"
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file.name} is no table of machine code: {type(error).__name__}: {error}") from error


def _loop(loop: Mapping[str, Any]) -> Loop:
    sizes = (loop[name] for name in ("vector_bytes", "load_bytes", "store_bytes", "in_flight_bytes"))
    return Loop(loop["role"], loop.get("element", ""), loop["instructions"], loop["vectors"], *sizes)


def build_plans(folder: Path) -> Path:
    """The program gpu_plans, compiled into ``folder``.

    Raises:
        RuntimeError: there is no compiler, or compiling fails.
    """
    compiler = shlex.split(os.environ.get("CXX") or "g++")
    program = folder / "gpu_plans"
    flags = ["-std=c++20", "-O1", "-pthread", "-Wno-unknown-pragmas"]
    includes = [f"-I{ROOT / 'tests' / 'simt'}", f"-I{ROOT / 'csrc'}"]
    source = ROOT / "benchmarks" / "gpu_plans.cu"
    try:
        done = subprocess.run(
            [*compiler, *flags, *includes, "-x", "c++", source, "-o", program], capture_output=True, text=True
        )
    except OSError as error:
        raise RuntimeError(f"expected a C++ compiler named {compiler[0]} (CXX says which): {error.strerror}") from error
    if done.returncode:
        raise RuntimeError(f"{compiler[0]} could not compile {source.name}:\n{done.stdout}{done.stderr}")
    return program


def plans(program: Path, gpu: Gpu, requests: Sequence[str]) -> list[dict[str, Any]]:
    """The launches that ``requests`` to gpu_plans name.

    Raises:
        RuntimeError: gpu_plans does not understand a request.
    """
    done = subprocess.run(
        [program, *map(str, gpu.device)],
        input="".join(f"{line}\n" for line in requests),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"gpu_plans: {done.stderr.strip()}")
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return [plan | {"order": tuple(map(tuple, plan["order"]))} if "order" in plan else plan for plan in found]
