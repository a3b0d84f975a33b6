"""The report of a benchmark: its environment, statistics of raw samples, goals, a table, a plot and the JSON."""

import argparse
import json
import os
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch

import talib_fast
from talib_fast.ops import backends, compiled
from talib_fast.plots import STYLE
from talib_fast.storage import write_atomically

if TYPE_CHECKING:  # kernels are measured on machines that may lack the libraries of finetune
    from talib_fast.training.page import Section

Case = dict[str, Any]

# Okabe and Ito's colours, which people with any colour vision can tell apart; the markers differ without colour too
LOOKS = (("#0072B2", "o"), ("#D55E00", "^"), ("#009E73", "s"), ("#CC79A7", "D"), ("#E69F00", "v"))


def _said(*command: str, folder: Path | None = None) -> str | None:
    """The output of a command; None if it is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    return done.stdout.strip() or None if done.returncode == 0 else None


def without_folders(text: str) -> str:
    """``text`` with every absolute path cut to its last part, so that results do not name a machine's folders."""
    return re.sub(r"(?<![\w.~-])~?/(?:[^\s/:'\"=,;]+/)*(?=[^\s/:'\"=,;])", "", text)


def progress(text: str) -> None:
    """Print the present step: in one line of a terminal, or as a line of a log."""
    if sys.stderr.isatty():
        print(f"\r{text}\033[K", end="", file=sys.stderr, flush=True)
    elif text:
        print(text, file=sys.stderr, flush=True)


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _commit() -> str:
    """The commit of the measured package; without git it is the environment variable ``COMMIT``.

    It ends in ``-dirty`` if files differ from it. Results do not count, since an earlier benchmark may have written
    them.
    """
    folder = Path(talib_fast.__file__).parent
    commit = _said("git", "describe", "--always", folder=folder)
    if commit is None:
        return os.environ.get("COMMIT", "unknown")
    changed = ("git", "status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)benchmarks/results")
    return f"{commit}-dirty" if _said(*changed, folder=folder) else commit


def _gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    driver = _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    nvcc = re.search(r"release [\d.]+, V[\d.]+", _said("nvcc", "--version") or "")
    return {
        "device": properties.name,
        "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "driver": None if driver is None else driver.splitlines()[0],
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nvcc": nvcc and nvcc.group(),
    }


def _served(operation: str, device: torch.device) -> dict[str, str]:
    backend, reason = backends()[operation][device.type]
    return {
        "backend": backend,
        "backend_reason": without_folders(reason),
        "compiled_library": without_folders(compiled().status),
    }


def environment(device: torch.device, operation: str | None = None) -> dict[str, Any]:
    """Hardware, versions, commit and command of a run, and the backend that serves ``operation`` on ``device``.

    No entry names the machine or its folders.
    """
    compiler = _said(os.environ.get("CXX", "c++"), "--version")
    cpu = _cpu_model()
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": without_folders(shlex.join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]])),
        "commit": _commit(),
        "talib_fast": talib_fast.__version__,
        **(_served(operation, device) if operation is not None else {}),
        "device": cpu,
        "cpu": cpu,
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "compiler": compiler and compiler.splitlines()[0],
        **(_gpu(device) if device.type == "cuda" else {}),
    }


def backend_warning(operation: str, where: dict[str, Any]) -> str | None:
    """A sentence if no compiled kernel was measured, else None."""
    if where.get("backend", "compiled") == "compiled":
        return None
    return (
        f"WARNING: {operation} was served by {where['backend']}, not by a compiled kernel: {where['backend_reason']}."
    )


@dataclass(frozen=True)
class Spread:
    """The median and the quartiles of some figures."""

    median: float
    lower: float
    upper: float

    @classmethod
    def of(cls, figures: Sequence[float]) -> "Spread":
        if len(figures) < 2:
            return cls(figures[0], figures[0], figures[0])
        lower, _, upper = statistics.quantiles(figures, n=4, method="inclusive")
        return cls(statistics.median(figures), lower, upper)

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.lower:.2f}–{self.upper:.2f})"


def error_bars(spreads: Sequence[Spread]) -> list[list[float]]:
    """The distances from the medians to the quartiles, in matplotlib's form."""
    return [[s.median - s.lower for s in spreads], [s.upper - s.median for s in spreads]]


def seconds(case: Case, candidate: str, measure: str) -> list[float]:
    """A candidate's raw samples; ``both`` adds its forward and backward pass round by round."""
    samples = case["samples"][candidate]
    if measure == "both":
        return [sum(pair) for pair in zip(samples["forward"], samples["backward"], strict=True)]
    return samples[measure]


