"""Time the tail of the spectrum, as BSS needs it, compared with the code that it replaces, and measure its accuracy.

One command measures all candidates interleaved and writes ``results.json`` (raw samples), ``table.md``, ``plot.png``::

    python benchmarks/bench_spectral_tail.py [--device cuda] [--quick] [--out DIR]

``--from-json DIR`` writes the table and the plot again from ``DIR/results.json``.

The cases vary one of b, f and k of features ``[b, f]`` at a time around BSS's 48 × 2048 with k = 1. Errors are those of
float32 features with a geometric spectrum, compared with a float64 SVD of the same features.
"""

import argparse
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import baselines
import command
import harness
import report
import torch
from command import DTYPES
from harness import Candidate, Feed
from report import LOOKS, Case, Goal, Spread, error_bars, progress, seconds, speedup
from torch import Tensor, nn

from talib_fast.ops import spectral_tail

OPERATION = "spectral_tail"
B, F, K = 48, 2048, 1
OVER_B = tuple((b, F, K) for b in (16, 32, B, 64, 96, 128, 192, 256))
OVER_F = tuple((B, f, K) for f in (128, 256, 512, 1024, F, 4096))
OVER_K = tuple((B, F, k) for k in (K, 2, 5, 10, 24, 47))
SHAPES = tuple(dict.fromkeys((*OVER_B, *OVER_F, *OVER_K)))
CONDITIONS = tuple(10.0**exponent for exponent in range(1, 7))
PARTS = ("forward", "backward", "both")
OURS, UPSTREAM, IN_PYTORCH = "talib_fast", "upstream's SVD", "talib_fast in PyTorch"
EIGVALSH = "eigvalsh in float64"

# b × f: how many times as fast as upstream
GOALS = {"cpu": {(48, 2048): 4, (128, 2048): 5, (48, 512): 3}, "cuda": {(48, 2048): 20}}
GPU_MICROSECONDS = {(48, 2048): 150, (256, 2048): 1000}
ERROR_GOALS = {1e4: 1e-3, 1e5: 1e-2}


@dataclass(frozen=True)
class Setting:
    """Features of one shape and dtype, and k."""

    b: int
    f: int
    k: int
    dtype: str
    device: str

    @property
    def label(self) -> str:
        return f"{self.b}×{self.f}, k={self.k}"

    def feed(self) -> Feed:
        torch.manual_seed(0)
        features = torch.randn(self.b, self.f, device=self.device).to(DTYPES[self.dtype])
        return Feed((nn.Parameter(features),), torch.ones((), device=self.device))


