"""Predicts the times of the CUDA kernels' passes from what gpu_launches.py knows. No time is a measurement.

A pass takes the longest of three times:

* work: each block does its items one after the other. An item has fixed steps (`Steps`) and the iterations of its loop.
  An iteration waits for its loads, as many bytes in flight each time (Little's law), and then issues its instructions.
* memory: what DRAM moves. The second pass reads a share of its bytes from the L2 cache, and the others from DRAM.
* cache: what moves between L2 and the multiprocessors.

The work overlaps with memory and cache, but not perfectly. So `LEAK` of the shorter time is added: of the work, or of
memory or cache if the work is longer. The time of a launch comes first. Expect an error of 25 % either way.
``spectral_tail``, which arithmetic limits and not memory, is not modelled.
"""

import functools
import heapq
import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import bench_squared_distance as distance
import bench_stoch_norm as norm
from gpu_launches import Gpu, Kernel
from report import Case

PASSES = FORWARD, BACKWARD = "forward", "backward"
WORK, MEMORY, CACHE = "work", "memory", "cache"
ELEMENTS = {"float32": "float", "bfloat16": "bfloat16"}  # dtypes as the machine code's table names them

LEAK = 0.12  # of the shorter of work and of memory or cache, which the longer one does not cover


@dataclass(frozen=True)
class Sums:
    """Cycles to merge one of a kernel's sums into another."""

    lane: int  # the sum of another lane, by shuffles
    instructions: int  # a warp's on its scheduler, for each further channel of a row; a shuffle takes four turns
    entry: int  # a sum that the thread already has
    uneven_lane: int  # like `lane`, where counts differ
    uneven_entry: int  # like `entry`, where counts differ


@dataclass(frozen=True)
class Steps:
    """What the kernels' steps take beside their loops: the first two in seconds, the others in cycles.

    These are estimates from the code and the latencies of its instructions: about 30 cycles for a shuffle or a load
    from shared memory, 30 for a barrier, 100 for a division or a square root, 270 for a load from an idle L2, 700 for
    an atomic or a fence after stores.
    """

    launch: float = 2.5e-6  # of a kernel, until its first load and after its last store
    memset: float = 2.0e-6  # one more operation in the stream, and the gap after it

    # stoch_norm merges three numbers forward, two backward. Where counts differ, in rows of runs, a merge divides.
    moments: Sums = Sums(lane=70, instructions=26, entry=60, uneven_lane=170, uneven_entry=150)
    products: Sums = Sums(lane=60, instructions=10, entry=20, uneven_lane=60, uneven_entry=50)
    join: int = 150  # rows of runs: a thread adds its lanes to the sums of two channels
    read: int = 60  # a barrier, and the first entry from shared memory
    finish: int = 900  # a channel's constants from its sums: a chain of loads, √ and divisions
    # the resident schedule
    block: int = 550  # the start of a block, and its addresses
    operands: int = 400  # of the block's channels: loads at the same time, then √ and division
    # the sliced schedule
    item: int = 250  # a barrier, and the 32-bit division that turns a ticket into an item
    known_constants: int = 250  # of the operands fetched for the item: √ and division, a barrier and a load
    # a slice's sum: store, barrier, fence and atomic, barrier; meanwhile another warp fetches the next item's operands
    arrive: int = 1500
    slices: int = 350  # in the last block: four loads a thread at the same time, from L2
    release: int = 700  # a fence and an atomic after the constants
    wait: int = 950  # the counter and a fence, a barrier, then the constants from L2; meanwhile the next ticket

    # squared_distance
    chunk: int = 700  # the start of a block, which finds its operand in a step or two
    chunk_sum: int = 450  # shuffles in double, a barrier, shuffles again
    chunk_arrive: int = 1000  # two counters at the same time: a fence and an atomic
    chunks: int = 700  # in the last block: sixteen loads a thread at the same time, from L2
    store: int = 100  # of a result


