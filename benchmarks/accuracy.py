"""Trains all methods on photographs with few and with all labels, and compares each with plain fine-tuning.

    python benchmarks/accuracy.py [--data DIR] [--labels N|all ...] [--seeds N] [--trials N] [-- FINETUNE OPTIONS]

1. All methods and some combinations compete by ``python -m talib_fast finetune --method auto``, at five labels per
   class. The two combinations with the best validation results join the methods.
2. ``finetune --tune`` searches the settings of every method and trains it, for each number of labels per class.
3. The method with the best validation result with all labels is trained again on larger images, as in the literature.

Each step writes to a folder of its own below ``runs/``. After an interrupt, the same command continues. At the end it
writes ``results.json``, ``table.md`` and ``plot.png``. All of it takes five hours on two CPU cores. docs/finetune.md
says where the photographs come from.
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
from torch.utils.flop_counter import FlopCounterMode

from talib_fast import networks
from talib_fast.storage import write_atomically
from talib_fast.training import trial_report
from talib_fast.training.choosing import best_trial, merit
from talib_fast.training.comparison import Comparison, by_method, comparisons, mean_and_deviation, points
from talib_fast.training.page import Section
from talib_fast.training.recipes import RECIPES, canonical
from talib_fast.training.report import method_colours
from talib_fast.training.search import as_arguments

DATA = "groceries"
LABELS = ("2", "5", "all")
SEEDS = {"2": 5, "5": 5, "all": 3}
STEPS = {"2": 120, "5": 120, "all": 400}
TRIALS, SIZE, LARGER_SIZE = 8, 96, 224
COMPETITION = ("5", 2)  # labels per class, and settings of each method, of the competition
COMBINATIONS = (
    *("stochnorm+bss", "l2_sp+stochnorm", "delta_attention+stochnorm", "co_tuning+stochnorm", "lwf+stochnorm"),
    *("bi_tuning+stochnorm", "co_tuning+bss", "lwf+bss"),
)
BEST = 2  # combinations that join the methods
# reported accuracy on these photographs, %, of convolutional networks that the abstract does not name
LITERATURE = ("[Antioquia 2021](https://animorepository.dlsu.edu.ph/faculty_research/9103)", "86.0")


def run_finetune(failure: str, folder: Path, arguments: Sequence[str]) -> dict[str, Any]:
    """Run ``finetune``; returns the results that it writes into ``folder``, or exits with ``failure``."""
    command = [sys.executable, "-m", "talib_fast", "finetune", *arguments]
    if subprocess.run(command).returncode:
        sys.exit(f"{failure}: see above")
    return json.loads((folder / "results.json").read_text())


def finetune(
    name: str,
    labels: str,
    methods: Sequence[str],
    trials: int,
    options: argparse.Namespace,
    *,
    size: int = SIZE,
    settings: Sequence[str] = (),
) -> Any:
    """The results of ``finetune`` for some methods with ``labels`` per class.

    Args:
        name: name of the output folder.
        labels: number of labels per class, or ``all``.
        methods: the methods.
        trials: number of trials of each method.
        options: the options of this script.
        size: side of the images in pixels.
        settings: further options of ``finetune``.
    """
    folder = options.runs / name
    if options.gather:
        return json.loads((folder / "results.json").read_text())
    arguments = ["--data", str(options.data), "--labels-per-class", labels, "--image-size", str(size)]
    arguments += ["--steps", str(STEPS.get(labels, STEPS["5"])), "--evaluations", "1", "--keep", "none"]
    arguments += ["--method", ",".join(methods), "--tune", str(trials), "--out", str(folder)]
    arguments += ["--seeds", str(options.seeds or SEEDS.get(labels, SEEDS["5"]))]
    return run_finetune(f"accuracy.py: no results in {folder}", folder, [*arguments, *settings, *options.finetune])


def on_larger_images(found: Mapping[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """The method with the best validation result with all labels, trained with the settings found before."""
    best = best_trial(found["trials"])
    assert best is not None
    settings = as_arguments(best["settings"])
    results = finetune("larger", "all", [best["method"]], 1, options, size=LARGER_SIZE, settings=settings)
    return {
        "multiply_adds": multiply_adds(results["settings"]["network"], results["settings"]["image_size"]),
        "runs": runs("image_size", {results["settings"]["image_size"]: results}),
    }


def best_combinations(trials: Sequence[Mapping[str, Any]]) -> list[str]:
    """The combinations that reached the last rungs of the competition, the best of them first."""
    best: dict[str, Mapping[str, Any]] = {}
    for name in COMBINATIONS:
        own = best_trial([trial for trial in trials if canonical(trial["method"]) == canonical(name)])
        if own is not None:
            best[name] = own
    return sorted(best, key=lambda name: (best[name]["steps"], merit(best[name])), reverse=True)[:BEST]


def same_commit(environment: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """The environment in which the runs were started; exits if this commit is another one and would train more."""
    path = options.runs / "environment.json"
    if path.exists():
        started = json.loads(path.read_text())
        if started["commit"] != environment["commit"] and not options.gather:
            sys.exit(
                f"accuracy.py: {options.runs} holds runs of commit {started['commit']}, and this is "
                f"{environment['commit']}: choose another --runs, go back to that commit, or --gather what is finished"
            )
        return started
    write_atomically(path, lambda file: file.write(json.dumps(environment, indent=1).encode()))
    return environment


def runs(name: str, found: Mapping[Any, dict[str, Any]]) -> list[dict[str, Any]]:
    """The kept entries of the runs of several commands, which differ in the setting ``name``."""
    kept = ("method", "seed", "accuracy", "seconds_per_step", "chosen")
    return [
        {name: value, **{key: run[key] for key in kept if key in run}}
        for value, results in found.items()
        for run in results["runs"]
    ]


def searched(found: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The kept entries of the trials of several commands, by number of labels per class."""
    kept = ("method", "number", "settings", "steps", "rung", "state", "accuracy", "cross_entropy", "seconds")
    return [
        {"labels_per_class": labels, **{key: trial[key] for key in kept}}
        for labels, results in found.items()
        for trial in results["trials"]
    ]


