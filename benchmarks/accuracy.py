"""Trains all methods on photographs with few and with all labels: what each is worth beside plain fine-tuning.

    python benchmarks/accuracy.py [--data DIR] [--labels N|all ...] [--seeds N] [--trials N] [-- FINETUNE OPTIONS]

First all methods and some combinations compete, by ``python -m talib_fast finetune --method auto`` at five labels per
class; the two combinations that validation likes best join the methods. Then ``finetune --tune`` searches every
method's settings and trains it, for each number of labels per class. Everything goes to folders of its own below
``runs/``, and an interrupted command goes on where it stopped; ``results.json``, ``table.md`` and ``plot.png`` are
written at the end. Five hours on two CPU cores. The photographs: docs/finetune.md says where they come from.
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
from talib_fast.training.comparison import Comparison, by_method, comparisons, points
from talib_fast.training.page import Section
from talib_fast.training.recipes import RECIPES, canonical
from talib_fast.training.report import method_colours
from talib_fast.training.search import as_arguments

DATA = "groceries"
LABELS = ("2", "5", "all")
SEEDS = {"2": 5, "5": 5, "all": 3}
STEPS = {"2": 120, "5": 120, "all": 400}
TRIALS, SIZE = 8, 96
COMPETITION = ("5", 2)  # labels per class, and settings of each method, of the competition
COMBINATIONS = (
    *("stochnorm+bss", "l2_sp+stochnorm", "delta_attention+stochnorm", "co_tuning+stochnorm", "lwf+stochnorm"),
    *("bi_tuning+stochnorm", "co_tuning+bss", "lwf+bss"),
)
BEST = 2  # combinations that join the methods


def main_job(failure: str, folder: Path, arguments: Sequence[str]) -> dict[str, Any]:
    """What ``finetune`` with these arguments writes into ``folder``; ``failure`` is said where it fails."""
    command = [sys.executable, "-m", "talib_fast", "finetune", *arguments]
    if subprocess.run(command).returncode:
        sys.exit(f"{failure}: see above")
    return json.loads((folder / "results.json").read_text())


def finetune(name: str, labels: str, methods: Sequence[str], trials: int, options: argparse.Namespace) -> Any:
    """The main job's results for these methods with that many labels per class, in a folder of that name."""
    folder = options.runs / name
    if options.gather:
        return json.loads((folder / "results.json").read_text())
    arguments = ["--data", str(options.data), "--labels-per-class", labels, "--image-size", str(SIZE)]
    arguments += ["--steps", str(STEPS.get(labels, STEPS["5"])), "--evaluations", "1", "--keep", "none"]
    arguments += ["--method", ",".join(methods), "--tune", str(trials), "--out", str(folder)]
    arguments += ["--seeds", str(options.seeds or SEEDS.get(labels, SEEDS["5"]))]
    return main_job(f"accuracy.py: no results in {folder}", folder, [*arguments, *options.finetune])


def best_combinations(trials: Sequence[Mapping[str, Any]]) -> list[str]:
    """The combinations that went farthest in the competition, and there were the best."""
    best: dict[str, Mapping[str, Any]] = {}
    for name in COMBINATIONS:
        own = best_trial([trial for trial in trials if canonical(trial["method"]) == canonical(name)])
        if own is not None:
            best[name] = own
    return sorted(best, key=lambda name: (best[name]["steps"], merit(best[name])), reverse=True)[:BEST]


