"""Predicts how long the CUDA kernels take on a GPU that is not at hand. No figure of it is a measurement.

    python benchmarks/gpu_model.py [--before FILE] [--out DIR] [--page]

writes ``results.json`` and ``table.md``: ``stoch_norm`` at ResNet-50's shapes and ``squared_distance`` on its lists,
for an H100 and an H200. ``--before`` names an older ``results.json`` to compare with. ``--page`` puts the totals into
the operations' pages in docs/operations. It needs g++, and no GPU.

What is known goes in as it is: how a launch looks comes from the kernels' own ``choose_plan`` and ``plan``
(gpu_plans.cu), instructions, bytes in flight and registers from their machine code (tools/machine_code.py), the floor's
bytes from the benchmarks. What is not known is assumed, each in one place: a GPU's speeds (`Gpu`), and what the steps
of a kernel take beside its loops (`Steps`). With these a pass takes the longest of three times,

* work: each block's items one after the other, an item its fixed steps and the iterations of its loop. An iteration
  waits for its loads, as many bytes in flight each time (Little's law), and then issues its instructions,
* memory: what DRAM moves, with that share of the second pass's reads that is not found in the L2 cache,
* cache: what moves between L2 and the multiprocessors,

with `LEAK` of the work where it is not the longest, or else of memory or cache, for these overlap imperfectly; and
before it comes what a launch takes. Expect an error of 25 % either way. ``spectral_tail``, where not memory but
arithmetic is the limit, is not modelled.
"""

import argparse
import functools
import heapq
import itertools
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import bench_squared_distance as distance
import bench_stoch_norm as norm
import command
import report
import torch
from command import DTYPES, LAYOUTS
from report import Case

from talib_fast.storage import write_atomically

ROOT = Path(__file__).parent.parent
FOLDER = command.RESULTS / "gpu_model"
BEFORE = FOLDER / "before.json"
MACHINE_CODE = command.RESULTS / "machine_code" / "sm_90.json"
PAGES = ROOT / "docs" / "operations"
BATCH = 48
PASSES = FORWARD, BACKWARD = "forward", "backward"
OPERATIONS = STOCH_NORM, SQUARED_DISTANCE = norm.OPERATION, distance.OPERATION
LISTS = (distance.DELTA, distance.ATTENTION, distance.L2_SP, distance.L2)
WORK, MEMORY, CACHE = "work", "memory", "cache"
ELEMENTS = {"float32": "float", "bfloat16": "bfloat16"}  # dtypes as the machine code's table names them

LEAK = 0.12  # of the shorter of work and of memory or cache, which the longer one does not cover


@dataclass(frozen=True)
class Gpu:
    """A GPU as the plans see it, and its speeds."""

    name: str
    cache_bytes: int  # L2, as the driver tells it
    copy: float  # bytes a second, read and written, of a large copy_: nine tenths of what the memory's pins could
    kept_bytes: float  # L2 keeps this much of what was touched last: it is in two halves, and not the oldest goes first
    multiprocessors: int = 132
    threads_per_block: int = 1024
    shared_bytes: int = 227 << 10  # that a block can have
    clock: float = 1.98e9  # Hz, boost
    fabric: float = 5.6e12  # bytes a second between L2 and the multiprocessors
    memory_latency: int = 1150  # cycles from a load to its value out of DRAM, under the load of a copy
    cache_latency: int = 600  # cycles, out of L2, likewise
    shared_latency: int = 150  # cycles, out of shared memory, with the loop's turn

    @property
    def device(self) -> tuple[int, int, int, int]:
        """What gpu_plans takes as its arguments."""
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
class Sums:
    """Cycles to merge one of a kernel's sums into another."""

    lane: int  # a neighbouring lane's, by shuffles, and in rows each further channel's beside it:
    instructions: int  # a warp's, on its scheduler; a shuffle takes four turns
    entry: int  # one that a thread has already
    uneven_lane: int  # the same two where counts differ
    uneven_entry: int


@dataclass(frozen=True)
class Steps:
    """What the kernels' steps take beside their loops: cycles, but for the first two, which are seconds.

    Estimates from the code and the latencies of its instructions: about 30 cycles for a shuffle or a look into shared
    memory, 30 for a barrier, 100 for a division or a square root, 270 for a load out of an idle L2, 700 for an atomic
    or a fence behind stores.
    """

    launch: float = 2.5e-6  # of a kernel, until its first load and after its last store
    memset: float = 2.0e-6  # a node more in the stream, and the gap behind it

    # stoch_norm: three numbers to merge, or two. Equal counts take no division; others do, in rows of runs.
    moments: Sums = Sums(lane=70, instructions=26, entry=60, uneven_lane=170, uneven_entry=150)
    products: Sums = Sums(lane=60, instructions=10, entry=20, uneven_lane=60, uneven_entry=50)
    join: int = 150  # rows of runs: a thread's lanes to the sums of two channels
    read: int = 60  # a barrier, and the first entry out of shared memory
    finish: int = 900  # a channel's constants of its sums: a chain of loads, √ and divisions
    # the resident schedule
    block: int = 550  # a block comes to be, and its addresses
    operands: int = 400  # of its channels, loads at once; then √ and division
    # the sliced one
    item: int = 250  # a barrier, and the 32-bit division that makes an item of a ticket
    known_constants: int = 250  # of what was fetched for the item: √ and division, a barrier and a look
    # a slice's sum: store, barrier, fence and atomic, barrier; meanwhile another warp fetches the next item's operands
    arrive: int = 1500
    slices: int = 350  # the last block: four loads a thread at once, out of L2
    release: int = 700  # a fence and an atomic behind the constants
    wait: int = 950  # the counter and a fence, a barrier, and then the constants, out of L2; the next ticket meanwhile

    # squared_distance
    chunk: int = 700  # a block comes to be, and finds its operand in a step or two
    chunk_sum: int = 450  # shuffles in double, a barrier, shuffles again
    chunk_arrive: int = 1000  # two counters at the same time: a fence and an atomic
    chunks: int = 700  # the last block: sixteen loads a thread at once, out of L2
    store: int = 100  # of a result


