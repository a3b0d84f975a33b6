"""Measures how each CUDA kernel uses the GPU: time, launch, occupancy, and the bandwidth of each pass.

    python benchmarks/kernels.py [--out DIR]

writes ``table.md``, and ``results.json`` after every pass. The figures come from PyTorch's profiler. Bandwidth is that
of the memory floor: the bytes that a pass has to move with any kernel, as the operations' benchmarks count them. Feeds
rotate, so that a pass finds neither its inputs nor its output's memory in the cache. It needs a GPU.
"""

import argparse
import collections
import itertools
import json
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import bench_spectral_tail as tail
import bench_squared_distance as distance
import bench_stoch_norm as norm
import command
import report
import torch
from harness import Candidate, Feed, on_chip_bytes, sets_beyond_cache
from report import Case, progress
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

OPERATION = "kernels"
REPETITIONS = 10
MAPS = ((64, 112), (256, 56), (512, 28), (1024, 14), (2048, 7))  # C@H of StochNorm's inputs
MATRICES = ((48, 2048), (256, 2048))
COPIED_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Pass:
    """Work to profile, and the bytes that it has to move."""

    label: str
    floor_bytes: float
    work: Callable[[], object]


@dataclass(frozen=True)
class Kernel:
    """One kernel in a pass, as the profiler reports it."""

    name: str
    launches: float  # in a pass
    microseconds: float  # of a launch
    grid: tuple[int, ...]
    block: tuple[int, ...]
    registers: int  # of a thread
    shared_bytes: int  # of a block
    occupancy: float  # %, estimated from the launch


def in_turns(work: Callable[[Feed], object], feeds: Sequence[Feed]) -> Callable[[], object]:
    """``work`` on one feed after the other. As many results are kept, so that each result gets other memory."""
    supply, kept = itertools.cycle(feeds), collections.deque[object](maxlen=len(feeds))
    return lambda: kept.append(work(next(supply)))


def both_passes(
    label: str, candidate: Candidate, feeds: Sequence[Feed], forward_bytes: float, backward_bytes: float
) -> list[Pass]:
    """Forward and backward of a benchmark's candidate."""
    outputs = {id(feed): candidate.forward(*feed.arguments) for feed in feeds}

    def backward(feed: Feed) -> tuple[Tensor, ...]:
        output = outputs[id(feed)]
        return torch.autograd.grad(
            output, (*feed.leaves, *(candidate.parameters or ())), feed.grad_for(output), retain_graph=True
        )

    return [
        Pass(f"{label}, forward", forward_bytes, in_turns(lambda feed: candidate.forward(*feed.arguments), feeds)),
        Pass(f"{label}, backward", backward_bytes, in_turns(backward, feeds)),
    ]


def stoch_norm_passes(device: str, dtype: str, batch: int) -> Iterator[list[Pass]]:
    """Passes of stoch_norm. Half of the channels take the batch statistics."""
    on_chip = on_chip_bytes(torch.device(device))
    for layout, (channels, size), block in itertools.product(command.LAYOUTS, MAPS, norm.BLOCKS):
        setting = norm.Setting(channels, size, 1, layout, dtype, batch, device, block)
        feeds = setting.feeds()
        ours = norm.candidates(setting, feeds[0])[0]
        samples = {norm.OURS: {"batch_share": [norm.P]}}
        case = {"shape": setting.shape, "dtype": dtype, "parts": setting.parts, "samples": samples}
        forward, backward = (norm.floor_bytes(case, part, on_chip)[0] for part in ("forward", "backward"))
        yield both_passes(f"stoch_norm {setting.label} {layout} {dtype}", ours, feeds, forward, backward)


def squared_distance_passes(device: str, dtype: str, batch: int) -> Iterator[list[Pass]]:
    for label in (distance.DELTA, distance.ATTENTION, distance.L2_SP, distance.L2):
        setting = distance.Setting(label, "contiguous", dtype, batch, device)
        feeds = setting.feeds()
        case = {"label": label, "target_bytes": feeds[0].nbytes}
        forward, backward = (distance.floor_bytes(case, part) for part in ("forward", "backward"))
        ours = distance.candidates(setting, feeds[0])[0]
        yield both_passes(f"squared_distance {label} {dtype}", ours, feeds, forward, backward)


def spectral_tail_passes(device: str, dtype: str) -> Iterator[list[Pass]]:
    for b, f in MATRICES:
        setting = tail.Setting(b, f, 1, dtype, device)
        feeds = [setting.feed()]
        nbytes = feeds[0].nbytes
        feeds += [setting.feed() for _ in range(1, sets_beyond_cache(torch.device(device), nbytes))]
        ours = tail.candidates(1)[0]
        yield both_passes(f"spectral_tail {setting.label} {dtype}", ours, feeds, nbytes, 2 * nbytes)


