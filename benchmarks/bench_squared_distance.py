"""Time DELTA, L2 and L2-SP on ResNet-50, compared with the code that they replace and with the memory floor.

One command measures all candidates interleaved and writes ``results.json`` (raw samples), ``table.md``, ``plot.png``::

    python benchmarks/bench_squared_distance.py [--device cuda] [--quick] [--out DIR]

``--from-json DIR`` writes the table and the plot again from ``DIR/results.json``.

Speed-ups are medians of the single rounds' ratios, with quartiles. The memory floor, forward and backward, with N the
bytes of all targets: 2N and 3N with sources, 1.5N and 2.5N with bfloat16 sources for float32 targets, N and 2N without
sources.
"""

import argparse
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import baselines
import command
import harness
import report
import torch
from command import DTYPES
from harness import Candidate, Feed
from report import Case, Goal, Spread, draw_speedups, seconds, speedup
from resnet import ResNet50
from torch import Tensor, nn

from talib_fast.finetune.delta import (
    AttentionBehavioralRegularization,
    BehavioralRegularization,
    L2Regularization,
    SPRegularization,
)

OPERATION = "squared_distance"
MAPS = ((256, 56), (512, 28), (1024, 14), (2048, 7))
BATCHES = {"cpu": 16, "cuda": 48}
PARTS = ("forward", "backward", "both")
OURS, UPSTREAM, IN_PYTORCH = "talib_fast", "upstream composition", "talib_fast in PyTorch"
CLONE, COPY = "clone", "copy_"

DELTA, ATTENTION, L2_SP, L2 = "DELTA", "DELTA with attention", "L2-SP", "L2"
NARROW = "DELTA, bfloat16 sources"  # of a frozen network that computes so, beside float32 targets
ONE_MAP = {f"DELTA, {channels}@{size} alone": (channels, size) for channels, size in MAPS}


def resnet50_parameters() -> list[tuple[int, ...]]:
    """The shapes of a ResNet-50's parameters without its head: 159 tensors, 23,508,032 numbers."""
    with torch.device("meta"):
        parameters = ResNet50().named_parameters()
    return [tuple(parameter.shape) for name, parameter in parameters if not name.startswith("fc.")]