@dataclass(frozen=True)
class Loop:
    """A kernel's innermost loop over vectors, by its machine code."""

    role: str
    element: str  # dtype of its vectors, where a kernel has loops for several; else empty
    instructions: int  # of an iteration
    vectors: int  # of each tensor, or of all if it stores none
    vector_bytes: int
    load_bytes: int  # by a thread in an iteration
    store_bytes: int
    in_flight_bytes: int  # loaded before any of it is used

    def cycles(self, vectors: int, latency: float, share: Callable[[float, float], float]) -> dict[str, float]:
        """Of a thread with so many vectors; ``share`` makes an iteration of what it waits and of its instructions."""
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
    shared_bytes: int  # static ones
    loops: tuple[Loop, ...]

    def of_pass(self, role: str) -> Loop:
        """stoch_norm's loop of that pass, the most unrolled if there are several.

        Raises:
            ValueError: it has none.
        """
        found = [loop for loop in self.loops if loop.role == role]
        if not found:
            raise ValueError(f"the table of machine code has no {role} of {self.name}")
        return max(found, key=lambda loop: loop.vectors)

    def without_residual(self) -> "Kernel":
        """Of a fused loop the table has the way with a residual or signs: without, loads wait for none of these."""
        return replace(self, loops=tuple(replace(loop, in_flight_bytes=loop.load_bytes) for loop in self.loops))

    def of_list(self, element: str, sources: bool, weights: bool) -> Loop:
        """squared_distance's loop over such elements, of its versions the one with least to do for a byte.

        With weights, which caches have, it has as much to do as the version with most, and loads the same.

        Raises:
            ValueError: it has none.
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


@dataclass(frozen=True)
class Traffic:
    """The bytes of one direction of a layer."""

    first: float  # read in the first pass
    again: float  # read once more in the second one, from L2 or not
    beside: float  # read in the second one only
    written_early: float  # in the first pass, of what both passes write at the same pace
    written_late: float

    @classmethod
    def of(cls, case: Case, direction: str, late: float) -> "Traffic":
        """``late``: share of the groups that the second pass writes."""
        own, signs = norm.map_bytes(case), norm.sign_bytes(case)
        residual = own if "add" in case["parts"] else 0
        if direction == FORWARD:
            return cls(own + residual * (1 - late), own * late, residual * late, 0, own + signs)
        # with a residual the first pass reads the signs, and writes the residual's gradient
        return cls(2 * own + signs, 2 * own * late, 0, residual, own)

    @property
    def written(self) -> float:
        return self.written_early + self.written_late

    def found_again(self, plan: Mapping[str, Any], kept: float) -> float:
        """Share of what a sliced schedule reads again that a cache has, of which it keeps ``kept`` bytes.

        Between the two passes over a slice lies what the items in between read and write for the first time.
        """
        slices = plan["groups"] * plan["slices"]
        first, second = (self.first + self.written_early) / slices, (self.beside + self.written_late) / slices
        distances = between_passes(plan["order"])
        found = (count * hit_share(m * first + n * second, kept) for (m, n), count in distances.items())
        return sum(found) / distances.total()


@dataclass(frozen=True)
class Prediction:
    """A pass over one map, or one list of tensors."""

    seconds: float
    copy_share: float  # of the time that a copy of the floor's bytes would take
    limit: str  # what takes longest: work, memory or cache
    microseconds: dict[str, float]  # of these three, of launches, and of what comes after all else
    work: dict[str, float]  # microseconds of the work's parts
    dram_bytes: float
    hit: float | None  # share of what is read again that L2 has; None: nothing is
    rounds: float  # items or blocks for each place where one runs at a time


# ---- What is known of the kernels


def read_machine_code(file: Path) -> tuple[dict[str, Kernel], str]:
    """The kernels by name, and which compiler made them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no table of machine code.
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
    """The program that says how launches look, compiled into ``folder``.

    Raises:
        RuntimeError: there is no compiler, or it fails.
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
    """How the launches look that gpu_plans.cu's ``requests`` name.

    Raises:
        RuntimeError: a request is none.
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


# ---- Time


def quantisation(rounds: float) -> float:
    """By what factor ``rounds`` equal blocks for each place take longer than if they could be shared out evenly.

    Few take whole rounds; many are not in step, and half a one is waited for at the end.
    """
    return math.ceil(rounds) / rounds if rounds < 6 else 1 + 0.5 / rounds


