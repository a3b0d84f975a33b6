"""Trials of a method's settings, judged by labelled images that are not test images."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import count
from . import parallel, search
from .data import TaskData
from .experiment import Experiment
from .options import VAL_SHARE
from .recipes import canonical
from .results import Results
from .splits import Shares, Splits, folded, split
from .trainer import DivergedError, Record

FOLDS = 3
FEW = 100  # if a share for validation has fewer images, trials are judged by cross-validation instead
EVALUATIONS = 6  # evaluations of each fold, if a trial may be pruned after one


def judges(experiment: Experiment) -> list[Splits]:
    """The images that trials are trained on and judged by: one split, or one per fold.

    The judges are, in this order: the folder for validation, if there is one and all labels are used; a stratified
    share of the labelled images, if it is large enough; else stratified cross-validation over the labelled images.
    """
    options, found = experiment.options, experiment.sources
    chosen = options.folds or options.val_share
    if experiment.val_is_labelled and not chosen:
        return [Splits(found.train, found.val, None)]
    seed = options.seeds[0]
    labelled = experiment.splits(seed)
    share, most = options.val_share or VAL_SHARE, int(labelled.train.labels.bincount().max())
    if most > 1 and (options.val_share or (not chosen and share * len(labelled.train) >= FEW)):
        return [replace(split(labelled.train, None, labelled.test, Shares(None, share), seed), test=None)]
    return folded(labelled.train, options.folds or max(2, min(FOLDS, most)), seed)


def load(experiment: Experiment) -> list[TaskData]:
    """Load the images of :func:`judges`, for all trials of a command."""
    seed = experiment.options.seeds[0]
    return [parallel.together(partial(experiment.load, part, seed)) for part in judges(experiment)]


def in_words(parts: Sequence[Splits]) -> str:
    """How trials are judged, in words."""
    images = sum(len(part.val) for part in parts if part.val is not None)
    if len(parts) == 1:
        return f"judged by {count(images, 'validation image')}"
    return f"judged by cross-validation over {count(images, 'labelled image')} in {len(parts)} folds"


def carry_out(
    trial: dict[str, Any],
    parts: Sequence[TaskData],
    experiment: Experiment,
    results: Results,
    label: str,
    hopeless: Callable[[list[float]], bool] | None = None,
) -> None:
    """Train a trial on each of the parts, or continue an interrupted one; the outcome is added to ``trial``.

    Args:
        trial: an entry of the results' trials, see :func:`new`; it is changed in place.
        parts: the images of each fold.
        experiment: what all trials share.
        results: where the trial is kept.
        label: label of the progress bar.
        hopeless: given the accuracies so far in % (see :func:`intermediate`), returns whether to prune the trial.
    """
    folds = trial["folds"]
    while trial["state"] == "running" and len(folds) < len(parts):
        started, place = time.monotonic(), checkpoint(trial, experiment)
        try:
            folds.append(fold(trial, parts[len(folds)], experiment, results, label, hopeless))
        except DivergedError:
            trial |= {"state": "pruned", "diverged": True, "accuracy": 0.0, "cross_entropy": None}
        else:
            if len(folds) == len(parts) and folds[-1]["accuracies"][-1][0] == trial["steps"]:
                trial["state"] = "finished"
            elif hopeless is not None and hopeless(intermediate(folds)):
                trial["state"] = "pruned"
            trial |= summary(folds)
        trial["seconds"] += time.monotonic() - started
        results.write()
        experiment.remove(place)


def fold(
    trial: Mapping[str, Any],
    data: TaskData,
    experiment: Experiment,
    results: Results,
    label: str,
    hopeless: Callable[[list[float]], bool] | None,
) -> dict[str, Any]:
    """Train a trial on the images of one fold; raises DivergedError."""
    options, earlier = experiment.options, trial["folds"]
    assert options.steps is not None
    own = replace(
        search.applied(options, trial["settings"]),
        steps=trial["steps"],
        warmup=options.warmup * trial["steps"] // options.steps,
        evaluations=EVALUATIONS if hopeless else 1,
    )
    settings = results.content["settings"] | {"trial": {name: trial[name] for name in ("number", "settings", "steps")}}
    settings["fold"] = len(earlier)
    if trial["of_folds"] > 1:
        label += f", fold {len(earlier) + 1} of {trial['of_folds']}"

    def until(record: Record) -> bool:
        return hopeless is not None and hopeless(intermediate([*earlier, {"accuracies": record.accuracies}]))

    place = checkpoint(trial, experiment)
    record = experiment.train(trial["method"], data, own, settings, place, label, until=until).record
    assert data.val is not None and record.answers is not None
    return {
        "accuracies": record.accuracies,
        "cross_entropy": statistics.fmean(record.answers.cross_entropies),
        "right": "".join("01"[right] for right in record.answers.right(data.val)),
    }


def checkpoint(trial: Mapping[str, Any], experiment: Experiment) -> Path:
    """The checkpoint file of a trial's next fold."""
    name = f"{trial['method']}-trial{trial['number']}-steps{trial['steps']}-fold{len(trial['folds'])}.pt"
    return experiment.folder / "checkpoints" / name


def summary(folds: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """A trial's accuracy in % and its cross-entropy, over all images that have judged it."""
    images = sum(len(fold["right"]) for fold in folds)
    return {
        "accuracy": 100 * sum(fold["right"].count("1") for fold in folds) / images,
        "cross_entropy": sum(fold["cross_entropy"] * len(fold["right"]) for fold in folds) / images,
    }


def intermediate(folds: Sequence[Mapping[str, Any]]) -> list[float]:
    """A trial's accuracy after each evaluation, in %: the mean over the folds so far."""
    values, earlier = [], 0.0
    for place, fold in enumerate(folds):
        values += [(earlier + accuracy) / (place + 1) for _, accuracy in fold["accuracies"]]
        earlier += fold["accuracies"][-1][1]
    return values


def found(trials: Sequence[dict[str, Any]], method: str) -> list[dict[str, Any]]:
    """The trials of a method, in order."""
    return [trial for trial in trials if canonical(trial["method"]) == canonical(method)]


def new(method: str, number: int, settings: Mapping[str, Any], steps: int, folds: int, rung: int = 0) -> dict[str, Any]:
    """The entry of a trial that has not begun."""
    return {
        "method": method,
        "number": number,
        "settings": dict(settings),
        "steps": steps,
        "rung": rung,
        "state": "running",
        "of_folds": folds,
        "folds": [],
        "seconds": 0.0,
    }


def told(trial: Mapping[str, Any]) -> str:
    """A finished trial's settings and their accuracy, in words."""
    words = search.in_words(trial["settings"])
    if trial.get("diverged"):
        return f"{words}: diverged"
    ended = " when it was pruned" if trial["state"] == "pruned" else ""
    return f"{words}: {trial['accuracy']:.1f} %{ended}"
