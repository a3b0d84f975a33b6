"""How fast StochNorm and plain fine-tuning come to an accuracy, over the steps and over the time.

    python benchmarks/accuracy_over_time.py [--data DIR] [--seeds N] [-- FINETUNE OPTIONS]

trains both by ``python -m talib_fast finetune`` on all labelled photographs, in turn for each seed. It measures the
accuracy on validation images while they train, and writes ``results.json``, ``table.md`` and ``plot.png``. This takes
ten minutes on two idle CPU cores.
"""

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import accuracy
import command
import report
import torch

from talib_fast.storage import write_atomically
from talib_fast.training.comparison import comparisons, mean_and_deviation, points
from talib_fast.training.page import Section
from talib_fast.training.report import means, method_colours

METHODS = ("plain", "stochnorm")
SEEDS, STEPS, EVALUATIONS, SIZE = 3, 240, 8, 128


def collect(options: argparse.Namespace) -> dict[str, Any]:
    folder = options.runs
    arguments = ["--data", str(options.data), "--image-size", str(SIZE), "--steps", str(STEPS), "--keep", "none"]
    arguments += ["--evaluations", str(EVALUATIONS), "--method", ",".join(METHODS), "--seeds", str(options.seeds)]
    arguments += ["--out", str(folder), *options.finetune]
    results = accuracy.run_finetune(f"accuracy_over_time.py: no results in {folder}", folder, arguments)
    kept = ("method", "seed", "accuracy", "val_accuracy", "accuracies", "seconds", "preparation_seconds")
    first = results["runs"][0]
    return {
        "environment": report.environment(torch.device(results["settings"]["device"])),
        "settings": results["settings"],
        "images": {part: first[f"{part}_images"] for part in ("train", "val", "test")},
        "runs": [{name: run[name] for name in kept} for run in results["runs"]],
    }


def of(results: Mapping[str, Any], method: str) -> list[dict[str, Any]]:
    """A method's runs in the order of the seeds."""
    return sorted((run for run in results["runs"] if run["method"] == method), key=lambda run: run["seed"])


def duration(run: Mapping[str, Any]) -> float:
    """Seconds of all steps and of the method's preparation."""
    return run["seconds"][-1] + run["preparation_seconds"]


def reached(run: Mapping[str, Any], seconds: float) -> float:
    """The last accuracy on validation images that a run measured within ``seconds`` of training."""
    measured = zip(run["accuracies"], run["seconds"], strict=True)
    return next((value for (_, value), time in reversed(list(measured)) if time <= seconds), 0.0)


def table(results: Mapping[str, Any]) -> Section:
    plain, stochnorm = (of(results, method) for method in METHODS)
    rows = []
    for method, own in zip(METHODS, (plain, stochnorm), strict=True):
        times, accuracies = [duration(run) for run in own], [run["accuracy"] for run in own]
        rows.append((method, f"{statistics.median(times):.1f}", mean_and_deviation(accuracies)))
    pairs = list(zip(stochnorm, plain, strict=True))
    ratios = [duration(own) / duration(other) for own, other in pairs]
    gains = [reached(own, other["seconds"][-1]) - other["val_accuracy"] for own, other in pairs]
    settings, images = results["settings"], results["images"]
    caption = (
        f"{settings['network']} on {images['train']:,} images, {settings['steps']} steps of {settings['batch_size']} "
        f"with {settings['image_size']} pixels, {len(plain)} seeds. Time: the median of a run's steps and preparation, "
        f"without evaluations. Accuracy: on {images['test']:,} test images, mean ± sample standard deviation."
    )
    findings = [
        f"A run of stochnorm takes {statistics.median(ratios):.2f}× of plain's time ({min(ratios):.2f} to "
        f"{max(ratios):.2f} by seed).",
        *(one.sentence() for one in comparisons(results["runs"])),
        f"When plain has ended, stochnorm is {points(statistics.fmean(gains))} points beside it on the "
        f"{images['val']:,} validation images, mean over seeds.",
    ]
    return Section("Over time", ("method", "seconds of a run", "test accuracy, %"), rows, caption, findings)


def draw(results: Mapping[str, Any]) -> Any:
    """The figure: accuracy on validation images over steps and over seconds, thin for a seed, thick for the mean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    colours = method_colours(METHODS)
    for method in METHODS:
        own, style = of(results, method), {"color": colours[method]}
        for run in own:
            steps, accuracies = zip(*run["accuracies"], strict=True)
            left.plot(steps, accuracies, lw=0.8, alpha=0.4, **style)
            right.plot(run["seconds"], accuracies, lw=0.8, alpha=0.4, **style)
        mean = means([value for _, value in run["accuracies"]] for run in own)
        left.plot([step for step, _ in own[0]["accuracies"]], mean, "o-", ms=4, lw=1.8, label=method, **style)
        right.plot(means(run["seconds"] for run in own), mean, "o-", ms=4, lw=1.8, **style)
    left.set(xlabel="step", ylabel="accuracy on validation images, %")
    right.set(xlabel="training time, s")
    left.legend(loc="lower right", frameon=False)
    seeds = len(of(results, METHODS[0]))
    figure.suptitle(f"StochNorm and plain fine-tuning: {seeds} seeds and their mean", fontsize=11)
    return figure


def publish(results: dict[str, Any], folder: Path) -> None:
    """Print the table, and write it, the plot and the figures."""
    write_atomically(folder / "results.json", lambda file: file.write((json.dumps(results, indent=1) + "\n").encode()))
    report.write_sections([table(results)], results["environment"], folder)
    report.write_plot(folder / "plot.png", partial(draw, results))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--data", type=Path, default=Path(accuracy.DATA), metavar="DIR", help="%(default)s")
    made.add_argument("--seeds", type=int, default=SEEDS, help="%(default)s")
    made.add_argument("--runs", type=Path, default=Path("runs/over_time"), metavar="DIR", help="%(default)s")
    made.add_argument("--out", type=Path, help="folder; results/ beside this file")
    made.add_argument("--from-json", type=Path, metavar="DIR", help="train nothing, write table and plot anew")
    made.add_argument("finetune", nargs="*", metavar="-- OPTIONS", help="further options of finetune")
    return made.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    command.collect_and_publish(
        options, collect, publish, lambda device: options.out or command.RESULTS / device / "accuracy_over_time"
    )


if __name__ == "__main__":
    main()