def hit_share(touched: float, kept: float) -> float:
    """Share of the bytes read again that a cache has, of which it keeps ``kept``, if ``touched`` others came between.

    All up to three quarters, none from five quarters on.
    """
    return min(1.0, max(0.0, (kept - touched) / (0.5 * kept) + 0.5))


@dataclass(frozen=True)
class Schedulers:
    """How warps share the four schedulers of a multiprocessor, each of which issues an instruction a cycle."""

    own: float  # warps of a block for each scheduler
    all: float  # warps there

    @classmethod
    def of(cls, threads: int, blocks: int) -> "Schedulers":
        """Of so many blocks on a multiprocessor."""
        warps = threads / 32 / 4
        return cls(warps, warps * blocks)

    def apart(self, waiting: float, instructions: float) -> float:
        """Cycles of an iteration where blocks are at different points: the others' work hides behind the waiting."""
        return max(waiting + instructions * self.own, instructions * self.all)

    def together(self, waiting: float, instructions: float) -> float:
        """Where all have begun at once. Beyond eight warps the last issue their loads when the first are served."""
        return max(waiting + instructions * min(self.all, 8), instructions * self.all)


def added(*parts: Mapping[str, float]) -> dict[str, float]:
    """Times by cause, of all parts."""
    return {cause: sum(part.get(cause, 0) for part in parts) for cause in dict.fromkeys(itertools.chain(*parts))}


def nearest(number: float) -> int:
    """The nearest whole number, halves upwards."""
    return math.floor(number + 0.5)


def scaled(part: Mapping[str, float], factor: float) -> dict[str, float]:
    return {cause: factor * time for cause, time in part.items()}


class Task(NamedTuple):
    """An item of the sliced schedule's list, as a block sees it: a slice of a group, in one of the passes."""

    first_pass: bool
    group: int
    cycles: float
    waits: bool = False  # for the group's constants


Order = tuple[tuple[int, int, int], ...]  # of a plan: items [first pass, group, slice]


@functools.cache
def between_passes(order: Order) -> Counter[tuple[int, int]]:
    """How many items of the first and of the second pass are between the two over a slice; of how many slices."""
    firsts = seconds = 0
    begun: dict[tuple[int, int], tuple[int, int]] = {}
    counts: Counter[tuple[int, int]] = Counter()
    for first_pass, group, its_slice in order:
        if first_pass:
            firsts += 1
            begun[group, its_slice] = firsts, seconds
        else:
            firsts_then, seconds_then = begun.pop((group, its_slice))
            counts[firsts - firsts_then, seconds - seconds_then] += 1
            seconds += 1
    return counts


def makespan(tasks: Sequence[Task], blocks: int, merge: float) -> float:
    """Cycles until so many blocks have done all tasks.

    A block takes its next ticket when it begins a task. The last of a group's first pass takes ``merge`` cycles more,
    and what waits, waits for it.
    """
    tickets = iter(tasks)
    numbers = itertools.count()
    # (when the block is there, number, what it holds a ticket for)
    turns = [(0.0, next(numbers), task) for task in itertools.islice(tickets, blocks)]
    left = Counter(task.group for task in tasks if task.first_pass)
    ready: dict[int, float] = {}
    waiting: dict[int, list[tuple[float, Task, Task | None]]] = {}
    end = 0.0
    while turns:
        now, _, task = heapq.heappop(turns)
        begun = [(now, task, next(tickets, None))]
        if task.first_pass:
            left[task.group] -= 1
            if not left[task.group]:
                ready[task.group] = now + task.cycles + merge
                begun += waiting.pop(task.group, [])
        elif task.waits and task.group not in ready:
            waiting.setdefault(task.group, []).extend(begun)
            continue
        for since, own, following in begun:
            start = max(since, ready[own.group]) if own.waits else since
            done = ready[own.group] if own.first_pass and not left[own.group] else start + own.cycles
            end = max(end, done)
            if following is not None:
                heapq.heappush(turns, (done, next(numbers), following))
    assert not waiting, "the list of items has a second pass before the first one"
    return end


