"""The report: tables on the terminal and in Markdown, plots, and an HTML page with all of them."""

import importlib.util
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..images.imageset import ImageSet
from ..plots import STYLE, drawn
from ..storage import write_atomically
from . import trial_report
from .choosing import best_run, best_trial, right_or_wrong
from .comparison import by_method, comparisons, mean_and_deviation, points, span
from .page import Choice, Section, html
from .recipes import RECIPES, canonical

# colours of combined methods, different from matplotlib's C0 to C9
COMBINED = ("black", "gold", "navy", "maroon", "teal", "magenta", "darkolivegreen", "coral", "slateblue", "turquoise")
COLUMNS = ("method", "accuracy, %", "seeds", "s/step", "preparation, s", "peak MiB")
GAINS = ("method", "points above plain", "by itself", "seeds")


@dataclass(frozen=True)
class Row:
    """One method over its seeds: accuracies in %, median times and the largest memory use."""

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
        """The sample standard deviation; None for a single seed."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else None

    def cells(self) -> tuple[str, ...]:
        preparation = f"{self.preparation_seconds:.1f}" if self.preparation_seconds >= 0.05 else "-"
        return (
            self.method,
            mean_and_deviation(self.accuracies),
            str(len(self.accuracies)),
            f"{self.seconds_per_step:.3f}",
            preparation,
            f"{self.peak_mib:.0f}",
        )


def rows(runs: Sequence[dict[str, Any]]) -> list[Row]:
    """One row per method that has runs, in the order of :func:`by_method`."""
    table = []
    for own in by_method(runs).values():
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


def sections(results: dict[str, Any]) -> list[Section]:
    """The report's tables: accuracies, gains over plain fine-tuning, and trials; the last two only if there are any."""
    accuracy = Section(
        "Accuracy by method",
        COLUMNS,
        [row.cells() for row in rows(results["runs"])],
        caption(results),
        plots={
            "accuracy": "Accuracy of each method, a dot for each seed",
            "curves": "Cross-entropy and accuracy over the steps, and accuracy over the training time, by method",
        },
    )
    return [accuracy, *(part for part in (gains(results["runs"]), trial_report.section(results)) if part)]


def gains(runs: Sequence[dict[str, Any]]) -> Section | None:
    """The gains of each method over plain fine-tuning; None if no method has two seeds in common with plain."""
    found = comparisons(runs)
    if not any(len(one.differences) > 1 for one in found):
        return None
    table, bold = [], set()
    for place, one in enumerate(found):
        cells = ["-", "-"]
        if one.mean is not None:
            cells[0] = points(one.mean)
            if one.half_width is not None:
                cells = [f"{cells[0]} ± {one.corrected_half_width:.1f}", span(one.mean, one.half_width)]
        if one.beyond_chance:
            bold.add((place, 1))
        table.append((one.method, *cells, str(len(one.differences))))
    number = found[0].number
    wide = f", corrected so that all {number} hold at once (Bonferroni)" if number > 1 else ""
    meant = (
        f"Mean difference to plain with the same seed ± half its 95 % interval (Student's t){wide}. It is bold in "
        "table.md and report.html if the interval excludes zero. By itself: the interval of one comparison alone. The "
        "intervals are about other seeds, which choose the labelled images and their order, not about other data, "
        "networks or settings."
    )
    return Section("Points above plain", GAINS, table, meant, [one.sentence() for one in found], bold=frozenset(bold))


def text(results: dict[str, Any]) -> str:
    """The tables for a terminal."""
    return "\n" + "\n\n".join(section.text() for section in sections(results))


def markdown(results: dict[str, Any]) -> str:
    """The tables in Markdown, with the command that made them."""
    versions = f"talib_fast {results['talib_fast']}, torch {results['torch']}, Python {results['python']}"
    origin = f"`{results['command']}` ({results['device']}; {versions})"
    return "\n\n".join([*(section.markdown() for section in sections(results)), origin]) + "\n"


def caption(results: dict[str, Any]) -> str:
    """The meaning of the table's figures, in a few sentences."""
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


def choice(results: dict[str, Any]) -> Choice:
    """The run that the page shows in detail: the best one, or the first if nothing chose."""
    runs, best, trial = results["runs"], best_run(results), best_trial(results["trials"])
    run = dict(best or runs[0])
    heading = "The run" if len(runs) == 1 else "The best run" if best else "The first run"
    reason = ""
    if trial and best and canonical(trial["method"]) == canonical(run["method"]):
        right = f"{trial['accuracy']:.1f} % of {len(right_or_wrong(trial)):,} validation images"
        whole = "" if run["val_images"] else " The model was then trained on all labelled images."
        reason = f"Trials chose the method and the settings, which reached {right}.{whole}"
    elif trial:
        reason = f"Trials chose {trial['method']}, but no run of it is finished."
    elif best is None:
        reason = "There are no validation images that could choose the best run (--tune or --method auto would choose)."
    elif len(runs) > 1:
        right = f"{run['val_accuracy']:.1f} % of {run['val_images']:,} validation images"
        reason = f"It was chosen because it reached {right}."
    return Choice(run, heading, reason)


