"""The machine code of the kernels: what is read of it, faults that are planted, and the kernels against the record."""

import dataclasses
import json
import shutil
from pathlib import Path

import hot_loops
import machine_code
import pytest
import sass
from hot_loops import Kernel, Loop
from machine_code import Record
from sass import Instruction

pytestmark = pytest.mark.no_cover  # what is tested here is not of the package

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
RECORDED = Record.of((machine_code.RESULTS / "sm_90.json").read_text())


@pytest.fixture
def disassembler() -> str:
    try:
        return machine_code.find_disassembler()
    except machine_code.Unavailable as reason:
        pytest.skip(str(reason))


# ---- Reading


def listed(*lines: str) -> list[Instruction]:
    """Instructions as `read` has them, from lines like ``@P0 BRA 0x10``."""
    found = []
    for line in lines:
        words = line.split()
        predicate = words.pop(0) if words[0].startswith("@") else ""
        found.append(Instruction(words[0], "".join(words[1:]), predicate))
    return found


# A loop of two vectors of 16 bytes, the second stored in pieces, whose last iterations skip what there is no vector
# for; before it a loop that has nothing to do with them.
CODE = listed(
    "MOV R1, RZ",  # 0x000
    "LDG.E.U16 R2, desc[UR4][R30.64]",  # 0x010
    "@P1 BRA 0x10",  # 0x020
    "LDG.E.128 R4, desc[UR4][R20.64]",  # 0x030
    "@!P2 LDG.E.128 R8, desc[UR4][R22.64]",  # 0x040
    "@P3 BRA 0x80",  # 0x050
    "FADD R4, R4, R5",  # 0x060
    "STG.E.128 desc[UR4][R20.64], R4",  # 0x070
    "@P4 BRA 0x100",  # 0x080
    "PRMT R12, R9, 0x7610, R12",  # 0x090
    "FMUL R13, R12, R12",  # 0x0a0
    "STG.E desc[UR4][R24.64+0x8], R13",  # 0x0b0
    "STG.E desc[UR4][R24.64], R13",  # 0x0c0
    "STG.E desc[UR4][R24.64+0xc], R13",  # 0x0d0
    "STG.E desc[UR4][R24.64+0x4], R13",  # 0x0e0
    "STG.E desc[UR4][R24.64+0x40], R13",  # 0x0f0
    "@P5 BRA P6, 0x30",  # 0x100
    "EXIT",  # 0x110
)


def test_a_listing_is_read():
    listing = [
        {"SM": {}},
        [
            {
                "function-name": "_Z1kPf",
                "sass-instructions": [
                    {"opcode": "LDG.E", "operands": "R2,desc[UR4][R4.64]", "predicate": "@!P0"},
                    {"opcode": "EXIT"},
                ],
            }
        ],
    ]
    load, end = machine_code.read(json.dumps(listing))["_Z1kPf"]
    assert load == Instruction("LDG.E", "R2,desc[UR4][R4.64]", "@!P0") and end == Instruction("EXIT", "", "")
    for other in ("", "[]", "nvdisasm fatal", '[{}, [{"name": 1}]]'):
        with pytest.raises(ValueError, match="expected the list of functions of nvdisasm -json, got"):
            machine_code.read(other)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("LDG.E.128 R4, desc[UR4][R2.64]", ("global", False, 16, {4, 5, 6, 7})),
        ("LDG.E.64.CONSTANT R4, desc[UR4][R2.64]", ("global", False, 8, {4, 5})),
        ("LDG.E.U16 R4, desc[UR4][R2.64]", ("global", False, 2, {4})),
        ("STG.E.EF.128 desc[UR4][R2.64], R8", ("global", True, 16, set())),
        ("STG.E.U8 desc[UR4][R2.64], R8", ("global", True, 1, set())),
        ("LDS.64 R6, [R3+0x10]", ("shared", False, 8, {6, 7})),
        ("STL [R1], R3", ("local", True, 4, set())),
        ("LDL.LU.128 R4, [R1+0x20]", ("local", False, 16, {4, 5, 6, 7})),
        ("LD.E.STRONG.GPU R5, desc[UR4][R2.64]", ("any", False, 4, {5})),
        ("LDGSTS.E.BYPASS.128 [R5], desc[UR4][R2.64]", ("global", False, 16, set())),
    ],
)
def test_accesses_are_read(line, expected):
    (instruction,) = listed(line)
    access = sass.access_of(instruction)
    assert (access.memory, access.stores, access.bytes, set(access.registers)) == expected and access.pieces == 1