def candidates(k: int) -> list[Candidate]:
    """Everything that is timed, talib_fast first."""
    functions: dict[str, Callable[[Tensor, int], Tensor]] = {
        OURS: spectral_tail,
        UPSTREAM: baselines.upstream_spectral_tail,
        IN_PYTORCH: baselines.spectral_tail_in_pytorch,
        EIGVALSH: baselines.spectral_tail_by_eigvalsh,
    }

    def with_k(function: Callable[[Tensor, int], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda features: function(features, k)

    return [Candidate(name, with_k(function), ()) for name, function in functions.items()]


def timed(setting: Setting, rounds: int) -> Case:
    """The raw samples of one setting."""
    progress(f"{setting.label} {setting.dtype}")
    samples, repetitions = harness.interleaved(
        torch.device(setting.device), candidates(setting.k), [setting.feed()], rounds
    )
    return {
        "label": setting.label,
        "b": setting.b,
        "f": setting.f,
        "k": setting.k,
        "layout": "contiguous",
        "dtype": setting.dtype,
        "passes_per_sample": repetitions,
        "samples": samples,
    }


def conditioned(b: int, f: int, condition: float, device: torch.device) -> Tensor:
    """Float32 features whose singular values fall geometrically from 1 to 1/condition."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(size, b, dtype=torch.float64, generator=generator)).Q for size in (b, f))
    spectrum = torch.logspace(0, 1, b, 1 / condition, dtype=torch.float64)
    return (left * spectrum @ right.mT).float().to(device)


def errors(device: torch.device) -> list[dict[str, Any]]:
    """Relative errors of value and gradient by condition number and candidate."""

    def value_and_gradient(function: Callable[..., Tensor], features: Tensor) -> tuple[Tensor, Tensor]:
        leaf = features.detach().requires_grad_()
        value = function(leaf)
        (gradient,) = torch.autograd.grad(value, leaf)
        return value.detach().double().cpu(), gradient.double().cpu()

    found = []
    for condition in CONDITIONS:
        features = conditioned(B, F, condition, device)
        true_value, true_gradient = value_and_gradient(
            functools.partial(baselines.upstream_spectral_tail, k=K), features.cpu().double()
        )
        row: dict[str, Any] = {"condition": condition, "value": {}, "gradient": {}}
        for candidate in candidates(K):
            value, gradient = value_and_gradient(candidate.forward, features)
            row["value"][candidate.name] = ((value - true_value).abs() / true_value).item()
            row["gradient"][candidate.name] = ((gradient - true_gradient).norm() / true_gradient.norm()).item()
        found.append(row)
    return found


def goals(results: dict[str, Any]) -> list[Goal]:
    """The goals, with the figures that decide them."""
    device = results["settings"]["device"]

    def named(shape: tuple[int, int]) -> list[Case]:
        return [case for case in results["cases"] if (case["b"], case["f"], case["k"]) == (*shape, K)]

    found = [
        Goal(
            f"forward + backward at least {factor}× upstream at {b}×{f}, k=1",
            factor,
            {f"{b}×{f} {case['dtype']}": speedup(case, UPSTREAM, OURS, "both").median for case in named((b, f))},
        )
        for (b, f), factor in GOALS[device].items()
    ]
    if device == "cuda":
        found += [
            Goal(
                f"forward + backward at most {most} µs at {b}×{f}, k=1",
                most,
                {f"{b}×{f} {case['dtype']}": 1e6 * _median(case, OURS, "both") for case in named((b, f))},
                at_most=True,
            )
            for (b, f), most in GPU_MICROSECONDS.items()
        ]
    for row in results["errors"]:
        if row["condition"] in ERROR_GOALS:
            most = ERROR_GOALS[row["condition"]]
            words = f"relative error of the value at most {most:g} at condition number {row['condition']:g}"
            found.append(Goal(words, most, {"float32": row["value"][OURS]}, at_most=True))
    return found


def _median(case: Case, candidate: str, part: str) -> float:
    return Spread.of(seconds(case, candidate, part)).median


def table(results: dict[str, Any]) -> list[list[str]]:
    """A row per shape, k and dtype."""
    gpu = results["settings"]["device"] == "cuda"
    header = ["b×f, k", "dtype", *(f"{part} / upstream" for part in PARTS)]
    header += [f"both / {name}" for name in (IN_PYTORCH, EIGVALSH)]
    if gpu:
        header += ["host-bound / upstream", "forward, µs", "backward, µs"]
    lines = [header]
    for case in results["cases"]:
        line = [case["label"], case["dtype"], *(str(speedup(case, UPSTREAM, OURS, part)) for part in PARTS)]
        line += [str(speedup(case, name, OURS, "both")) for name in (IN_PYTORCH, EIGVALSH)]
        if gpu:
            line.append(str(speedup(case, UPSTREAM, OURS, "wall")))
            line += [f"{1e6 * _median(case, OURS, part):.1f}" for part in PARTS[:2]]
        lines.append(line)
    return lines


def error_table(results: dict[str, Any]) -> list[list[str]]:
    """A row per condition number."""
    names = (OURS, UPSTREAM, EIGVALSH)
    lines = [["condition number", *(f"{what}, {name}" for what in ("value", "gradient") for name in names)]]
    for row in results["errors"]:
        cells = [f"{row[what][name]:.0e}" for what in ("value", "gradient") for name in names]
        lines.append([f"{row['condition']:g}", *cells])
    return lines


CAPTION = (
    "Columns with / : how many times as long as talib_fast the other takes, median (quartiles) of the rounds' ratios. "
    "upstream: a full SVD in the features' dtype (float32 for half precision); talib_fast in PyTorch: the operation's "
    "PyTorch implementation; eigvalsh: PyTorch's eigenvalues of the Gram matrix in float64, what a careful user would "
    f"write. Below: relative errors for float32 features of {B}×{F}, k={K}."
)


def draw(results: dict[str, Any]) -> Any:
    """The figure: speed over upstream against b, f and k, and the error against the condition number."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 7), layout="constrained")
    grid = figure.subplots(2, 2)
    dtype = results["cases"][0]["dtype"]
    shown = (OURS, EIGVALSH)
    by_shape = {(case["b"], case["f"], case["k"]): case for case in results["cases"] if case["dtype"] == dtype}
    panels = (("b", OVER_B, f"f={F}, k={K}"), ("f", OVER_F, f"b={B}, k={K}"), ("k", OVER_K, f"{B}×{F}"))
    for axes, (name, shapes, rest) in zip(grid.flat, panels, strict=False):
        cases = [by_shape[shape] for shape in shapes if shape in by_shape]
        for candidate, (colour, marker) in zip(shown, LOOKS, strict=False):
            spreads = [speedup(case, UPSTREAM, candidate, "both") for case in cases]
            axes.errorbar(
                [case[name] for case in cases], [s.median for s in spreads], yerr=error_bars(spreads), fmt=f"{marker}-",
                color=colour, ms=4.5, lw=1.2, label=candidate,
            )  # fmt: skip
        axes.axhline(1, color="0.3", lw=1, ls=(0, (4, 3)), zorder=0)
        axes.set_xscale("log", base=2)
        axes.set_xlabel(name)
        axes.set_title(f"speed over {UPSTREAM}, {rest}", fontsize=10)
        axes.set_xticks([case[name] for case in cases], [str(case[name]) for case in cases])
        axes.set_ylim(bottom=0)
    axes = grid.flat[3]
    conditions = [row["condition"] for row in results["errors"]]
    for candidate, (colour, marker) in zip((*shown, UPSTREAM), LOOKS, strict=False):
        # an error of zero has no place on the axis
        figures = [max(row["value"][candidate], 1e-17) for row in results["errors"]]
        axes.plot(conditions, figures, f"{marker}-", color=colour, ms=4.5, lw=1.2, label=candidate)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("condition number")
    axes.set_title(f"relative error of the value, float32, {B}×{F}, k={K}", fontsize=10)
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    report.entitle(figure, f"{OPERATION}, forward + backward, {dtype}", results)
    return figure


def publish(results: dict[str, Any], folder: Path) -> None:
    """Print the results, and write the table and the plot."""
    caption = f"{CAPTION}\n\n{report.markdown(error_table(results))}"
    report.publish(results, folder, table(results), caption, goals(results), functools.partial(draw, results))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    made = command.parser(__doc__, layouts=False, batch=False)
    return command.parse(made, arguments, OPERATION)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure everything that the options ask for."""
    device = torch.device(options.device)
    settings = [Setting(*shape, dtype, options.device) for dtype in options.dtype for shape in SHAPES]
    return {
        "operation": OPERATION,
        "environment": report.environment(device, OPERATION),
        "settings": {"device": options.device, "rounds": options.rounds, "units": "seconds per pass"},
        "errors": errors(device),
        "cases": (timed(setting, options.rounds) for setting in settings),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    report.run(parse(arguments), run, goals, publish)


if __name__ == "__main__":
    main()
