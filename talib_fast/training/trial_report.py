"""The report of trials: the settings that they found, or how close the candidates of successive halving came."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import count
from .choosing import best_trial, merit, right_or_wrong
from .comparison import by_method, paired_images, points
from .page import Section
from .recipes import RECIPES, canonical, parse
from .search import in_words

Trial = Mapping[str, Any]
TUNED = ("method", "validation accuracy, %", "with the defaults, %", "finished", "pruned", "time, s", "settings found")
HALVED = ("method", "steps", "validation accuracy, %", "winner's at that step, %", "difference, points", "settings")
CHOSEN = (
    "Accuracies are of validation images; test images choose nothing. The best accuracy is a little too high, since it "
    "is the best of many."
)
MOST_COLUMNS = 4
RATIOS = 10.0  # the colours range from a tenth to ten times the default trade-off; values outside are clipped


def section(results: Mapping[str, Any]) -> Section | None:
    """The section about the trials; None if no trial is finished."""
    winner = best_trial(results["trials"])
    if winner is None:
        return None
    return halving(results, winner) if halved(results) else tuning(results, winner)


def halved(results: Mapping[str, Any]) -> bool:
    return results["settings"]["candidates"] is not None


def tuning(results: Mapping[str, Any], winner: Trial) -> Section:
    """The section of ``--tune``: the settings that were found for each method."""
    trials = results["trials"]
    budget = (
        f"Each method had {count(results['settings']['tune'], 'trial')} of {count(winner['steps'], 'step')}, and "
        f"trials that fell behind were pruned: {count(len(trials), 'trial')} in {duration(trials)}."
    )
    return Section(
        "Settings found by trials",
        TUNED,
        [tuned_cells(own) for own in by_method(trials).values()],
        f"{budget} {judged_on(winner)} {CHOSEN}",
        words=(0, len(TUNED) - 1),
        plots={"trials": "Validation accuracy of each trial by learning rate, a panel for each method"},
    )


def tuned_cells(own: Sequence[Trial]) -> tuple[str, ...]:
    """The row of a method: its best trial, the trial with the defaults, and the cost of the search."""
    best = best_trial(own)
    default = best_trial([trial for trial in own if trial["number"] == 0])
    states = Counter(trial["state"] for trial in own)
    return (
        own[0]["method"],
        *("-" if trial is None else f"{trial['accuracy']:.1f}" for trial in (best, default)),
        str(states["finished"]),
        str(states["pruned"]),
        f"{sum(trial.get('seconds', 0.0) for trial in own):.0f}",
        "-" if best is None else words(best),
    )


@dataclass(frozen=True)
class Rival:
    """A method's best candidate compared with the winner, in the last rung that the candidate reached.

    Attributes:
        difference: points above the winner after the same steps, on the same images.
        half_width: half the 95 % interval of the difference, corrected so that all rivals' intervals hold at once.
    """

    trial: Trial
    winner: Trial
    difference: float
    half_width: float

    @property
    def told_apart(self) -> bool:
        return abs(self.difference) > self.half_width

    def cells(self) -> tuple[str, ...]:
        difference = f"{points(self.difference)} ± {self.half_width:.1f}"
        return candidate_cells(self.trial, f"{self.winner['accuracy']:.1f}", difference)


def candidate_cells(trial: Trial, winners: str, difference: str) -> tuple[str, ...]:
    return trial["method"], f"{trial['steps']:,}", f"{trial['accuracy']:.1f}", winners, difference, words(trial)


def rivals(trials: Sequence[Trial], winner: Trial) -> list[Rival]:
    """The other methods' best candidates, those that reached the latest rung first."""
    best = [best_trial(own) for name, own in by_method(trials).items() if name != canonical(winner["method"])]
    ranked = sorted((trial for trial in best if trial), key=lambda trial: (trial["steps"], merit(trial)), reverse=True)
    winners = {trial["rung"]: trial for trial in trials if candidate(trial) == candidate(winner)}
    found = []
    for trial in ranked:
        same = winners[trial["rung"]]
        found.append(Rival(trial, same, *paired_images(right_or_wrong(trial), right_or_wrong(same), len(ranked))))
    return found


