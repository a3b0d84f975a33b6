"""Times the soft threshold against PyTorch's own operator, and against the memory floor.

One command measures all candidates interleaved and writes ``results.json`` (raw samples), ``table.md``, ``plot.png``::

    python benchmarks/bench_soft_threshold.py [--device cuda] [--quick] [--out DIR]

``--from-json DIR`` writes the table and the plot anew from ``DIR/results.json``.

Speed-ups are medians of the single rounds' ratios, with quartiles. Floor bytes, with N those of the input: 2N forward
and 3N backward, which reads the gradient and the input.
"""

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import command
import harness
import report
import torch
from command import DTYPES
from harness import Candidate, Feed
from report import Case, Goal, Spread, draw_speedups, progress, seconds, speedup
from torch import Tensor
from torch.nn import functional

from talib_fast.ops import soft_threshold

OPERATION = "soft_threshold"
SIZES = (2**14, 2**18, 2**22)
THRESHOLD = 0.5
PARTS = ("forward", "backward", "both")
OURS, SOFTSHRINK, COPY = "talib_fast", "softshrink", "copy_"


def candidates(feed: Feed) -> list[Candidate]:
    """Everything that is timed, talib_fast first; ``feed`` is one of the inputs."""
    place = torch.empty_like(feed.grad)

    @torch.no_grad()
    def copy(input: Tensor) -> Tensor:
        return place.copy_(input)

    return [
        Candidate(OURS, lambda input: soft_threshold(input, THRESHOLD), ()),
        Candidate(SOFTSHRINK, lambda input: functional.softshrink(input, THRESHOLD), ()),
        Candidate(COPY, copy),  # no parameters: there is no backward pass
    ]


def timed(size: int, dtype: str, device: torch.device, rounds: int) -> Case:
    """The raw samples of one size and dtype."""
    progress(f"{size} {dtype}")
    torch.manual_seed(0)
    inputs = harness.feeds(device, (size,), DTYPES[dtype], channels_last=False)
    samples, repetitions = harness.interleaved(device, candidates(inputs[0]), inputs, rounds)
    return {
        "label": f"{size:,}",
        "bytes": inputs[0].nbytes,
        "layout": "contiguous",
        "dtype": dtype,
        "passes_per_sample": repetitions,
        "samples": samples,
    }


def bandwidth_share(case: Case, part: str) -> Spread:
    """Our floor bytes per second over those of ``copy_``, which reads N and writes N."""
    floor = {"forward": 2, "backward": 3, "both": 5}[part]
    rounds = zip(seconds(case, COPY, "forward"), seconds(case, OURS, part), strict=True)
    return Spread.of([floor / 2 * copying / own for copying, own in rounds])


def goals(results: dict[str, Any]) -> list[Goal]:
    """The goals, with the figures that decide them."""
    figures = {
        f"{case['label']} {case['dtype']}": speedup(case, SOFTSHRINK, OURS, "both").median for case in results["cases"]
    }
    return [Goal(f"forward + backward at least 1× {SOFTSHRINK}", 1, figures)]


def table(results: dict[str, Any]) -> list[list[str]]:
    """A row per size and dtype."""
    header = ["elements", "dtype", *(f"{part} / {SOFTSHRINK}" for part in PARTS), "% of copy_"]
    return [
        header,
        *(
            [
                case["label"],
                case["dtype"],
                *(str(speedup(case, SOFTSHRINK, OURS, part)) for part in PARTS),
                f"{100 * bandwidth_share(case, 'both').median:.0f}",
            ]
            for case in results["cases"]
        ),
    ]


CAPTION = (
    "Columns with / : how many times as long as talib_fast the other takes, median (quartiles) of the rounds' ratios. "
    "% of copy_: bytes of the floor per second over the plain copy's, forward and backward together."
)


def publish(results: dict[str, Any], folder: Path) -> None:
    """Print the results, and write the table and the plot."""
    draw = functools.partial(draw_speedups, results, SOFTSHRINK)
    report.publish(results, folder, table(results), CAPTION, goals(results), draw)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    return command.parse(command.parser(__doc__, layouts=False, batch=False), arguments, OPERATION)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure everything that the options ask for."""
    device = torch.device(options.device)
    return {
        "operation": OPERATION,
        "environment": report.environment(device, OPERATION),
        "settings": {"device": options.device, "rounds": options.rounds, "units": "seconds per pass"},
        "cases": (timed(size, dtype, device, options.rounds) for dtype in options.dtype for size in SIZES),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    report.run(parse(arguments), run, goals, publish)


if __name__ == "__main__":
    main()
