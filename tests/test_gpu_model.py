"""The model of the CUDA kernels' times, against what a pencil says."""

import dataclasses
import itertools
import json
import math

import gpu_launches
import gpu_model
import gpu_times
import pytest
from compiler_support import needs
from gpu_launches import Gpu, Kernel, Loop
from gpu_times import Model, Steps, Sums, Task, Traffic

pytestmark = pytest.mark.no_cover  # what is tested here is not of the package

needs_gxx = needs("g++")
NOTHING = Sums(0, 0, 0, 0, 0)
FREE = Steps(
    **{
        field.name: NOTHING if isinstance(field.default, Sums) else type(field.default)(0)
        for field in dataclasses.fields(Steps)
    }
)
H100, _ = gpu_launches.GPUS
# a cycle a second, and nothing takes any time
INFINITE = Gpu(
    "infinite", 1 << 20, copy=math.inf, kept_bytes=1e6, multiprocessors=4, clock=1.0, fabric=math.inf,
    memory_latency=0, cache_latency=0, shared_latency=0,
)  # fmt: skip


def loop(role, instructions=0, vectors=4, **sizes):
    sizes = {"vector_bytes": 16, "load_bytes": 64, "store_bytes": 64, "in_flight_bytes": 64, **sizes}
    return Loop(role, "", instructions, vectors, **sizes)


def model(gpu, steps=FREE, registers=32, **options):
    loops = tuple(loop(role, **options) for role in ("first pass", "second pass"))
    return Model(gpu, {"kernel": Kernel("kernel", registers, 0, loops)}, steps)


# 2 images of 4 channels of 8 × 8: 2048 bytes, 512 of each channel
CASE = {"label": "4@8", "parts": ["norm"], "shape": [2, 4, 8, 8], "layout": "contiguous", "dtype": "float32"}


def resident(blocks=4, shared_bytes=200 << 10):
    """A warp for each channel, so that a thread has one vector."""
    return {
        "kernel": "kernel", "resident": True, "threads": 32, "blocks": blocks, "shared_bytes": shared_bytes,
        "vector": 4, "rows": False, "run": 64, "columns": 1, "lane_rows": 32, "log_lanes": 0, "group_channels": 1,
        "steps": 32, "whole_words": True,
    }  # fmt: skip


def sliced(order, slices, blocks, steps=64):
    return {
        **resident(blocks, shared_bytes=0), "resident": False, "groups": len({group for _, group, _ in order}),
        "steps": steps, "slices": slices, "slice_steps": 32, "sections": 1, "section_slices": slices, "order": order,
    }  # fmt: skip