def halving(results: Mapping[str, Any], winner: Trial) -> Section:
    """The section of ``--method auto``: how close the other methods came to the winner."""
    trials = results["trials"]
    behind = rivals(trials, winner)
    return Section(
        "The best method by successive halving",
        HALVED,
        [candidate_cells(winner, "-", "-"), *(rival.cells() for rival in behind)],
        " ".join(
            [
                halving_budget(results),
                judged_on(winner),
                "Each row compares a method's best candidate with the winner after the same steps: the difference ± "
                "half its 95 % interval over the images (Agresti and Min), corrected so that all hold at once "
                "(Bonferroni).",
                CHOSEN,
            ]
        ),
        closeness(winner, behind),
        words=(0, len(HALVED) - 1),
        plots={"trials": "Validation accuracy of each candidate over the steps of the rungs"},
    )


def halving_budget(results: Mapping[str, Any]) -> str:
    trials, settings = results["trials"], results["settings"]
    sizes = Counter(trial["steps"] for trial in trials)
    rungs = ", ".join(f"{number} of {steps:,} steps" for steps, number in sorted(sizes.items()))
    methods = count(len(settings["candidates"]), "method")
    return (
        f"{methods} with {count(settings['tune'], 'setting')} each competed, and the better half of each rung went on: "
        f"{rungs}, in {duration(trials)}."
    )


def closeness(winner: Trial, rivals: Sequence[Rival]) -> list[str]:
    """Sentences that say which methods differ from the winner by more than chance."""
    close = [rival.trial["method"] for rival in rivals if not rival.told_apart]
    behind = [rival for rival in rivals if rival.told_apart]
    found = []
    if close:
        found.append(f"These images show no difference to {winner['method']} for {', '.join(close)}.")
    if behind:
        names = ", ".join(rival.trial["method"] for rival in behind)
        found.append(f"Worse than {winner['method']} beyond chance, after the same steps: {names}.")
    if any(rival.trial["steps"] < winner["steps"] for rival in rivals):
        found.append(f"Candidates with fewer than {winner['steps']:,} steps might have caught up with more steps.")
    return found


def candidate(trial: Trial) -> tuple[str, int]:
    """The key that identifies a candidate in all rungs."""
    return canonical(trial["method"]), trial["number"]


def judged_on(trial: Trial) -> str:
    folds = f" in {trial['of_folds']} folds" if trial["of_folds"] > 1 else ""
    return f"Judged by {count(len(right_or_wrong(trial)), 'validation image')}{folds}."


def words(trial: Trial) -> str:
    """A trial's settings."""
    return "defaults" if trial["number"] == 0 else in_words(trial["settings"])


def duration(trials: Sequence[Trial]) -> str:
    """The total time of the trials, in words."""
    seconds = sum(trial.get("seconds", 0.0) for trial in trials)
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.0f} s"


def draw(results: Mapping[str, Any], title: str, colours: Mapping[str, str]) -> Any:
    """The plot of the trials, a matplotlib Figure; ``colours`` maps canonical names of methods to colours."""
    figure = draw_rungs(results, colours) if halved(results) else draw_search(results)
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=11)
    return figure


