"""The best trial and the best run by validation images. Test images never choose anything."""

from collections.abc import Mapping, Sequence
from typing import Any

from .recipes import canonical


def merit(trial: Mapping[str, Any]) -> tuple[float, float, int]:
    """The key that ranks trials of equal length: higher accuracy, then lower cross-entropy, then the earlier trial."""
    return trial["accuracy"], -trial["cross_entropy"], -trial["number"]


def right_or_wrong(trial: Mapping[str, Any]) -> str:
    """One digit per validation image of all folds: 1 if the prediction is right, 0 if it is wrong."""
    return "".join(fold["right"] for fold in trial["folds"])


def best_trial(trials: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The best of the longest finished trials; None if no trial is finished."""
    finished = [trial for trial in trials if trial["state"] == "finished"]
    longest = [trial for trial in finished if trial["steps"] == max(other["steps"] for other in finished)]
    return max(longest, key=merit, default=None)


def best_run(results: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The run with the best model according to validation; None if nothing can choose.

    After trials this is the first run of the method with the best trial. Otherwise it is the run with the best accuracy
    on its validation images.
    """
    runs = results["runs"]
    if len(runs) < 2:
        return runs[0] if runs else None
    trial = best_trial(results["trials"])
    if trial is not None:
        own = [run for run in runs if canonical(run["method"]) == canonical(trial["method"])]
        return own[0] if own else None
    validated = [run for run in runs if "val_accuracy" in run]
    return max(validated, key=lambda run: run["val_accuracy"]) if len(validated) == len(runs) else None