def plots(results: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """A function that draws each plot of the report, by name; empty if matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        return {}
    found: dict[str, Callable[[], Any]] = {
        "accuracy": partial(draw_accuracy, results),
        "curves": partial(draw_curves, results),
    }
    if trial_report.section(results):
        found["trials"] = partial(trial_report.draw, results, title(results), colours(results))
    return found


def files(results: dict[str, Any]) -> list[str]:
    """The names of the report's files, ``results.json`` among them."""
    return ["report.html", "results.json", "table.md", *(f"{name}.png" for name in plots(results))]


def write(results: dict[str, Any], folder: Path, test_images: Callable[[int], ImageSet]) -> None:
    """Write the tables, the page and, if matplotlib is installed, the plots.

    ``test_images(seed)`` gives the images that the seed's runs were tested on.
    """
    write_atomically(folder / "table.md", lambda file: file.write(markdown(results).encode()))
    images: dict[str, bytes] = {}
    drawings = plots(results)
    if drawings:
        import matplotlib

        with matplotlib.rc_context(STYLE):
            images = {name: drawn(draw()) for name, draw in drawings.items()}
    else:
        print("No plots are written, because matplotlib is missing: pip install matplotlib")
    for name in images:
        write_atomically(folder / f"{name}.png", lambda file, name=name: file.write(images[name]))  # type: ignore[misc]
    page = html(results, folder, title(results), sections(results), choice(results), images, test_images)
    write_atomically(folder / "report.html", lambda file: file.write(page.encode()))


def draw_accuracy(results: dict[str, Any]) -> Any:
    """A matplotlib Figure of accuracy by method: a dot per seed, and the mean ± one standard deviation."""
    from matplotlib.figure import Figure

    table = rows(results["runs"])
    shades = colours(results)
    figure = Figure(figsize=(7.2, 1.5 + 0.36 * len(table)), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(table):
        colour = shades[canonical(row.method)]
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
    """A matplotlib Figure of cross-entropy and accuracy over the steps, and of accuracy over time; means over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.6, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    right.sharey(middle)
    shades = colours(results)
    for name, own in by_method(results["runs"]).items():
        losses = means(run["cross_entropies"] for run in own)
        smooth = moving_average(losses, max(1, len(losses) // 15))
        left.plot(range(1, len(smooth) + 1), smooth, color=shades[name], lw=1.4)
        reached = means([accuracy for _, accuracy in run["accuracies"]] for run in own)
        steps = [step for step, _ in own[0]["accuracies"]]
        middle.plot(steps, reached, "o-", color=shades[name], lw=1.4, ms=4, label=own[0]["method"])
        right.plot(means(run["seconds"] for run in own), reached, "o-", color=shades[name], lw=1.4, ms=4)
    left.set(xlabel="step", ylabel="cross-entropy", yscale="log")
    left.set_title("training batches (moving average)", loc="left", fontsize=10)
    images = "validation images" if any(run["val_images"] for run in results["runs"]) else "test images"
    middle.set(xlabel="step", ylabel=f"accuracy on the {images}, %")
    middle.set_title("by steps", loc="left", fontsize=10)
    right.set(xlabel="training time, s")
    right.set_title("by time, without preparation and evaluation", loc="left", fontsize=10)
    figure.legend(loc="outside right center", frameon=False)
    figure.suptitle(title(results), x=0.01, ha="left", fontweight="bold", fontsize=11)
    return figure


def means(series: Iterable[Sequence[float]]) -> list[float]:
    """The element-wise mean of series of equal length."""
    return [statistics.fmean(values) for values in zip(*series, strict=True)]


def title(results: dict[str, Any]) -> str:
    name = Path(data_name(results)).name or data_name(results)
    return f"{results['settings']['network']} → {name}, {labels(results['settings'])}"


def colours(results: dict[str, Any]) -> dict[str, str]:
    """The colour of every method that has runs or trials, by its canonical name."""
    return method_colours(list(by_method([*results["runs"], *results["trials"]])))


def method_colours(methods: Sequence[str]) -> dict[str, str]:
    """Each method's colour, the same in every plot; plain fine-tuning and the linear probe are grey."""
    palette = ["C0", "C1", "C2", "C3", "C4", "C5", "C6", "C8", "C9"]
    single = [name for name in RECIPES if name not in ("plain", "linear")]
    own = {"plain": "0.35", "linear": "0.65"} | dict(zip(single, palette, strict=True))
    combined = [name for name in methods if name not in own]
    return own | {name: COMBINED[place % len(COMBINED)] for place, name in enumerate(combined)}


def moving_average(values: Sequence[float], width: int) -> list[float]:
    """For each value, the mean of it and of up to ``width`` - 1 values before it."""
    return [statistics.fmean(values[max(0, end - width) : end]) for end in range(1, len(values) + 1)]