def test_what_accesses_nothing_is_none():
    lines = ("LDC.64 R2, c[0x0][0x210]", "ULDC UR4, c[0x0][0x208]", "REDG.E.ADD [R2.64], R3", "FADD R2, R3, R4")
    assert [sass.access_of(one) for one in listed(*lines)] == [None] * 4


def test_addresses_are_read():
    lines = ("LDG.E R4, desc[UR4][R2.64+0x10]", "LDG.E R4, desc[UR4][R2.64+-0x2000]", "STG.E desc[UR4][R6.64], R3")
    addresses = [sass.address_of(one) for one in listed(*lines)]
    assert addresses == [("R2.64", 16), ("R2.64", -8192), ("R6.64", 0)]


def test_innermost_loops_are_found():
    # a loop in a loop, with a branch over one instruction; a case of a BRX, to which nothing else leads; a trap
    code = listed(
        "MOV R1, RZ", "MOV R2, RZ", "IADD3 R2, R2, 0x1, RZ", "@P0 BRA 0x20", "@P1 BRA 0x60", "MOV R3, RZ",
        "@P2 BRA 0x10", "BRX R4, -0x70", "EXIT", "@P3 BRA 0x90", "EXIT", "BRA 0xb0",
    )  # fmt: skip
    loops = sass.innermost_loops(sass.blocks_of(code))
    assert sorted([(block.begin, block.end) for block in loop] for loop in loops) == [[(2, 4)], [(9, 10)], [(11, 12)]]


def test_a_loop_is_read():
    (hot,) = hot_loops.hot_loops(CODE, hot_loops.Vectors(16))
    assert hot.blocks[0].begin == 3
    assert hot.split() == ["1 times 4 stores of 4 bytes where one of 16 would do"]
    # without either, with the first, which takes fewer than the second, and with both
    assert {(way.used, way.stores): way.instructions for way in hot.ways} == {(0, 0): 5, (1, 1): 7, (2, 2): 14}
    best = hot.best(stores=True)
    assert hot.figures("pass", best) == Loop(
        role="pass", element="", instructions=14, vectors=2, vector_bytes=16, load_bytes=32, store_bytes=36,
        in_flight_bytes=32,
    )  # fmt: skip


def test_calls_are_no_short_cuts():
    code = listed(
        "LDG.E R2, desc[UR4][R20.64]", "LDG.E R3, desc[UR4][R22.64]", "@P1 BRA 0x50", "CALL.REL.NOINC f", "BRA 0x80",
        "MUFU.RCP R4, R2", "FMUL R4, R4, R3", "FFMA R4, R4, R4, R3", "FADD R5, R2, R3", "@P0 BRA 0x0", "EXIT",
    )  # fmt: skip
    (hot,) = hot_loops.hot_loops(code, hot_loops.Vectors(4))
    best = hot.best(stores=None)
    assert (best.calls, best.instructions, best.used) == (0, 8, 2)


def test_loads_that_wait_for_each_other_are_not_in_flight_together():
    code = listed(
        "LDG.E.128 R4, desc[UR4][R20.64]", "LDG.E R12, desc[UR4][R24.64]", "SHF.R.U32 R13, RZ, R1, R12",
        "LDG.E.128 R8, desc[UR4][R22.64]", "FADD R3, R4, R8", "@P0 BRA 0x0", "EXIT",
    )  # fmt: skip
    (hot,) = hot_loops.hot_loops(code, hot_loops.Vectors(16))
    loop = hot.figures("pass", hot.best(stores=None))
    assert (loop.load_bytes, loop.in_flight_bytes, loop.vectors) == (36, 20, 2)


def test_loops_over_constants_and_sums_are_not_hot():
    by_dtype = listed(
        "LDG.E R4, desc[UR4][R20.64]", "LDG.E R5, desc[UR4][R22.64]", "LDG.E.U16 R6, desc[UR4][R24.64]",
        "FADD R4, R4, R5", "@P0 BRA 0x0", "EXIT",
    )  # fmt: skip
    fields_of_sums = listed(
        "LDG.E R4, desc[UR4][R20.64]", "LDG.E R5, desc[UR4][R20.64+0x4]", "LDG.E R6, desc[UR4][R22.64]",
        "LDG.E R7, desc[UR4][R22.64+0x4]", "FADD R4, R4, R5", "FADD R6, R6, R7", "@P0 BRA 0x0", "EXIT",
    )  # fmt: skip
    assert hot_loops.hot_loops(by_dtype, hot_loops.Vectors(4, 1)) == []
    for width in (4, 8):  # where vectors are as wide as all fields together, too
        assert hot_loops.hot_loops(fields_of_sums, hot_loops.Vectors(width, 1)) == []
    assert len(hot_loops.hot_loops(by_dtype[:2] + by_dtype[3:], hot_loops.Vectors(4, 1))) == 1


