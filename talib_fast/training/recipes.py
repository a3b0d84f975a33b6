"""The fine-tuning methods by name: their defaults, and which of them combine."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..errors import UsageError


@dataclass(frozen=True)
class Setting:
    """A number that a method has: its default, between what ``--tune`` searches it, and what it is."""

    default: float
    low: float
    high: float
    log: bool = True
    whole: bool = False
    meaning: str = ""

    def at(self, share: float) -> float:
        """The value that far, from 0 to below 1, on the way from low to high."""
        if self.whole:
            return int(self.low + share * (self.high - self.low + 1))
        value = self.low * (self.high / self.low) ** share if self.log else self.low + share * (self.high - self.low)
        return min(max(float(value), self.low), self.high)  # rounding may leave the range


@dataclass(frozen=True)
class Recipe:
    """What a method adds to the cross-entropy, the trade-off it is weighted with, and the optimiser's weight decay.

    ``own`` are settings that no other method has, by the name that its part takes them under.
    """

    adds: str
    trade_off: float
    weight_decay: float = 5e-4
    own: Mapping[str, Setting] = field(default_factory=dict)


HEAD_DECAY = Setting(1e-2, 1e-4, 1.0, meaning="L2 coefficient of the new head, where the rest is tied to the start")


# Tried, not tuned: most methods got one or two values, at 5 labels per class, 120 steps of 24 images and 64 pixels, on
# two seeds other than those reported, where differences of a few points are noise.
RECIPES = {
    "plain": Recipe("nothing", 0.0),
    "linear": Recipe("nothing, and trains the head alone, on the features of the pretrained network", 0.0),
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
        "that distance with channels weighted by attention", 3e-2, weight_decay=0.0, own={"head_decay": HEAD_DECAY}
    ),
    "bss": Recipe(
        "the smallest squared singular values of the batch's features",
        1e-3,
        own={"k": Setting(1, 1, 4, whole=True, meaning="how many singular values are shrunk")},
    ),
    "stochnorm": Recipe("no loss; the trade-off is p, the share of channels normalised by the batch", 0.5),
    "co_tuning": Recipe("the cross-entropy of the pretrained head with its mean answer per class", 0.3),
    "lwf": Recipe(
        "the divergence of the pretrained head from its first answers",
        4.0,
        own={"temperature": Setting(3.0, 1.0, 10.0, meaning="what the pretrained head's logits are divided by")},
    ),
    "bi_tuning": Recipe(
        "two contrastive divergences, of projections and of logits",
        1.0,
        own={"temperature": Setting(0.07, 0.02, 0.5, meaning="what cosines are divided by")},
    ),
}

ALONE = ("plain", "linear")  # have no trade-off and go with no other method
CLASSIFIERS = ("co_tuning", "lwf", "bi_tuning")
DISTANCES = ("l2", "l2_sp", "delta", "delta_attention")
ORDER = (*ALONE, *CLASSIFIERS, *DISTANCES, "bss", "stochnorm")  # of the parts in a combination's name


def parse(name: str) -> tuple[str, ...]:
    """The parts of a method such as ``bss`` or ``stochnorm+bss``, in one order whatever the name's.

    Raises UsageError where a part is unknown or named twice, or two of them do not combine.
    """
    parts = [part.strip() for part in name.split("+")]
    for part in parts:
        if part not in RECIPES:
            where = f" in {name}" if len(parts) > 1 else ""
            raise UsageError(
                f"there is no method {part or '(empty)'}{where}: --method knows all, {', '.join(RECIPES)}, and "
                "combinations such as bss+stochnorm"
            )
        if parts.count(part) > 1:
            raise UsageError(f"{name} names {part} twice: leave one out")
    ordered = tuple(part for part in ORDER if part in parts)
    for first, second in itertools.combinations(ordered, 2):
        reason = conflict(first, second)
        if reason:
            raise UsageError(f"{first} and {second} can't be combined, {reason}: leave one of them out")
    return ordered


def conflict(first: str, second: str) -> str:
    """Why two methods, in that order, can't be combined; empty where they can."""
    if first == "plain":
        return "since plain fine-tuning is what every method starts from"
    if first == "linear":
        return "since linear trains nothing but the head"
    if first in CLASSIFIERS and second in CLASSIFIERS:
        return "since each brings a classifier of its own"
    if first in DISTANCES and second in DISTANCES:
        return "since each is a distance to where the network started or to zero"
    if first == "bi_tuning" and second in ("delta", "delta_attention"):
        return "since bi_tuning trains on two views of each image, and the maps are compared on one"
    return ""


def canonical(name: str) -> str:
    """The name that all orders of a method's parts share; raises UsageError as :func:`parse` does."""
    return "+".join(parse(name))


def weight_decay(name: str) -> float:
    """The optimiser's weight decay: the smallest of the parts', some of which have a decay of their own."""
    return min(RECIPES[part].weight_decay for part in parse(name))


def own_defaults() -> dict[str, float]:
    """The own settings of all methods, ``bss.k`` for example, with their defaults."""
    return {
        f"{name}.{setting}": value.default for name, recipe in RECIPES.items() for setting, value in recipe.own.items()
    }
