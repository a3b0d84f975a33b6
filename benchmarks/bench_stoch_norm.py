"""Times stochastic normalisation at ResNet-50's shapes against what it replaces, and against the memory floor.

One command measures all candidates interleaved and writes ``results.json`` (raw samples), ``table.md``, ``plot.png``::

    python benchmarks/bench_stoch_norm.py [--device cuda] [--quick] [--out DIR]

``--from-json DIR`` writes the table and the plot anew from ``DIR/results.json``. For a look at single cases there is
``python -m pytest benchmarks/bench_stoch_norm.py -k 'ours and 512x7'`` with pytest-benchmark's own options, and
``--batch``; it times one candidate after the other, so it compares less well.

Speed-ups are medians of the single rounds' ratios, with quartiles. Floor bytes, with N those of the map: forward 2N
for a channel with running statistics, 3N for one with the batch's, or 2N where the channel fits on chip; backward 3N
and 5N, or 3N where input and gradient fit.
"""

import argparse
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import baselines
import command
import harness
import numpy as np
import pytest
import report
import torch
from command import DEFAULT_DTYPES, DTYPES, LAYOUTS
from harness import Candidate, Feed
from report import Case, Goal, Spread, seconds, speedup
from torch import Tensor, nn

OPERATION = "stoch_norm"

# ResNet-50 at 224×224: channels, height and width, number of layers
LAYERS = (
    (64, 112, 1), (64, 56, 6), (256, 56, 4), (128, 56, 1), (128, 28, 7), (512, 28, 5), (256, 28, 1), (256, 14, 11),
    (1024, 14, 7), (512, 14, 1), (512, 7, 5), (2048, 7, 4),
)  # fmt: skip
P = 0.5

OURS, BATCH_NORM, COMPOSITION, IN_PYTORCH = (
    "talib_fast",
    "nn.BatchNorm2d",
    "upstream composition",
    "talib_fast in PyTorch",
)
CLONE, COPY = "clone", "copy_"


@dataclass(frozen=True)
class Setting:
    """One shape in one layout and dtype."""

    channels: int
    size: int
    count: int
    layout: str
    dtype: str
    batch: int
    device: str

    @property
    def label(self) -> str:
        return f"{self.channels}@{self.size}"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.batch, self.channels, self.size, self.size

    def feeds(self, sets: int | None = None) -> list[Feed]:
        return harness.feeds(
            torch.device(self.device), self.shape, DTYPES[self.dtype], self.layout == "channels_last", sets
        )


def candidates(channels: int, feed: Feed) -> list[Candidate]:
    """Everything that is timed, ours first; ``feed`` is one of the inputs that will come."""
    device = feed.grad.device

    def module(name: str, layer: nn.Module, observe: Callable[[], dict[str, float]] | None = None) -> Candidate:
        layer.to(device).train()
        return Candidate(name, layer, tuple(layer.parameters()), observe)

    ours = baselines.RecordingStochNorm2d(channels, p=P)
    target = torch.empty_like(feed.grad)

    @torch.no_grad()
    def copy(input: Tensor) -> Tensor:
        return target.copy_(input)

    return [
        module(OURS, ours, lambda: {"batch_share": ours.batch_share()}),
        module(BATCH_NORM, nn.BatchNorm2d(channels)),
        module(COMPOSITION, baselines.UpstreamComposition(channels, p=P)),
        module(IN_PYTORCH, baselines.PyTorchStochNorm2d(channels, p=P)),
        Candidate(CLONE, torch.no_grad()(torch.clone)),
        Candidate(COPY, copy),
    ]


def _seed() -> None:
    torch.manual_seed(0)
    np.random.seed(0)


def peak_bytes(setting: Setting) -> dict[str, int]:
    """By how much a forward and backward pass of each candidate raises memory at its peak."""
    _seed()
    (feed,) = setting.feeds(1)
    device = feed.grad.device
    own = [candidate for candidate in candidates(setting.channels, feed) if candidate.parameters is not None]
    return {candidate.name: harness.peak_rise(device, candidate, feed) for candidate in own}