def speedup(case: Case, baseline: str, candidate: str, measure: str) -> Spread:
    """The baseline's time over the candidate's, from the ratios of the single rounds."""
    pairs = zip(seconds(case, baseline, measure), seconds(case, candidate, measure), strict=True)
    return Spread.of([base / own for base, own in pairs])


GOAL_COLUMNS = ("goal", "outcome", "kept in", "worst", "limit there", "where")


@dataclass(frozen=True)
class Goal:
    """A goal: a bound for measured figures.

    A place whose limit does not keep the bound is not judged, because no code could keep it there.

    Attributes:
        text: the goal in words.
        threshold: the bound.
        figures: the measured figures, by the place of the measurement.
        at_most: whether the figures should be at most ``threshold``; otherwise at least.
        limits: for some places, the best figure that memory or arithmetic allows on the machine of the run.
    """

    text: str
    threshold: float
    figures: dict[str, float] = field(default_factory=dict)
    at_most: bool = False
    limits: dict[str, float] = field(default_factory=dict)

    def _keeps(self, figure: float) -> bool:
        return figure <= self.threshold if self.at_most else figure >= self.threshold

    @property
    def judged(self) -> dict[str, float]:
        """The figures whose limit leaves room for the bound."""
        return {
            place: figure
            for place, figure in self.figures.items()
            if place not in self.limits or self._keeps(self.limits[place])
        }

    @property
    def passed(self) -> bool | None:
        """Whether all judged figures keep the bound; None if no figure is judged."""
        return all(map(self._keeps, self.judged.values())) if self.judged else None

    def row(self) -> list[str]:
        """The cells under GOAL_COLUMNS."""
        if not self.figures:
            return [self.text, "not measured", *["–"] * (len(GOAL_COLUMNS) - 2)]
        judged = self.judged
        shown = judged or self.figures
        worst = (max if self.at_most else min)(shown, key=lambda place: shown[place])
        outcome = {True: "reached", False: "missed", None: "beyond the limit"}[self.passed]
        kept = f"{sum(map(self._keeps, judged.values()))} of {len(judged)}" if judged else "–"
        limit = f"{self.limits[worst]:.3g}" if worst in self.limits else "–"
        return [self.text, outcome, kept, f"{shown[worst]:.3g}", limit, worst]


