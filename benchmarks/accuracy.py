"""Trains all methods with few and with more labels: which one helps when, over seeds, against plain fine-tuning.

    python benchmarks/accuracy.py [--labels N ...] [--seeds N] [-- FINETUNE OPTIONS]

runs ``python -m talib_fast finetune --method all`` for each number of labels per class, in folders of its own below
``runs/``, and writes ``results.json``, ``table.md`` and ``plot.png``. It goes on where an earlier run of the same
command stopped. An hour and a half on two CPU cores.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import command
import report
import torch
from report import align, markdown

from talib_fast.storage import write_atomically
from talib_fast.training.recipes import RECIPES
from talib_fast.training.report import method_colours

LABELS, SEEDS = (2, 5, 10, 20), 5
# the two-sided 95 % quantile of Student's t by degrees of freedom
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


def main_job(failure: str, folder: Path, arguments: Sequence[str]) -> dict[str, Any]:
    """What ``finetune`` with these arguments writes into ``folder``; ``failure`` is said where it fails."""
    command = [sys.executable, "-m", "talib_fast", "finetune", *arguments]
    if subprocess.run(command).returncode:
        sys.exit(f"{failure}: see above")
    return json.loads((folder / "results.json").read_text())


def finetune(labels: int, options: argparse.Namespace) -> dict[str, Any]:
    """The main job's results with that many labels per class."""
    folder = options.runs / f"labels-{labels}"
    arguments = ["--method", "all", "--seeds", str(options.seeds), "--labels-per-class", str(labels)]
    failure = f"accuracy.py: no results for {labels} labels per class"
    return main_job(failure, folder, [*arguments, "--out", str(folder), *options.finetune])


def runs(name: str, found: Mapping[Any, dict[str, Any]]) -> list[dict[str, Any]]:
    """What is kept of the runs of several main jobs, which differ in the setting of that name."""
    return [
        {name: value, **{kept: run[kept] for kept in ("method", "seed", "accuracy")}}
        for value, results in found.items()
        for run in results["runs"]
    ]


def by_seed(results: dict[str, Any], **settings: Any) -> list[float]:
    """The accuracies of the runs with these settings, in the seeds' order."""
    own = [run for run in results["runs"] if settings.items() <= run.items()]
    return [run["accuracy"] for run in sorted(own, key=lambda run: run["seed"])]


def collect(options: argparse.Namespace) -> dict[str, Any]:
    """All runs' accuracies, and what they share."""
    found = {labels: finetune(labels, options) for labels in options.labels}
    first = next(iter(found.values()))
    settings = first["settings"] | {"data": first["data"]["name"].removeprefix("the built-in sample of ")}
    return {
        "environment": report.environment(torch.device(settings["device"])),
        "settings": {name: value for name, value in settings.items() if name != "labels_per_class"},
        "runs": runs("labels_per_class", found),
    }


def accuracies(results: dict[str, Any], method: str, labels: int) -> list[float]:
    """One for each seed, in the seeds' order."""
    return by_seed(results, method=method, labels_per_class=labels)


def gains(results: dict[str, Any], method: str, labels: int) -> list[float]:
    """Points above plain fine-tuning with the same seed, its images and its order."""
    pairs = zip(accuracies(results, method, labels), accuracies(results, "plain", labels), strict=True)
    return [own - plain for own, plain in pairs]


def interval(figures: Sequence[float]) -> float:
    """Half the 95 % confidence interval of the mean, by Student's t."""
    return T95[len(figures) - 2] * statistics.stdev(figures) / len(figures) ** 0.5


def counts(results: dict[str, Any]) -> list[int]:
    return sorted({run["labels_per_class"] for run in results["runs"]})


def methods(results: dict[str, Any]) -> list[str]:
    """Those that have runs, in their usual order."""
    return [name for name in RECIPES if any(run["method"] == name for run in results["runs"])]


def tables(results: dict[str, Any]) -> tuple[list[list[str]], list[list[str]]]:
    """Accuracy, and what is gained over plain fine-tuning: bold where the interval is on one side of zero."""
    header = ["method", *(f"{labels} labels per class" for labels in counts(results))]
    absolute, gained = [header], [header]
    for method in methods(results):
        own = [accuracies(results, method, labels) for labels in counts(results)]
        absolute.append([method, *(f"{statistics.fmean(a):.1f} ± {statistics.stdev(a):.1f}" for a in own)])
        if method != "plain":
            cells = []
            for labels in counts(results):
                points = gains(results, method, labels)
                mean, half = statistics.fmean(points), interval(points)
                text = f"{mean:+.1f} ± {half:.1f}"
                cells.append(f"**{text}**" if abs(mean) > half else text)
            gained.append([method, *cells])
    return absolute, gained