def draw_rungs(results: Mapping[str, Any], colours: Mapping[str, str]) -> Any:
    """Validation accuracy over the steps of the rungs: one line per candidate, the winner's thicker."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, NullLocator

    trials = [trial for trial in results["trials"] if "accuracy" in trial]
    winner = best_trial(trials)
    figure = Figure(figsize=(8.4, 4.4), layout="constrained")
    axes = figure.subplots()
    for name, own in by_method(trials).items():
        label: str | None = own[0]["method"]
        for number in sorted({trial["number"] for trial in own}):
            line = sorted((trial["steps"], trial["accuracy"]) for trial in own if trial["number"] == number)
            won = winner is not None and (name, number) == candidate(winner)
            style: dict[str, Any] = {"lw": 3.0, "ms": 8, "zorder": 3} if won else {"lw": 1.1, "ms": 4, "alpha": 0.8}
            axes.plot(*zip(*line, strict=True), "o-", color=colours[name], label=label, **style)
            label = None
    steps = sorted({trial["steps"] for trial in trials})
    axes.set(xscale="log", xlabel="steps", ylabel="validation accuracy, %")
    axes.set_xticks(steps, [f"{value:,}" for value in steps])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_title("a line for each candidate; thick: the winner", loc="left", fontsize=9, color="0.35")
    figure.legend(loc="outside right center", frameon=False)
    return figure


def draw_search(results: Mapping[str, Any]) -> Any:
    """Validation accuracy by learning rate: one panel per method; combinations have one panel per trade-off."""
    import matplotlib
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    judged = by_method(trial for trial in results["trials"] if "accuracy" in trial)
    panels = [(own, part) for own in judged.values() for part in searched(own)]
    columns = min(MOST_COLUMNS, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(2.0 + 2.3 * columns, 1.5 + 2.0 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).ravel()
    scale = ScalarMappable(LogNorm(1 / RATIOS, RATIOS, clip=True), matplotlib.colormaps["viridis"])
    for axes in grid[len(panels) :]:
        axes.remove()
    for axes, (own, part) in zip(grid, panels, strict=False):
        draw_panel(axes, own, part, scale, results["settings"])
    for axes in grid[: len(panels)][-columns:]:
        axes.tick_params(labelbottom=True)  # matplotlib labels only the last row, which may not be full
    figure.supxlabel("learning rate", fontsize=10)
    figure.supylabel("validation accuracy, %", fontsize=10)
    if any(part for _, part in panels):
        bar = figure.colorbar(scale, ax=list(grid[: len(panels)]), aspect=30, pad=0.02, format="%g")
        bar.set_label("trade-off / its default")
    marks = {"trial": "o", "defaults": "s", "chosen": "*"}
    key = [Line2D([], [], marker=mark, ls="", color="0.4", ms=6, label=name) for name, mark in marks.items()]
    pruned = Line2D([], [], marker="o", ls="", color="0.4", mfc="none", ms=6, label="pruned")
    figure.legend(handles=[*key, pruned], loc="outside upper right", ncols=4, frameon=False)
    return figure


def draw_panel(axes: Any, own: Sequence[Trial], part: str | None, scale: Any, settings: Mapping[str, Any]) -> None:
    """Draw one method's trials, coloured by the trade-off of one of its parts."""
    best = best_trial(own)
    for trial in own:
        found = trial["settings"]
        colour: Any = "0.4"
        if part:
            default = RECIPES[part].trade_off
            colour = scale.to_rgba(max(found.get(trade_off(part), default) / default, 1 / RATIOS))
        mark, size = ("*", 13) if trial is best else ("s" if trial["number"] == 0 else "o", 5)
        axes.plot(
            found.get("lr", settings["lr"]),
            trial["accuracy"],
            mark,
            color=colour,
            mfc="none" if trial["state"] == "pruned" else colour,
            mec="black" if trial is best else colour,
            ms=size,
        )
    method = own[0]["method"]
    axes.set_title(method if part in (None, method) else f"{method}\n{part}", fontsize=9)
    axes.set_xscale("log")


def searched(own: Sequence[Trial]) -> list[str | None]:
    """The parts of a method whose trade-offs were searched; ``[None]`` if there are none."""
    parts = [part for part in parse(own[0]["method"]) if any(trade_off(part) in trial["settings"] for trial in own)]
    return [*parts] or [None]


def trade_off(part: str) -> str:
    return f"trade_off {part}"