class TestTime:
    def test_memory_alone(self):
        gpu = dataclasses.replace(INFINITE, copy=1000.0)
        forward, backward = (model(gpu).stoch_norm(CASE, part, resident()) for part in ("forward", "backward"))
        assert forward.seconds == pytest.approx(2 * 2.048)  # reads N, writes N
        assert backward.seconds == pytest.approx(3 * 2.048)
        assert forward.copy_share == backward.copy_share == pytest.approx(1)
        assert (forward.limit, forward.dram_bytes) == ("memory", 4096)

    def test_cache_alone(self):
        gpu = dataclasses.replace(INFINITE, fabric=1000.0)
        assert model(gpu).stoch_norm(CASE, "forward", resident()).seconds == pytest.approx(2 * 2.048)
        assert model(gpu).stoch_norm(CASE, "forward", resident()).limit == "cache"

    def test_latency_alone(self):
        gpu = dataclasses.replace(INFINITE, memory_latency=100, shared_latency=10)
        # an iteration of the first pass waits for memory, one of the second, which half the channels have, for shared
        assert model(gpu).stoch_norm(CASE, "forward", resident()).seconds == pytest.approx(100 + 10 / 2)
        # 9 vectors a thread are three iterations of four
        plan = {**resident(), "steps": 9 * 32}
        assert model(gpu).stoch_norm(CASE, "forward", plan).seconds == pytest.approx(3 * 105)
        # half of the bytes in flight: twice the wait
        halves = model(gpu, in_flight_bytes=32)
        assert halves.stoch_norm(CASE, "forward", plan).seconds == pytest.approx(2 * 3 * 105)
        # what is read of a fused loop's code is the way with a residual
        assert halves.stoch_norm({**CASE, "parts": ["norm", "relu"]}, "forward", plan).seconds == pytest.approx(3 * 105)
        # that comes from memory: ahead in the second pass, but vector by vector in the first one, if that writes
        added = {**CASE, "parts": ["norm", "add", "relu"]}
        assert halves.stoch_norm(added, "forward", plan).seconds == pytest.approx(600 + (600 + 900) / 2)

    def test_instructions_alone(self):
        # a warp of the four that a scheduler of each has: 10 instructions an iteration, of half the channels twice
        plan = resident(blocks=64, shared_bytes=0)
        assert model(INFINITE, instructions=10).stoch_norm(CASE, "forward", plan).seconds == pytest.approx(4 * 15)

    @pytest.mark.parametrize(("blocks", "rounds"), [(1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
    def test_whole_rounds(self, blocks, rounds):
        """A multiprocessor of the four holds one block of 200 KB."""
        gpu = dataclasses.replace(INFINITE, memory_latency=100)
        predicted = model(gpu).stoch_norm(CASE, "forward", resident(blocks))
        assert predicted.seconds == pytest.approx(100 * rounds)
        assert sum(predicted.work.values()) == pytest.approx(1e6 * 100 * rounds)
        assert predicted.rounds == blocks / 4

    def test_fixed_steps(self):
        sums = dataclasses.replace(NOTHING, lane=50000, entry=100000)
        steps = dataclasses.replace(FREE, launch=1000.0, block=1, operands=20, read=300, finish=4000, moments=sums)
        plan = {**resident(), "threads": 256, "lane_rows": 256, "steps": 256, "log_lanes": 3}
        # five shuffles join 32 lanes, and three more the entries of eight warps
        expected = 1000 + 1 + 20 + 300 + 4000 + 5 * 50000 + 3 * 50000
        assert model(INFINITE, steps).stoch_norm(CASE, "forward", plan).seconds == expected
        # where two lanes have four entries each, there are three merges before the one shuffle
        expected += 3 * 100000 - 2 * 50000
        assert model(INFINITE, steps).stoch_norm(CASE, "forward", {**plan, "log_lanes": 1}).seconds == expected

    def test_shorter_of_work_and_memory_leaks(self):
        gpu = dataclasses.replace(INFINITE, copy=1000.0, memory_latency=2)
        predicted = model(gpu).stoch_norm(CASE, "forward", resident())
        assert predicted.seconds == pytest.approx(4.096 + gpu_times.LEAK * 2)

    def test_rounds_of_equal_blocks(self):
        assert [gpu_times.quantisation(rounds) for rounds in (1, 1.5, 2, 10)] == pytest.approx([1, 4 / 3, 1, 1.05])

    @pytest.mark.parametrize(
        ("threads", "registers", "shared", "blocks"),
        [
            (256, 80, 0, 3),  # 65536 / (80 · 256) = 3.2
            (256, 33, 0, 6),  # registers come in eights
            (1024, 32, 0, 2),  # 2048 threads
            (32, 16, 0, 32),
            (512, 32, 100 << 10, 2),  # a kilobyte more each, of 228
            (512, 32, 114 << 10, 1),
        ],
    )
    def test_blocks_of_a_multiprocessor(self, threads, registers, shared, blocks):
        assert H100.blocks_per_multiprocessor(threads, registers, shared) == blocks


class TestSums:
    """Of a block of 256 threads, eight warps."""

    STEPS = dataclasses.replace(
        FREE, join=1, read=20, slices=300,
        moments=Sums(lane=4000, instructions=50000, entry=600000, uneven_lane=7000000, uneven_entry=80000000),
        products=Sums(lane=5, instructions=0, entry=0, uneven_lane=0, uneven_entry=0),
    )  # fmt: skip

    def model(self):
        return model(INFINITE, self.STEPS)

    def plan(self, **others):
        return {**resident(), "threads": 256, **others}

    def test_channels_last(self):
        """Columns of 8 vectors of 4 channels: four lanes of a warp are of one, and join in two steps."""
        plan = self.plan(rows=True, run=1, vector=4, columns=8, group_channels=32, log_lanes=3)
        # a scheduler has two of the eight warps, with three channels each beside the first
        assert self.model().block_sums(plan, "forward") == 2 * (4000 + 3 * 2 * 50000) + 20 + 3 * 4000
        assert self.model().block_sums(plan, "backward") == 2 * 5 + 20 + 3 * 5

    @pytest.mark.parametrize(
        ("run", "vector", "rows", "entries"),
        [
            (49, 4, 5, 3),  # a channel is in 13 vectors of 5 rows, 65 entries for 32 lanes
            (196, 8, 5, 4),  # in 25 of them: it begins where a vector does or in its middle
        ],
    )
    def test_rows_of_runs(self, run, vector, rows, entries):
        plan = self.plan(rows=True, run=run, vector=vector, columns=49, lane_rows=rows, log_lanes=5)
        assert self.model().block_sums(plan, "forward") == 1 + 20 + entries * 80000000 + 5 * 7000000

    @pytest.mark.parametrize(
        ("channels", "log_lanes", "slices", "batches", "shuffles"),
        [
            (1, 3, 25, 1, 5 + 3),  # every thread has one at most; a warp's lanes join, then eight warps
            (1, 3, 1025, 2, 5 + 3),  # 256 threads have four each
            (8, 3, 25, 1, 2 + 3),
            (64, 2, 25, 2, 2),  # four rows of threads, with four each: none of a warp's lanes are of one channel
        ],
    )
    def test_slices(self, channels, log_lanes, slices, batches, shuffles):
        plan = self.plan(group_channels=channels, log_lanes=log_lanes)
        expected = batches * (300 + 4 * 600000) + 20 + shuffles * 4000
        assert self.model().slices(plan, "forward", slices) == expected


class TestTraffic:
    """Of a map of 2048 bytes, of whose groups the second pass writes half."""

    @pytest.mark.parametrize(
        ("parts", "direction", "first", "again", "beside", "written"),
        [
            (["norm"], "forward", 2048, 1024, 0, 2048),
            (["norm"], "backward", 4096, 2048, 0, 2048),
            (["norm", "relu"], "forward", 2048, 1024, 0, 2048),
            # a bit an element of 4 bytes is a 32nd
            (["norm", "add", "relu"], "forward", 2048 + 1024, 1024, 1024, 2048 + 64),
            (["norm", "add", "relu"], "backward", 4096 + 64, 2048, 0, 4096),
        ],
    )
    def test_passes(self, parts, direction, first, again, beside, written):
        found = Traffic.of({**CASE, "parts": parts}, direction, 0.5)
        assert (found.first, found.again, found.beside, found.written) == (first, again, beside, written)

    def test_what_comes_between(self):
        order = (
            (1, 0, 0), (1, 0, 1), (1, 1, 0), (1, 1, 1),
            (0, 0, 1), (0, 0, 0), (0, 1, 1), (0, 1, 0),
        )  # fmt: skip
        assert gpu_times.between_passes(order) == {(3, 1): 1, (2, 0): 1, (1, 3): 1, (0, 2): 1}
        # 100 bytes an item: 400, 200, 400 and 200. Of those beside 200 a cache that keeps 200 has half, of others none.
        traffic = Traffic(first=400, again=400, beside=0, written_early=0, written_late=400)
        assert traffic.found_again(sliced(order, slices=2, blocks=1), kept=200) == (0 + 0.5 + 0 + 0.5) / 4

    def test_share_that_the_cache_has(self):
        shares = [gpu_times.hit_share(touched, 100) for touched in (0, 75, 100, 112.5, 125, 1000)]
        assert shares == pytest.approx([1, 1, 0.5, 0.25, 0, 0])

    @pytest.mark.parametrize(("kept", "read"), [(1e9, 2048), (1.0, 2048 + 1024)])
    def test_misses_are_read_again(self, kept, read):
        """By rows, which are all written late. The slice that was read last is read again before any other."""
        gpu = dataclasses.replace(INFINITE, copy=1000.0, kept_bytes=kept)
        order = ((1, 0, 0), (1, 0, 1), (0, 0, 1), (0, 0, 0))
        plan = {**sliced(order, slices=2, blocks=1), "rows": True, "run": 1}
        predicted = model(gpu).stoch_norm(CASE, "forward", plan)
        assert predicted.dram_bytes == read + 2048
        assert predicted.seconds == pytest.approx((read + 2048) / 1000)


class TestSlices:
    def test_the_second_pass_waits_for_the_merge(self):
        tasks = [Task(True, 0, 10.0)] * 2 + [Task(False, 0, 4.0, waits=True)] * 2
        assert gpu_times.makespan(tasks, 2, merge=3) == 10 + 3 + 4
        assert gpu_times.makespan(tasks, 1, merge=3) == 10 + 10 + 3 + 4 + 4

    def test_what_needs_no_constants_waits_for_nothing(self):
        tasks = [Task(True, 0, 10.0), Task(False, 0, 4.0)]
        assert gpu_times.makespan(tasks, 2, merge=3) == 13

    def test_a_block_holds_its_next_ticket(self):
        """The second block is done at 1 and 2, but the third item is the first block's already."""
        tasks = [Task(True, group, cycles) for group, cycles in enumerate((10.0, 1.0, 1.0, 1.0))]
        assert gpu_times.makespan(tasks, 2, merge=0) == 11

    def test_more_blocks_than_items(self):
        assert gpu_times.makespan([Task(True, 0, 10.0)], 8, merge=2) == 12

    def test_work_of_a_plan(self):
        """Two channels in two slices each, of which one takes the batch's statistics; two blocks."""
        steps = dataclasses.replace(
            FREE, item=1, known_constants=4, arrive=10, wait=100, slices=500, finish=1000, release=2000
        )
        gpu = dataclasses.replace(INFINITE, memory_latency=50, cache_latency=20)
        order = (
            (1, 0, 0), (1, 0, 1), (1, 1, 0), (1, 1, 1),
            (0, 0, 1), (0, 0, 0), (0, 1, 1), (0, 1, 0),
        )  # fmt: skip
        predicted = model(gpu, steps).stoch_norm(CASE, "forward", sliced(order, slices=2, blocks=2))
        # each block has two items of the first pass, one of the second, and one that does nothing
        found = {cause: microseconds / 1e6 for cause, microseconds in predicted.work.items()}
        assert found.pop("idle") == pytest.approx(predicted.seconds - sum(found.values()))
        assert {cause: seconds for cause, seconds in found.items() if seconds} == pytest.approx(
            {
                "tickets": 4 * 1,
                "known constants": 2 * 4,
                "sums to memory": 2 * 10,
                "wait for constants": 100,
                "loads": 2 * 50 + 20,
                "last block's merge": 3500,
            }
        )
        assert predicted.hit == 1 and predicted.limit == "work"

    def test_sections(self):
        """Four slices in two sections. The last block of each section takes 500 for the merge and 10 to say so."""
        steps = dataclasses.replace(FREE, arrive=10, slices=500, finish=1000)
        order = tuple((first_pass, 0, its_slice) for first_pass in (1, 0) for its_slice in range(4))
        plan = {**sliced(order, slices=4, blocks=4, steps=128), "sections": 2, "section_slices": 2}
        predicted = model(INFINITE, steps).stoch_norm(CASE, "forward", plan)
        assert predicted.work["last block's merge"] / 1e6 == pytest.approx((2 * 510 + 500 + 1000) / 4)
        # four blocks sum up at the same time; then comes a section's merge, and that of both
        assert predicted.seconds == pytest.approx(10 + 510 + 500 + 1000)


LIST = {"label": "L2", "target_bytes": 4 * 4096, "dtype": "float32"}


class TestLists:
    def model(self, gpu, steps=FREE):
        loops = (Loop("pass, no sources", "float", 0, 4, 16, load_bytes=64, store_bytes=0, in_flight_bytes=64),)
        return Model(gpu, {"forward_kernel<40>": Kernel("forward_kernel<40>", 32, 0, loops)}, steps)

    def plan(self, *blocks):
        launch = {"operands": 40, "blocks": sum(blocks), "threads": 256, "chunk": 1024, "operand_blocks": blocks}
        return {"launches": [launch]}

    def test_memory_alone(self):
        gpu = dataclasses.replace(INFINITE, copy=1000.0)
        predicted = self.model(gpu).squared_distance(LIST, "forward", self.plan(4), [4096])
        assert predicted.seconds == pytest.approx(16.384)
        assert predicted.copy_share == pytest.approx(1)

    def test_latency_alone(self):
        """A chunk of 4 KB is 16 bytes a thread; each of the 4 multiprocessors has room for all blocks that it gets."""
        gpu = dataclasses.replace(INFINITE, memory_latency=100)
        whole = self.model(gpu).squared_distance(LIST, "forward", self.plan(32), [32 * 1024])
        assert whole.rounds == 1
        assert whole.seconds == pytest.approx(100)

    def test_weights_are_instructions(self):
        """The loop over 16 bytes in 20 instructions, as costly for a byte as the one over 8 in 30."""
        loops = [
            Loop("pass, with sources", "float", instructions, 1, 16, load_bytes, store_bytes=0, in_flight_bytes=8)
            for instructions, load_bytes in ((20, 16), (30, 8))
        ]
        kernel = Kernel("forward_kernel<40>", 32, 0, tuple(loops))
        assert kernel.of_list("float", sources=True, weights=False) == loops[0]
        assert kernel.of_list("float", sources=True, weights=True) == dataclasses.replace(loops[0], instructions=60)
        with pytest.raises(ValueError, match=r"no pass, no sources, over float in forward_kernel<40>"):
            kernel.of_list("float", sources=False, weights=False)

    def test_the_last_block_adds_up(self):
        steps = dataclasses.replace(FREE, chunks=100, store=7)
        model = self.model(INFINITE, steps)
        # sixteen loads of each of 256 threads; then the last operand's sum, and that of all
        for blocks, rounds in ((1, 1), (4096, 1), (4097, 2)):
            predicted = model.squared_distance(LIST, "forward", self.plan(blocks), [blocks * 1024])
            assert predicted.seconds == rounds * 100 + 2 * 7
        # the blocks' own sums are as long as either of these two
        model = self.model(INFINITE, dataclasses.replace(steps, chunk_sum=1000))
        assert model.squared_distance(LIST, "forward", self.plan(32), [32 * 1024]).seconds == 1000 + 100 + 2 * 1007


class TestBatchNorm:
    """Assumptions: the arithmetic alone is tested."""

    @pytest.mark.parametrize(
        ("case", "direction", "passes"),
        [
            ({"layout": "channels_last"}, "forward", 3 / 0.75),
            ({"layout": "channels_last"}, "backward", 5 / 0.75),
            ({"layout": "channels_last", "parts": ["norm", "relu"]}, "backward", 5 / 0.75 + 3),
            ({"layout": "channels_last", "parts": ["norm", "add", "relu"]}, "forward", 3 / 0.75 + 3 + 2),
        ],
    )
    def test_passes(self, case, direction, passes):
        case = {**CASE, "shape": [48, 256, 56, 56], **case}
        launches = 3e-6 * (len(case["parts"]) - (direction == "backward" and "add" in case["parts"]))
        expected = launches + passes * 48 * 256 * 56 * 56 * 4 / 3e12
        assert gpu_times.batch_norm_seconds(case, direction, H100) == pytest.approx(expected)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return gpu_launches.build_plans(tmp_path_factory.mktemp("plans"))


@needs_gxx
class TestPlans:
    def test_a_sliced_plan(self, program):
        (plan,) = gpu_launches.plans(program, H100, ["stoch_norm float32 forward plain 48 64 3136"])
        order = plan.pop("order")
        # a channel has 48 · 3136 / 4 vectors, 602,112 bytes: more than a block's 227 KB
        expected = {"resident": False, "threads": 256, "blocks": 264, "groups": 64, "steps": 37632, "columns": 1}
        assert {name: plan[name] for name in expected} == expected
        assert plan["kernel"] == "sliced_kernel<Forward<float, false>, 4, false>"
        assert plan["slices"] == math.ceil(37632 / plan["slice_steps"])
        slices = range(plan["slices"])
        first, second = ([tuple(item) for is_first, *item in order if is_first == pass_] for pass_ in (True, False))
        assert first == [(group, its_slice) for group in range(64) for its_slice in slices]
        assert second == [(group, its_slice) for group in range(64) for its_slice in reversed(slices)]
        # the first pass is a group and `lag` slices ahead; then they take turns
        ahead = plan["slices"] + plan["lag"]
        assert [is_first for is_first, *_ in order[: ahead + 4]] == [1] * ahead + [0, 1, 0, 1]

    def test_a_resident_plan(self, program):
        (plan,) = gpu_launches.plans(program, H100, ["stoch_norm float32 forward fused 48 256 196"])
        # 48 · 196 · 4 bytes are 37,632, and there are channels for half of the 132 multiprocessors
        expected = {"resident": True, "blocks": 256, "threads": 256, "slices": 1, "steps": 2352, "order": ()}
        assert {name: plan[name] for name in expected} == expected
        assert plan["kernel"] == "resident_kernel<Forward<float, true>, 4, false>"
        assert 37632 < plan["shared_bytes"] < 37632 + 4096 + 256

    def test_another_device_has_another_plan(self, program):
        request = "stoch_norm float32 forward plain 48 256 196"
        small = dataclasses.replace(H100, shared_bytes=32 << 10)
        assert [gpu_launches.plans(program, gpu, [request])[0]["resident"] for gpu in (H100, small)] == [True, False]

    def test_a_list(self, program):
        chunks = {"float32 none": 16384, "float32 sources": 8192, "bfloat16 none": 32768, "bfloat16 sources": 16384}
        requests = [f"squared_distance {kind} 1000 2000000 50" for kind in chunks]
        for plan, elements in zip(gpu_launches.plans(program, H100, requests), chunks.values(), strict=True):
            (launch,) = plan["launches"]
            # 64 KB of target and source a block
            assert launch["chunk"] == elements
            assert launch["operand_blocks"] == [1, math.ceil(2e6 / elements), 1]
            assert launch["blocks"] == sum(launch["operand_blocks"])
            assert (launch["operands"], launch["threads"]) == (40, 256)

    @pytest.mark.parametrize(
        "request_",
        [
            "stoch_norm float16 forward plain 1 2 3",
            "stoch_norm float32",
            "squared_distance float32",
            "squared_distance 8",
            "nothing",
        ],
    )
    def test_what_is_no_request(self, program, request_):
        with pytest.raises(RuntimeError, match=f"no request: {request_}"):
            gpu_launches.plans(program, H100, [request_])


@pytest.fixture
def machine_code(tmp_path):
    """A table that has all kernels, with round numbers."""

    def moves(role, element=""):
        return {
            "role": role, "element": element, "instructions": 100, "vectors": 4, "vector_bytes": 16,
            "load_bytes": 128, "store_bytes": 64, "in_flight_bytes": 128,
        }  # fmt: skip

    passes = [moves("first pass"), moves("second pass")]
    kinds = itertools.product(
        ("resident", "sliced"), ("Forward", "Backward"), ("float", "bfloat16"), ("true", "false"), (1, 2, 4, 8),
        ("true", "false"),
    )  # fmt: skip
    kernels = [
        {"name": f"{schedule}_kernel<{operation}<{element}, {fused}>, {vector}, {rows}>", "loops": passes}
        for schedule, operation, element, fused, vector, rows in kinds
    ]
    over = [
        moves(f"pass, {sources} sources", element)
        for sources, element in itertools.product(("with", "no"), ("float", "bfloat16"))
    ]
    kernels += [
        {"name": f"{direction}_kernel<{operands}>", "loops": over}
        for direction, operands in itertools.product(("forward", "backward"), (40, 360))
    ]
    table = {"cuda": "13.0", "architecture": "sm_90"}
    table["kernels"] = [{**kernel, "registers": 80, "shared_bytes": 0} for kernel in kernels]
    file = tmp_path / "sm_90.json"
    file.write_text(json.dumps(table))
    return file


@needs_gxx
class TestCommand:
    def test_results_and_table(self, machine_code, tmp_path, capsys):
        every = [*gpu_model.stoch_norm_cases(), *(case for case, _ in gpu_model.squared_distance_cases())]
        millisecond = {part: {"seconds": 1e-3} for part in gpu_times.PASSES}
        older = [{"gpu": gpu.name, **case, **millisecond} for gpu in gpu_launches.GPUS for case in every]
        before = tmp_path / "before.json"
        before.write_text(json.dumps({"environment": {"commit": "0123456"}, "cases": older}))
        gpu_model.main(["--machine-code", str(machine_code), "--out", str(tmp_path), "--before", str(before)])
        assert "all 53 layers" in capsys.readouterr().out
        results = json.loads((tmp_path / "results.json").read_text())
        layers = [case for case in results["cases"] if case["operation"] == "stoch_norm" and case["parts"] == ["norm"]]
        assert {gpu["name"] for gpu in results["settings"]["gpus"]} == {case["gpu"] for case in layers}
        assert len(layers) == 2 * 2 * 2 * 12
        assert sum(case["count"] for case in layers) == 2 * 2 * 2 * 53
        assert all(0 < case[part]["copy_share"] < 1.3 for case in results["cases"] for part in gpu_times.PASSES)
        table = (tmp_path / "table.md").read_text()
        assert "A prediction, not a measurement" in table and "commit 0123456" in table
        rows = {
            tuple(cells[:3]): cells[3:]
            for line in table.splitlines()
            if len(cells := [cell.strip() for cell in line.strip("|").split("|")]) > 4
        }
        own = [case for case in layers if gpu_model.identity(case)[1::2] == ("H100", "contiguous")]
        own = [case for case in own if case["dtype"] == "float32"]
        milliseconds = 1e3 * sum(case["count"] * case[part]["seconds"] for case in own for part in gpu_times.PASSES)
        cells = rows["all 53 layers", "contiguous", "float32"]
        assert cells[:2] == ["106.0", f"{milliseconds:.1f}"]
        assert cells[-1] == ""  # nothing is measured
        assert ("64@112×1", "channels_last", "bfloat16") in rows and ("L2-SP", "contiguous", "float32") in rows

    def test_more_bandwidth_takes_no_longer(self, machine_code, program):
        kernels, _ = gpu_launches.read_machine_code(machine_code)
        times = []
        for factor in (0.5, 1, 1000):
            gpu = dataclasses.replace(H100, copy=factor * H100.copy)
            cases = list(gpu_model.predict(Model(gpu, kernels, Steps()), program))
            times.append([case[part]["seconds"] for case in cases for part in gpu_times.PASSES])
        for slower, faster in itertools.pairwise(times):
            assert all(map(float.__ge__, slower, faster))
        assert sum(times[0]) > 1.5 * sum(times[-1])

    def fails(self, *arguments):
        with pytest.raises(SystemExit) as error:
            gpu_model.main(list(map(str, arguments)))
        assert str(error.value).startswith("gpu_model.py: ") and "\n" not in str(error.value)
        return str(error.value)

    def test_no_table_of_machine_code(self, tmp_path):
        said = self.fails("--machine-code", tmp_path / "none.json", "--out", tmp_path)
        assert "expected the table of machine code at none.json: python tools/machine_code.py makes it" in said

    def test_another_file_than_that(self, tmp_path):
        (tmp_path / "other.json").write_text("[]")
        said = self.fails("--machine-code", tmp_path / "other.json", "--out", tmp_path)
        assert "other.json is no table of machine code" in said

    def test_a_kernel_that_the_table_lacks(self, machine_code, tmp_path):
        table = json.loads(machine_code.read_text())
        table["kernels"] = [kernel for kernel in table["kernels"] if "<float," not in kernel["name"]]
        machine_code.write_text(json.dumps(table))
        said = self.fails("--machine-code", machine_code, "--out", tmp_path)
        assert "the table of machine code has no sliced_kernel<Forward<float, " in said

    def test_no_compiler(self, machine_code, tmp_path, monkeypatch):
        monkeypatch.setenv("CXX", "no-such-compiler")
        said = self.fails("--machine-code", machine_code, "--out", tmp_path)
        assert "expected a C++ compiler named no-such-compiler" in said

    def test_older_results_that_are_missing(self, machine_code, tmp_path):
        said = self.fails("--machine-code", machine_code, "--out", tmp_path, "--before", tmp_path / "none.json")
        assert "none.json" in said
        (tmp_path / "few.json").write_text('{"environment": {"commit": "0"}, "cases": []}')
        said = self.fails("--machine-code", machine_code, "--out", tmp_path, "--before", tmp_path / "few.json")
        assert "few.json lacks stoch_norm, H100, 64@112" in said


RESULTS = gpu_model.FOLDER / "results.json"


@needs_gxx
def test_recorded_results_are_of_these_kernels():
    recorded = json.loads(RESULTS.read_text())
    found = gpu_model.run(gpu_model.MACHINE_CODE, gpu_model.BEFORE, Steps())
    advice = "python benchmarks/gpu_model.py --page brings them up to date"
    assert recorded["before"] == found["before"], advice
    for old, new in zip(recorded["cases"], found["cases"], strict=True):
        for part in gpu_times.PASSES:
            assert new[part]["seconds"] == pytest.approx(old[part]["seconds"], rel=1e-3), (advice, new["label"], part)


@pytest.mark.parametrize("operation", gpu_model.OPERATIONS)
def test_the_page_has_the_recorded_results(operation):
    page = gpu_model.page_of(operation).read_text()
    assert gpu_model.page_with_table(page, json.loads(RESULTS.read_text()), operation) == page


def test_a_page_without_markers():
    expected = r"expected <!-- gpu_model, stoch_norm: begin --> and, behind it, <!-- gpu_model, stoch_norm: end -->"
    with pytest.raises(ValueError, match=expected):
        gpu_model.page_with_table("# A page", json.loads(RESULTS.read_text()), "stoch_norm")


def test_pages_are_brought_up_to_date(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_model, "PAGES", tmp_path)
    for operation in gpu_model.OPERATIONS:
        marks = (f"<!-- gpu_model, {operation}: {word} -->" for word in ("begin", "end"))
        (tmp_path / f"{operation}.md").write_text("Before\n{}\nold\n{}\nAfter\n".format(*marks))
    gpu_model.write_pages(json.loads(RESULTS.read_text()))
    pages = {operation: (tmp_path / f"{operation}.md").read_text() for operation in gpu_model.OPERATIONS}
    assert "| all 53 layers | contiguous |" in pages["stoch_norm"] and "DELTA" not in pages["stoch_norm"]
    assert "| DELTA | contiguous |" in pages["squared_distance"] and "all 53" not in pages["squared_distance"]
    for page in pages.values():
        assert page.startswith("Before\n") and page.endswith("\nAfter\n") and "old" not in page


def test_the_recorded_table_is_that_of_the_results(tmp_path):
    gpu_model.publish(json.loads(RESULTS.read_text()), tmp_path)
    assert (tmp_path / "table.md").read_text() == (gpu_model.FOLDER / "table.md").read_text()