@dataclass(frozen=True)
class Model:
    """Predicts passes on one GPU."""

    gpu: Gpu
    kernels: Mapping[str, Kernel]
    steps: Steps

    def kernel(self, name: str) -> Kernel:
        """
        Raises:
            ValueError: the table of machine code lacks it.
        """
        if name not in self.kernels:
            raise ValueError(f"the table of machine code has no {name}: expected the one of these sources")
        return self.kernels[name]

    def prediction(self, floor: float, launch: float, work: Mapping[str, float], dram: float, fabric: float,
                   hit: float | None, rounds: float, after: Mapping[str, float]) -> Prediction:  # fmt: skip
        """Of bytes, seconds by cause, and what comes ``after`` all else, likewise."""
        times = {WORK: sum(work.values()), MEMORY: dram / self.gpu.copy, CACHE: fabric / self.gpu.fabric}
        shorter, longer = sorted((times[WORK], max(times[MEMORY], times[CACHE])))
        seconds = launch + longer + LEAK * shorter + sum(after.values())
        return Prediction(
            seconds=seconds,
            copy_share=floor / self.gpu.copy / seconds,
            limit=max(times, key=lambda cause: times[cause]),
            microseconds=scaled({"launch": launch, **times, **after}, 1e6),
            work=scaled(work, 1e6),
            dram_bytes=dram,
            hit=hit,
            rounds=rounds,
        )

    # -- stoch_norm

    def stoch_norm(self, case: Case, direction: str, plan: Mapping[str, Any]) -> Prediction:
        """One direction of a layer, half of whose channels take the batch's statistics."""
        kernel, steps = self.kernel(plan["kernel"]), self.steps
        if case["parts"] == [norm.NORM, "relu"]:
            kernel = kernel.without_residual()
        # runs are written in the first pass if their channel is on running statistics, rows always in the second
        late = 1.0 if plan["rows"] else norm.P
        traffic = Traffic.of(case, direction, late)
        launch = steps.launch
        if direction == FORWARD and norm.sign_bytes(case) and not plan["whole_words"]:
            launch += steps.memset  # signs that are joined by atomicOr
        once = traffic.first + traffic.beside
        latency: float
        if plan["resident"]:
            hit, again, missed = None, 0.0, 0.0
            held = self.gpu.blocks_per_multiprocessor(plan["threads"], kernel.registers, plan["shared_bytes"])
            rounds = plan["blocks"] / (self.gpu.multiprocessors * held)
            latency = self.gpu.memory_latency if traffic.beside else self.gpu.shared_latency
            cycles = self.resident_cycles(plan, kernel, direction, traffic, late, held, latency)
        else:
            hit = traffic.found_again(plan, self.gpu.kept_bytes)
            again, missed = traffic.again, traffic.again * (1 - hit)
            rounds = 2 * plan["groups"] * plan["slices"] / plan["blocks"]
            found = 0 if traffic.beside else hit  # an iteration waits for the last of its loads
            latency = found * self.gpu.cache_latency + (1 - found) * self.gpu.memory_latency
            cycles = self.sliced_cycles(plan, kernel, direction, traffic, late, latency)
        floor, *_ = norm.floor_bytes(
            {**case, "samples": {norm.OURS: {"batch_share": [norm.P]}}}, direction, self.gpu.shared_bytes
        )
        dram, fabric = once + missed + traffic.written, once + again + traffic.written
        return self.prediction(floor, launch, scaled(cycles, 1 / self.gpu.clock), dram, fabric, hit, rounds, {})

    def block_sums(self, plan: Mapping[str, Any], direction: str) -> float:
        """Cycles to merge the sums of a block's threads."""
        sums, steps, log_lanes, warps = self.sums(direction), self.steps, plan["log_lanes"], plan["threads"] // 32
        if plan["rows"] and plan["run"] > 1:
            # a channel has an entry of each vector that its run touches: most where it begins late in one
            run, vector = plan["run"], plan["vector"]
            columns = math.ceil((vector - math.gcd(run, vector) + run) / vector)
            entries = math.ceil(plan["lane_rows"] * columns / (1 << log_lanes))
            return steps.join + steps.read + entries * sums.uneven_entry + log_lanes * sums.uneven_lane
        channels = plan["vector"] if plan["rows"] else 1
        lane = sums.lane + (channels - 1) * sums.instructions * warps / 4
        return lane * math.log2(32 / plan["columns"]) + self.entries(plan, direction, warps)

    def entries(self, plan: Mapping[str, Any], direction: str, rows: int) -> float:
        """Cycles to merge so many entries of each channel in shared memory: those of a lane, then the lanes."""
        sums, log_lanes = self.sums(direction), plan["log_lanes"]
        own = math.ceil(rows / (1 << log_lanes))
        return self.steps.read + (own - 1) * sums.entry + log_lanes * sums.lane

    def slices(self, plan: Mapping[str, Any], direction: str, count: int) -> float:
        """Cycles in which a block merges so many slices, or sections, of a group."""
        sums, channels, threads = self.sums(direction), plan["group_channels"], plan["threads"]
        rows = threads // channels
        batches = math.ceil(count / (4 * rows)) * (self.steps.slices + 4 * sums.entry)
        if channels >= 32:
            return batches + self.entries(plan, direction, rows)
        return batches + math.log2(32 / channels) * sums.lane + self.entries(plan, direction, threads // 32)

    def sums(self, direction: str) -> Sums:
        return self.steps.moments if direction == FORWARD else self.steps.products

    def first_pass(self, kernel: Kernel, vectors: int, share: Callable[[float, float], float],
                   residual: bool) -> dict[str, float]:  # fmt: skip
        """Cycles of a loop that, with a ``residual``, writes: no load of that is under way with another."""
        latency = self.gpu.memory_latency
        loop = kernel.of_pass("first pass").cycles(vectors, latency, share)
        return added(loop, {"loads": vectors * latency}) if residual else loop

    def resident_cycles(self, plan: Mapping[str, Any], kernel: Kernel, direction: str, traffic: Traffic, late: float,
                        held: int, latency: float) -> dict[str, float]:  # fmt: skip
        """Cycles of all blocks.

        Args:
            plan: of the launch.
            kernel: that it is of.
            direction: forward or backward.
            traffic: of the launch.
            late: share of the groups that the second pass writes.
            held: blocks that a multiprocessor holds at once.
            latency: of the second pass's loads.
        """
        gpu, steps = self.gpu, self.steps
        schedulers = Schedulers.of(plan["threads"], min(held, math.ceil(plan["blocks"] / gpu.multiprocessors)))
        vectors = math.ceil(plan["steps"] / plan["lane_rows"])
        fixed: dict[str, float] = {
            "blocks": steps.block,
            "known constants": steps.operands,
            "sums within a block": self.block_sums(plan, direction),
            "constants of sums": steps.finish,
        }
        first = self.first_pass(kernel, vectors, schedulers.together, residual=False)
        early = self.first_pass(kernel, vectors, schedulers.together, residual=traffic.beside > 0)
        second = kernel.of_pass("second pass").cycles(vectors, latency, schedulers.together)
        block = added(fixed, scaled(added(first, second), late), scaled(early, 1 - late))
        rounds = plan["blocks"] / (gpu.multiprocessors * held)
        # all of a round begin and end together; in the last one some places stay empty
        return added(scaled(block, rounds), {"idle": (math.ceil(rounds) - rounds) * sum(block.values())})

    def sliced_cycles(self, plan: Mapping[str, Any], kernel: Kernel, direction: str, traffic: Traffic, late: float,
                      latency: float) -> dict[str, float]:  # fmt: skip
        """Cycles of a block, which takes items until there are none; the arguments are `resident_cycles`'."""
        gpu, steps = self.gpu, self.steps
        share = Schedulers.of(plan["threads"], math.ceil(plan["blocks"] / gpu.multiprocessors)).apart
        needs_constants = direction == BACKWARD or not plan["rows"]
        first: dict[str, float] = {
            "tickets": steps.item,
            "known constants": steps.known_constants if needs_constants else 0,
            "sums within a block": self.block_sums(plan, direction),
            "sums to memory": steps.arrive,
        }
        second: dict[str, float] = {"tickets": steps.item}
        slices = plan["slices"]
        lengths = {False: plan["slice_steps"], True: plan["steps"] - (slices - 1) * plan["slice_steps"]}
        # by pass, whether the group is written in the second one, and whether the slice is the last, which is shorter
        kinds: dict[tuple[bool, bool, bool], dict[str, float]] = {}
        for is_last, length in lengths.items():
            vectors = math.ceil(length / plan["lane_rows"])
            for is_late in (False, True):
                residual = traffic.beside > 0 and not is_late
                kinds[True, is_late, is_last] = added(first, self.first_pass(kernel, vectors, share, residual))
            kinds[False, False, is_last] = second  # which finds that there is nothing to do
            loop = kernel.of_pass("second pass").cycles(vectors, latency, share)
            kinds[False, True, is_last] = added(second, {"wait for constants": steps.wait}, loop)

        # with sections the last block of each merges its slices, and the last of all the sections
        sections, section = plan["sections"], 0.0
        if sections > 1:
            section = self.slices(plan, direction, plan["section_slices"]) + steps.arrive
        merge = self.slices(plan, direction, sections if sections > 1 else slices) + steps.finish + steps.release

        cycles = {kind: sum(causes.values()) for kind, causes in kinds.items()}
        counts: Counter[tuple[bool, bool, bool]] = Counter()
        tasks = []
        ends = [nearest(group * late) for group in range(plan["groups"] + 1)]
        are_late = [end > begin for begin, end in itertools.pairwise(ends)]  # so many groups, evenly
        for is_first, group, its_slice in plan["order"]:
            is_late = are_late[group]
            kind = bool(is_first), is_late, its_slice == slices - 1
            counts[kind] += 1
            tasks.append(Task(bool(is_first), group, cycles[kind], waits=is_late and not is_first))
        total = added({"last block's merge": plan["groups"] * (sections * section + merge)}, *(
            scaled(kinds[kind], count) for kind, count in counts.items()
        ))  # fmt: skip
        block = scaled(total, 1 / plan["blocks"])
        return block | {"idle": makespan(tasks, plan["blocks"], section + merge) - sum(block.values())}

    # -- squared_distance

    def squared_distance(
        self, case: Case, direction: str, plan: Mapping[str, Any], elements: Sequence[int]
    ) -> Prediction:
        """One direction of a list of tensors of so many elements."""
        gpu, steps = self.gpu, self.steps
        sources, weights = case["label"] != distance.L2, case["label"] == distance.ATTENTION
        floor = distance.floor_bytes(case, direction)
        element_bytes = floor / sum(elements)
        work: dict[str, float] = {}
        rounds = 0.0
        rest = iter(elements)
        for launch in plan["launches"]:
            kernel = self.kernel(f"{direction}_kernel<{launch['operands']}>")
            loop = kernel.of_list(ELEMENTS[case["dtype"]], sources, weights)
            held = gpu.blocks_per_multiprocessor(launch["threads"], kernel.registers, kernel.shared_bytes)
            places = gpu.multiprocessors * held
            schedulers = Schedulers.of(launch["threads"], min(held, math.ceil(launch["blocks"] / gpu.multiprocessors)))
            chunk: dict[str, float] = {"blocks": steps.chunk}
            if direction == FORWARD:
                chunk["sums"] = steps.chunk_sum + steps.chunk_arrive
            parts = [scaled(chunk, launch["blocks"])]
            thread_bytes = launch["threads"] * loop.moved_bytes / loop.vectors
            for blocks, count in zip(launch["operand_blocks"], rest, strict=False):
                for length, times in ((launch["chunk"], blocks - 1), (count - (blocks - 1) * launch["chunk"], 1)):
                    vectors = math.ceil(length * element_bytes / thread_bytes)
                    parts.append(scaled(loop.cycles(vectors, gpu.memory_latency, schedulers.apart), times))
            work = added(work, scaled(added(*parts), 1 / places / gpu.clock))
            rounds += launch["blocks"] / places
        work["idle"] = (quantisation(rounds) - 1) * sum(work.values())
        after: dict[str, float] = {}
        if direction == FORWARD:
            # the last block of all is nearly always its operand's last one, too: two sums, each with its store
            threads, chunks = plan["launches"][-1]["threads"], sum(launch["blocks"] for launch in plan["launches"])
            cycles = steps.chunks * math.ceil(chunks / (16 * threads)) + 2 * (steps.chunk_sum + steps.store)
            after = {"last block's sum": cycles / gpu.clock}
        return self.prediction(floor, len(plan["launches"]) * steps.launch, work, floor, floor, None, rounds, after)


def batch_norm_seconds(case: Case, direction: str, gpu: Gpu) -> float:
    """What nn.BatchNorm2d, and PyTorch's operators for what follows it, would take: an assumption, not a prediction.

    That its kernels move 3N forward and 5N backward (in float32, where a channel of a contiguous map stays in a cache
    beside its multiprocessor, 2N and 3N) at these shares of a copy's speed: few channels leave multiprocessors idle,
    short runs and 16 bits are read in narrow pieces. An operator in place moves 2N, one that adds or a relu's gradient
    3N, both at a copy's speed.
    """
    channels, height = case["shape"][1:3]
    map_bytes, narrow = norm.map_bytes(case), case["dtype"] != "float32"
    passes = {FORWARD: 3, BACKWARD: 5}[direction]
    if case["layout"] == "channels_last":
        efficiency = 0.5 if narrow else 0.75
    elif narrow:
        efficiency = 0.35 * min(1, channels / (2 * gpu.multiprocessors)) if height > 7 else 0.25
    else:
        efficiency = 0.8 if height > 7 else 0.45
        if norm.channel_bytes(case) * (1 if direction == FORWARD else 2) <= 160e3:
            passes = {FORWARD: 2, BACKWARD: 3}[direction]
            efficiency *= min(1, channels / gpu.multiprocessors)
    if gpu.copy > 4e12:  # the more memory can do, the less of it is used
        efficiency *= 0.88
    seconds = 3e-6 + passes * map_bytes / (gpu.copy * efficiency)
    behind = {(FORWARD, "relu"): 2, (FORWARD, "add"): 3, (BACKWARD, "relu"): 3}
    return seconds + sum(
        3e-6 + behind[direction, part] * map_bytes / gpu.copy for part in case["parts"] if (direction, part) in behind
    )


# ---- All cases


def stoch_norm_cases() -> Iterator[Case]:
    """The layers of ResNet-50 alone, and its blocks, as bench_stoch_norm.py has them."""
    for dtype, layout, (channels, size, blocks) in itertools.product(("float32", "bfloat16"), LAYOUTS, norm.LAYERS):
        for block, count in (blocks | {norm.NORM: sum(blocks.values())}).items():
            setting = norm.Setting(channels, size, count, layout, dtype, BATCH, "cuda", block)
            yield {
                "operation": STOCH_NORM, "label": setting.label, "parts": setting.parts, "shape": list(setting.shape),
                "count": count, "layout": layout, "dtype": dtype,
            }  # fmt: skip


def stoch_norm_request(case: Case, direction: str) -> str:
    batch, channels, height, width = case["shape"]
    rows = case["layout"] == "channels_last"
    view = (batch * height * width, channels, 1) if rows else (batch, channels, height * width)
    kind = "plain" if case["parts"] == [norm.NORM] else "fused"
    return " ".join(map(str, (STOCH_NORM, case["dtype"], direction, kind, *view)))


def squared_distance_cases() -> Iterator[tuple[Case, list[int]]]:
    """The lists of bench_squared_distance.py, with their tensors' elements."""
    for dtype, label in itertools.product(("float32", "bfloat16"), LISTS):
        setting = distance.Setting(label, "contiguous", dtype, BATCH, "cuda")
        elements = [math.prod(shape) for shape in setting.shapes]
        target_bytes = sum(elements) * DTYPES[dtype].itemsize
        case = {"operation": SQUARED_DISTANCE, "label": label, "tensors": len(elements), "target_bytes": target_bytes,
                "layout": "contiguous", "dtype": dtype}  # fmt: skip
        yield case, elements


def squared_distance_request(case: Case, elements: Sequence[int]) -> str:
    sources = "none" if case["label"] == distance.L2 else "sources"
    return " ".join(map(str, (SQUARED_DISTANCE, case["dtype"], sources, *elements)))


def predict(model: Model, program: Path) -> Iterator[Case]:
    """All cases on one GPU, each with a prediction for either direction."""
    layers, lists = list(stoch_norm_cases()), list(squared_distance_cases())
    requests = [stoch_norm_request(case, direction) for case in layers for direction in PASSES]
    requests += [squared_distance_request(case, elements) for case, elements in lists]
    found = iter(plans(program, model.gpu, requests))
    for case in layers:
        own = {"gpu": model.gpu.name, **case}
        for direction in PASSES:
            plan = next(found)
            predicted = model.stoch_norm(case, direction, plan)
            batch_norm = batch_norm_seconds(case, direction, model.gpu)
            shown = {name: plan[name] for name in ("kernel", "blocks", "slices", "slice_steps", "lag")}
            own[direction] = {**asdict(predicted), "batch_norm": batch_norm, "plan": shown}
        yield own
    for (case, elements), plan in zip(lists, found, strict=True):
        own = {"gpu": model.gpu.name, **case}
        for direction in PASSES:
            own[direction] = asdict(model.squared_distance(case, direction, plan, elements))
        yield own


def run(machine_code: Path, before: Path | None, steps: Steps) -> dict[str, Any]:
    """The results: a prediction for every case, with that of ``before`` beside it."""
    kernels, compiled_by = read_machine_code(machine_code)
    older = None if before is None else read_before(before)
    with tempfile.TemporaryDirectory() as folder:
        program = build_plans(Path(folder))
        cases = [case for gpu in GPUS for case in predict(Model(gpu, kernels, steps), program)]
    where = report.environment(torch.device("cpu"))
    results = {
        "environment": {name: where[name] for name in ("date", "command", "commit")} | {"machine_code": compiled_by},
        "settings": {"batch": BATCH, "p": norm.P, "gpus": [asdict(gpu) for gpu in GPUS], "steps": asdict(steps)},
        "cases": cases,
    }
    if older is not None:
        results["before"], seconds = older
        for case in cases:
            case["before"] = seconds[identity(case)]
    return results


def identity(case: Case) -> tuple[str, ...]:
    return tuple(case[name] for name in ("operation", "gpu", "label", "layout", "dtype"))


def read_before(file: Path) -> tuple[str, dict[tuple[str, ...], dict[str, float]]]:
    """The commit of older results, and the seconds of each case's passes.

    Raises:
        FileNotFoundError: there are none.
        ValueError: the file is none, or lacks a case.
    """
    if not file.exists():
        raise FileNotFoundError(f"expected the results of an older commit at {file.name}: there is no such file")
    try:
        older = json.loads(file.read_text())
        seconds = {identity(case): {part: case[part]["seconds"] for part in PASSES} for case in older["cases"]}
        commit = older["environment"]["commit"]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file.name} has no results of gpu_model.py: {type(error).__name__}: {error}") from error
    every = [*stoch_norm_cases(), *(case for case, _ in squared_distance_cases())]
    for gpu, case in itertools.product(GPUS, every):
        name = identity({"gpu": gpu.name, **case})
        if name not in seconds:
            raise ValueError(f"{file.name} lacks {', '.join(name)}")
    return commit, seconds


