"""Time stochastic normalisation at ResNet-50's shapes, compared with what it replaces and with the memory floor.

The norm is timed alone and in the network's blocks, with a relu, or with a residual's addition and a relu. Ours fuses
these; the others run them behind the norm, in place. In a full run on a CPU, the blocks are also timed with plain
BatchNorm compiled by inductor.

One command measures all candidates interleaved and writes ``results.json`` (raw samples), ``table.md``, ``plot.png``::

    python benchmarks/bench_stoch_norm.py [--device cuda] [--quick] [--out DIR]

``--from-json DIR`` writes the table and the plot again from ``DIR/results.json``.

Speed-ups are medians of the single rounds' ratios, with quartiles. The memory floor, with N the bytes of the map:

- forward: 2N for a channel with running statistics; 3N for a channel with batch statistics, or 2N if it fits on chip;
- backward: 3N for a channel with running statistics; 5N with batch statistics, or 3N if input and gradient fit on chip;
- a relu adds nothing; a residual adds N and one bit per element forward, and the same backward.
"""

import argparse
import functools
import math
from argparse import BooleanOptionalAction
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import filterfalse
from pathlib import Path
from typing import Any

import baselines
import command
import harness
import numpy as np
import report
import torch
import torch.nn.functional as F
from command import BOTH_DTYPES, DTYPES
from harness import Candidate, Feed
from report import Case, Goal, Spread, seconds, speedup
from torch import Tensor, nn

from talib_fast.finetune.stochnorm import StochNorm2d
from talib_fast.ops.activation import Activation

OPERATION = "stoch_norm"

BLOCKS = NORM, RELU, ADD_RELU = "norm", "norm + relu", "norm + add + relu"

# ResNet-50 at 224×224: channels, height and width, number of layers, and in which blocks
LAYERS = (
    (64, 112, {RELU: 1}), (64, 56, {RELU: 6}), (256, 56, {NORM: 1, ADD_RELU: 3}),
    (128, 56, {RELU: 1}), (128, 28, {RELU: 7}), (512, 28, {NORM: 1, ADD_RELU: 4}),
    (256, 28, {RELU: 1}), (256, 14, {RELU: 11}), (1024, 14, {NORM: 1, ADD_RELU: 6}),
    (512, 14, {RELU: 1}), (512, 7, {RELU: 5}), (2048, 7, {NORM: 1, ADD_RELU: 3}),
)  # fmt: skip
LABELS = tuple(f"{channels}@{size}" for channels, size, _ in LAYERS)
P = 0.5

OURS, BATCH_NORM, COMPOSITION, IN_PYTORCH = (
    "talib_fast",
    "nn.BatchNorm2d",
    "upstream composition",
    "talib_fast in PyTorch",
)
UNFUSED, COMPILED = "talib_fast unfused", "nn.BatchNorm2d compiled"
CLONE, COPY = "clone", "copy_"


@dataclass(frozen=True)
class Setting:
    """One shape in one layout and dtype, in a block."""

    channels: int
    size: int
    count: int
    layout: str
    dtype: str
    batch: int
    device: str
    block: str = NORM

    @property
    def label(self) -> str:
        return f"{self.channels}@{self.size}{self.block.removeprefix(NORM)}"

    @property
    def parts(self) -> list[str]:
        return self.block.split(" + ")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.batch, self.channels, self.size, self.size

    def feeds(self, sets: int | None = None) -> list[Feed]:
        return harness.feeds(
            torch.device(self.device),
            self.shape,
            DTYPES[self.dtype],
            self.layout == "channels_last",
            sets,
            leaves=2 if self.block == ADD_RELU else 1,
        )


def followed(norm: Callable[[Tensor], Tensor], block: str) -> Callable[..., Tensor]:
    """The norm, then the other operators of the block, in place."""

    def run(input: Tensor, *residual: Tensor) -> Tensor:
        output = norm(input)
        for added in residual:
            output += added
        return output if block == NORM else F.relu_(output)

    return run