def align(lines: Sequence[Sequence[str]]) -> str:
    """A header and rows for a terminal, the first column aligned to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = [
        "  ".join([first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))])
        for first, *rest in lines
    ]
    return "\n".join([texts[0], "  ".join("-" * width for width in widths), *texts[1:]])


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """The same rows in Markdown."""
    rule = "|---" + "|---:" * (len(lines[0]) - 1) + "|"
    header, *rows = ("| " + " | ".join(line) + " |" for line in lines)
    return "\n".join([header, rule, *rows])


def with_block(page: str, name: str, block: str) -> str:
    """A page's text with ``block`` between the page's markers of that name.

    Raises:
        ValueError: the page lacks the markers.
    """
    begin, end = (f"<!-- {name}: {word} -->" for word in ("begin", "end"))
    before, found, rest = page.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found or not found_end:
        raise ValueError(f"expected {begin} and, behind it, {end} in the page")
    return f"{before}{begin}\n{block}\n{end}{after}"


def origin(where: dict[str, Any]) -> str:
    """One line with command, commit and machine of a run."""
    machine = f"{where['device']}, {where['cores']} CPU cores, {where['threads']} threads"
    if "driver" in where:
        machine = f"{where['device']}, driver {where['driver']}, CUDA {where['cuda']}"
    return (
        f"`{where['command']}` ({where['date']}; commit {where['commit']}; {machine}; "
        f"torch {where['torch']}, Python {where['python']})"
    )


def write_json(results: dict[str, Any], folder: Path) -> None:
    """Write ``results.json``, with five digits for every float and one line for each case."""

    def shorten(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.5g}")
        if isinstance(value, dict):
            return {key: shorten(item) for key, item in value.items()}
        return [shorten(item) for item in value] if isinstance(value, (list, tuple)) else value

    short = shorten(results)
    cases = ",\n".join(json.dumps(case) for case in short.pop("cases"))
    text = json.dumps(short, indent=1).removesuffix("\n}") + f',\n "cases": [\n{cases}\n]}}\n'
    write_atomically(folder / "results.json", lambda file: file.write(text.encode()))


def publish(
    results: dict[str, Any],
    folder: Path,
    lines: Sequence[Sequence[str]],
    caption: str,
    goals: Sequence[Goal],
    draw: Callable[[], Any],
) -> None:
    """Print a table and the outcomes of the goals; write ``table.md``, and the figure of ``draw`` as ``plot.png``."""
    where, outcomes = results["environment"], [GOAL_COLUMNS, *(goal.row() for goal in goals)]
    warning = backend_warning(results["operation"], where)
    print(align(lines), caption, align(outcomes), origin(where), sep="\n\n", end="\n\n")
    if warning:
        print(warning, file=sys.stderr)
    parts = [*([warning] if warning else []), markdown(lines), caption, markdown(outcomes), origin(where)]
    text = "\n\n".join(parts) + "\n"
    write_atomically(folder / "table.md", lambda file: file.write(text.encode()))
    write_plot(folder / "plot.png", draw)


def collect(results: dict[str, Any], folder: Path) -> dict[str, Any]:
    """``results`` with a list of all ``cases``. Each case is in ``results.json`` as soon as it is measured.

    The file of a stopped run has no ``goals``.
    """
    cases: list[Case] = []
    for case in results["cases"]:
        cases.append(case)
        write_json({**results, "cases": cases}, folder)
    progress("")
    return {**results, "cases": cases}


def run(
    options: argparse.Namespace,
    measure: Callable[[argparse.Namespace], dict[str, Any]],
    goals: Callable[[dict[str, Any]], Sequence[Goal]],
    publish: Callable[[dict[str, Any], Path], None],
) -> None:
    """Measure, then write and publish the results; or publish those of ``--from-json`` again.

    ``measure`` gives results whose ``cases`` are an iterator. Taking a case measures it.
    """
    folder = options.from_json
    if folder is None:
        folder = options.out
        results = collect(measure(options), folder)
        results["goals"] = [{"goal": goal.text, "passed": goal.passed} for goal in goals(results)]
        write_json(results, folder)
    publish(json.loads((folder / "results.json").read_text()), folder)


def write_sections(sections: "Sequence[Section]", where: dict[str, Any], folder: Path) -> None:
    """Print sections, and write them to ``table.md`` with the origin of the run."""
    print("\n\n".join(section.text() for section in sections))
    page = "\n\n".join([*(section.markdown() for section in sections), origin(where)]) + "\n"
    write_atomically(folder / "table.md", lambda file: file.write(page.encode()))


def write_plot(file: Path, draw: Callable[[], Any]) -> None:
    """Write the figure that ``draw`` makes, if matplotlib is installed."""
    try:
        import matplotlib
    except ImportError:
        print("No plot: it needs matplotlib (pip install matplotlib).")
        return
    with matplotlib.rc_context(STYLE):
        write_atomically(file, partial(draw().savefig, format="png"))


def entitle(figure: Any, title: str, results: dict[str, Any]) -> None:
    """Give a figure its title, and below it the device and the number of rounds."""
    where, rounds = results["environment"]["device"], results["settings"]["rounds"]
    figure.suptitle(f"{title}\n{where}, median and quartiles of {rounds} rounds", fontsize=11)


def label_rows(axes: Any, labels: Sequence[str]) -> None:
    """Label the rows, the first one on top, and draw a line at 1, where two candidates take the same time."""
    axes.axvline(1, color="0.3", lw=1, ls=(0, (4, 3)), zorder=0)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)


def draw_speedups(results: dict[str, Any], baseline: str) -> Any:
    """A figure of each candidate's speed over the baseline's by case, a panel per layout and dtype."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    panels: dict[str, list[Case]] = {}
    for case in results["cases"]:
        panels.setdefault(f"{case['layout']}, {case['dtype']}", []).append(case)
    labels = [case["label"] for case in next(iter(panels.values()))]
    height = 1.6 + (0.3 * len(labels) + 0.6) * -(-len(panels) // 2)
    columns = min(2, len(panels))
    figure = Figure(figsize=(1.5 + 4.2 * columns, height), layout="constrained")
    grid = figure.subplots(-(-len(panels) // 2), columns, sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, (title, cases) in zip(grid.flat, panels.items(), strict=False):
        candidates = [name for name, own in cases[0]["samples"].items() if name != baseline and "backward" in own]
        for number, (candidate, (colour, marker)) in enumerate(zip(candidates, LOOKS, strict=False)):
            places = [place for place, case in enumerate(cases) if candidate in case["samples"]]
            spreads = [speedup(cases[place], baseline, candidate, "both") for place in places]
            offset = 0.2 * (number - (len(candidates) - 1) / 2)  # side by side, so that none hides another
            axes.errorbar(
                [s.median for s in spreads], [place + offset for place in places],
                xerr=error_bars(spreads), fmt=marker, color=colour, ms=4.5, lw=1.2, label=candidate,
            )  # fmt: skip
        axes.set_title(title, fontsize=10)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(LogLocator(2))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2g}×"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        label_rows(axes, labels)
    handles, names = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    entitle(figure, f"{results['operation']}: speed over {baseline}, forward + backward", results)
    return figure