def timed(setting: Setting, rounds: int) -> Case:
    """The raw samples of one setting."""
    _seed()
    inputs = setting.feeds()
    samples, repetitions = harness.interleaved(
        torch.device(setting.device), candidates(setting.channels, inputs[0]), inputs, rounds
    )
    return {
        "label": setting.label,
        "shape": list(setting.shape),
        "count": setting.count,
        "layout": setting.layout,
        "dtype": setting.dtype,
        "passes_per_sample": repetitions,
        "samples": samples,
    }


def measure(settings: Sequence[Setting], rounds: int) -> list[Case]:
    """Samples and peak memory of all settings."""
    # large enough for every thread
    warm_up = replace(settings[0], batch=8, channels=64, size=28)
    return harness.measure(settings, lambda setting: timed(setting, rounds), peak_bytes, warm_up)


def map_bytes(case: Case) -> int:
    return math.prod(case["shape"]) * DTYPES[case["dtype"]].itemsize


def channel_bytes(case: Case) -> int:
    return map_bytes(case) // case["shape"][1]


def floor_bytes(case: Case, measure: str, on_chip: int | None) -> list[float]:
    """The bytes that cannot be avoided, round by round, with the masks that were drawn."""
    if measure == "both":
        parts = (floor_bytes(case, part, on_chip) for part in ("forward", "backward"))
        return [sum(pair) for pair in zip(*parts, strict=True)]
    with_running, with_batch, resident = {"forward": (2, 3, 1), "backward": (3, 5, 2)}[measure]
    if on_chip is not None and resident * channel_bytes(case) <= on_chip:
        with_batch = with_running
    shares = case["samples"][OURS]["batch_share"]
    return [map_bytes(case) * (share * with_batch + (1 - share) * with_running) for share in shares]


def bandwidth_share(cases: Sequence[Case], measure: str, copy: str, on_chip: int | None) -> Spread:
    """Our floor bytes per second over a copy's bytes per second, over all layers that ``cases`` stand for."""

    def total(rows: list[list[float]]) -> list[float]:
        return [
            sum(case["count"] * figure for case, figure in zip(cases, column, strict=True))
            for column in zip(*rows, strict=True)
        ]

    ours = total([seconds(case, OURS, measure) for case in cases])
    floors = total([floor_bytes(case, measure, on_chip) for case in cases])
    copied = total([[2.0 * map_bytes(case)] * len(ours) for case in cases])
    copying = total([seconds(case, copy, "forward") for case in cases])
    return Spread.of([floors[i] / ours[i] / (copied[i] / copying[i]) for i in range(len(ours))])


def limit(case: Case, on_chip: int | None) -> Spread:
    """Our speed over BatchNorm's, were the floor's bytes moved as fast as a plain copy moves its own."""
    floors, copied = floor_bytes(case, "both", on_chip), 2.0 * map_bytes(case)
    rounds = zip(seconds(case, BATCH_NORM, "both"), seconds(case, COPY, "forward"), floors, strict=True)
    return Spread.of([base / (copying * floor / copied) for base, copying, floor in rounds])


def network(cases: Sequence[Case]) -> Case:
    """All layers together: round by round the sum over ``cases``, each as often as the network has it."""
    samples: dict[str, dict[str, list[float]]] = {}
    for candidate, measures in cases[0]["samples"].items():
        samples[candidate] = {}
        for name in measures.keys() - {"batch_share"}:
            rounds = zip(*(case["samples"][candidate][name] for case in cases), strict=True)
            samples[candidate][name] = [
                sum(case["count"] * figure for case, figure in zip(cases, figures, strict=True)) for figures in rounds
            ]
    count = sum(case["count"] for case in cases)
    return {**{key: cases[0][key] for key in ("layout", "dtype")}, "label": f"all {count} layers", "samples": samples}


