"""Time StochNorm on tiny maps, where only the host's work counts, compared with BatchNorm.

One command measures all candidates interleaved and writes ``results.json`` (raw samples), ``table.md``, ``plot.png``::

    python benchmarks/bench_host_overhead.py [--device cuda] [--quick] [--out DIR]

``--from-json DIR`` writes the table and the plot again from ``DIR/results.json``. On a GPU the host's clock is read.

The cases are one layer, a chain of 53 layers as in a ResNet-50, and, if timm is installed, timm's layer with its
activation. If the library of autograd nodes is loaded, the Python code that replaces it is timed too.
"""

import argparse
import functools
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import command
import harness
import report
import torch
from baselines import UpstreamComposition
from harness import Candidate
from report import LOOKS, Case, Goal, Spread, error_bars, progress, speedup
from torch import Tensor, nn

from talib_fast import ops
from talib_fast.finetune.stochnorm import StochNorm2d, StochNormAct2d
from talib_fast.libraries import import_library
from talib_fast.ops import stoch_norm_step as step

OPERATION = "host_overhead"
SHAPES = ((2, 4, 2, 2), (4, 16, 4, 4), (8, 64, 4, 4))
ALONE, CHAIN, WITH_ACTIVATION = "one layer", "chain of 53", "norm and ReLU"
DEPTH = 53
OURS, IN_PYTHON, BATCH_NORM, COMPOSITION = "talib_fast", "in Python", "BatchNorm", "upstream composition"
ROUNDS = 201
# at most, of BatchNorm's time, by what is timed and by whom
MOST = {
    OURS: {ALONE: 0.95, CHAIN: 0.95, WITH_ACTIVATION: 0.85},
    IN_PYTHON: {ALONE: 1.15, CHAIN: 1.3},
}


def together() -> list[str]:
    """The names of what is timed besides single layers."""
    return [CHAIN, *([WITH_ACTIVATION] if find_spec("timm") else [])]


def layer(what: str, candidate: str, channels: int) -> nn.Module:
    """A module to time: one layer, a chain, or a layer with its activation."""
    if what == CHAIN:
        return nn.Sequential(*[layer(ALONE, candidate, channels) for _ in range(DEPTH)])
    if what == ALONE:
        kinds = {BATCH_NORM: nn.BatchNorm2d, COMPOSITION: UpstreamComposition}
        return kinds.get(candidate, StochNorm2d)(channels)
    if candidate == BATCH_NORM:
        return import_library("timm.layers.norm_act").BatchNormAct2d(channels)
    if candidate == COMPOSITION:
        return nn.Sequential(UpstreamComposition(channels), nn.ReLU(inplace=True))
    return StochNormAct2d(channels)


def in_python(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """The module as it is without the library of autograd nodes."""

    def forward(input: Tensor) -> Tensor:
        usual, step._ordinary_step = step._ordinary_step, step._quick_step
        try:
            return module(input)
        finally:
            step._ordinary_step = usual

    return forward


def candidates(what: str, channels: int, device: torch.device) -> list[Candidate]:
    """Everything that is timed, talib_fast first."""
    names = [OURS, *([IN_PYTHON] if ops.compiled_nodes().loaded else []), BATCH_NORM, COMPOSITION]
    found = []
    for name in names:
        module = layer(what, name, channels).to(device)
        forward = in_python(module) if name == IN_PYTHON else module
        found.append(Candidate(name, forward, tuple(module.parameters())))
    return found


def timed(what: str, shape: tuple[int, ...], rounds: int, device: torch.device) -> Case:
    """The raw samples of one shape."""
    progress(f"{what}, {shape}")
    torch.manual_seed(0)
    inputs = harness.feeds(device, shape, torch.float32, False, sets=1)
    samples, repetitions = harness.interleaved(device, candidates(what, shape[1], device), inputs, rounds)
    label = f"{what}, {'×'.join(map(str, shape))}"
    return {"label": label, "what": what, "passes_per_sample": repetitions, "samples": samples}


def parts(results: dict[str, Any]) -> tuple[str, ...]:
    """The measures of a case: on a GPU the host's time of a whole step, on a CPU the step and its two passes."""
    return ("wall",) if results["settings"]["device"] == "cuda" else ("both", "forward", "backward")


def overhead(case: Case, candidate: str, part: str) -> Spread:
    """The candidate's time over BatchNorm's."""
    return speedup(case, candidate, BATCH_NORM, part)


def goals(results: dict[str, Any]) -> list[Goal]:
    """The goals: a layer's time, at most."""
    part, found = parts(results)[0], []
    for name, most in MOST.items():
        for what, limit in most.items():
            cases = [case for case in results["cases"] if case["what"] == what and name in case["samples"]]
            figures = {case["label"]: overhead(case, name, part).median for case in cases}
            if figures:
                text = f"{what}, {name}: forward + backward at most {limit:g}× BatchNorm"
                found.append(Goal(text, limit, figures, at_most=True))
    return found


def table(results: dict[str, Any]) -> list[list[str]]:
    """A row per case."""
    measured = parts(results)
    lines = [["input", *(f"{part} / BatchNorm" for part in measured)]]
    lines[0] += [f"{IN_PYTHON} / BatchNorm", f"{COMPOSITION} / BatchNorm"]
    for case in results["cases"]:
        line = [case["label"], *(str(overhead(case, OURS, part)) for part in measured)]
        for name in (IN_PYTHON, COMPOSITION):
            line.append(str(overhead(case, name, measured[0])) if name in case["samples"] else "-")
        lines.append(line)
    return lines


CAPTION = (
    "How many times as long as BatchNorm each takes, median (quartiles) of the rounds' ratios: here less is better. "
    f"{IN_PYTHON}: without the library of autograd nodes."
)


def draw(results: dict[str, Any]) -> Any:
    """The figure: time over BatchNorm's by shape."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes, cases = figure.subplots(), results["cases"]
    for name, (colour, marker) in zip((OURS, IN_PYTHON, COMPOSITION), LOOKS, strict=False):
        rows = [row for row, case in enumerate(cases) if name in case["samples"]]
        spreads = [overhead(cases[row], name, parts(results)[0]) for row in rows]
        middles = [spread.median for spread in spreads]
        axes.errorbar(middles, rows, xerr=error_bars(spreads), fmt=marker, color=colour, label=name)
    report.label_rows(axes, [case["label"] for case in cases])
    axes.set_xlim(left=0)
    axes.legend(frameon=False)
    report.entitle(figure, "Tiny maps: time over BatchNorm's, forward + backward", results)
    return figure


def publish(results: dict[str, Any], folder: Path) -> None:
    """Print the results, and write the table and the plot."""
    report.publish(results, folder, table(results), CAPTION, goals(results), functools.partial(draw, results))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    made = command.parser(__doc__, dtypes=False, layouts=False, batch=False)
    return command.parse(made, arguments, OPERATION, rounds={"cpu": ROUNDS, "cuda": ROUNDS})


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure everything that the options ask for."""
    device = torch.device(options.device)
    torch.set_num_threads(1)
    middle = SHAPES[len(SHAPES) // 2]
    settings = (*((ALONE, shape) for shape in SHAPES), *((what, middle) for what in together()))
    return {
        "operation": OPERATION,
        "environment": report.environment(device, "stoch_norm"),
        "settings": {"device": options.device, "rounds": options.rounds, "units": "seconds per pass"},
        "cases": (timed(what, shape, options.rounds, device) for what, shape in settings),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    report.run(parse(arguments), run, goals, publish)


if __name__ == "__main__":
    main()