@dataclass(frozen=True)
class Traffic:
    """The bytes that one direction of a layer moves."""

    first: float  # read in the first pass
    again: float  # read once more in the second pass, from L2 or DRAM
    beside: float  # read in the second pass only
    written_early: float  # in the first pass
    written_late: float  # counted for the second pass, although the first pass writes some groups of it

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
        """Share of a sliced schedule's second reads that hit a cache which keeps ``kept`` bytes.

        Between the two passes over a slice, other items read and write their bytes for the first time.
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
    microseconds: dict[str, float]  # of these three, of the launches, and of the steps after all others
    work: dict[str, float]  # microseconds of the work's parts
    dram_bytes: float
    hit: float | None  # share of the second reads that hit L2; None: nothing is read twice
    rounds: float  # items or blocks divided by the number that runs at the same time


def quantisation(rounds: float) -> float:
    """The factor by which equal blocks take longer than if they could be shared out evenly.

    Few blocks take whole rounds. Many blocks are not in step, and at the end half a round is lost.
    """
    return math.ceil(rounds) / rounds if rounds < 6 else 1 + 0.5 / rounds


def hit_share(touched: float, kept: float) -> float:
    """Share of second reads that hit a cache which keeps ``kept`` bytes, if ``touched`` other bytes came between.

    All hit if ``touched`` is at most three quarters of ``kept``, and none from five quarters on.
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
        """Cycles of an iteration where blocks are at different points: their work hides the waiting."""
        return max(waiting + instructions * self.own, instructions * self.all)

    def together(self, waiting: float, instructions: float) -> float:
        """Cycles where all blocks began together. The ninth warp issues its loads when the first has its data."""
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
    """The numbers of items of the first and of the second pass between a slice's two items, by number of slices."""
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
    """Cycles until ``blocks`` blocks have done all tasks.

    A block takes its next ticket when it begins a task. The last task of a group's first pass takes ``merge`` cycles
    more. The tasks that wait for the group start after it.
    """
    tickets = iter(tasks)
    numbers = itertools.count()
    # (when the block is free, a number that breaks ties, the task of its ticket)
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
        """The prediction from bytes and from seconds by cause; ``after`` are seconds of steps after all others."""
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
        """One direction of a layer. Half of its channels take the batch statistics."""
        kernel, steps = self.kernel(plan["kernel"]), self.steps
        if case["parts"] == [norm.NORM, "relu"]:
            kernel = kernel.without_residual()
        # the first pass writes runs whose channel takes running statistics; the second pass writes all rows
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
            # a channel has an entry for each vector that its run touches: most if it begins late in a vector
            run, vector = plan["run"], plan["vector"]
            columns = math.ceil((vector - math.gcd(run, vector) + run) / vector)
            entries = math.ceil(plan["lane_rows"] * columns / (1 << log_lanes))
            return steps.join + steps.read + entries * sums.uneven_entry + log_lanes * sums.uneven_lane
        channels = plan["vector"] if plan["rows"] else 1
        lane = sums.lane + (channels - 1) * sums.instructions * warps / 4
        return lane * math.log2(32 / plan["columns"]) + self.entries(plan, direction, warps)

    def entries(self, plan: Mapping[str, Any], direction: str, rows: int) -> float:
        """Cycles to merge ``rows`` entries of each channel in shared memory: those of a lane, then the lanes."""
        sums, log_lanes = self.sums(direction), plan["log_lanes"]
        own = math.ceil(rows / (1 << log_lanes))
        return self.steps.read + (own - 1) * sums.entry + log_lanes * sums.lane

    def slices(self, plan: Mapping[str, Any], direction: str, count: int) -> float:
        """Cycles in which a block merges ``count`` slices, or sections, of a group."""
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
        """Cycles of the first pass's loop. With a ``residual`` it writes, and loads its residual one by one."""
        latency = self.gpu.memory_latency
        loop = kernel.of_pass("first pass").cycles(vectors, latency, share)
        return added(loop, {"loads": vectors * latency}) if residual else loop

    def resident_cycles(self, plan: Mapping[str, Any], kernel: Kernel, direction: str, traffic: Traffic, late: float,
                        held: int, latency: float) -> dict[str, float]:  # fmt: skip
        """Cycles of all blocks.

        Args:
            plan: of the launch.
            kernel: that is launched.
            direction: forward or backward.
            traffic: of the direction.
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
        # the blocks of a round begin and end together; in the last round some multiprocessors have room left
        return added(scaled(block, rounds), {"idle": (math.ceil(rounds) - rounds) * sum(block.values())})

    def sliced_cycles(self, plan: Mapping[str, Any], kernel: Kernel, direction: str, traffic: Traffic, late: float,
                      latency: float) -> dict[str, float]:  # fmt: skip
        """Cycles of a block, which takes items until none are left. See `resident_cycles` for the arguments."""
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
        # by first pass or not, group written late or not, and last slice of the group or not, which is shorter
        kinds: dict[tuple[bool, bool, bool], dict[str, float]] = {}
        for is_last, length in lengths.items():
            vectors = math.ceil(length / plan["lane_rows"])
            for is_late in (False, True):
                residual = traffic.beside > 0 and not is_late
                kinds[True, is_late, is_last] = added(first, self.first_pass(kernel, vectors, share, residual))
            kinds[False, False, is_last] = second  # an item with nothing to do
            loop = kernel.of_pass("second pass").cycles(vectors, latency, share)
            kinds[False, True, is_last] = added(second, {"wait for constants": steps.wait}, loop)

        # with sections, the last block of each section merges its slices; the last block of all merges the sections
        sections, section = plan["sections"], 0.0
        if sections > 1:
            section = self.slices(plan, direction, plan["section_slices"]) + steps.arrive
        merge = self.slices(plan, direction, sections if sections > 1 else slices) + steps.finish + steps.release

        cycles = {kind: sum(causes.values()) for kind, causes in kinds.items()}
        counts: Counter[tuple[bool, bool, bool]] = Counter()
        tasks = []
        ends = [nearest(group * late) for group in range(plan["groups"] + 1)]
        are_late = [end > begin for begin, end in itertools.pairwise(ends)]  # evenly spread
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
        """One direction of a list of tensors with these numbers of elements."""
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
            # the last block of all is nearly always the last of its operand too: two sums, each with its store
            threads, chunks = plan["launches"][-1]["threads"], sum(launch["blocks"] for launch in plan["launches"])
            cycles = steps.chunks * math.ceil(chunks / (16 * threads)) + 2 * (steps.chunk_sum + steps.store)
            after = {"last block's sum": cycles / gpu.clock}
        return self.prediction(floor, len(plan["launches"]) * steps.launch, work, floor, floor, None, rounds, after)


def batch_norm_seconds(case: Case, direction: str, gpu: Gpu) -> float:
    """Seconds of nn.BatchNorm2d and of the operators after it: an assumption, not a prediction.

    It assumes that the kernels of BatchNorm2d move 3N bytes forward and 5N backward, for a map of N bytes. In float32
    they move 2N and 3N if a channel of a contiguous map fits into a multiprocessor's cache. They reach a share of a
    copy's speed: few channels leave multiprocessors idle, and short runs and 16 bits are read in narrow pieces. An
    operator in place moves 2N. An addition or the gradient of a relu moves 3N. Both reach a copy's speed.
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
    if gpu.copy > 4e12:  # faster memory is used less fully
        efficiency *= 0.88
    seconds = 3e-6 + passes * map_bytes / (gpu.copy * efficiency)
    behind = {(FORWARD, "relu"): 2, (FORWARD, "add"): 3, (BACKWARD, "relu"): 3}
    return seconds + sum(
        3e-6 + behind[direction, part] * map_bytes / gpu.copy for part in case["parts"] if (direction, part) in behind
    )