def collect(options: argparse.Namespace) -> dict[str, Any]:
    """All runs and trials, and what they share."""
    environment = same_commit(report.environment(torch.device("cpu")), options)
    labels, settings = COMPETITION
    names = ["auto", *COMBINATIONS]
    competition = finetune("auto", labels, names, min(settings, options.trials), options)
    methods = [*RECIPES, *best_combinations(competition["trials"])]
    found = {
        labels: finetune(f"labels-{labels}", labels, methods, options.trials, options) for labels in options.labels
    }
    first = next(iter(found.values()))
    differing = ("labels_per_class", "steps", "test_images", "candidates")
    larger = {"larger": on_larger_images(found["all"], options)} if "all" in found else {}
    return {
        "environment": environment,
        "settings": {name: value for name, value in first["settings"].items() if name not in differing}
        | {"steps": {labels: results["settings"]["steps"] for labels, results in found.items()}},
        "data": {
            "classes": len(first["data"]["classes"]),
            "test_images": first["runs"][0]["test_images"],
            "train_images": {labels: results["runs"][0]["train_images"] for labels, results in found.items()},
        },
        "multiply_adds": multiply_adds(first["settings"]["network"], first["settings"]["image_size"]),
        "competition": {
            "settings": competition["settings"],
            "table": [list(row) for row in closest(competition).rows],
            "caption": closest(competition).caption,
            "findings": list(closest(competition).findings),
            "runs": runs("labels_per_class", {labels: competition}),
        },
        "judged": {labels: judged(results) for labels, results in found.items()},
        **larger,
        "trials": searched(found),
        "runs": runs("labels_per_class", found),
    }


def multiply_adds(name: str, size: int) -> int:
    """The multiply-adds of a forward pass of one image through the network without its head."""
    backbone = networks.build(name, size).backbone.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        backbone(torch.zeros(1, 3, size, size))
    return counter.get_total_flops() // 2


def closest(competition: Mapping[str, Any]) -> Section:
    """The section about the candidates in the report of the competition."""
    found = trial_report.section(competition)
    assert found is not None
    return found