def candidates(setting: Setting, feed: Feed, compiled: bool = False) -> list[Candidate]:
    """Everything that is timed, talib_fast first; ``feed`` is one of the inputs."""
    channels, block, device = setting.channels, setting.block, feed.grad.device

    def candidate(
        name: str,
        layer: nn.Module,
        forward: Callable[..., Tensor],
        observe: Callable[[], dict[str, float]] | None = None,
    ) -> Candidate:
        layer.to(device).train()
        return Candidate(name, forward, tuple(layer.parameters()), observe)

    def composed(name: str, layer: nn.Module) -> Candidate:
        return candidate(name, layer, followed(layer, block))

    ours = baselines.RecordingStochNorm2d(channels, p=P)
    target = torch.empty_like(feed.grad)

    @torch.no_grad()
    def clone(input: Tensor, *_: Tensor) -> Tensor:
        return torch.clone(input)

    @torch.no_grad()
    def copy(input: Tensor, *_: Tensor) -> Tensor:
        return target.copy_(input)

    def fused(input: Tensor, residual: Tensor | None = None) -> Tensor:
        if block == NORM:
            return ours(input)
        return ours.followed_by(input, Activation("relu"), None if residual is None else lambda: residual)

    made = [
        candidate(OURS, ours, fused, lambda: {"batch_share": ours.batch_share()}),
        composed(BATCH_NORM, nn.BatchNorm2d(channels)),
        composed(COMPOSITION, baselines.UpstreamComposition(channels, p=P)),
    ]
    if block == NORM:
        made.append(composed(IN_PYTORCH, baselines.PyTorchStochNorm2d(channels, p=P)))
    else:
        made.append(composed(UNFUSED, StochNorm2d(channels, p=P)))
        if compiled:
            torch.compiler.reset()  # or it would make one code for all shapes
            layer = nn.BatchNorm2d(channels)
            made.append(candidate(COMPILED, layer, torch.compile(followed(layer, block), dynamic=False)))
    return [*made, Candidate(CLONE, clone), Candidate(COPY, copy)]


def _seed() -> None:
    torch.manual_seed(0)
    np.random.seed(0)


def peak_bytes(setting: Setting) -> dict[str, int]:
    """The bytes by which each candidate's forward and backward pass raise memory at their peak."""
    _seed()
    (feed,) = setting.feeds(1)
    device = feed.grad.device
    own = [candidate for candidate in candidates(setting, feed) if candidate.parameters is not None]
    return {candidate.name: harness.peak_rise(device, candidate, feed) for candidate in own}


def timed(setting: Setting, rounds: int, compiled: bool) -> Case:
    """The raw samples of one setting."""
    _seed()
    inputs = setting.feeds()
    compiled = compiled and (setting.layout, setting.dtype) == ("channels_last", "float32")  # the others take as long
    samples, repetitions = harness.interleaved(
        torch.device(setting.device), candidates(setting, inputs[0], compiled), inputs, rounds
    )
    return {
        "label": setting.label,
        "parts": setting.parts,
        "shape": list(setting.shape),
        "count": setting.count,
        "layout": setting.layout,
        "dtype": setting.dtype,
        "passes_per_sample": repetitions,
        "samples": samples,
    }


def measure(settings: Sequence[Setting], rounds: int, compiled: bool) -> Iterator[Case]:
    """Samples and peak memory of all settings."""
    # large enough for every thread
    warm_up = replace(settings[0], batch=8, channels=64, size=28)
    return harness.measure(settings, lambda setting: timed(setting, rounds, compiled), peak_bytes, warm_up)


def map_bytes(case: Case) -> int:
    return math.prod(case["shape"]) * DTYPES[case["dtype"]].itemsize


def channel_bytes(case: Case) -> int:
    return map_bytes(case) // case["shape"][1]


def sign_bytes(case: Case) -> int:
    """A bit for each element if a residual is added: the backward pass reads from it where the relu was positive."""
    return math.prod(case["shape"]) // 8 if "add" in case["parts"] else 0


def floor_bytes(case: Case, measure: str, on_chip: int | None) -> list[float]:
    """The bytes that cannot be avoided, round by round, with the masks that were drawn."""
    if measure == "both":
        parts = (floor_bytes(case, part, on_chip) for part in ("forward", "backward"))
        return [sum(pair) for pair in zip(*parts, strict=True)]
    with_running, with_batch, resident = {"forward": (2, 3, 1), "backward": (3, 5, 2)}[measure]
    if on_chip is not None and resident * channel_bytes(case) <= on_chip:
        with_batch = with_running
    residual = map_bytes(case) + sign_bytes(case) if "add" in case["parts"] else 0
    shares = case["samples"][OURS]["batch_share"]
    return [map_bytes(case) * (share * with_batch + (1 - share) * with_running) + residual for share in shares]


def bandwidth_share(cases: Sequence[Case], measure: str, copy: str, on_chip: int | None) -> Spread:
    """The floor's bytes per second of talib_fast over a copy's, for all layers that ``cases`` represent."""

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


def limit(cases: Sequence[Case], baseline: str, on_chip: int | None) -> Spread:
    """The speed over a baseline of a kernel that moves the floor's bytes as fast as a plain copy moves its own.

    It is the speed of all layers that ``cases`` represent, together.
    """
    slow, fast = [0.0] * len(seconds(cases[0], baseline, "both")), [0.0] * len(seconds(cases[0], COPY, "forward"))
    for case in cases:
        rounds = zip(
            seconds(case, baseline, "both"), seconds(case, COPY, "forward"), floor_bytes(case, "both", on_chip),
            strict=True,
        )  # fmt: skip
        for number, (base, copying, floor) in enumerate(rounds):
            slow[number] += case["count"] * base
            fast[number] += case["count"] * copying * floor / (2.0 * map_bytes(case))
    return Spread.of([base / copying for base, copying in zip(slow, fast, strict=True)])