def passes(device: str, dtypes: Iterable[str], batch: int) -> Iterator[list[Pass]]:
    """Groups of passes that share their memory; the first has a copy, with which bandwidths are compared."""
    source = torch.zeros(COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    yield [Pass("copy_", 2 * COPIED_BYTES, lambda: target.copy_(source))]
    for dtype in dtypes:
        yield from stoch_norm_passes(device, dtype, batch)
        yield from squared_distance_passes(device, dtype, batch)
        yield from spectral_tail_passes(device, dtype)


def short(name: str) -> str:
    """A kernel's name without namespaces, return type and arguments, but with its own template arguments."""
    name = re.sub(r"\([^()]*(?:\([^()]*\)[^()]*)*\)(?: const)?$", "", name.replace("(anonymous namespace)::", ""))
    head, bracket, arguments = name.partition("<")
    return head.rpartition(" ")[2].rpartition("::")[2] + bracket + arguments


def read(trace: dict[str, Any], repetitions: int) -> list[Kernel]:
    """The kernels, copies and fills of a trace, the longest first."""
    grouped: dict[tuple[Any, ...], list[float]] = {}
    for event in trace["traceEvents"]:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            told = event["args"]
            launch = (
                *(tuple(told.get("grid", ())), tuple(told.get("block", ()))),
                *(told.get("registers per thread", 0), told.get("shared memory", 0)),
                told.get("est. achieved occupancy %", 0),
            )
            name = short(event["name"]) if event["cat"] == "kernel" else event["name"]
            grouped.setdefault((name, *launch), []).append(event["dur"])
    kernels = [
        Kernel(name, len(times) / repetitions, sum(times) / len(times), *launch)
        for (name, *launch), times in grouped.items()
    ]
    return sorted(kernels, key=lambda kernel: -kernel.launches * kernel.microseconds)


def profiled(work: Callable[[], object]) -> list[Kernel]:
    """The kernels, copies and fills that ``work`` runs on the GPU."""
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(REPETITIONS):
            work()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        kernels = read(json.loads(file.read_text()), REPETITIONS)
    if not kernels:
        raise SystemExit("kernels.py: the profiler saw nothing of the GPU: is CUPTI there, and may it be used?")
    return kernels


def measured() -> Iterator[Case]:
    """The profile of every pass."""
    for group in passes("cuda", command.DEFAULT_DTYPES["cuda"], distance.BATCHES["cuda"]):
        for one in group:
            progress(one.label)
            kernels = profiled(one.work)
            microseconds = sum(kernel.launches * kernel.microseconds for kernel in kernels)
            yield {
                **{"label": one.label, "floor_bytes": one.floor_bytes, "microseconds": microseconds},
                "kernels": [asdict(kernel) for kernel in kernels],
            }


def table(cases: Sequence[dict[str, Any]]) -> list[list[str]]:
    """A row per pass and one for each kernel in it."""
    header = ["pass, kernel", "µs", "GB/s over the floor", "% of copy_", "launches", "grid", "block", "registers"]
    lines = [[*header, "shared KB", "occupancy, %"]]
    copying = cases[0]["floor_bytes"] / cases[0]["microseconds"]
    for case in cases:
        speed = case["floor_bytes"] / case["microseconds"]
        figures = [f"{case['microseconds']:.1f}", f"{speed / 1e3:.0f}", f"{100 * speed / copying:.0f}"]
        lines.append([case["label"], *figures, *[""] * 6])
        for kernel in case["kernels"]:
            lines.append(
                [
                    *(f"– {kernel['name']}", f"{kernel['microseconds']:.1f}", "", "", f"{kernel['launches']:g}"),
                    *("×".join(map(str, kernel[name])) for name in ("grid", "block")),
                    *(str(kernel["registers"]), f"{kernel['shared_bytes'] / 1024:.1f}", f"{kernel['occupancy']:g}"),
                ]
            )
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, default=command.RESULTS / "cuda" / OPERATION, help="folder")
    options = made.parse_args(arguments)
    if not torch.cuda.is_available():
        made.error("there is no GPU that this torch can use")
    where = report.environment(torch.device("cuda"))
    results = report.collect({"operation": OPERATION, "environment": where, "cases": measured()}, options.out)
    report.write_json({**results, "goals": []}, options.out)
    lines = table(results["cases"])
    print(report.align(lines), report.origin(where), sep="\n\n")
    (options.out / "table.md").write_text(f"{report.markdown(lines)}\n\n{report.origin(where)}\n")


if __name__ == "__main__":
    main()
