"""What came out: the table on the terminal and in Markdown, the plots, and the page that has all of it."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..images.imageset import ImageSet
from ..inference.output import aligned
from ..plots import STYLE, drawn
from ..storage import write_atomically
from .page import html
from .recipes import RECIPES, canonical

FILES = ("report.html", "results.json", "table.md", "accuracy.png", "curves.png")
# of combined methods: the colours of C0 to C9 again, in another order
COMBINED = ("pink", "gray", "olive", "cyan", "brown", "purple", "red", "green", "orange", "blue")
COLUMNS = ("method", "accuracy, %", "seeds", "s/step", "preparation, s", "peak MiB")


@dataclass(frozen=True)
class Row:
    """One method over its seeds: accuracies in %, the medians of time and the largest memory use."""

    method: str
    accuracies: tuple[float, ...]
    seconds_per_step: float
    preparation_seconds: float
    peak_mib: float

    @property
    def mean(self) -> float:
        return statistics.fmean(self.accuracies)

    @property
    def deviation(self) -> float | None:
        """The sample standard deviation; None for a single seed, which shows no spread."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else None

    def cells(self) -> tuple[str, ...]:
        spread = "" if self.deviation is None else f" ± {self.deviation:.1f}"
        preparation = f"{self.preparation_seconds:.1f}" if self.preparation_seconds >= 0.05 else "-"
        return (
            self.method,
            f"{self.mean:.1f}{spread}",
            str(len(self.accuracies)),
            f"{self.seconds_per_step:.3f}",
            preparation,
            f"{self.peak_mib:.0f}",
        )


def rows(runs: Sequence[dict[str, Any]]) -> list[Row]:
    """One row per method that has runs, in the methods' usual order, combinations behind them."""
    found: dict[str, list[dict[str, Any]]] = {}  # by a name that does not depend on the order of what is combined
    for run in runs:
        found.setdefault(canonical(run["method"]), []).append(run)
    methods = [name for name in RECIPES if name in found] + [name for name in found if name not in RECIPES]
    table = []
    for own in map(found.__getitem__, methods):
        table.append(
            Row(
                own[0]["method"],
                tuple(run["accuracy"] for run in own),
                statistics.median(run["seconds_per_step"] for run in own),
                statistics.median(run["preparation_seconds"] for run in own),
                max(run["peak_mib"] for run in own),
            )
        )
    return table


def text(results: dict[str, Any]) -> str:
    """The table for a terminal."""
    lines: list[tuple[str, ...]] = [COLUMNS, *(row.cells() for row in rows(results["runs"]))]
    rule = tuple("-" * max(map(len, column)) for column in zip(*lines, strict=True))
    table = aligned([lines[0], rule, *lines[1:]], right=range(1, len(COLUMNS)))
    return "\n" + "\n".join(table) + f"\n\n{caption(results)}"


def markdown(results: dict[str, Any]) -> str:
    """The table for a README, with the command that made it."""
    lines = [
        "| " + " | ".join(COLUMNS) + " |",
        "|---" + "|---:" * (len(COLUMNS) - 1) + "|",
        *("| " + " | ".join(row.cells()) + " |" for row in rows(results["runs"])),
    ]
    versions = f"talib_fast {results['talib_fast']}, torch {results['torch']}, Python {results['python']}"
    origin = f"`{results['command']}` ({results['device']}; {versions})"
    return "\n".join([*lines, "", caption(results), "", origin, ""])


def caption(results: dict[str, Any]) -> str:
    """What the table's figures mean, in a few sentences."""
    settings = results["settings"]
    memory = "the GPU's" if settings["device"] == "cuda" else "the whole process's"
    if "processes" in settings:
        memory += f" (the first of {settings['processes']})"
    sentences = [
        f"{settings['network']} on {data_name(results)}: {labels(settings)}, {settings['steps']} steps of "
        f"{settings['batch_size']} images, {settings['image_size']} pixels. Tested on "
        f"{results['runs'][-1]['test_images']:,} images."
    ]
    most = max(len(row.accuracies) for row in rows(results["runs"]))
    if most > 1:
        sentences.append(f"Accuracy: mean ± sample standard deviation over seeds. Peak memory: {memory}.")
    else:
        sentences.append(f"One seed: differences of a few points are noise. Peak memory: {memory}.")
    return " ".join(sentences)


def labels(settings: dict[str, Any]) -> str:
    number = settings["labels_per_class"]
    return "all labels" if number == "all" else f"{number} labels per class"


def data_name(results: dict[str, Any]) -> str:
    return results["data"]["name"].removeprefix("the built-in sample of ")