def groups(cases: Sequence[Case]) -> Iterator[list[Case]]:
    """The cases of one layout and dtype each."""
    grouped: dict[tuple[str, str], list[Case]] = {}
    for case in cases:
        grouped.setdefault((case["layout"], case["dtype"]), []).append(case)
    yield from grouped.values()


def place(case: Case) -> str:
    return f"{case['label']} {case['layout']} {case['dtype']}"


# a difference of this many bytes is page accounting and masks, not a map
MEMORY_SLACK = 2**20


def goals(results: dict[str, Any]) -> list[Goal]:
    """What the kernels are to reach, with the figures that decide it."""
    cases, on_chip = results["cases"], results["settings"]["on_chip_bytes"]
    both = "forward + backward"

    def faster(factor: float, baseline: str, chosen: Sequence[Case], where: str) -> Goal:
        figures = {place(case): speedup(case, baseline, OURS, "both").median for case in chosen}
        return Goal(f"{both} at least {factor:g}× {baseline} at every shape{where}", factor, figures)

    def memory(case: Case) -> float:
        ours, reference = (case["peak_bytes"][name] for name in (OURS, BATCH_NORM))
        return 1.0 if abs(ours - reference) <= MEMORY_SLACK else ours / max(reference, 1)

    peak = Goal(
        f"peak memory at most {BATCH_NORM}'s", 1.01, {place(case): memory(case) for case in cases}, at_most=True
    )
    if results["settings"]["device"] == "cpu":
        return [faster(6, COMPOSITION, cases, ""), faster(2, BATCH_NORM, cases, ""), peak]
    resident = [case for case in cases if on_chip is not None and channel_bytes(case) <= on_chip]
    large = [case for case in cases if map_bytes(case) >= 64e6]
    bandwidth = {place(case): bandwidth_share([case], "both", COPY, on_chip).median for case in large}
    return [
        faster(1.15, BATCH_NORM, cases, ""),
        faster(4, COMPOSITION, cases, ""),
        faster(1.3, BATCH_NORM, resident, " where a channel fits a block's shared memory"),
        Goal(f"{both} at least 85 % of a copy's bandwidth over the floor's bytes at maps of 64 MB", 0.85, bandwidth),
        peak,
    ]


def table(results: dict[str, Any]) -> list[list[str]]:
    """A row per shape and one for the network, in each layout and dtype."""
    on_chip, gpu = results["settings"]["on_chip_bytes"], results["settings"]["device"] == "cuda"
    header = [
        "C@H×layers", "layout", "dtype", "forward / BatchNorm", "backward / BatchNorm", "both / BatchNorm",
        "limit / BatchNorm", "both / upstream", "both / in PyTorch", "% of clone", "% of copy_", "memory / BatchNorm",
    ]  # fmt: skip
    if gpu:
        header += ["host-bound / BatchNorm", "forward, µs", "backward, µs"]
    lines = [header]
    for group in groups(results["cases"]):
        for case in (*group, network(group)):
            members = group if "count" not in case else [case]
            peaks = case.get("peak_bytes")
            line = [
                f"{case['label']}×{case['count']}" if "count" in case else case["label"],
                case["layout"],
                case["dtype"],
                *(str(speedup(case, BATCH_NORM, OURS, part)) for part in ("forward", "backward", "both")),
                str(limit(case, on_chip)) if "count" in case else "-",
                *(str(speedup(case, name, OURS, "both")) for name in (COMPOSITION, IN_PYTORCH)),
                *(f"{100 * bandwidth_share(members, 'both', name, on_chip).median:.0f}" for name in (CLONE, COPY)),
                f"{peaks[OURS] / max(peaks[BATCH_NORM], 1):.2f}" if peaks else "-",
            ]
            if gpu:
                line.append(str(speedup(case, BATCH_NORM, OURS, "wall")))
                line += [f"{1e6 * Spread.of(seconds(case, OURS, part)).median:.1f}" for part in ("forward", "backward")]
            lines.append(line)
    return lines


