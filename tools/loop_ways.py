"""The ways through a loop of machine code: the vectors that each way moves, and its instructions."""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from sass import Access, Block, Instruction, access_of, address_of


def accesses_of(instructions: Sequence[Instruction], block: Block, whole: int) -> dict[int, Access]:
    """The loads and stores of a block, by the instruction that completes them.

    Args:
        instructions: the kernel's instructions.
        block: one of its blocks.
        whole: bytes of a vector. Narrower accesses of global memory at neighbouring addresses are joined to one access.
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
            join_neighbours(key)  # from here on the register holds another base
    for key in list(narrow):
        join_neighbours(key)
    return found


@dataclass(frozen=True)
class Way:
    """One way through a loop.

    Attributes:
        used: number of vectors that are loaded by `main_loads` and then calculated with or stored.
        stores: number of vectors that are stored.
        calls: number of function calls; the functions' own instructions are not counted.
        instructions: number of instructions of a thread.
        blocks: the blocks on the way.
    """

    used: int
    stores: int
    calls: int
    instructions: int
    blocks: tuple[Block, ...]


def unavoidable(loop: Sequence[Block]) -> set[int]:
    """The blocks that every way through the loop passes, by their first instruction."""
    head = loop[0].begin
    to: dict[int, int] = defaultdict(int, {head: 1})  # by block: the number of ways from the head to it
    back: dict[int, int] = defaultdict(int)  # by block: the number of ways from it back to the head
    for block in loop:
        for successor in block.successors:
            to[successor] += to[block.begin] * (successor != head)
    for block in reversed(loop):
        back[block.begin] = sum(1 if successor == head else back[successor] for successor in block.successors)
    return {block.begin for block in loop if to[block.begin] * back[block.begin] == back[head]}


def main_loads(
    instructions: Sequence[Instruction], loop: Sequence[Block], accesses: Mapping[int, Access], vector: int
) -> set[int]:
    """The loads of vectors that are on every way, or that come before the first calculation with a vector.

    Other loads are on some ways only, for example the load of the residual in a first pass that writes.
    """
    everywhere = unavoidable(loop)
    found: set[int] = set()
    before: dict[int, tuple[frozenset[int], bool]] = {}  # registers that may hold a vector; whether a vector was used
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
            registers, other_used = before.get(successor, (frozenset(), False))
            before[successor] = (registers | loaded, other_used or used)
    return found


# The registers that hold loaded vectors which are not used yet, each with its load; vectors used; vectors stored.
State = tuple[frozenset[tuple[int, int]], int, int]


def ways_through(
    instructions: Sequence[Instruction], loop: Sequence[Block], accesses: Mapping[int, Access], vector: int
) -> list[Way]:
    """The shortest way for each number of vectors used and stored in an iteration.

    A way with fewer calls is shorter than any way with more calls.

    Args:
        instructions: the kernel's instructions.
        loop: the blocks of the loop, the head first.
        accesses: the accesses of all its blocks.
        vector: bytes of a vector.
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
                        found = best.get((used, stores))
                        if found is None or cost[:2] < (found.calls, found.instructions):
                            best[used, stores] = Way(used, stores, *cost)
                    elif successor in inside:
                        there = states[successor].get((held, used, stores))
                        if there is None or cost[:2] < there[:2]:
                            states[successor][held, used, stores] = cost
    return list(best.values())


def loads_in_flight(
    instructions: Sequence[Instruction], way: Way, accesses: Mapping[int, Access]
) -> list[tuple[int, Access]]:
    """The loads of global memory that a thread has issued in an iteration before it first uses a loaded value."""
    found: list[tuple[int, Access]] = []
    for block in way.blocks:
        for i in range(block.begin, block.end):
            if any(access.registers & instructions[i].registers[1] for _, access in found):
                return found
            if i in accesses and accesses[i].memory == "global" and not accesses[i].stores:
                found.append((i, accesses[i]))
    return found