def network(cases: Sequence[Case], label: str) -> Case:
    """All layers together: round by round the sum over ``cases``, each as often as the network has it."""
    samples: dict[str, dict[str, list[float]]] = {}
    for candidate, measures in cases[0]["samples"].items():
        if not all(candidate in case["samples"] for case in cases):
            continue
        samples[candidate] = {}
        for name in measures.keys() - {"batch_share"}:
            rounds = zip(*(case["samples"][candidate][name] for case in cases), strict=True)
            samples[candidate][name] = [
                sum(case["count"] * figure for case, figure in zip(cases, figures, strict=True)) for figures in rounds
            ]
    count = sum(case["count"] for case in cases)
    total = {key: cases[0][key] for key in ("layout", "dtype")}
    return {**total, "label": f"all {count} {label}", "members": list(cases), "samples": samples}


def members(case: Case) -> list[Case]:
    """The cases that a case of ``network`` sums up; any other case has itself alone."""
    return case.get("members", [case])


def is_alone(case: Case) -> bool:
    return case["parts"] == [NORM]


def in_blocks(cases: Sequence[Case]) -> list[Case]:
    """The cases of the network's blocks: a norm alone only where nothing follows it in the network."""
    alone = {f"{channels}@{size}": blocks[NORM] for channels, size, blocks in LAYERS if NORM in blocks}
    found = []
    for case in cases:
        if not is_alone(case):
            found.append(case)
        elif case["label"] in alone:
            samples = case["samples"] | {UNFUSED: case["samples"][OURS]}
            found.append({**case, "count": alone[case["label"]], "samples": samples})
    return sorted(found, key=is_alone)


def groups(cases: Sequence[Case]) -> Iterator[list[Case]]:
    """The cases of one layout and dtype each."""
    grouped: dict[tuple[str, str], list[Case]] = {}
    for case in cases:
        grouped.setdefault((case["layout"], case["dtype"]), []).append(case)
    yield from grouped.values()


def all_layers(group: Sequence[Case]) -> Case:
    """The norms of the network without what follows them."""
    return network(list(filter(is_alone, group)), "layers")


def all_blocks(group: Sequence[Case]) -> Case:
    """The norms of the network with what follows them there."""
    return network(in_blocks(group), "blocks")


def place(case: Case) -> str:
    return f"{case['label']} {case['layout']} {case['dtype']}"


# a difference of this many bytes is page accounting and masks, not a map
MEMORY_SLACK = 2**20


# forward + backward of the network's blocks over BatchNorm's on a CPU
BLOCKS_GOALS = {("contiguous", "float32"): 2.0, ("channels_last", "float32"): 1.7, ("channels_last", "bfloat16"): 2.0}


def goals(results: dict[str, Any]) -> list[Goal]:
    """The goals, with the figures that decide them."""
    cases, on_chip = results["cases"], results["settings"]["on_chip_bytes"]
    alone = list(filter(is_alone, cases))
    both = "forward + backward"

    def faster(factor: float, baseline: str, chosen: Sequence[Case], where: str) -> Goal:
        figures = {place(case): speedup(case, baseline, OURS, "both").median for case in chosen}
        limits = {place(case): limit(members(case), baseline, on_chip).median for case in chosen}
        return Goal(f"{both} at least {factor:g}× {baseline} {where}", factor, figures, limits=limits)

    def memory(case: Case) -> float:
        ours, reference = (case["peak_bytes"][name] for name in (OURS, BATCH_NORM))
        ours -= sign_bytes(case)
        return 1.0 if abs(ours - reference) <= MEMORY_SLACK else ours / max(reference, 1)

    text = f"peak memory at most {BATCH_NORM}'s, and a bit an element where a residual is added"
    peak = Goal(text, 1.01, {place(case): memory(case) for case in cases}, at_most=True)
    if results["settings"]["device"] == "cpu":
        totals = {(total["layout"], total["dtype"]): total for total in map(all_blocks, groups(cases))}
        in_network = [
            faster(factor, BATCH_NORM, [totals[kind]], f"in the network's blocks, {', '.join(kind)}")
            for kind, factor in BLOCKS_GOALS.items()
            if kind in totals
        ]
        every = "at every shape"
        return [faster(6, COMPOSITION, alone, every), faster(2, BATCH_NORM, alone, every), *in_network, peak]
    resident = [case for case in alone if on_chip is not None and channel_bytes(case) <= on_chip]
    large = [case for case in alone if map_bytes(case) >= 64e6]
    bandwidth = {place(case): bandwidth_share([case], "both", COPY, on_chip).median for case in large}
    return [
        faster(1.15, BATCH_NORM, alone, "at every shape"),
        faster(4, COMPOSITION, alone, "at every shape"),
        faster(1.3, BATCH_NORM, resident, "at every shape where a channel fits a block's shared memory"),
        Goal(f"{both} at least 85 % of a copy's bandwidth over the floor's bytes at maps of 64 MB", 0.85, bandwidth),
        peak,
    ]


