"""Find the loops of a CUDA kernel that move its vectors, and measure one iteration of each.

A *hot loop* is an innermost loop that moves a kernel's vectors. Its figures are those of one whole iteration: an
iteration that uses every vector that it loads. If several ways through the loop do so, the shortest one counts. For the
first pass of stoch_norm it is the shortest way without a store, the way of channels whose output needs the constants
first.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from loop_ways import Way, accesses_of, loads_in_flight, main_loads, ways_through
from sass import BYTES_PER_INSTRUCTION, Access, Block, Instruction, address_of, blocks_of, innermost_loops


@dataclass(frozen=True)
class Loop:
    """The figures of a thread in one iteration of a hot loop.

    Attributes:
        role: ``first pass`` or ``second pass`` in stoch_norm, ``pass`` in others; squared_distance adds ``with
            sources`` or ``no sources``.
        element: the dtype that the loop calculates with or converts, if it is not in the kernel's name.
        instructions: number of issued instructions.
        vectors: number of stored vectors, or of loaded vectors if none is stored; in stoch_norm, of each tensor.
        vector_bytes: the width of a vector, or of the widest access if the kernel promises no vectors.
        load_bytes: all bytes loaded from global memory.
        store_bytes: all bytes stored to global memory.
        in_flight_bytes: bytes loaded from global memory before the first use of any of them.
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
    """The figures of a kernel.

    Attributes:
        name: without namespaces and parameters, such as ``sliced_kernel<Forward<bfloat16, false>, 4, true>``.
        operation: the name of the source file.
        threads: the most threads of a block, by the launch bounds.
        blocks: the most blocks on a multiprocessor, by registers; or the number in the launch bounds, if they have one,
            since so many blocks are launched.
        registers: per thread.
        shared_bytes: static shared memory per block.
        loops: the hot loops.
    """

    name: str
    operation: str
    threads: int
    blocks: int
    registers: int
    shared_bytes: int
    loops: tuple[Loop, ...] = ()


ELEMENTS = {"float": 4, "double": 8, "half": 2, "bfloat16": 2}
SIGNS_BYTES, FULL_BYTES = 4, 16  # of a word of signs; of a vector if the kernel's name does not give its width
ON_CHIP = "solve_kernel"  # this kernel calculates in shared memory, so it has no hot loops


@dataclass(frozen=True)
class Vectors:
    """The vectors that a kernel promises to move.

    Attributes:
        bytes: width of a vector; None if the kernel moves single elements.
        tensors: number of tensors that the first of two passes loads; 0 if the kernel does not have two passes.
    """

    bytes: int | None
    tensors: int = 0


def vectors_of(name: str) -> Vectors:
    """A kernel's promise by its short name: stoch_norm's names give it, squared_distance has the widest vectors."""
    parts = re.fullmatch(r"\w+<(Forward|Backward)<(\w+), \w+>, (\d+), \w+>", name)
    if parts is not None:
        return Vectors(ELEMENTS[parts[2]] * int(parts[3]), 1 if parts[1] == "Forward" else 2)
    if re.fullmatch(r"(forward|backward)_kernel<\d+>", name):
        return Vectors(FULL_BYTES)
    return Vectors(None)


def short(name: str) -> str:
    """A demangled kernel's name without namespaces, parameters and return type."""
    name = re.sub(r"\(anonymous namespace\)::|\b\w+::", "", name.removeprefix("void "))
    return re.sub(r"\b__(?:nv_)?(half|bfloat16)\b", r"\1", name.partition("(")[0])


def element_of(instructions: Iterable[Instruction]) -> str:
    """The dtype that a loop calculates with or converts, for kernels without a dtype in their name."""
    opcodes = {instruction.opcode for instruction in instructions}
    if any(re.match(r"D(ADD|MUL|FMA)", opcode) for opcode in opcodes):
        return "double"
    if any(re.match(r"HADD2\.F32|F2FP\.F16", opcode) for opcode in opcodes):
        return "half"
    return "bfloat16" if opcodes & {"PRMT", "IMAD.U32"} else "float"  # these instructions unpack bfloat16


@dataclass(frozen=True)
class HotLoop:
    """A loop that moves vectors, and its accesses.

    Attributes:
        instructions: the kernel's instructions.
        blocks: the blocks of the loop, the head first.
        accesses: its loads and stores.
        vector: bytes of a vector.
        ways: the ways through it.
    """

    instructions: Sequence[Instruction]
    blocks: Sequence[Block]
    accesses: Mapping[int, Access]
    vector: int
    ways: Sequence[Way]

    def moves_vectors(self, words: bool) -> bool:
        """Whether the loop stores two vectors, or loads two vectors that are not neighbours.

        This excludes other loops: loops over sums load neighbouring fields, and loops over constants load values of any
        dtype.

        Args:
            words: whether hot loops load only vectors and words of signs.
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
        """The shortest of the ways that use the most vectors.

        Args:
            stores: True: only ways that store the most vectors; False: only ways that store none; None: all ways.
        """
        used = max((way.used for way in self.ways), default=0)
        ways = [way for way in self.ways if way.used == used and (stores is None or bool(way.stores) == stores)]
        if stores and ways:
            # Vectors of one word are as wide as words of signs. Each store of signs has an atomic operation beside it.
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
        """The loop's figures on that way; ``tensors`` is the number of tensors that the first of two passes loads."""
        passed = [self.accesses[i] for block in way.blocks for i in range(block.begin, block.end) if i in self.accesses]
        moved = [one for one in passed if one.memory == "global"]
        if not way.stores:  # the stores on this way have a predicate and are not executed
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
        """One sentence for each width in which a vector, or a part of it, is moved in pieces."""
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
    """The loops that move vectors; for a kernel that promises no vectors, the loops that access global memory."""
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
    """A kernel's hot loops, and one sentence for each fault of its machine code."""
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
    """The main loops of the first and of the second pass.

    The first pass ends with sums over a warp by shuffles, and the second pass follows them. nvcc may make several
    versions of a loop, for example with another unrolling. The main version is the one that moves the most vectors in
    an iteration without stores (first pass) or with stores (second pass).
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
    """The main version of each loop: among versions with equal moves, the first that a thread reaches.

    The later versions move the remainder, one vector at a time, even if nvcc has unrolled them further.
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