def test_passes_are_told_apart_by_the_sums_between_them():
    def loop(head: int, *middle: str) -> list[Instruction]:
        loads = (f"LDG.E.64 R{n}, desc[UR4][R{n + 20}.64]" for n in (4, 6))
        return listed(*loads, *middle, f"@P0 BRA {head * 16:#x}")

    stores = [f"STG.E.64 desc[UR4][R{n}.64], R4" for n in (30, 32)]
    predicated = [f"@P1 {line}" for line in stores]
    sums = listed("SHFL.BFLY PT, R3, R2, 0x1, 0x1f")
    add = "FADD R2, R4, R6"
    first, written = loop(0, add), loop(4, add, *stores)
    second, again = loop(11, add, *predicated), loop(17, add, add, *stores)
    code = [*first, *written, *sums, *second, *again, *listed("EXIT")]
    name = "sliced_kernel<Forward<float, true>, 2, false>"
    loops, faults = hot_loops.loops_of(code, name)
    assert not faults
    assert [(one.role, one.vectors, one.instructions, one.store_bytes) for one in loops] == [
        ("first pass", 2, 4, 0), ("second pass", 2, 6, 16),
    ]  # fmt: skip
    _, faults = hot_loops.loops_of([*first, *sums, *listed("EXIT")], name)
    assert faults == ["expected a first and a second pass over vectors of 8 bytes, found first pass"]
    _, faults = hot_loops.loops_of([*first[1:], *sums, *listed("EXIT")], name)
    assert faults == ["expected a first and a second pass over vectors of 8 bytes, found none"]


def test_of_the_versions_of_a_loop_the_main_one_counts():
    def version(head: int, vectors: int, *middle: str) -> list[Instruction]:
        loads = [f"LDG.E.128 R4, desc[UR4][R2{n}.64]" for n in range(vectors)]
        return listed(*loads, *middle, "FFMA R8, R4, R4, R8", f"@P0 BRA {head * 16:#x}")

    main, rest = version(0, 4, "FADD R4, R4, R5"), version(7, 8, "FADD R4, R4, R5")
    other, half = version(18, 2), version(22, 2, "HADD2.F32 R4, -RZ, R4.H0_H0")
    loops, faults = hot_loops.loops_of([*main, *rest, *other, *half, *listed("EXIT")], "forward_kernel<40>")
    assert not faults
    # the last load is the one that is used
    assert [(one.role, one.element, one.vectors, one.load_bytes) for one in loops] == [
        ("pass, with sources", "float", 4, 64), ("pass, no sources", "float", 2, 32),
        ("pass, no sources", "half", 2, 32),
    ]  # fmt: skip
    for code in ([], version(0, 1)):
        _, faults = hot_loops.loops_of([*code, *listed("EXIT")], "forward_kernel<40>")
        assert faults == ["no loop moves vectors of 16 bytes"]


def test_dtypes_are_told_by_what_takes_values_apart():
    for line, dtype in (
        ("DFMA R4, R4, R4, R8", "double"), ("HADD2.F32 R4, -RZ, R5.H0_H0", "half"),
        ("PRMT R4, R5, 0x7632, R6", "bfloat16"), ("IMAD.U32 R4, R5, 0x10000, RZ", "bfloat16"),
        ("IADD3 R4, P0, R5, 0x10000, RZ", "float"),
    ):  # fmt: skip
        assert hot_loops.element_of(listed("LDG.E.128 R4, desc[UR4][R2.64]", line)) == dtype