def judged(results: Mapping[str, Any]) -> str:
    """The sentence about the images that judged the trials."""
    return trial_report.judged_on(results["trials"][0])


def counts(results: Mapping[str, Any]) -> list[str]:
    """The numbers of labels per class, in the order of the runs."""
    return list(dict.fromkeys(run["labels_per_class"] for run in results["runs"]))


def of(results: Mapping[str, Any], labels: str) -> list[dict[str, Any]]:
    return [run for run in results["runs"] if run["labels_per_class"] == labels]


def methods(results: Mapping[str, Any]) -> list[str]:
    """The methods that have runs, in their usual order, then the combinations."""
    return [own[0]["method"] for own in by_method(results["runs"]).values()]


def headings(results: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple("all labels" if labels == "all" else f"{labels} labels per class" for labels in counts(results))


def gains(results: Mapping[str, Any], labels: str) -> dict[str, Comparison]:
    """The comparison of each method with plain fine-tuning, with ``labels`` per class."""
    return {one.method: one for one in comparisons(of(results, labels))}


def accuracies(results: Mapping[str, Any]) -> Section:
    rows = []
    for method in methods(results):
        cells = [method]
        for labels in counts(results):
            own = [run["accuracy"] for run in of(results, labels) if run["method"] == method]
            cells.append(mean_and_deviation(own))
        rows.append(tuple(cells))
    settings, data = results["settings"], results["data"]
    lengths = ", ".join(
        f"{results['settings']['steps'][labels]:,} ({heading}, {data['train_images'][labels]:,} images)"
        for labels, heading in zip(counts(results), headings(results), strict=True)
    )
    seeds = ", ".join(str(len({run["seed"] for run in of(results, labels)})) for labels in counts(results))
    caption = (
        f"Accuracy on the {data['test_images']:,} test images, %, mean ± sample standard deviation over seeds "
        f"({seeds}): {settings['network']} on {data['classes']} products, {settings['image_size']} pixels "
        f"({results['multiply_adds'] / 1e6:.0f} million multiply-adds an image), steps of {settings['batch_size']} "
        f"images: {lengths}."
    )
    return Section("Accuracy", ("method", *headings(results)), rows, caption)


def gained(results: Mapping[str, Any]) -> Section:
    found = {labels: gains(results, labels) for labels in counts(results)}
    rows, bold = [], set()
    for place, method in enumerate(name for name in methods(results) if name != "plain"):
        cells = [method]
        for column, own in enumerate(found.values(), 1):
            one = own[method]
            assert one.mean is not None and one.half_width is not None and one.corrected_half_width is not None
            cells.append(f"{points(one.mean)} ± {one.half_width:.1f} ({one.corrected_half_width:.1f})")
            if one.beyond_chance:
                bold.add((place, column))
        rows.append(tuple(cells))
    number = next(iter(next(iter(found.values())).values())).number
    caption = (
        "Points above plain fine-tuning with the same seed, mean ± half the 95 % interval of one comparison (in "
        f"brackets: so wide that all {number} of a column hold at once); bold where the wide one leaves out zero. "
        "Intervals are for other seeds, not for other settings, which a longer search may find."
    )
    findings = [
        f"{heading}: {one.sentence()}"
        for (labels, own), heading in zip(found.items(), headings(results), strict=True)
        for one in own.values()
    ]
    return Section("Gains", ("method", *headings(results)), rows, caption, findings, bold=frozenset(bold))


def trials_of(results: Mapping[str, Any], labels: str, method: str) -> list[dict[str, Any]]:
    return [trial for trial in results["trials"] if (trial["labels_per_class"], trial["method"]) == (labels, method)]


def again(results: Mapping[str, Any], labels: str, method: str, size: int | None = None) -> str:
    """The command that repeats all seeds of a cell of the table, or does so with another size of images."""
    best = best_trial(trials_of(results, labels, method))
    assert best is not None
    words = ["python -m talib_fast finetune --data", DATA, "--labels-per-class", labels, "--method", method]
    words += ["--image-size", str(size or results["settings"]["image_size"]), "--steps", str(best["steps"])]
    words += ["--evaluations 1", "--seeds", str(len({run["seed"] for run in of(results, labels)}))]
    if labels == "all":
        words.append("--tune 1")  # so that the images that judged the trials are trained on too
    return " ".join([*words, *as_arguments(best["settings"])])


def settings_found(results: Mapping[str, Any]) -> Section:
    rows = []
    for labels in counts(results):
        for method in methods(results):
            own = trials_of(results, labels, method)
            best, default = best_trial(own), best_trial([trial for trial in own if trial["number"] == 0])
            if best is not None:
                words = " ".join(as_arguments({name: rounded(value) for name, value in best["settings"].items()}))
                before = "-" if default is None else f"{default['accuracy']:.1f}"
                rows.append((method, labels, words, f"{best['accuracy']:.1f}", before))
    hours = sum(trial["seconds"] for trial in results["trials"]) / 3600
    ways = " ".join(
        f"{heading}: {results['judged'][labels]}"
        for labels, heading in zip(counts(results), headings(results), strict=True)
    )
    caption = (
        f"What {results['settings']['tune']} trials of each method found, {hours:.1f} hours in all, the first of them "
        f"with the defaults. {ways} Validation accuracies are too high where they chose; no test image chose anything."
    )
    columns = ("method", "labels per class", "settings found", "validation accuracy, %", "with the defaults, %")
    labels = counts(results)[0]
    best = best_trial([trial for trial in results["trials"] if trial["labels_per_class"] == labels])
    assert best is not None
    finding = f"One cell again, {best['method']} in the first column: `{again(results, labels, best['method'])}`"
    return Section("Settings", columns, rows, caption, [finding], words=(0, 2))


def rounded(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.3g}")


def competition(results: Mapping[str, Any]) -> Section:
    found = results["competition"]
    reached = [run["accuracy"] for run in found["runs"]]
    winner = found["runs"][0]["method"]
    findings = [
        *found["findings"],
        f"The winner, {winner}, trained on all labelled images, reaches {statistics.fmean(reached):.1f} % of the test "
        f"images, mean over {len(reached)} seeds.",
    ]
    rows = [tuple(row) for row in found["table"]]
    return Section(
        "Competition", trial_report.HALVED, rows, found["caption"], findings, words=(0, len(trial_report.HALVED) - 1)
    )


def beside_literature(results: Mapping[str, Any]) -> Section:
    larger = results["larger"]["runs"]
    method, size = larger[0]["method"], larger[0]["image_size"]
    smaller = [run for run in of(results, "all") if run["method"] == method]
    settings, pixels = results["settings"], results["settings"]["image_size"]
    rows = []
    for side, count, own in (
        (pixels, results["multiply_adds"], smaller),
        (size, results["larger"]["multiply_adds"], larger),
    ):
        minutes = settings["steps"]["all"] * statistics.median(run["seconds_per_step"] for run in own) / 60
        reached = mean_and_deviation([run["accuracy"] for run in own])
        rows.append((f"{settings['network']}, {method}", f"{side}", f"{count / 1e6:.0f}", f"{minutes:.1f}", reached))
    rows.append((LITERATURE[0], "-", "-", "-", LITERATURE[1]))
    caption = (
        f"With all labels, the method that validation likes best, with the settings found for images of {pixels} "
        f"pixels, and no search for those of {size}: accuracy on the test images, %, mean ± sample standard deviation "
        f"over {len(larger)} seeds. The last row is of convolutional networks that its abstract does not name."
    )
    finding = f"The larger images again: `{again(results, 'all', method, size)}`"
    columns = ("what", "pixels", "multiply-adds an image, millions", "training, min", "accuracy, %")
    return Section("Beside the literature", columns, rows, caption, [finding])


def sections(results: Mapping[str, Any]) -> list[Section]:
    found = [accuracies(results), gained(results), settings_found(results), competition(results)]
    return [*found, beside_literature(results)] if "larger" in results else found


def draw(results: Mapping[str, Any]) -> Any:
    """The figure: the gain of each method by seed, its mean and both intervals, a panel per number of labels.

    All panels have the same axis, with zero in the middle. The seeds and the narrow intervals fill two thirds of it.
    The wide intervals may end outside, because with three seeds they are many times as wide.
    """
    from matplotlib.figure import Figure

    shown = [name for name in methods(results) if name != "plain"]
    colours = method_colours([canonical(name) for name in shown])
    figure = Figure(figsize=(3.4 + 2.6 * len(counts(results)), 1.4 + 0.32 * len(shown)), layout="constrained")
    grid = figure.subplots(1, len(counts(results)), sharey=True, squeeze=False)[0]
    found = {labels: gains(results, labels) for labels in counts(results)}
    every = [one for own in found.values() for one in own.values()]
    seeds = [abs(difference) for one in every for difference in one.differences.values()]
    limit = 1.5 * max(*seeds, *(abs(one.mean or 0) + (one.half_width or 0) for one in every)) or 1.0
    for axes, labels, heading in zip(grid, counts(results), headings(results), strict=True):
        for place, method in enumerate(shown):
            one, colour = found[labels][method], colours[canonical(method)]
            own = list(one.differences.values())
            axes.plot(own, [place] * len(own), "o", color=colour, alpha=0.35, ms=4, mew=0)
            axes.errorbar(one.mean, place, xerr=one.corrected_half_width, color=colour, lw=0.8, capsize=2)
            axes.errorbar(one.mean, place, xerr=one.half_width, fmt="D", color=colour, ms=4.5, lw=2.2)
        axes.set_xlim(-limit, limit)
        axes.axvline(0, color="0.35", lw=1, ls=(0, (4, 3)), zorder=0)
        axes.set_title(heading, fontsize=10)
        axes.set_yticks(range(len(shown)), shown)
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
    figure.supxlabel("points above plain fine-tuning", fontsize=10)
    title = "Gain over plain fine-tuning: seeds, mean, its 95 % interval (thick) and one for all of a panel at once"
    figure.suptitle(title, fontsize=11)
    return figure


def publish(results: dict[str, Any], folder: Path) -> None:
    """Print the tables, and write them, the plot and the figures."""
    text = json.dumps({**results, "trials": [], "runs": []}, indent=1)
    for name in ("trials", "runs"):
        lines = ",\n".join(json.dumps(one) for one in results[name])
        text = text.replace(f'"{name}": []', f'"{name}": [\n{lines}\n]')
    write_atomically(folder / "results.json", lambda file: file.write(f"{text}\n".encode()))
    report.write_sections(sections(results), results["environment"], folder)
    report.write_plot(folder / "plot.png", partial(draw, results))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--data", type=Path, default=Path(DATA), metavar="DIR", help="%(default)s")
    made.add_argument("--labels", nargs="+", default=LABELS, metavar="N|all", help="per class; %(default)s")
    made.add_argument("--seeds", type=int, help=f"2 or more ({SEEDS})")
    made.add_argument("--trials", type=int, default=TRIALS, help="of each method's settings (%(default)s)")
    made.add_argument("--runs", type=Path, default=Path("runs/accuracy"), metavar="DIR", help="%(default)s")
    made.add_argument("--out", type=Path, help="folder; results/ beside this file, --runs for anything but a full run")
    made.add_argument("--gather", action="store_true", help="train nothing, put together what is in --runs")
    made.add_argument("--from-json", type=Path, metavar="DIR", help="train nothing, write tables and plot anew")
    made.add_argument("finetune", nargs="*", metavar="-- OPTIONS", help="further options of finetune")
    options = made.parse_args(arguments)
    if options.seeds is not None and options.seeds < 2:
        made.error(f"expected 2 seeds or more, got {options.seeds}")
    return options


def place(options: argparse.Namespace, device: str) -> Path:
    """The folder of the results. Only a full run writes to ``results`` beside this file."""
    whole = set(options.labels) >= set(LABELS) and options.seeds is None and options.trials >= TRIALS
    return options.out or (command.RESULTS / device / "accuracy" if whole else options.runs)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    command.collect_and_publish(options, collect, publish, partial(place, options))


if __name__ == "__main__":
    main()
