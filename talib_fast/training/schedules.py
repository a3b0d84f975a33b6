"""Learning rate schedules, as pure functions of the step."""

import math
from collections.abc import Callable

DECAY_AT, DECAY_BY = 0.6, 0.1

# Each schedule maps the finished part of the run, in [0, 1), to a factor of the learning rate.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "step": lambda part: DECAY_BY if part >= DECAY_AT else 1.0,
    "cosine": lambda part: (1 + math.cos(math.pi * part)) / 2,
    "constant": lambda part: 1.0,
}


def factor(schedule: str, step: int, steps: int, warmup: int) -> float:
    """The factor of the learning rate in a step.

    It rises linearly from 0 over ``warmup`` steps. The schedule runs over the steps after that.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return SCHEDULES[schedule]((step - warmup) / (steps - warmup))