def test_names_and_what_they_promise():
    name = "talib_fast::stoch_norm::sliced_kernel<talib_fast::stoch_norm::Forward<__nv_bfloat16, true>, 8, false>"
    short = hot_loops.short(f"void {name}(talib_fast::stoch_norm::Forward<__nv_bfloat16, true>, long)")
    assert short == "sliced_kernel<Forward<bfloat16, true>, 8, false>"
    assert hot_loops.short("void (anonymous namespace)::k<__half>(int)") == "k<half>"
    promised = {
        short: hot_loops.Vectors(16, 1),
        "resident_kernel<Backward<double, false>, 2, true>": hot_loops.Vectors(16, 2),
        "resident_kernel<Backward<half, false>, 1, true>": hot_loops.Vectors(2, 2),
        "backward_kernel<40>": hot_loops.Vectors(16),
        "gram_kernel": hot_loops.Vectors(None),
    }
    assert {name: hot_loops.vectors_of(name) for name in promised} == promised


def test_launch_bounds_and_blocks():
    bounded = ".visible .entry _Z1aPf(\n\t.param .u64 p\n)\n.maxntid 256, 1, 1\n.minnctapersm 2\n{\n}\n"
    ptx = f"{bounded}.entry _Z1b(\n\n)\n{{\n}}\n"
    assert machine_code.bounds_of(ptx) == {"_Z1aPf": (256, 2), "_Z1b": (0, 0)}
    # 65,536 registers, in pieces of 8 a thread, and 2,048 threads
    assert [machine_code.blocks_by_registers(*one) for one in ((128, 256), (80, 256), (81, 256), (97, 512))] == [
        2,
        3,
        2,
        1,
    ]
    assert machine_code.blocks_by_registers(16, 256) == 8


def test_what_full_bandwidth_asks_for():
    least, most = machine_code.asked_in_flight()
    assert (round(least), round(most)) == (15227, 25379)  # 3.35e12 B/s × 600 and 1000 ns / 132
    # 4 warp instructions a cycle over 3.35e12 / 132 / 1.98e9 = 12.818 bytes, of 512 that a warp moves
    assert machine_code.issue_limit() == pytest.approx(4 * 512 / 12.818, rel=1e-4)


# ---- Planted faults

PLANTED = """
template <typename T, bool> struct Forward {{ const float4* x; float* out; float* y; int n; }};

{helper}

template <typename Op, int V, bool kRows>
__global__ void __launch_bounds__(256, {blocks}) sliced_kernel(Op op) {{
  float sum = 0;
#pragma unroll 1
  for (int i = threadIdx.x; i < op.n; i += 768) {{
    const float4 a = {load}, b = op.x[i + 256], c = op.x[i + 512];
    sum += (a.x + a.y) * (a.z + a.w) + (b.x + b.y) * (b.z + b.w) + (c.x + c.y) * (c.z + c.w);
  }}
  op.y[threadIdx.x] = sum;
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < op.n; i += 768)
#pragma unroll
    for (int u = 0; u < 2; ++u) {{
      float4 a = op.x[i + 256 * u];
      a.x += op.y[0], a.y *= 2, a.z *= 3, a.w *= 4;
      {store}
    }}
}}
template __global__ void sliced_kernel<Forward<float, false>, {width}, false>(Forward<float, false>);
"""
WHOLE = {
    "helper": "",
    "blocks": 2,
    "width": 4,
    "load": "op.x[i]",
    "store": "reinterpret_cast<float4*>(op.out)[i + 256 * u] = a;",
}
SPLIT_STORE = "volatile float* to = op.out + 4 * (i + 256 * u); to[0] = a.x; to[1] = a.y; to[2] = a.z; to[3] = a.w;"
NARROW_LOADS = """
__device__ float4 narrow(const float4* from) {
  const volatile float* one = reinterpret_cast<const volatile float*>(from);
  return {one[0], one[1], one[2], one[3]};
}"""
LOCAL_ARRAY = (
    "float t[64]; for (int k = 0; k < 64; ++k) t[k] = a.x * op.y[k * op.n]; a.x = t[op.n & 63]; "
    "reinterpret_cast<float4*>(op.out)[i + 256 * u] = a;"
)


# more values at once than 32 registers hold
SPILL = (
    "float t[48]; for (int k = 0; k < 48; ++k) t[k] = op.y[k * op.n + i]; "
    "for (int k = 0; k < 48; ++k) a.x = a.x * t[k] + a.y; for (int k = 0; k < 48; ++k) a.y = a.y * t[k] + a.x; "
    "reinterpret_cast<float4*>(op.out)[i + 256 * u] = a;"
)


