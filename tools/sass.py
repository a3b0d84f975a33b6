"""Machine code of CUDA kernels as nvdisasm prints it: instructions, accesses of memory, blocks and loops."""

import itertools
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

BYTES_PER_INSTRUCTION = 16  # on every architecture since 7.0


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
            placed = [one for one in predecessors[begin] if one in dominators]
            new = placed[0]
            for other in placed[1:]:
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
