"""Reads the machine code of the CUDA kernels: how wide their loops load and store, and in how many instructions.

``python tools/machine_code.py`` compiles csrc/cuda/*.cu for one architecture, takes the machine code apart and fails
where a loop moves its vectors in pieces, where a kernel uses local memory, and on whatever architectures.py fails on.
``--write`` puts the figures into benchmarks/results/machine_code and their table into docs/kernels.md. It needs nvcc,
torch's headers, c++filt and nvdisasm (``pip install nvidia-cuda-nvdisasm``), but no GPU.

A *hot loop* is an innermost loop that moves a kernel's vectors. Its figures are those of one whole iteration: one that
uses every vector that it loads. Of all ways through the loop that do, it is the shortest; of stoch_norm's first pass
the shortest without a store, as of channels whose output waits for the constants.
"""

import argparse
import importlib.metadata
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import architectures
import build_parts

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "machine_code"
PAGE = ROOT / "docs" / "kernels.md"
BEGIN, END = "<!-- machine code: begin -->", "<!-- machine code: end -->"
BYTES_PER_INSTRUCTION = 16  # on every architecture since 7.0

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


@dataclass(frozen=True)
class Instruction:
    opcode: str  # like LDG.E.128
    operands: str  # separated by commas
    predicate: str  # like @!P0; empty: none

    @property
    def operation(self) -> str:
        return self.opcode.partition(".")[0]

    @cached_property
    def registers(self) -> tuple[int | None, frozenset[int]]:
        """The first register that it writes, if any, and those that it names to read."""
        named = [int(number) for number in re.findall(r"\bR(\d+)", self.operands)]
        writes = re.match(r"R\d+\b", self.operands) is not None
        return (named[0], frozenset(named[1:])) if writes else (None, frozenset(named))

    @cached_property
    def calculates(self) -> bool:
        """Whether it does more to what it reads than an integer operation, by which values are taken apart and moved:
        arithmetic with floating-point numbers, or a store."""
        return re.match(r"[FHD]|MUFU|ST", self.opcode) is not None


@dataclass(frozen=True)
class Access:
    """One or more neighbouring loads, or stores, of memory."""

    memory: str  # global, shared, local, any
    stores: bool
    bytes: int  # of all of them
    pieces: int
    registers: frozenset[int]  # loads: that they write


MEMORY = {"G": "global", "": "any", "S": "shared", "L": "local"}
WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


