"""``--method auto``: all methods compete by successive halving.

Every method enters with the same number of settings: its defaults, and others spread evenly over the ranges. All
candidates are trained for few steps. The better half is trained again, from the start, for twice as many steps, and so
on up to the steps of a whole run (Jamieson and Talwalkar 2016, https://arxiv.org/abs/1502.07943).
"""

import math
from collections.abc import Sequence
from typing import Any

from ..errors import UserError, count
from . import trials
from .choosing import best_trial, merit
from .experiment import Experiment
from .results import Results
from .search import space
from .tuning import Search

LEAST_STEPS = 15  # the fewest steps of the first rung


def rungs(candidates: int, steps: int) -> list[tuple[int, int]]:
    """The (candidates, steps) of each rung; the last rung takes all ``steps``."""
    number = 1 + max(0, min(int(math.log2(candidates)), int(math.log2(max(1, steps / LEAST_STEPS)))))
    counts = [math.ceil(candidates / 2**rung) for rung in range(number)]
    return [(many, math.ceil(steps / 2 ** (number - 1 - rung))) for rung, many in enumerate(counts)]


def cost(plan: Sequence[tuple[int, int]]) -> float:
    """The cost of a plan, in whole runs."""
    return sum(many * steps for many, steps in plan) / plan[-1][1]


def compete(methods: Sequence[str], experiment: Experiment, results: Results) -> tuple[str, dict[str, Any]]:
    """Carry out the missing trials; returns the winning method and its settings."""
    options = experiment.options
    assert options.tune is not None and options.steps is not None
    parts = trials.load(experiment)
    plan = rungs(options.tune * len(methods), options.steps)
    entered = []
    for method in methods:
        search = Search(space(method, options), options.seeds[0], method)
        entered += [(method, number, search.spread(number)) for number in range(options.tune)]
    for rung, (_, steps) in enumerate(plan):
        for place, (method, number, settings) in enumerate(entered, 1):
            trial = entry(results, method, number, rung)
            if trial is None:
                trial = trials.new(method, number, settings, steps, len(parts), rung)
                results.trials.append(trial)
            if trial["state"] != "running":
                continue
            label = f"[rung {rung + 1} of {len(plan)}, {place}/{len(entered)}] {method}, {count(steps, 'step')}"
            trials.carry_out(trial, parts, experiment, results, label)
            print(f"{label}: {trials.told(trial)}", flush=True)
        finished = [one for one in results.trials if one["rung"] == rung and one["state"] == "finished"]
        if rung + 1 < len(plan):
            best = sorted(finished, key=merit, reverse=True)[: plan[rung + 1][0]]
            entered = [(one["method"], one["number"], one["settings"]) for one in best]
    winner = best_trial(results.trials)
    if winner is None:
        raise UserError("every candidate diverged: lower --lr, the centre of the searched range")
    return winner["method"], winner["settings"]


def entry(results: Results, method: str, number: int, rung: int) -> dict[str, Any] | None:
    """A candidate's trial in a rung; None if it has not begun."""
    found = (one for one in trials.found(results.trials, method) if (one["number"], one["rung"]) == (number, rung))
    return next(found, None)
