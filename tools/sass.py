"""The machine code of CUDA kernels from nvdisasm: instructions, memory accesses, basic blocks and loops."""

import itertools
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

BYTES_PER_INSTRUCTION = 16  # on every architecture since 7.0


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        opcode: such as LDG.E.128.
        operands: separated by commas.
        predicate: such as @!P0; empty if there is none.
    """

    opcode: str
    operands: str
    predicate: str

    @property
    def operation(self) -> str:
        return self.opcode.partition(".")[0]

    @cached_property
    def registers(self) -> tuple[int | None, frozenset[int]]:
        """The first register that the instruction writes (None if it writes none), and the registers that it reads."""
        named = [int(number) for number in re.findall(r"\bR(\d+)", self.operands)]
        writes = re.match(r"R\d+\b", self.operands) is not None
        return (named[0], frozenset(named[1:])) if writes else (None, frozenset(named))

    @cached_property
    def calculates(self) -> bool:
        """Whether it is floating-point arithmetic or a store; integer operations only unpack and move values."""
        return re.match(r"[FHD]|MUFU|ST", self.opcode) is not None


@dataclass(frozen=True)
class Access:
    """One load or store, or several at neighbouring addresses.

    Attributes:
        memory: global, shared, local or any.
        stores: whether it is a store.
        bytes: of all pieces.
        pieces: number of instructions.
        registers: the registers that a load writes.
    """

    memory: str
    stores: bool
    bytes: int
    pieces: int
    registers: frozenset[int]


MEMORY = {"G": "global", "": "any", "S": "shared", "L": "local"}
WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


def access_of(instruction: Instruction) -> Access | None:
    """The load or store of an instruction; None if it is neither. Copies to shared memory (LDGSTS) count as loads."""
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
    """The address of a load or store: its registers, as text, and its constant."""
    address = instruction.operands.rpartition("[")[2].rpartition("]")[0]
    offset = re.search(r"\+?(-?0x[0-9a-f]+)$", address)
    return (address[: offset.start()], int(offset[1], 16)) if offset else (address, 0)


# ---- Control flow


@dataclass(frozen=True)
class Block:
    """A basic block: the instructions [begin, end), and the first instructions of the blocks that may follow."""

    begin: int
    end: int
    successors: tuple[int, ...]


def blocks_of(instructions: Sequence[Instruction]) -> dict[int, Block]:
    """Basic blocks by their first instruction. A call counts as one instruction; called functions have own blocks."""
    after: dict[int, tuple[int, ...]] = {}  # the possible next instructions after a branch
    for i, instruction in enumerate(instructions):
        following = (i + 1,) if instruction.predicate else ()
        if instruction.operation in ("BRA", "JMP"):
            *conditions, target = instruction.operands.split(",")
            following = (i + 1,) if instruction.predicate or conditions else ()
            after[i] = (int(target, 16) // BYTES_PER_INSTRUCTION, *following)
        elif instruction.operation in ("EXIT", "RET", "BRX", "JMX"):  # the targets of BRX and JMX are not listed
            after[i] = following
    starts = {0} | {i + 1 for i in after} | {target for targets in after.values() for target in targets}
    ordered = [*sorted(start for start in starts if start < len(instructions)), len(instructions)]
    return {
        begin: Block(begin, end, tuple(start for start in after.get(end - 1, (end,)) if start < len(instructions)))
        for begin, end in itertools.pairwise(ordered)
    }


@dataclass(frozen=True)
class Graph:
    """The control flow graph.

    Attributes:
        order: the blocks in reverse postorder: each after its predecessors, except those by a loop's back edge.
        dominators: the immediate dominators; -1 for blocks without predecessors (entries and targets of BRX).
        predecessors: the predecessors of each block.
    """

    order: list[int]
    dominators: Mapping[int, int]
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
    # start from blocks without predecessors, then from blocks that only a cycle leads to
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
    """The blocks of each loop that contains no other loop, its head first; blocks and loops in the order of `Graph`."""
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