def captions(results: dict[str, Any]) -> tuple[str, str]:
    settings = results["settings"]
    seeds = len(accuracies(results, "plain", counts(results)[0]))
    data = "MNIST digits" if settings["data"] == "sample" else settings["data"]
    return (
        f"Accuracy on {settings['test_images']} test images, %, mean ± sample standard deviation over {seeds} seeds: "
        f"{settings['network']} on {data}, {settings['steps']} steps of {settings['batch_size']} images, "
        f"{settings['image_size']} pixels.",
        "Points above plain fine-tuning with the same seed, mean ± half the 95 % confidence interval; bold where that "
        "leaves out zero. With this many comparisons one or two of them do so by chance.",
    )


def draw(results: dict[str, Any]) -> Any:
    """A panel per method: what each seed gains by number of labels, the mean and its confidence interval."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, NullLocator

    shown, labels = [name for name in methods(results) if name != "plain"], counts(results)
    colours, rows = method_colours(shown), -(-len(shown) // 3)
    figure = Figure(figsize=(8.4, 2.2 * rows), layout="constrained")
    grid = figure.subplots(rows, 3, sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat[len(shown) :]:
        axes.remove()
    for axes, method in zip(grid.flat, shown, strict=False):
        colour = colours[method]
        points = [gains(results, method, count) for count in labels]
        for count, own in zip(labels, points, strict=True):
            axes.plot([count] * len(own), own, "o", color=colour, alpha=0.35, ms=4, mew=0)
        means, halves = [statistics.fmean(own) for own in points], [interval(own) for own in points]
        axes.errorbar(labels, means, yerr=halves, fmt="D-", color=colour, ms=4.5, capsize=3, lw=1.4)
        axes.axhline(0, color="0.35", lw=1, ls=(0, (4, 3)), zorder=0)
        axes.set_title(method, fontsize=10)
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xticks(labels, [str(count) for count in labels])
    figure.supxlabel("labels per class", fontsize=10)
    figure.supylabel("points above plain fine-tuning", fontsize=10)
    seeds = len(accuracies(results, "plain", labels[0]))
    figure.suptitle(f"Gain over plain fine-tuning: {seeds} seeds, mean and 95 % confidence interval", fontsize=11)
    return figure


def publish(results: dict[str, Any], folder: Path) -> None:
    """Print both tables, and write them, the plot and the accuracies."""
    text = json.dumps({**results, "runs": []}, indent=1).removesuffix("[]\n}")
    kept = ",\n".join(json.dumps(run) for run in results["runs"])
    content = f"{text}[\n{kept}\n]}}\n"
    write_atomically(folder / "results.json", lambda file: file.write(content.encode()))
    parts = []
    for lines, caption in zip(tables(results), captions(results), strict=True):
        print(align(lines), caption, sep="\n\n", end="\n\n")
        parts += [markdown(lines), caption]
    page = "\n\n".join([*parts, report.origin(results["environment"])]) + "\n"
    write_atomically(folder / "table.md", lambda file: file.write(page.encode()))
    report.write_plot(folder / "plot.png", partial(draw, results))


def check_seeds(parser: argparse.ArgumentParser, seeds: int) -> None:
    """End with the parser's error unless there is an interval for so many seeds."""
    if not 2 <= seeds <= len(T95) + 1:
        parser.error(f"expected 2 to {len(T95) + 1} seeds, got {seeds}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--labels", type=int, nargs="+", default=LABELS, metavar="N", help="per class; %(default)s")
    made.add_argument("--seeds", type=int, default=SEEDS, help="from 2 to 10 (%(default)s)")
    made.add_argument("--runs", type=Path, default=Path("runs/accuracy"), metavar="DIR", help="%(default)s")
    made.add_argument("--out", type=Path, help="folder; results/ beside this file, --runs for anything but a full run")
    made.add_argument("--from-json", type=Path, metavar="DIR", help="train nothing, write tables and plot anew")
    made.add_argument("finetune", nargs="*", metavar="-- OPTIONS", help="options of the main job")
    options = made.parse_args(arguments)
    check_seeds(made, options.seeds)
    return options


def place(options: argparse.Namespace, device: str) -> Path:
    """Only a full run writes beside the benchmarks."""
    whole = set(options.labels) >= set(LABELS) and options.seeds >= SEEDS
    return options.out or (command.RESULTS / device / "accuracy" if whole else options.runs)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if options.from_json:
        publish(json.loads((options.from_json / "results.json").read_text()), options.from_json)
    else:
        results = collect(options)
        publish(results, place(options, results["settings"]["device"]))


if __name__ == "__main__":
    main()