# ---- Tables


def summed(cases: Sequence[Case], figure: str) -> float:
    """Seconds of all layers that the cases stand for, forward and backward."""
    return sum(case.get("count", 1) * case[part][figure] for case in cases for part in PASSES)


def copied(cases: Sequence[Case]) -> float:
    """Seconds of a copy of all of their floors' bytes."""
    return sum(
        case.get("count", 1) * case[part]["copy_share"] * case[part]["seconds"] for case in cases for part in PASSES
    )


def cells(cases: Sequence[Case], scale: float, digits: int) -> list[str]:
    """Time before, if known, and now, share of a copy, and ratio to BatchNorm's if there is one."""
    own = summed(cases, "seconds")
    line = []
    if "before" in cases[0]:
        before = sum(case.get("count", 1) * sum(case["before"].values()) for case in cases)
        line.append(f"{scale * before:.{digits}f}")
    line += [f"{scale * own:.{digits}f}", f"{100 * copied(cases) / own:.0f} %"]
    if cases[0]["operation"] == STOCH_NORM:
        line.append(f"{summed(cases, 'batch_norm') / own:.2f}×")
    return line


def totals(cases: Sequence[Case]) -> Iterator[tuple[str, list[Case]]]:
    """All layers alone, and all blocks of the network, of one GPU, layout and dtype."""
    alone = [case for case in cases if norm.is_alone(case)]
    count = sum(case["count"] for case in alone)
    yield f"all {count} layers", alone
    nothing_behind = {f"{channels}@{size}": blocks[norm.NORM] for channels, size, blocks in norm.LAYERS
                      if norm.NORM in blocks}  # fmt: skip
    blocks = [case for case in cases if not norm.is_alone(case)]
    blocks += [{**case, "count": nothing_behind[case["label"]]} for case in alone if case["label"] in nothing_behind]
    yield f"all {count} blocks", blocks


