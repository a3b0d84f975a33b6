"""The fine-tuning methods by name: their defaults, and which methods can be combined."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..errors import UsageError


@dataclass(frozen=True)
class Setting:
    """A numeric setting of a method: its default, the range that ``--tune`` searches, and its meaning."""

    default: float
    low: float
    high: float
    log: bool = True
    whole: bool = False
    meaning: str = ""

    def at(self, share: float) -> float:
        """The value at a fraction ``share``, in [0, 1), of the range."""
        if self.whole:
            return int(self.low + share * (self.high - self.low + 1))
        value = self.low * (self.high / self.low) ** share if self.log else self.low + share * (self.high - self.low)
        return min(max(float(value), self.low), self.high)  # rounding errors could leave the range


@dataclass(frozen=True)
class Recipe:
    """A method's term besides the cross-entropy, its default trade-off, and the optimiser's weight decay.

    ``own`` holds the settings that no other method has, by the name of the argument of its part.
    """

    adds: str
    trade_off: float
    weight_decay: float = 5e-4
    own: Mapping[str, Setting] = field(default_factory=dict)


HEAD_DECAY = Setting(1e-2, 1e-4, 1.0, meaning="L2 coefficient of the new head, which has no pretrained weights")


# These defaults were tried, not tuned. For most methods one or two values were tried, at 5 labels per class, 120 steps
# of 24 images and 64 pixels, with two seeds other than the reported ones. There, differences of a few points are noise.
RECIPES = {
    "plain": Recipe("nothing", 0.0),
    "linear": Recipe("nothing; only the head is trained, on the features of the pretrained network", 0.0),
    "l2": Recipe("half the squared norm of all weights", 5e-3, weight_decay=0.0),
    "l2_sp": Recipe(
        "half the squared distance to the pretrained weights", 1e-2, weight_decay=0.0, own={"head_decay": HEAD_DECAY}
    ),
    "delta": Recipe(
        "the distance between feature maps, summed over the batch",
        1e-3,
        weight_decay=0.0,
        own={"head_decay": HEAD_DECAY},
    ),
    "delta_attention": Recipe(
        "delta's distance with channels weighted by attention", 3e-2, weight_decay=0.0, own={"head_decay": HEAD_DECAY}
    ),
    "bss": Recipe(
        "the smallest squared singular values of the batch's features",
        1e-3,
        own={"k": Setting(1, 1, 4, whole=True, meaning="how many singular values are shrunk")},
    ),
    "stochnorm": Recipe("no loss; the trade-off is p, the share of channels normalised by batch statistics", 0.5),
    "co_tuning": Recipe("the cross-entropy of the pretrained head with its mean probabilities per class", 0.3),
    "lwf": Recipe(
        "the divergence of the pretrained head from its answers before training",
        4.0,
        own={"temperature": Setting(3.0, 1.0, 10.0, meaning="divisor of the pretrained head's logits")},
    ),
    "bi_tuning": Recipe(
        "two contrastive divergences, of projections and of logits",
        1.0,
        own={"temperature": Setting(0.07, 0.02, 0.5, meaning="divisor of the cosine similarities")},
    ),
}

ALONE = ("plain", "linear")  # these have no trade-off and combine with no other method
CLASSIFIERS = ("co_tuning", "lwf", "bi_tuning")
DISTANCES = ("l2", "l2_sp", "delta", "delta_attention")
ORDER = (*ALONE, *CLASSIFIERS, *DISTANCES, "bss", "stochnorm")  # order of the parts in a combination's name


def parse(name: str) -> tuple[str, ...]:
    """The parts of a method such as ``bss`` or ``stochnorm+bss``, always in the order of ``ORDER``.

    Raises UsageError if a part is unknown or named twice, or if two parts cannot be combined.
    """
    parts = [part.strip() for part in name.split("+")]
    for part in parts:
        if part not in RECIPES:
            where = f" in {name}" if len(parts) > 1 else ""
            raise UsageError(
                f"there is no method {part or '(empty)'}{where}: choose from all, {', '.join(RECIPES)}, and "
                "combinations such as bss+stochnorm"
            )
        if parts.count(part) > 1:
            raise UsageError(f"{name} names {part} twice: leave one out")
    ordered = tuple(part for part in ORDER if part in parts)
    for first, second in itertools.combinations(ordered, 2):
        reason = conflict(first, second)
        if reason:
            raise UsageError(f"{first} and {second} cannot be combined, {reason}: leave one of them out")
    return ordered


def conflict(first: str, second: str) -> str:
    """Why two methods, in that order, cannot be combined; empty if they can."""
    if first == "plain":
        return "because every method includes plain fine-tuning"
    if first == "linear":
        return "because linear trains only the head"
    if first in CLASSIFIERS and second in CLASSIFIERS:
        return "because each has a classifier of its own"
    if first in DISTANCES and second in DISTANCES:
        return "because each penalises the distance to the pretrained network or to zero"
    if first == "bi_tuning" and second in ("delta", "delta_attention"):
        return "because bi_tuning trains on two views of each image, but delta compares the maps of one view"
    return ""


def canonical(name: str) -> str:
    """The name with the parts in the order of ``ORDER``; raises UsageError as :func:`parse` does."""
    return "+".join(parse(name))


def weight_decay(name: str) -> float:
    """The optimiser's weight decay: the smallest of the parts' values (0 if a part brings a decay of its own)."""
    return min(RECIPES[part].weight_decay for part in parse(name))


def own_defaults() -> dict[str, float]:
    """The own settings of all methods, for example ``bss.k``, with their defaults."""
    return {
        f"{name}.{setting}": value.default for name, recipe in RECIPES.items() for setting, value in recipe.own.items()
    }