def table(results: dict[str, Any]) -> list[list[str]]:
    """A row per shape and block, and two for the network, in each layout and dtype."""
    on_chip, gpu = results["settings"]["on_chip_bytes"], results["settings"]["device"] == "cuda"
    others = {COMPOSITION: "upstream", IN_PYTORCH: "in PyTorch", UNFUSED: "unfused", COMPILED: "compiled BatchNorm"}
    header = [
        "C@H×layers", "layout", "dtype", "forward / BatchNorm", "backward / BatchNorm", "both / BatchNorm",
        "limit / BatchNorm", *(f"both / {name}" for name in others.values()), "% of clone", "% of copy_",
        "memory / BatchNorm",
    ]  # fmt: skip
    if gpu:
        header += ["host-bound / BatchNorm", "forward, µs", "backward, µs"]
    lines = [header]
    for group in groups(results["cases"]):
        alone, behind = (list(part) for part in (filter(is_alone, group), filterfalse(is_alone, group)))
        for case in (*alone, all_layers(group), *behind, all_blocks(group)):
            peaks = case.get("peak_bytes")
            line = [
                case["label"] if "members" in case else f"{case['label']}×{case['count']}",
                case["layout"],
                case["dtype"],
                *(str(speedup(case, BATCH_NORM, OURS, part)) for part in ("forward", "backward", "both")),
                str(limit(members(case), BATCH_NORM, on_chip)),
                *(str(speedup(case, name, OURS, "both")) if name in case["samples"] else "-" for name in others),
                *(
                    f"{100 * bandwidth_share(members(case), 'both', name, on_chip).median:.0f}"
                    for name in (CLONE, COPY)
                ),
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
    "forward and backward together; clone allocates its output, copy_ does not. Where + relu or + add + relu follows a "
    "norm, the others have PyTorch's, in place; blocks: the layers with what follows them in the network."
)
GPU_CAPTION = " Times are the GPU's; host-bound is the clock's on the host, with Python's launches."


def publish(results: dict[str, Any], folder: Path) -> None:
    """Print the results, and write the table and the plot."""
    lines = table(results)
    caption = CAPTION + (GPU_CAPTION if results["settings"]["device"] == "cuda" else "")
    plotted = []
    for group in groups(results["cases"]):
        plotted += [*filterfalse(is_alone, group), all_blocks(group), all_layers(group)]
    plot = functools.partial(report.draw_speedups, {**results, "cases": plotted}, BATCH_NORM)
    report.publish(results, folder, lines, caption, goals(results), plot)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command.parser(__doc__)
    parser.add_argument("--shapes", nargs="+", choices=LABELS, default=LABELS, metavar="C@H", help="all twelve")
    parser.add_argument(
        "--compile",
        action=BooleanOptionalAction,
        help="BatchNorm's blocks in channels_last and float32 too; in a full run on a CPU",
    )
    options = command.parse(
        parser, arguments, OPERATION, {"cpu": 48, "cuda": 48}, fewest=2,
        full=lambda options: len(options.shapes) == len(LABELS) and options.compile is None, dtypes=BOTH_DTYPES,
        rounds={"cpu": 7, "cuda": 25},
    )  # fmt: skip
    if options.compile is None:  # on a GPU it takes longer than all else
        options.compile = options.device == "cpu" and not options.quick
    return options


def settings(options: argparse.Namespace) -> list[Setting]:
    """What the options ask for: of each shape the norm alone, as often as the network has it, and its block.

    On a CPU bfloat16 is for channels_last, unless that is not asked for.
    """
    layouts = {dtype: options.layouts for dtype in options.dtype}
    if options.device == "cpu" and "bfloat16" in layouts and "channels_last" in options.layouts:
        layouts["bfloat16"] = ["channels_last"]
    return [
        Setting(channels, size, count, layout, dtype, options.batch, options.device, block)
        for dtype in options.dtype
        for layout in layouts[dtype]
        for label, (channels, size, blocks) in zip(LABELS, LAYERS, strict=True)
        if label in options.shapes
        for block, count in (blocks | {NORM: sum(blocks.values())}).items()
    ]


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure everything that the options ask for."""
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
        "cases": measure(settings(options), options.rounds, options.compile),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    report.run(parse(arguments), run, goals, publish)


if __name__ == "__main__":
    main()