def write(results: dict[str, Any], folder: Path, test_images: Callable[[int], ImageSet]) -> None:
    """Write the table, the page and, where matplotlib is installed, the plots.

    ``test_images(seed)`` gives those that the seed's runs were tested on.
    """
    write_atomically(folder / "table.md", lambda file: file.write(markdown(results).encode()))
    plots: dict[str, bytes] = {}
    try:
        import matplotlib
    except ImportError:
        print("No plots: they need matplotlib (pip install matplotlib).")
    else:
        with matplotlib.rc_context(STYLE):
            plots = {"accuracy": drawn(draw_accuracy(results)), "curves": drawn(draw_curves(results))}
    for name in plots:
        write_atomically(folder / f"{name}.png", lambda file, name=name: file.write(plots[name]))  # type: ignore[misc]
    page = html(results, folder, title(results), caption(results), COLUMNS, rows(results["runs"]), plots, test_images)
    write_atomically(folder / "report.html", lambda file: file.write(page.encode()))


def draw_accuracy(results: dict[str, Any]) -> Any:
    """Accuracy by method: a dot per seed, the mean and one standard deviation to either side."""
    from matplotlib.figure import Figure

    table = rows(results["runs"])
    colours = method_colours([row.method for row in table])
    figure = Figure(figsize=(7.2, 1.5 + 0.36 * len(table)), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(table):
        colour = colours[row.method]
        axes.plot(row.accuracies, [place] * len(row.accuracies), "o", color=colour, alpha=0.35, ms=5, mew=0)
        axes.errorbar(row.mean, place, xerr=row.deviation, fmt="D", color=colour, ms=6, capsize=4, lw=1.6)
        axes.annotate(
            row.cells()[1], (1.0, place), (6, 0), ("axes fraction", "data"), "offset points", va="center", color="0.25"
        )
    if table[0].method == "plain":
        axes.axvline(table[0].mean, color="0.55", lw=1, ls=(0, (4, 3)), zorder=0)
    axes.set_yticks(range(len(table)), [row.method for row in table])
    axes.set_ylim(len(table) - 0.5, -0.5)
    axes.margins(x=0.08)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("accuracy on the test images, %")
    several = max(len(row.accuracies) for row in table) > 1
    legend = "dots: seeds; diamond: mean ± standard deviation" if several else "one seed each"
    if table[0].method == "plain":
        legend += "; dashed: plain"
    figure.suptitle(title(results), x=0.01, ha="left", fontweight="bold", fontsize=11)
    axes.set_title(legend, loc="left", fontsize=9, color="0.35")
    return figure


def draw_curves(results: dict[str, Any]) -> Any:
    """Cross-entropy on the training batches and accuracy over the steps, means over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.2, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    table = rows(results["runs"])
    colours = method_colours([row.method for row in table])
    for row in table:
        own = [run for run in results["runs"] if canonical(run["method"]) == canonical(row.method)]
        colour = colours[row.method]
        losses = [statistics.fmean(values) for values in zip(*(run["cross_entropies"] for run in own), strict=True)]
        smooth = moving_average(losses, max(1, len(losses) // 15))
        left.plot(range(1, len(smooth) + 1), smooth, color=colour, lw=1.4)
        steps = [step for step, _ in own[0]["accuracies"]]
        means = [statistics.fmean(run["accuracies"][place][1] for run in own) for place in range(len(steps))]
        right.plot(steps, means, "o-", color=colour, lw=1.4, ms=4, label=row.method)
    left.set(xlabel="step", ylabel="cross-entropy", yscale="log")
    left.set_title("training batches (moving average)", loc="left", fontsize=10)
    right.set(xlabel="step", ylabel="accuracy, %")
    validated = any(run["val_images"] for run in results["runs"])
    right.set_title("validation images" if validated else "test images", loc="left", fontsize=10)
    figure.legend(loc="outside right center", frameon=False)
    figure.suptitle(title(results), x=0.01, ha="left", fontweight="bold", fontsize=11)
    return figure


def title(results: dict[str, Any]) -> str:
    name = Path(data_name(results)).name or data_name(results)
    return f"{results['settings']['network']} → {name}, {labels(results['settings'])}"


def method_colours(methods: Sequence[str]) -> dict[str, str]:
    """Each method's own colour, the same in every plot; grey is for plain fine-tuning and the linear probe."""
    palette = ["C0", "C1", "C2", "C3", "C4", "C5", "C6", "C8", "C9"]
    single = [name for name in RECIPES if name not in ("plain", "linear")]
    own = {"plain": "0.35", "linear": "0.65"} | dict(zip(single, palette, strict=True))
    others = [name for name in methods if name not in own]
    return own | {name: f"tab:{COMBINED[place % len(COMBINED)]}" for place, name in enumerate(others)}


def moving_average(values: Sequence[float], width: int) -> list[float]:
    """The mean of each value and the up to ``width`` - 1 values before it."""
    return [statistics.fmean(values[max(0, end - width) : end]) for end in range(1, len(values) + 1)]