def grouped(results: dict[str, Any], operation: str) -> dict[tuple[str, str], dict[str, list[Case]]]:
    """An operation's cases by layout and dtype, and by GPU."""
    found: dict[tuple[str, str], dict[str, list[Case]]] = {}
    for case in results["cases"]:
        if case["operation"] == operation:
            by_gpu = found.setdefault((case["layout"], case["dtype"]), {})
            by_gpu.setdefault(case["gpu"], []).append(case)
    return found


def total_rows(results: dict[str, Any], operation: str) -> list[list[str]]:
    """What an operation's page shows: a header, and a row for each layout and dtype."""
    names = [gpu["name"] for gpu in results["settings"]["gpus"]]
    times = ["before, ms", "predicted, ms"] if "before" in results else ["predicted, ms"]
    columns = [*times, "of a copy", *(["over BatchNorm"] if operation == STOCH_NORM else [])]
    lines = [["", "layout", "dtype", *(f"{name}: {column}" for name in names for column in columns), "measured"]]
    for (layout, dtype), by_gpu in grouped(results, operation).items():
        if operation == STOCH_NORM:
            rows = zip(*(totals(cases) for cases in by_gpu.values()), strict=True)
            named = [(pairs[0][0], [cases for _, cases in pairs]) for pairs in rows]
        else:
            labels = [case["label"] for case in next(iter(by_gpu.values()))]
            named = [(label, [[case] for cases in by_gpu.values() for case in cases if case["label"] == label])
                     for label in labels]  # fmt: skip
        digits = 1 if operation == STOCH_NORM else 3
        for label, of_gpus in named:
            figures = [cell for cases in of_gpus for cell in cells(cases, 1e3, digits)]
            lines.append([label, layout, dtype, *figures, ""])
    return lines