CAPTION = (
    "Columns with / : how many times as long as talib_fast the other takes, median (quartiles) of the rounds' ratios; "
    "limit: what both / BatchNorm would be if the floor's bytes moved at copy_'s speed; "
    "memory / : our peak over BatchNorm's. % of : bytes of the floor per second over the plain copy's, "
    "forward and backward together; clone allocates its output, copy_ does not."
)
GPU_CAPTION = " Times are the GPU's; host-bound is the clock's on the host, with Python's launches."


def publish(results: dict[str, Any], folder: Path) -> None:
    """Print what came out, and write table and plot."""
    lines = table(results)
    caption = CAPTION + (GPU_CAPTION if results["settings"]["device"] == "cuda" else "")
    plotted = [case for group in groups(results["cases"]) for case in (*group, network(group))]
    plot = functools.partial(report.draw_speedups, {**results, "cases": plotted}, BATCH_NORM)
    report.publish(results, folder, lines, caption, goals(results), plot)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command.parser(__doc__)
    labels = [f"{channels}@{size}" for channels, size, _ in LAYERS]
    parser.add_argument("--shapes", nargs="+", choices=labels, default=labels, metavar="C@H", help="all twelve")
    return command.parse(
        parser, arguments, OPERATION, {"cpu": 48, "cuda": 48}, fewest=2,
        full=lambda options: len(options.shapes) == len(labels),
    )  # fmt: skip


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure everything that the options ask for."""
    settings = [
        Setting(channels, size, count, layout, dtype, options.batch, options.device)
        for dtype in options.dtype
        for layout in options.layouts
        for channels, size, count in LAYERS
        if f"{channels}@{size}" in options.shapes
    ]
    device = torch.device(options.device)
    return {
        "operation": OPERATION,
        "environment": report.environment(device, OPERATION),
        "settings": {
            "device": options.device,
            "batch": options.batch,
            "rounds": options.rounds,
            "p": P,
            "on_chip_bytes": harness.on_chip_bytes(device),
            "units": "seconds per pass; batch_share is the share of channels with the batch's statistics",
        },
        "cases": measure(settings, options.rounds),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    report.run(parse(arguments), run, goals, publish)


@pytest.mark.parametrize(
    "name",
    [OURS, BATCH_NORM, COMPOSITION, IN_PYTORCH, CLONE, COPY],
    ids=["ours", "batch_norm", "upstream", "in_pytorch", "clone", "copy"],
)
@pytest.mark.parametrize("part", ["forward", "backward", "both"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("channels", "size", "count"), LAYERS, ids=[f"{c}x{size}" for c, size, _ in LAYERS])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_speed(benchmark, pytestconfig, device, dtype, channels, size, count, layout, part, name):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if dtype not in DEFAULT_DTYPES[device]:
        pytest.skip(f"{dtype} is measured on GPUs")
    _seed()
    setting = Setting(channels, size, count, layout, dtype, pytestconfig.getoption("batch"), device)
    (feed,) = setting.feeds(1)
    candidate = next(candidate for candidate in candidates(channels, feed) if candidate.name == name)
    if part != "forward" and candidate.parameters is None:
        pytest.skip("a copy has no backward pass")
    stopwatch = harness.Stopwatch(feed.grad.device)

    def prepared() -> tuple[tuple[Tensor | None], dict[str, Any]]:
        output = candidate.forward(*feed.arguments) if part == "backward" else None
        stopwatch.synchronize()
        return (output,), {}

    def run(output: Tensor | None) -> None:
        output = candidate.forward(*feed.arguments) if output is None else output
        if part != "forward":
            candidate.backward(output, feed)
        stopwatch.synchronize()

    benchmark.group = f"{setting.label} {layout} {dtype} {device} {part}"
    benchmark.pedantic(run, setup=prepared, rounds=5, warmup_rounds=1)


if __name__ == "__main__":
    main()
