"""Times a StochNorm layer on tiny maps, where nothing but the host's own work counts, against BatchNorm.

One command measures all candidates interleaved and writes ``results.json`` (raw samples), ``table.md``, ``plot.png``::

    python benchmarks/bench_host_overhead.py [--device cuda] [--quick] [--out DIR]

``--from-json DIR`` writes the table and the plot anew from ``DIR/results.json``. On a GPU the host's clock decides.
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
from baselines import UpstreamComposition
from harness import Candidate
from report import LOOKS, Case, Goal, Spread, error_bars, progress, speedup
from torch import nn

from talib_fast.finetune.stochnorm import StochNorm2d

OPERATION = "host_overhead"
SHAPES = ((2, 4, 2, 2), (4, 16, 4, 4), (8, 64, 4, 4))
OURS, BATCH_NORM, COMPOSITION = "talib_fast", "BatchNorm", "upstream composition"
ROUNDS = 201
MOST = 1.3


def candidates(channels: int, device: torch.device) -> list[Candidate]:
    """Everything that is timed, ours first."""
    layers = {OURS: StochNorm2d, BATCH_NORM: nn.BatchNorm2d, COMPOSITION: UpstreamComposition}
    found = []
    for name, kind in layers.items():
        layer = kind(channels).to(device)
        found.append(Candidate(name, layer, (layer.weight, layer.bias)))
    return found


def timed(shape: tuple[int, ...], rounds: int, device: torch.device) -> Case:
    """The raw samples of one shape."""
    torch.manual_seed(0)
    inputs = harness.feeds(device, shape, torch.float32, False, sets=1)
    samples, repetitions = harness.interleaved(device, candidates(shape[1], device), inputs, rounds)
    return {"label": "×".join(map(str, shape)), "passes_per_sample": repetitions, "samples": samples}


def parts(results: dict[str, Any]) -> tuple[str, ...]:
    """On a GPU the host's clock over a whole step; on a CPU also its two passes."""
    return ("wall",) if results["settings"]["device"] == "cuda" else ("both", "forward", "backward")


def overhead(case: Case, candidate: str, part: str) -> Spread:
    """How many times as long as BatchNorm the candidate takes."""
    return speedup(case, candidate, BATCH_NORM, part)


def goals(results: dict[str, Any]) -> list[Goal]:
    """What a layer is to cost at most."""
    part = parts(results)[0]
    figures = {case["label"]: overhead(case, OURS, part).median for case in results["cases"]}
    return [Goal(f"forward + backward at most {MOST}× BatchNorm", MOST, figures, at_most=True)]


def table(results: dict[str, Any]) -> list[list[str]]:
    """A row per shape."""
    measured = parts(results)
    lines = [["input", *(f"{part} / BatchNorm" for part in measured), f"{COMPOSITION} / BatchNorm"]]
    for case in results["cases"]:
        line = [case["label"], *(str(overhead(case, OURS, part)) for part in measured)]
        lines.append([*line, str(overhead(case, COMPOSITION, measured[0]))])
    return lines


CAPTION = (
    "How many times as long as BatchNorm each takes, median (quartiles) of the rounds' ratios: here less is better."
)


def draw(results: dict[str, Any]) -> Any:
    """The figure: time over BatchNorm's by shape."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 2.6), layout="constrained")
    axes, cases = figure.subplots(), results["cases"]
    for name, (colour, marker) in zip((OURS, COMPOSITION), LOOKS, strict=False):
        spreads = [overhead(case, name, parts(results)[0]) for case in cases]
        middles = [spread.median for spread in spreads]
        bars = error_bars(spreads)
        axes.errorbar(middles, range(len(cases)), xerr=bars, fmt=marker, color=colour, label=name)
    report.label_rows(axes, [case["label"] for case in cases])
    axes.set_xlim(left=0)
    axes.legend(frameon=False)
    report.entitle(figure, "Tiny maps: time over BatchNorm's, forward + backward", results)
    return figure


def publish(results: dict[str, Any], folder: Path) -> None:
    """Print what came out, and write table and plot."""
    report.publish(results, folder, table(results), CAPTION, goals(results), functools.partial(draw, results))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    made = command.parser(__doc__, dtypes=False, layouts=False, batch=False)
    return command.parse(made, arguments, OPERATION, rounds={"cpu": ROUNDS, "cuda": ROUNDS})


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure everything that the options ask for."""
    device = torch.device(options.device)
    torch.set_num_threads(1)
    cases = []
    for shape in SHAPES:
        progress(str(shape))
        cases.append(timed(shape, options.rounds, device))
    progress("")
    return {
        "operation": OPERATION,
        "environment": report.environment(device, "stoch_norm"),
        "settings": {"device": options.device, "rounds": options.rounds, "units": "seconds per pass"},
        "cases": cases,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    report.run(parse(arguments), run, goals, publish)


if __name__ == "__main__":
    main()
