"""``--tune``: search each method's settings by Optuna, with the same number of trials for every method.

The first trials are spread evenly over the ranges. All methods get the same learning rates there, since a method with
luckier learning rates would look better than it is. The later trials come from Optuna's tree-structured Parzen
estimator (Bergstra et al. 2011,
https://proceedings.neurips.cc/paper/2011/hash/86e8f7ab32cfd12577bc2619bc635690-Abstract.html). A trial is pruned if its
best accuracy is below the median of the trials before it. The next settings are a function of the seed and the trials
so far, so an interrupted search gives the same result as an uninterrupted one.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import UserError
from ..libraries import needed
from . import parallel, trials
from .choosing import best_trial
from .experiment import Experiment
from .recipes import Setting
from .results import Results
from .search import defaults, space
from .splits import mixed_seed

SPREAD = 4  # trials that are spread evenly over the ranges, after the first trial with the defaults
STARTUP = 3  # the first trials, which are never pruned
WARMUP = trials.EVALUATIONS // 2  # the first evaluations, after which no trial is pruned: a slow start may end well


def tune(methods: Sequence[str], experiment: Experiment, results: Results) -> dict[str, dict[str, Any]]:
    """Carry out the missing trials; returns the settings chosen for each method.

    A method is left out if all of its trials diverged.
    """
    number, steps = experiment.options.tune, experiment.options.steps
    assert number is not None and steps is not None
    parts = trials.load(experiment)
    chosen: dict[str, dict[str, Any]] = {}
    for place, method in enumerate(methods):
        search = Search(space(method, experiment.options), experiment.options.seeds[0], method)
        for index in range(number):
            own = trials.found(results.trials, method)
            if index == len(own):
                own.append(trials.new(method, index, search.following(own), steps, len(parts)))
                results.trials.append(own[index])
            trial = own[index]
            if trial["state"] != "running":
                continue
            label = f"[{place * number + index + 1}/{number * len(methods)}] {method}, trial {index + 1} of {number}"
            trials.carry_out(trial, parts, experiment, results, label, search.pruner(own[:index], trial["settings"]))
            print(f"{label}: {trials.told(trial)}", flush=True)
        best = best_trial(trials.found(results.trials, method))
        if best is not None:
            chosen[method] = best["settings"]
    if not chosen:
        raise UserError("every trial diverged: lower --lr, the centre of the searched range")
    return chosen


class Search:
    """The search of one method's settings; it has no state, so each call takes the trials so far."""

    def __init__(self, settings: Mapping[str, Setting], seed: int, method: str) -> None:
        self.settings, self.seed, self.method = settings, seed, method

    def following(self, earlier: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The next trial's settings, the same on every rank."""
        if len(earlier) <= SPREAD:
            return self.spread(len(earlier))
        return parallel.from_first(lambda: self._ask(earlier, {}).params)

    def spread(self, number: int) -> dict[str, Any]:
        """Settings that do not depend on earlier trials, the same on every rank; number 0 gives the defaults.

        The others are a Halton sequence shifted by the seed, which is spread evenly at any length. The learning rate,
        the first setting, has the same values for all methods.
        """
        if number == 0:
            return defaults(self.settings)

        def settings() -> dict[str, Any]:
            points = needed("scipy.stats", "--tune").qmc.Halton(len(self.settings), scramble=False).random(number)
            shift = np.random.default_rng(mixed_seed(self.seed, "spread")).random(len(self.settings))
            shares = zip(self.settings.items(), (points[-1] + shift) % 1, strict=True)
            return {name: setting.at(share) for (name, setting), share in shares}

        return parallel.from_first(settings)

    def pruner(self, earlier: Sequence[dict[str, Any]], own: Mapping[str, Any]) -> Callable[[list[float]], bool]:
        """A function of the accuracies of a trial with these settings: whether to prune it, given earlier trials."""
        trial = self._ask(earlier, own) if parallel.rank() == 0 else None
        reported = 0

        def hopeless(values: list[float]) -> bool:
            nonlocal reported
            for step in range(reported, len(values)):
                trial.report(values[step], step)  # type: ignore[union-attr]
            reported = len(values)
            return trial.should_prune()  # type: ignore[union-attr]

        return lambda values: parallel.from_first(lambda: hopeless(values))

    def _ask(self, earlier: Sequence[dict[str, Any]], own: Mapping[str, Any]) -> Any:
        """Optuna's next trial, with the settings in ``own``; the sampler chooses the settings that are not in it."""
        optuna = library()
        study = optuna.create_study(
            direction="maximize",
            sampler=optuna.samplers.TPESampler(
                seed=mixed_seed(self.seed, "tune", self.method, len(earlier)), n_startup_trials=SPREAD + 1
            ),
            pruner=optuna.pruners.MedianPruner(n_startup_trials=STARTUP, n_warmup_steps=WARMUP),
        )
        distributions = {name: distribution(setting) for name, setting in self.settings.items()}
        states = optuna.trial.TrialState
        for trial in earlier:
            finished = trial["state"] == "finished"
            study.add_trial(
                optuna.trial.create_trial(
                    params=trial["settings"],
                    distributions=distributions,
                    state=states.COMPLETE if finished else states.PRUNED,
                    value=trial["accuracy"] if finished else None,
                    intermediate_values=dict(enumerate(trials.intermediate(trial["folds"]))),
                )
            )
        if own:
            study.enqueue_trial(dict(own))
        return study.ask(distributions)


def distribution(setting: Setting) -> Any:
    distributions = library().distributions
    if setting.whole:
        return distributions.IntDistribution(int(setting.low), int(setting.high))
    return distributions.FloatDistribution(setting.low, setting.high, log=setting.log)


def library() -> Any:
    """Optuna; raises UserError if it is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna warns of its own experimental parts
        optuna = needed("optuna", "--tune")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