def test_kernels_are_read(tmp_path, toolkit, disassembler):
    (tmp_path / "k.cu").write_text(PLANTED.format(**WHOLE))
    (kernel,), faults = machine_code.check(str(tmp_path / "k.cu"), toolkit, "9.0")
    assert not faults and kernel.name == "sliced_kernel<Forward<float, false>, 4, false>"
    assert (kernel.threads, kernel.blocks, kernel.shared_bytes) == (256, 2, 0)
    first, second = kernel.loops
    # three vectors of 16 bytes, and two; the second pass reads y[0] beside each
    assert (first.role, first.vectors, first.vector_bytes, first.load_bytes, first.store_bytes) == (
        "first pass", 3, 16, 48, 0,
    )  # fmt: skip
    assert (second.role, second.vectors, second.load_bytes, second.store_bytes) == ("second pass", 2, 40, 32)
    assert first.in_flight_bytes == 48
    # 6 additions, 3 multiplications and additions, 3 loads; the counter, the address, the comparison, the branch
    assert 6 + 3 + 3 + 4 <= first.instructions <= 32


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"store": SPLIT_STORE}, "2 times 4 stores of 4 bytes where one of 16 would do"),
        ({"helper": NARROW_LOADS, "load": "narrow(op.x + i)"}, "1 times 4 loads of 4 bytes where one of 16 would do"),
        ({"width": 2}, "expected a first and a second pass over vectors of 8 bytes, found none"),
        ({"store": LOCAL_ARRAY}, "loads and stores of local memory"),
        ({"store": SPILL, "blocks": 8}, "loads and stores of local memory"),
        ({"load": "op.nothing[i]"}, 'has no member "nothing"'),
    ],
    ids=["split store", "narrow loads", "other width", "local array", "spill", "not compiled"],
)
def test_planted_faults_are_found(changes, fault, tmp_path, toolkit, disassembler):
    source = tmp_path / "k.cu"
    source.write_text(PLANTED.format(**{**WHOLE, **changes}))
    _, faults = machine_code.check(str(source), toolkit, "9.0")
    assert any(sentence.endswith(fault) for sentence in faults), faults


# ---- The record

LOOP = Loop("first pass", "", 100, 4, 16, 64, 0, 64)
KERNEL = Kernel("sliced_kernel<Forward<float, false>, 4, false>", "stoch_norm", 256, 2, 80, 0, (LOOP,))


def record(*kernels: Kernel) -> Record:
    return Record("13.0", "sm_90", kernels)


def loop_with(**changes) -> Kernel:
    return dataclasses.replace(KERNEL, loops=(dataclasses.replace(LOOP, **changes),))


def test_a_record_is_read_as_it_was_written():
    passes = dataclasses.replace(
        KERNEL, name="forward_kernel<40>", loops=(LOOP, dataclasses.replace(LOOP, element="half"))
    )
    text = record(KERNEL, passes).text()
    assert Record.of(text) == record(KERNEL, passes)
    entries = json.loads(text)
    assert (entries["cuda"], entries["architecture"]) == ("13.0", "sm_90")
    assert entries["kernels"][0]["loops"] == [
        {
            "role": "first pass", "instructions": 100, "vectors": 4, "vector_bytes": 16, "load_bytes": 64,
            "store_bytes": 0, "in_flight_bytes": 64,
        }
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("found", "sentences"),
    [
        (KERNEL, []),
        (loop_with(instructions=110), []),
        (loop_with(instructions=111), ["first pass: instructions 111, 100 recorded"]),
        (loop_with(instructions=89), ["first pass: instructions 89, 100 recorded"]),
        (loop_with(in_flight_bytes=48), ["first pass: in_flight_bytes 48, 64 recorded"]),
        (loop_with(vectors=3), ["first pass: vectors 3, 4 recorded"]),
        (dataclasses.replace(KERNEL, registers=88), []),
        (dataclasses.replace(KERNEL, registers=71), ["71 registers, 80 are recorded"]),
        (dataclasses.replace(KERNEL, loops=()), ["0 hot loops, 1 are recorded"]),
        (dataclasses.replace(KERNEL, name="k"), ["k: not recorded", "recorded, but does not exist"]),
    ],
)
def test_what_differs_from_the_record_is_told(found, sentences):
    differing = machine_code.differences(record(KERNEL), record(found))
    assert len(differing) == len(sentences)
    assert all(one.endswith(sentence) for one, sentence in zip(differing, sentences, strict=True)), differing


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_kernels_are_without_faults_and_as_recorded(source, toolkit, disassembler):
    if "9.0" not in toolkit.architectures:
        pytest.skip(f"{toolkit.nvcc} does not know 9.0")
    kernels, faults = machine_code.check(str(source), toolkit, "9.0")
    assert kernels and not faults, "\n".join(faults)
    if toolkit.version == RECORDED.cuda:  # another compiler's figures are others
        theirs = [kernel for kernel in RECORDED.kernels if kernel.operation == source.stem]
        differing = machine_code.differences(record(*theirs), record(*kernels))
        assert not differing, "\n".join([*differing, "python tools/machine_code.py --write records them"])