@dataclass(frozen=True)
class Setting:
    """One regulariser in one layout and dtype."""

    label: str
    layout: str
    dtype: str
    batch: int
    device: str

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        if self.label in (L2, L2_SP):
            return resnet50_parameters()
        maps = [ONE_MAP[self.label]] if self.label in ONE_MAP else MAPS
        return [(self.batch, channels, size, size) for channels, size in maps]

    def feeds(self) -> list[Feed]:
        device, dtype = torch.device(self.device), DTYPES[self.dtype]
        source_dtype = torch.bfloat16 if self.label == NARROW else dtype

        def draw(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            drawn = torch.randn(shape, device=device).to(dtype)
            return drawn.contiguous(memory_format=torch.channels_last) if self.layout == "channels_last" else drawn

        def feed() -> Feed:
            targets = tuple(nn.Parameter(draw(shape, dtype)) for shape in self.shapes)
            sources = () if self.label == L2 else tuple(draw(shape, source_dtype) for shape in self.shapes)
            return Feed(targets, torch.ones((), device=device), sources)

        first = feed()
        # a regulariser of parameters belongs to one model, which no cache holds
        sets = 1 if self.label in (L2, L2_SP) else harness.sets_beyond_cache(device, 2 * first.nbytes)
        return [first, *(feed() for _ in range(sets - 1))]


def in_halves(distance: Callable[[list[Tensor], list[Tensor]], Tensor]) -> Callable[..., Tensor]:
    """``distance(sources, targets)`` as a function of a feed's arguments, the targets and then the sources."""

    def of_all(*tensors: Tensor) -> Tensor:
        middle = len(tensors) // 2
        return distance(list(tensors[middle:]), list(tensors[:middle]))

    return of_all


def candidates(setting: Setting, feed: Feed) -> list[Candidate]:
    """Everything that is timed, talib_fast first; ``feed`` is one of the inputs."""
    ours: Callable[..., Tensor]
    if setting.label == L2:
        l2 = L2Regularization(nn.ParameterList(feed.leaves))
        ours, upstream = lambda *_: l2(), lambda *targets: baselines.upstream_l2(targets)
        in_pytorch = lambda *targets: baselines.distance_in_pytorch(targets)  # noqa: E731
    elif setting.label == L2_SP:
        start = nn.ParameterList(nn.Parameter(constant) for constant in feed.constants)
        l2_sp = SPRegularization(start, nn.ParameterList(feed.leaves))
        ours = lambda *_: l2_sp()  # noqa: E731
        upstream = in_halves(lambda sources, targets: baselines.upstream_l2(targets, sources))
        in_pytorch = in_halves(lambda sources, targets: baselines.distance_in_pytorch(targets, sources))
    elif setting.label == ATTENTION:
        channels = [leaf.size(1) for leaf in feed.leaves]
        attention = [torch.randn(count, device=feed.grad.device).softmax(0) for count in channels]
        weights = [
            weight * (leaf.size(1) / leaf[0, 0].numel()) for weight, leaf in zip(attention, feed.leaves, strict=True)
        ]
        ours = in_halves(AttentionBehavioralRegularization(attention))
        upstream = in_halves(functools.partial(baselines.upstream_attention, attention=attention))
        in_pytorch = in_halves(lambda sources, targets: baselines.distance_in_pytorch(targets, sources, weights))
    else:
        ours = in_halves(BehavioralRegularization())
        upstream = in_halves(baselines.upstream_behavioral)
        in_pytorch = in_halves(lambda sources, targets: baselines.distance_in_pytorch(targets, sources))
    places = [torch.empty_like(leaf) for leaf in feed.leaves]

    @torch.no_grad()
    def clone(*tensors: Tensor) -> Tensor:
        clones = [tensor.clone() for tensor in tensors[: len(places)]]
        return clones[0]

    @torch.no_grad()
    def copy(*tensors: Tensor) -> Tensor:
        for place, tensor in zip(places, tensors, strict=False):
            place.copy_(tensor)
        return places[0]

    return [
        Candidate(OURS, ours, ()),
        Candidate(UPSTREAM, upstream, ()),
        Candidate(IN_PYTORCH, in_pytorch, ()),
        Candidate(CLONE, clone),
        Candidate(COPY, copy),
    ]


def peak_bytes(setting: Setting) -> dict[str, int]:
    """The bytes by which each candidate's forward and backward pass raise memory at their peak."""
    torch.manual_seed(0)
    feed = setting.feeds()[0]
    own = [candidate for candidate in candidates(setting, feed) if candidate.parameters is not None]
    return {candidate.name: harness.peak_rise(feed.grad.device, candidate, feed) for candidate in own}


def timed(setting: Setting, rounds: int) -> Case:
    """The raw samples of one setting."""
    torch.manual_seed(0)
    inputs = setting.feeds()
    samples, repetitions = harness.interleaved(
        torch.device(setting.device), candidates(setting, inputs[0]), inputs, rounds
    )
    return {
        "label": setting.label,
        "tensors": len(inputs[0].leaves),
        "target_bytes": inputs[0].nbytes,
        "layout": setting.layout,
        "dtype": setting.dtype,
        "passes_per_sample": repetitions,
        "samples": samples,
    }


def measure(settings: Sequence[Setting], rounds: int) -> Iterator[Case]:
    """Samples and peak memory of all settings."""
    return harness.measure(settings, lambda setting: timed(setting, rounds), peak_bytes, settings[0])


def floor_bytes(case: Case, part: str) -> float:
    """The bytes that cannot be avoided."""
    sources = {L2: 0.0, NARROW: 0.5}.get(case["label"], 1.0)
    forward, backward = 1 + sources, 2 + sources
    return case["target_bytes"] * {"forward": forward, "backward": backward, "both": forward + backward}[part]


def _copying(case: Case, copy: str, part: str) -> list[float]:
    """The seconds in which a copy would move the floor's bytes, round by round."""
    passes = floor_bytes(case, part) / (2 * case["target_bytes"])
    return [passes * copying for copying in seconds(case, copy, "forward")]


def bandwidth_share(case: Case, part: str, copy: str = COPY) -> Spread:
    """The floor's bytes per second of talib_fast over a copy's bytes per second."""
    rounds = zip(_copying(case, copy, part), seconds(case, OURS, part), strict=True)
    return Spread.of([copying / own for copying, own in rounds])


def limit(case: Case, part: str) -> Spread:
    """The speed over upstream of a kernel that moves the floor's bytes as fast as a plain copy moves its own."""
    rounds = zip(seconds(case, UPSTREAM, part), _copying(case, COPY, part), strict=True)
    return Spread.of([base / copying for base, copying in rounds])


def goals(results: dict[str, Any]) -> list[Goal]:
    """The goals, with the figures that decide them."""

    def named(label: str) -> list[Case]:
        return [case for case in results["cases"] if case["label"] == label]

    def place(case: Case) -> str:
        return f"{case['label']} {case['layout']} {case['dtype']}"

    def faster(factor: float, label: str, part: str) -> Goal:
        figures = {place(case): speedup(case, UPSTREAM, OURS, part).median for case in named(label)}
        limits = {place(case): limit(case, part).median for case in named(label)}
        words = part.replace("both", "forward + backward")
        return Goal(f"{label}: {words} at least {factor:g}× upstream", factor, figures, limits=limits)

    if results["settings"]["device"] == "cpu":
        lists = [case for label in (DELTA, ATTENTION, L2_SP, L2) for case in named(label)]
        shares = {place(case): bandwidth_share(case, "both").median for case in lists}
        text = "forward + backward at least 90 % of copy_'s bandwidth over the floor's bytes"
        return [Goal(text, 0.9, shares), faster(2, L2, "both")]
    large = [case for case in results["cases"] if case["target_bytes"] >= 64e6]
    bandwidth = {f"{place(case)} {part}": bandwidth_share(case, part).median for case in large for part in PARTS[:2]}
    return [
        Goal("at least 90 % of a copy's bandwidth over the floor's bytes at 64 MB", 0.9, bandwidth),
        faster(3, DELTA, "both"), faster(3, ATTENTION, "both"), faster(5, L2_SP, "both"),
    ]  # fmt: skip


def table(results: dict[str, Any]) -> list[list[str]]:
    """A row per regulariser, layout and dtype."""
    gpu = results["settings"]["device"] == "cuda"
    header = [
        "what", "layout", "dtype", "tensors", "MB", *(f"{part} / upstream" for part in PARTS),
        *(f"limit, {part}" for part in PARTS), "both / in PyTorch", "% of clone", "% of copy_", "memory / upstream",
    ]  # fmt: skip
    if gpu:
        header += ["host-bound / upstream", "forward, µs", "backward, µs"]
    lines = [header]
    for case in results["cases"]:
        peaks = case["peak_bytes"]
        line = [
            case["label"],
            case["layout"],
            case["dtype"],
            str(case["tensors"]),
            f"{case['target_bytes'] / 1e6:.0f}",
            *(str(speedup(case, UPSTREAM, OURS, part)) for part in PARTS),
            *(f"{limit(case, part).median:.2f}" for part in PARTS),
            str(speedup(case, IN_PYTORCH, OURS, "both")),
            *(f"{100 * bandwidth_share(case, 'both', copy).median:.0f}" for copy in (CLONE, COPY)),
            f"{peaks[OURS] / max(peaks[UPSTREAM], 1):.2f}",
        ]
        if gpu:
            line.append(str(speedup(case, UPSTREAM, OURS, "wall")))
            line += [f"{1e6 * Spread.of(seconds(case, OURS, part)).median:.1f}" for part in PARTS[:2]]
        lines.append(line)
    return lines


CAPTION = (
    "Columns with / : how many times as long as talib_fast the other takes, median (quartiles) of the rounds' ratios; "
    "limit: what it would be over upstream if the floor's bytes moved at copy_'s speed; MB: of the targets alone; "
    "memory / : our peak over upstream's, gradients included. % of : bytes of the floor per second over the plain "
    "copy's, forward and backward together; clone allocates its output, copy_ does not."
)


def publish(results: dict[str, Any], folder: Any) -> None:
    """Print the results, and write the table and the plot."""
    report.publish(
        results, folder, table(results), CAPTION, goals(results), functools.partial(draw_speedups, results, UPSTREAM)
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    return command.parse(command.parser(__doc__), arguments, OPERATION, BATCHES)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure everything that the options ask for."""
    settings = [
        Setting(label, layout, dtype, options.batch, options.device)
        for dtype in options.dtype
        for layout in options.layouts
        for label in (DELTA, NARROW, ATTENTION, *ONE_MAP, L2_SP, L2)
        if (layout == "contiguous" or label not in (L2_SP, L2)) and (dtype == "float32" or label != NARROW)
    ]
    return {
        "operation": OPERATION,
        "environment": report.environment(torch.device(options.device), OPERATION),
        "settings": {
            "device": options.device,
            "batch": options.batch,
            "rounds": options.rounds,
            "units": "seconds per pass",
        },
        "cases": measure(settings, options.rounds),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    report.run(parse(arguments), run, goals, publish)


if __name__ == "__main__":
    main()
