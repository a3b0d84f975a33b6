"""How the learning rate changes over a run: a pure function of the step."""

import math
from collections.abc import Callable

DECAY_AT, DECAY_BY = 0.6, 0.1

# Each maps the part of the run that is over, in [0, 1), to a factor of the learning rate.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "step": lambda part: DECAY_BY if part >= DECAY_AT else 1.0,
    "cosine": lambda part: (1 + math.cos(math.pi * part)) / 2,
    "constant": lambda part: 1.0,
}


def factor(schedule: str, step: int, steps: int, warmup: int) -> float:
    """What the learning rate is multiplied by in a step: rising from 0 over ``warmup`` steps, then by the schedule.

    The schedule runs over the steps after the warm-up.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return SCHEDULES[schedule]((step - warmup) / (steps - warmup))