def case_rows(results: dict[str, Any], operation: str) -> list[list[str]]:
    """A row for every case, with what limits it on each GPU."""
    names = [gpu["name"] for gpu in results["settings"]["gpus"]]
    times = ["before, µs"] if "before" in results else []
    ratio = ["over BatchNorm"] if operation == STOCH_NORM else []
    columns = [*times, "both, µs", "of a copy", *ratio, "forward, µs", "backward, µs", "longest"]
    lines = [["", "layout", "dtype", *(f"{name}: {column}" for name in names for column in columns)]]
    for (layout, dtype), by_gpu in grouped(results, operation).items():
        for same in zip(*by_gpu.values(), strict=True):
            label = f"{same[0]['label']}×{same[0]['count']}" if "count" in same[0] else same[0]["label"]
            figures = []
            for case in same:
                figures += cells([case], 1e6, 1)
                figures += [f"{1e6 * case[part]['seconds']:.1f}" for part in PASSES]
                figures.append(" / ".join(case[part]["limit"] for part in PASSES))
            lines.append([label, layout, dtype, *figures])
    return lines


CAPTION = (
    "**A prediction, not a measurement**: by benchmarks/gpu_model.py, ±25 %, for forward and backward pass at batch "
    "{batch}. Of a copy: the floor's bytes per second over those of a large copy_ ({copies}). Over BatchNorm: how many "
    "times as long nn.BatchNorm2d takes, whose time is assumed, not predicted. Longest, forward / backward: work "
    "(fixed steps, latency and instructions of the blocks), memory (DRAM) or cache (what L2 moves)."
)