def same_commit(environment: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """The environment that the runs were started in; ends where more would be trained at another commit."""
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


def runs(name: str, found: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """What is kept of the runs of several main jobs, which differ in the setting of that name."""
    kept = ("method", "seed", "accuracy", "seconds_per_step", "chosen")
    return [
        {name: value, **{key: run[key] for key in kept if key in run}}
        for value, results in found.items()
        for run in results["runs"]
    ]


def searched(found: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """What is kept of their trials: settings and what came of them."""
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
        "trials": searched(found),
        "runs": runs("labels_per_class", found),
    }


def multiply_adds(name: str, size: int) -> int:
    """Of the forward pass of one image through the network without its head."""
    backbone = networks.build(name, size).backbone.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        backbone(torch.zeros(1, 3, size, size))
    return counter.get_total_flops() // 2


def closest(competition: Mapping[str, Any]) -> Section:
    """What the competition's own report says of its candidates."""
    found = trial_report.section(competition)
    assert found is not None
    return found


def judged(results: Mapping[str, Any]) -> str:
    """By what trials were judged, in words."""
    return trial_report.judged_on(results["trials"][0])


def counts(results: Mapping[str, Any]) -> list[str]:
    """The numbers of labels per class, in their order."""
    return list(dict.fromkeys(run["labels_per_class"] for run in results["runs"]))


def of(results: Mapping[str, Any], labels: str) -> list[dict[str, Any]]:
    return [run for run in results["runs"] if run["labels_per_class"] == labels]


def methods(results: Mapping[str, Any]) -> list[str]:
    """Those that have runs, in their usual order, combinations behind them."""
    return [own[0]["method"] for own in by_method(results["runs"]).values()]


def headings(results: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple("all labels" if labels == "all" else f"{labels} labels per class" for labels in counts(results))


def gains(results: Mapping[str, Any], labels: str) -> dict[str, Comparison]:
    """Each method beside plain fine-tuning with that many labels."""
    return {one.method: one for one in comparisons(of(results, labels))}


def accuracies(results: Mapping[str, Any]) -> Section:
    rows = []
    for method in methods(results):
        cells = [method]
        for labels in counts(results):
            own = [run["accuracy"] for run in of(results, labels) if run["method"] == method]
            cells.append(f"{statistics.fmean(own):.1f} ± {statistics.stdev(own):.1f}")
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


def again(results: Mapping[str, Any], labels: str, method: str) -> str:
    """The command that repeats a cell of the table, all seeds of it."""
    best = best_trial(trials_of(results, labels, method))
    assert best is not None
    words = ["python -m talib_fast finetune --data", DATA, "--labels-per-class", labels, "--method", method]
    words += ["--image-size", str(results["settings"]["image_size"]), "--steps", str(best["steps"])]
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
    best = max(
        (trial for method in methods(results) if (trial := best_trial(trials_of(results, labels, method)))), key=merit
    )
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


def sections(results: Mapping[str, Any]) -> list[Section]:
    return [accuracies(results), gained(results), settings_found(results), competition(results)]


def draw(results: Mapping[str, Any]) -> Any:
    """A panel per number of labels: what each method gains by seed, the mean and both of its intervals.

    The wider interval, which with three seeds is many times as wide, may end outside of its panel.
    """
    from matplotlib.figure import Figure

    shown = [name for name in methods(results) if name != "plain"]
    colours = method_colours([canonical(name) for name in shown])
    figure = Figure(figsize=(3.4 + 2.6 * len(counts(results)), 1.4 + 0.32 * len(shown)), layout="constrained")
    grid = figure.subplots(1, len(counts(results)), sharey=True, squeeze=False)[0]
    for axes, labels, heading in zip(grid, counts(results), headings(results), strict=True):
        for place, method in enumerate(shown):
            one, colour = gains(results, labels)[method], colours[canonical(method)]
            own = list(one.differences.values())
            axes.plot(own, [place] * len(own), "o", color=colour, alpha=0.35, ms=4, mew=0)
            axes.errorbar(one.mean, place, xerr=one.corrected_half_width, color=colour, lw=0.8, capsize=2)
            axes.errorbar(one.mean, place, xerr=one.half_width, fmt="D", color=colour, ms=4.5, lw=2.2)
        ends = [(one.mean or 0, one.half_width or 0) for one in gains(results, labels).values()]
        axes.set_xlim(1.15 * min(mean - half for mean, half in ends), 1.15 * max(mean + half for mean, half in ends))
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
    made.add_argument("finetune", nargs="*", metavar="-- OPTIONS", help="options of the main job")
    options = made.parse_args(arguments)
    if options.seeds is not None and options.seeds < 2:
        made.error(f"expected 2 seeds or more, got {options.seeds}")
    return options


def place(options: argparse.Namespace, device: str) -> Path:
    """Only a full run writes beside the benchmarks."""
    whole = set(options.labels) >= set(LABELS) and options.seeds is None and options.trials >= TRIALS
    return options.out or (command.RESULTS / device / "accuracy" if whole else options.runs)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    command.collect_and_publish(options, collect, publish, partial(place, options))


if __name__ == "__main__":
    main()