def access_of(instruction: Instruction) -> Access | None:
    """What it loads or stores; None if it does neither. Loads past the registers (LDGSTS) count as loads."""
    found = re.fullmatch(r"(LD|ST)([GSL]?)|LDGSTS", instruction.operation)
    if found is None:
        return None
    size = next((WIDTHS[part] for part in instruction.opcode.split(".") if part in WIDTHS), 4)
    stores = found[1] == "ST"
    first, _ = instruction.registers
    written = frozenset() if stores or first is None else frozenset(range(first, first + max(size // 4, 1)))
    memory = MEMORY[found[2]] if found[1] else "global"
    return Access(memory, stores, size, 1, written)


def address_of(instruction: Instruction) -> tuple[str, int]:
    """The registers and the constant of its address."""
    address = instruction.operands.rpartition("[")[2].rpartition("]")[0]
    offset = re.search(r"\+?(-?0x[0-9a-f]+)$", address)
    return (address[: offset.start()], int(offset[1], 16)) if offset else (address, 0)


# ---- Control flow


@dataclass(frozen=True)
class Block:
    """The instructions [begin, end), and where the next ones are."""

    begin: int
    end: int
    successors: tuple[int, ...]


def blocks_of(instructions: Sequence[Instruction]) -> dict[int, Block]:
    """Basic blocks by their first instruction. A call counts as one instruction; what it calls are blocks as well."""
    after: dict[int, tuple[int, ...]] = {}  # what follows a branch
    for i, instruction in enumerate(instructions):
        following = (i + 1,) if instruction.predicate else ()
        if instruction.operation in ("BRA", "JMP"):
            *conditions, target = instruction.operands.split(",")
            following = (i + 1,) if instruction.predicate or conditions else ()
            after[i] = (int(target, 16) // BYTES_PER_INSTRUCTION, *following)
        elif instruction.operation in ("EXIT", "RET", "BRX", "JMX"):  # where the latter lead is not listed
            after[i] = following
    starts = {0} | {i + 1 for i in after} | {target for targets in after.values() for target in targets}
    ordered = [*sorted(start for start in starts if start < len(instructions)), len(instructions)]
    return {
        begin: Block(begin, end, tuple(start for start in after.get(end - 1, (end,)) if start < len(instructions)))
        for begin, end in itertools.pairwise(ordered)
    }


@dataclass(frozen=True)
class Graph:
    """Blocks in an order in which each comes after all that lead to it but those of loops, and its dominator."""

    order: list[int]
    dominators: Mapping[int, int]  # the immediate one; -1 for blocks that nothing leads to: entries and cases of BRX
    predecessors: Mapping[int, list[int]]

    def dominates(self, one: int, other: int) -> bool:
        while other not in (one, -1):
            other = self.dominators[other]
        return other == one


def graph_of(blocks: Mapping[int, Block]) -> Graph:
    predecessors: dict[int, list[int]] = defaultdict(list)
    for block in blocks.values():
        for successor in block.successors:
            predecessors[successor].append(block.begin)
    roots: set[int] = set()
    finished: list[int] = []
    seen: set[int] = set()
    # those that nothing leads to come first, then what only they themselves lead to
    for root in sorted(blocks, key=lambda begin: (bool(predecessors[begin]) and begin != 0, begin)):
        if root in seen:
            continue
        roots.add(root)
        seen.add(root)
        stack = [(root, iter(blocks[root].successors))]
        while stack:
            begin, successors = stack[-1]
            following = next((one for one in successors if one not in seen), None)
            if following is None:
                finished.append(begin)
                stack.pop()
            else:
                seen.add(following)
                stack.append((following, iter(blocks[following].successors)))
    order = finished[::-1]
    rank = {-1: -1} | {begin: i for i, begin in enumerate(order)}
    dominators: dict[int, int] = {-1: -1} | dict.fromkeys(roots, -1)
    changed = True
    while changed:  # Cooper, Harvey, Kennedy: A Simple, Fast Dominance Algorithm
        changed = False
        for begin in order:
            if begin in roots:
                continue
            known = [one for one in predecessors[begin] if one in dominators]
            new = known[0]
            for other in known[1:]:
                while new != other:
                    while rank[new] > rank[other]:
                        new = dominators[new]
                    while rank[other] > rank[new]:
                        other = dominators[other]
            changed |= dominators.get(begin) != new
            dominators[begin] = new
    return Graph(order, dominators, predecessors)


def innermost_loops(blocks: Mapping[int, Block]) -> list[list[Block]]:
    """The blocks of each loop that has no other in it, its head first; blocks and loops in the order of `Graph`."""
    graph = graph_of(blocks)
    bodies: dict[int, set[int]] = {}
    for begin in graph.order:
        for head in blocks[begin].successors:
            if graph.dominates(head, begin):
                body = bodies.setdefault(head, {head})
                pending = [begin]
                while pending:
                    one = pending.pop()
                    if one not in body:
                        body.add(one)
                        pending += graph.predecessors[one]
    inner = {head: body for head, body in bodies.items() if not any(one in body for one in bodies if one != head)}
    return [[blocks[begin] for begin in graph.order if begin in inner[head]] for head in graph.order if head in inner]


# ---- What a loop moves


def accesses_of(instructions: Sequence[Instruction], block: Block, whole: int) -> dict[int, Access]:
    """Loads and stores of a block by the instruction that completes them.

    Args:
        instructions: the kernel's.
        block: one of its blocks.
        whole: bytes. Narrower ones of global memory at neighbouring addresses are taken together.
    """
    found: dict[int, Access] = {}
    narrow: dict[tuple[bool, str, int], dict[int, int]] = defaultdict(dict)  # instructions by offset from a base

    def join(run: Sequence[int]) -> None:
        if len(run) > 1:
            pieces = [found.pop(i) for i in run]
            registers = frozenset[int]().union(*(piece.registers for piece in pieces))
            size = sum(piece.bytes for piece in pieces)
            found[max(run)] = Access("global", pieces[0].stores, size, len(pieces), registers)

    def join_neighbours(key: tuple[bool, str, int]) -> None:
        size, instruction_at = key[2], narrow.pop(key)
        run: list[int] = []
        for offset in sorted(instruction_at):
            if offset - size not in instruction_at or len(run) * size == whole:
                join(run)
                run = []
            run.append(instruction_at[offset])
        join(run)

    for i in range(block.begin, block.end):
        access = access_of(instructions[i])
        if access is not None:
            found[i] = access
            base, offset = address_of(instructions[i])
            if access.memory == "global" and access.bytes < whole:
                narrow[access.stores, base, access.bytes][offset] = i
        written = instructions[i].registers[0]
        for key in [key for key in narrow if written is not None and re.search(rf"\bR{written}\b", key[1])]:
            join_neighbours(key)  # what follows has another base of that name
    for key in list(narrow):
        join_neighbours(key)
    return found


@dataclass(frozen=True)
class Way:
    """One way through a loop.

    Attributes:
        used: vectors that are loaded by `main_loads` and calculated with or stored.
        stores: vectors that are stored.
        calls: of functions, whose own instructions are not counted.
        instructions: of a thread.
        blocks: the way.
    """

    used: int
    stores: int
    calls: int
    instructions: int
    blocks: tuple[Block, ...]


def unavoidable(loop: Sequence[Block]) -> set[int]:
    """The blocks that every way through the loop passes, by their first instruction."""
    head = loop[0].begin
    to: dict[int, int] = defaultdict(int, {head: 1})  # how many ways lead there from the head, and on to it again
    back: dict[int, int] = defaultdict(int)
    for block in loop:
        for successor in block.successors:
            to[successor] += to[block.begin] * (successor != head)
    for block in reversed(loop):
        back[block.begin] = sum(1 if successor == head else back[successor] for successor in block.successors)
    return {block.begin for block in loop if to[block.begin] * back[block.begin] == back[head]}


def main_loads(
    instructions: Sequence[Instruction], loop: Sequence[Block], accesses: Mapping[int, Access], vector: int
) -> set[int]:
    """The loads of vectors that every way makes, or that come before any vector is calculated with on all ways.

    What is left is for some ways only, as the residual is in a first pass that writes.
    """
    everywhere = unavoidable(loop)
    found: set[int] = set()
    before: dict[int, tuple[frozenset[int], bool]] = {}  # registers that may hold a vector; whether one may be used
    for block in loop:
        loaded, used = before.get(block.begin, (frozenset(), False))
        for i in range(block.begin, block.end):
            written, read = instructions[i].registers
            holds = bool(loaded & read)
            used |= holds and instructions[i].calculates
            if written is not None:
                loaded = loaded | {written} if holds and not instructions[i].calculates else loaded - {written}
            access = accesses.get(i)
            if access is not None and not access.stores and access.memory != "local" and access.bytes == vector:
                loaded |= access.registers
                if not used or block.begin in everywhere:
                    found.add(i)
        for successor in block.successors:
            others, other_used = before.get(successor, (frozenset(), False))
            before[successor] = (others | loaded, other_used or used)
    return found


# Registers with what is loaded and not used yet, each with its load; vectors used; vectors stored.
State = tuple[frozenset[tuple[int, int]], int, int]


def ways_through(
    instructions: Sequence[Instruction], loop: Sequence[Block], accesses: Mapping[int, Access], vector: int
) -> list[Way]:
    """For each number of vectors used and stored in an iteration the shortest way; calls count as longer than all else.

    Args:
        instructions: the kernel's.
        loop: its blocks, the head first.
        accesses: of all of its blocks.
        vector: bytes.
    """
    main = main_loads(instructions, loop, accesses, vector)
    writes = {i for i, one in accesses.items() if one.stores and one.memory == "global" and one.bytes == vector}

    def after(state: State, i: int) -> Iterator[State]:
        held, used, stores = state
        written, read = instructions[i].registers
        loads = {load for register, load in held if register in read}
        if instructions[i].calculates:
            used += len(loads)
            held = frozenset(pair for pair in held if pair[1] not in loads)
        if written is not None and not instructions[i].predicate:
            held = frozenset(pair for pair in held if pair[0] != written)
        if written is not None and not instructions[i].calculates:
            held |= {(written, load) for load in loads}
        if i in main:
            held |= {(register, i) for register in accesses[i].registers}
        if i not in writes or instructions[i].predicate:
            yield held, used, stores
        if i in writes:
            yield held, used, stores + 1

    head, inside = loop[0].begin, {block.begin for block in loop}
    states: dict[int, dict[State, tuple[int, int, tuple[Block, ...]]]] = defaultdict(dict)
    states[head][frozenset(), 0, 0] = (0, 0, ())
    best: dict[tuple[int, int], Way] = {}
    for block in loop:
        calls = sum(instructions[i].operation == "CALL" for i in range(block.begin, block.end))
        for state, (calls_before, length, way) in states.pop(block.begin, {}).items():
            results = {state}
            watched = {register for register, _ in state[0]}
            for i in range(block.begin, block.end):
                written, read = instructions[i].registers
                if i in main or i in writes or written in watched or watched & read:
                    results = {result for one in results for result in after(one, i)}
                    watched = {register for held, _, _ in results for register, _ in held}
            cost = (calls_before + calls, length + block.end - block.begin, (*way, block))
            for held, used, stores in results:
                for successor in block.successors:
                    if successor == head:
                        known = best.get((used, stores))
                        if known is None or cost[:2] < (known.calls, known.instructions):
                            best[used, stores] = Way(used, stores, *cost)
                    elif successor in inside:
                        there = states[successor].get((held, used, stores))
                        if there is None or cost[:2] < there[:2]:
                            states[successor][held, used, stores] = cost
    return list(best.values())


def loads_in_flight(
    instructions: Sequence[Instruction], way: Way, accesses: Mapping[int, Access]
) -> list[tuple[int, Access]]:
    """The loads of global memory that a thread has issued in an iteration when it first uses one."""
    found: list[tuple[int, Access]] = []
    for block in way.blocks:
        for i in range(block.begin, block.end):
            if any(access.registers & instructions[i].registers[1] for _, access in found):
                return found
            if i in accesses and accesses[i].memory == "global" and not accesses[i].stores:
                found.append((i, accesses[i]))
    return found


@dataclass(frozen=True)
class Loop:
    """What a thread does in one iteration of a hot loop.

    Attributes:
        role: ``first pass`` or ``second pass`` of stoch_norm, elsewhere ``pass``; squared_distance's, ``with sources``
            or ``no sources``.
        element: the dtype that it calculates with or converts, where that is not in the kernel's name.
        instructions: as many as are issued.
        vectors: that are stored, or if none are, that are loaded; of stoch_norm, of each tensor.
        vector_bytes: how wide they are, or the widest access where a kernel promises none.
        load_bytes: loaded from global memory, vectors and all else.
        store_bytes: stored there.
        in_flight_bytes: loaded from global memory before the first use of any of that.
    """

    role: str
    element: str
    instructions: int
    vectors: int
    vector_bytes: int
    load_bytes: int
    store_bytes: int
    in_flight_bytes: int


@dataclass(frozen=True)
class Kernel:
    """A kernel's figures.

    Attributes:
        name: without namespaces and parameters, like ``sliced_kernel<Forward<bfloat16, false>, 4, true>``.
        operation: the source's name.
        threads: the most of a block, by the launch bounds.
        blocks: the most on a multiprocessor, by registers, or by the launch bounds where these say for how many the
            kernel is compiled: as many are launched.
        registers: of a thread.
        shared_bytes: of a block, without what the launch asks for.
        loops: the hot ones.
    """

    name: str
    operation: str
    threads: int
    blocks: int
    registers: int
    shared_bytes: int
    loops: tuple[Loop, ...] = ()


ELEMENTS = {"float": 4, "double": 8, "half": 2, "bfloat16": 2}
SIGNS_BYTES, FULL_BYTES = 4, 16  # of a word of signs; of a vector where the kernel's name does not say it
ON_CHIP = "solve_kernel"  # its work is arithmetic on what is in shared memory: no loop of it is hot here


@dataclass(frozen=True)
class Vectors:
    """What a kernel promises of the vectors that it moves.

    Attributes:
        bytes: how wide they are; None: it moves single elements.
        tensors: of which the first of two passes loads one each; 0: there are no two passes.
    """

    bytes: int | None
    tensors: int = 0


def vectors_of(name: str) -> Vectors:
    """The promise of a kernel by its short name: stoch_norm's says it, squared_distance has the widest there are."""
    parts = re.fullmatch(r"\w+<(Forward|Backward)<(\w+), \w+>, (\d+), \w+>", name)
    if parts is not None:
        return Vectors(ELEMENTS[parts[2]] * int(parts[3]), 1 if parts[1] == "Forward" else 2)
    if re.fullmatch(r"(forward|backward)_kernel<\d+>", name):
        return Vectors(FULL_BYTES)
    return Vectors(None)


def short(name: str) -> str:
    """A demangled kernel's name without what says nothing: namespaces, parameters, what it returns."""
    name = re.sub(r"\(anonymous namespace\)::|\b\w+::", "", name.removeprefix("void "))
    return re.sub(r"\b__(?:nv_)?(half|bfloat16)\b", r"\1", name.partition("(")[0])


def element_of(instructions: Iterable[Instruction]) -> str:
    """The dtype that a loop without one in its kernel's name calculates with, or converts from or to."""
    opcodes = {instruction.opcode for instruction in instructions}
    if any(re.match(r"D(ADD|MUL|FMA)", opcode) for opcode in opcodes):
        return "double"
    if any(re.match(r"HADD2\.F32|F2FP\.F16", opcode) for opcode in opcodes):
        return "half"
    return "bfloat16" if opcodes & {"PRMT", "IMAD.U32"} else "float"  # by which it is taken apart


@dataclass(frozen=True)
class HotLoop:
    """One that moves vectors, and its accesses."""

    instructions: Sequence[Instruction]
    blocks: Sequence[Block]  # the head first
    accesses: Mapping[int, Access]
    vector: int  # bytes
    ways: Sequence[Way]

    def moves_vectors(self, words: bool) -> bool:
        """Whether it stores two vectors, or loads two of which none is a neighbour of another.

        Loops beside the hot ones over sums load their fields, which are neighbours; loops over constants load them in
        whatever dtype they have.

        Args:
            words: whether hot loops load nothing but vectors and words of signs.
        """
        if max((way.stores for way in self.ways), default=0) > 1:
            return True
        loads = [one for one in self.accesses.values() if one.memory == "global" and not one.stores]
        if words and any(one.bytes // one.pieces not in (self.vector, SIGNS_BYTES) for one in loads):
            return False
        main = main_loads(self.instructions, self.blocks, self.accesses, self.vector)
        whole = {i for i in main if self.accesses[i].memory == "global" and self.accesses[i].pieces == 1}
        places = {address_of(self.instructions[i]) for i in whole}
        around = (-self.vector, self.vector)
        alone = [one for one in places if not any((one[0], one[1] + distance) in places for distance in around)]
        return len(alone) > 1

    def best(self, stores: bool | None) -> Way | None:
        """The shortest way that uses as many vectors as any.

        Args:
            stores: whether it stores vectors, then as many as any; None: as it likes.
        """
        used = max((way.used for way in self.ways), default=0)
        ways = [way for way in self.ways if way.used == used and (stores is None or bool(way.stores) == stores)]
        if stores and ways:
            # Where vectors are words, the signs' stores look like theirs; each has an atomic operation beside it.
            atomic = sum(self.instructions[i].operation == "REDG" for i in self.span())
            most = max(way.stores for way in ways) - (atomic if self.vector == SIGNS_BYTES else 0)
            ways = [way for way in ways if way.stores == most]
        return min(ways, key=lambda way: (way.calls, way.instructions, -way.stores), default=None)

    @property
    def begin(self) -> int:
        return self.blocks[0].begin

    def span(self) -> Iterator[int]:
        for block in self.blocks:
            yield from range(block.begin, block.end)

    def vectors_loaded(self, way: Way) -> int:
        passed = [self.accesses[i] for i in self.accesses if any(block.begin <= i < block.end for block in way.blocks)]
        return sum(not one.stores and one.memory != "local" and one.bytes == self.vector for one in passed)

    def figures(self, role: str, way: Way, element: str = "", tensors: int = 0) -> Loop:
        """What it does on that way. Of two passes the first loads so many ``tensors``."""
        passed = [self.accesses[i] for block in way.blocks for i in range(block.begin, block.end) if i in self.accesses]
        moved = [one for one in passed if one.memory == "global"]
        if not way.stores:  # those that it passes all the same have a predicate
            moved = [one for one in moved if not one.stores or one.bytes != self.vector]
        in_flight = loads_in_flight(self.instructions, way, self.accesses)
        return Loop(
            role=role,
            element=element,
            instructions=way.instructions,
            vectors=way.stores or (way.used // tensors if tensors else self.vectors_loaded(way)),
            vector_bytes=self.vector,
            load_bytes=sum(access.bytes for access in moved if not access.stores),
            store_bytes=sum(access.bytes for access in moved if access.stores),
            in_flight_bytes=sum(access.bytes for _, access in in_flight),
        )

    def split(self) -> list[str]:
        """A sentence for each width in which a vector or a part of it is moved in pieces."""
        counts: dict[tuple[str, int, int], int] = defaultdict(int)
        for access in self.accesses.values():
            if access.pieces > 1:
                kind = "stores" if access.stores else "loads"
                counts[kind, access.pieces, access.bytes // access.pieces] += 1
        return [
            f"{count} times {pieces} {kind} of {size} bytes where one of {pieces * size} would do"
            for (kind, pieces, size), count in sorted(counts.items())
        ]


def hot_loops(instructions: Sequence[Instruction], vectors: Vectors) -> list[HotLoop]:
    """Those that move vectors, or of a kernel that has none, those that touch global memory."""
    found = []
    blocks = blocks_of(instructions)
    for loop in innermost_loops(blocks):
        whole = vectors.bytes or 0
        accesses = {i: one for block in loop for i, one in accesses_of(instructions, block, whole).items()}
        widths = [access.bytes for access in accesses.values() if access.memory == "global"]
        vector = vectors.bytes or max(widths, default=0)
        if not widths or not any(access.bytes == vector for access in accesses.values()):
            continue
        hot = HotLoop(instructions, loop, accesses, vector, ways_through(instructions, loop, accesses, vector))
        if vectors.bytes is None or hot.moves_vectors(words=bool(vectors.tensors)):
            found.append(hot)
    return found


def loops_of(instructions: Sequence[Instruction], name: str) -> tuple[list[Loop], list[str]]:
    """A kernel's hot loops, and in a sentence each what is wrong with its machine code."""
    vectors = vectors_of(name)
    hot = [] if name.startswith(ON_CHIP) else hot_loops(instructions, vectors)
    local = sum(one.operation in ("LDL", "STL") for one in instructions)
    faults = [f"{local} loads and stores of local memory"] if local else []
    faults += [
        f"in the loop at {loop.begin * BYTES_PER_INSTRUCTION:#x} {sentence}"
        for loop in hot
        if vectors.bytes is not None
        for sentence in loop.split()
    ]
    if not vectors.tensors:
        if vectors.bytes is not None and not hot:
            faults.append(f"no loop moves vectors of {vectors.bytes} bytes")
        return main_of_each_kind(hot, vectors), faults
    loops = two_passes(instructions, hot, vectors.tensors)
    roles = [loop.role for loop in loops]
    if roles != ["first pass", "second pass"]:
        found = " and ".join(roles) or "none"
        faults.append(f"expected a first and a second pass over vectors of {vectors.bytes} bytes, found {found}")
    return loops, faults


def two_passes(instructions: Sequence[Instruction], hot: Sequence[HotLoop], tensors: int) -> list[Loop]:
    """The loop of the first pass, which ends with sums over a warp by shuffles, and that of the second one behind them.

    nvcc may make several versions of a loop: for channels that are written in the first pass, or of another depth. Of
    those with a whole iteration without a store, in the second pass with stores, it is the one that moves most vectors.
    """
    inside = {i for loop in hot for i in loop.span()}
    sums = [i for i, one in enumerate(instructions) if one.operation == "SHFL" and i not in inside]
    first = min((loop.begin for loop in hot), default=0)
    behind = next((i for i in sums if i > first), max((loop.begin for loop in hot), default=0))
    found: list[Loop] = []
    for role, stores in (("first pass", False), ("second pass", True)):
        versions = [
            loop.figures(role, way, tensors=0 if stores else tensors)
            for loop in hot
            if (loop.begin >= behind) == stores and (way := loop.best(stores)) is not None
        ]
        found += sorted(versions, key=lambda loop: (-loop.vectors, loop.instructions))[:1]
    return found


def main_of_each_kind(loops: Iterable[HotLoop], vectors: Vectors) -> list[Loop]:
    """Of the versions of each loop, which move alike, the main one, which is the first that a thread reaches.

    The others are for what it leaves, one vector at a time, even where nvcc has unrolled these further.
    """
    kinds: dict[tuple[str, str, int, float, float], Loop] = {}
    for hot in loops:
        way = hot.best(stores=None)
        if way is None:
            continue
        code = [hot.instructions[i] for i in hot.span()]
        element, role = "", "pass"
        if vectors.bytes is not None:
            element = element_of(code)
            role += ", with sources" if any(one.operation in ("FADD", "DADD") for one in code) else ", no sources"
        found = hot.figures(role, way, element)
        shares = (found.load_bytes / max(found.vectors, 1), found.store_bytes / max(found.vectors, 1))
        kinds.setdefault((role, element, found.vector_bytes, *shares), found)
    return list(kinds.values())


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