def test_every_kernel_that_moves_memory_is_recorded():
    loops = {kernel.name.partition("<")[0]: len(kernel.loops) for kernel in RECORDED.kernels}
    assert loops.keys() == {
        "backward_kernel", "forward_kernel", "gradient_kernel", "gram_kernel", "resident_kernel", "sliced_kernel",
        "solve_kernel", "value_kernel",
    }  # fmt: skip
    assert all(count for name, count in loops.items() if name != "solve_kernel")
    assert {kernel.operation for kernel in RECORDED.kernels} == {source.stem for source in SOURCES}
    names = [(kernel.operation, kernel.name) for kernel in RECORDED.kernels]
    assert names == sorted(names) and len(set(names)) == len(names)


# ---- The page


def test_the_page_shows_what_is_recorded():
    page = machine_code.PAGE.read_text()
    assert machine_code.written(page, RECORDED) == page


def test_the_table_says_what_misses():
    whole = dataclasses.replace(KERNEL, loops=(LOOP, dataclasses.replace(LOOP, role="second pass", store_bytes=64)))
    narrow = loop_with(vector_bytes=8, load_bytes=8, in_flight_bytes=8)
    narrow = dataclasses.replace(narrow, name="sliced_kernel<Forward<bfloat16, false>, 4, false>")
    kernels = [whole, narrow]
    for name in (
        "sliced_kernel<Forward<float, false>, 1, false>", "sliced_kernel<Forward<half, false>, 4, false>",
        "resident_kernel<Forward<float, true>, 4, false>",
    ):  # fmt: skip
        kernels.append(dataclasses.replace(whole, name=name))
    shown = machine_code.table(record(*kernels)).splitlines()[2:]
    assert shown == [
        "| *asked of full bandwidth* | | | 16 | 25 | 160 |",
        # 64 bytes of each of 512 threads; 100 instructions for 64 bytes and for 128
        "| `sliced_kernel<Forward<float, false>, 4, false>` | 80 | 2 | 16 | 33 / 33 | 25 / 12 |",
        "| `sliced_kernel<Forward<bfloat16, false>, 4, false>` | 80 | 2 | **8** | **4** | **200** |",
    ]
    with pytest.raises(ValueError, match="expected <!-- machine code: begin --> and"):
        machine_code.written("a page", record(KERNEL))


# ---- The command


def test_the_command_says_what_it_lacks(monkeypatch, capsys):
    monkeypatch.setenv("CUDA_HOME", "/nonexistent")
    assert machine_code.main([]) == 1
    assert "the kernels cannot be compiled: CUDA_HOME is /nonexistent" in capsys.readouterr().err


def test_the_command_needs_a_disassembler(toolkit, monkeypatch, capsys):
    def missing(name):
        raise machine_code.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(machine_code.importlib.metadata, "files", missing)
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name, **path: None if name == "nvdisasm" else which(name, **path))
    assert machine_code.main(["k.cu"]) == 1
    assert "the machine code cannot be read: nvdisasm is not installed" in capsys.readouterr().err


def test_a_part_of_the_kernels_is_not_recorded(capsys):
    with pytest.raises(SystemExit):
        machine_code.main(["--write", "k.cu"])
    assert "--write records all of csrc/cuda, so it takes no list of sources" in capsys.readouterr().err


def test_the_command_fails_on_a_fault(toolkit, disassembler, tmp_path, capsys):
    source = tmp_path / "k.cu"
    source.write_text(PLANTED.format(**{**WHOLE, "store": SPLIT_STORE}))
    assert machine_code.main([str(source)]) == 1
    said = capsys.readouterr()
    assert "4 stores of 4 bytes where one of 16 would do" in said.err
    assert "| `sliced_kernel<Forward<float, false>, 4, false>` |" in said.out
    source.write_text(PLANTED.format(**WHOLE))
    assert machine_code.main([str(source)]) == 0 and not capsys.readouterr().err