def caption(results: dict[str, Any]) -> str:
    copies = ", ".join(f"{gpu['name']} {gpu['copy'] / 1e12:.1f} TB/s" for gpu in results["settings"]["gpus"])
    text = CAPTION.format(batch=results["settings"]["batch"], copies=copies)
    if "before" in results:
        text += f" Before: commit {results['before']}."
    return text


def publish(results: dict[str, Any], folder: Path) -> None:
    """Print the totals; write ``table.md`` with every case."""
    where = results["environment"]
    said = caption(results)
    origin = f"`{where['command']}` ({where['date']}; commit {where['commit']}; {where['machine_code']})"
    parts = [said]
    for operation in OPERATIONS:
        rows = total_rows(results, operation)
        print(report.align(rows), end="\n\n")
        parts += [f"## {operation}", report.markdown(rows), report.markdown(case_rows(results, operation))]
    print(said)
    text = "\n\n".join([*parts, origin]) + "\n"
    write_atomically(folder / "table.md", lambda file: file.write(text.encode()))


def page_of(operation: str) -> Path:
    return PAGES / f"{operation}.md"


def page_with_table(page: str, results: dict[str, Any], operation: str) -> str:
    """The text of an operation's page, with its totals between the markers.

    Raises:
        ValueError: the page lacks the markers.
    """
    return report.with_block(page, f"gpu_model, {operation}", report.markdown(total_rows(results, operation)))


def write_pages(results: dict[str, Any]) -> None:
    texts = {name: page_with_table(page_of(name).read_text(), results, name) for name in OPERATIONS}
    for name, text in texts.items():
        page_of(name).write_text(text)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, metavar="FILE", default=BEFORE if BEFORE.exists() else None,
                        help="an older results.json; before.json beside the committed results")  # fmt: skip
    parser.add_argument("--machine-code", type=Path, metavar="FILE", default=MACHINE_CODE, help="that of sm_90")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder; results/gpu_model beside this file")
    parser.add_argument("--page", action="store_true", help="write the totals into docs/operations as well")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    try:
        results = run(options.machine_code, options.before, Steps())
        report.write_json(results, options.out)
        results = json.loads((options.out / "results.json").read_text())
        publish(results, options.out)
        if options.page:
            write_pages(results)
    except (OSError, ValueError, RuntimeError) as error:
        sys.exit(f"gpu_model.py: {error}")


if __name__ == "__main__":
    main()
