"""Comparisons of methods on the same seeds or the same images, with confidence intervals."""

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import count
from ..libraries import needed
from .recipes import RECIPES, canonical

CONFIDENCE = 0.95
DIGITS = 9  # of differences; with more digits, rounding errors would make equal differences unequal


@dataclass(frozen=True)
class Comparison:
    """A method compared with a baseline, seed by seed.

    Attributes:
        differences: points (of accuracy in %) above the baseline, by seed.
        number: how many comparisons are made in all, for Bonferroni's correction.
    """

    method: str
    baseline: str
    differences: Mapping[int, float]
    number: int

    @property
    def mean(self) -> float | None:
        """The mean difference in points; None if there is no common seed."""
        return statistics.fmean(self.differences.values()) if self.differences else None

    @property
    def half_width(self) -> float | None:
        """Half of the 95 % interval of this comparison alone, in points (Student's t); None for less than two seeds."""
        return self._half_width(1)

    @property
    def corrected_half_width(self) -> float | None:
        """Half of the corrected interval: with 95 % confidence, the intervals of all comparisons hold at once."""
        return self._half_width(self.number)

    @property
    def beyond_chance(self) -> bool:
        """Whether the corrected interval excludes zero; False if all seeds give the same difference (no spread)."""
        mean, corrected = self.mean, self.corrected_half_width
        return mean is not None and corrected is not None and 0 < corrected < abs(mean)

    def sentence(self) -> str:
        """One sentence: what the seeds show about this method and what they do not."""
        return f"{self.method}: {self._finding()}."

    def _finding(self) -> str:
        mean, half, corrected = self.mean, self.half_width, self.corrected_half_width
        seeds, other = count(len(self.differences), "seed"), self.baseline
        if mean is None:
            return f"no seed in common with {other}, so nothing can be compared"
        compared = f"{points(mean)} points compared with {other}"
        if half is None or corrected is None:
            return f"{compared}, with one seed, which shows no difference"
        if half == 0:
            return f"{compared}, the same for all {seeds}, so there is no interval"
        if self.beyond_chance:
            better = "better" if mean > 0 else "worse"
            among = f" even among {self.number} comparisons" if self.number > 1 else ""
            figures = f"{points(mean)} points ({span(mean, corrected)}) over {seeds}"
            return f"{better} than {other}, {figures}, beyond chance{among}"
        if abs(mean) > half:
            chance = f"but this may be chance among {self.number} comparisons"
            return f"{compared} over {seeds} ({span(mean, half)}), {chance}: corrected, {span(mean, corrected)}"
        return f"no difference to {other} is shown: {span(mean, corrected)} points over {seeds}"

    def _half_width(self, number: int) -> float | None:
        if len(self.differences) < 2:
            return None
        t = needed("scipy.stats", "the interval of a mean").t
        quantile = float(t.ppf(1 - (1 - CONFIDENCE) / (2 * number), len(self.differences) - 1))
        return quantile * statistics.stdev(self.differences.values()) / math.sqrt(len(self.differences))


def comparisons(
    runs: Iterable[Mapping[str, Any]], baseline: str = "plain", number: int | None = None
) -> list[Comparison]:
    """Compare every method with the baseline, in the methods' usual order; empty if the baseline has no runs.

    Args:
        runs: mappings with ``method``, ``seed`` and ``accuracy`` in %.
        baseline: the method to compare with.
        number: the number of comparisons to correct for; None: the number of comparisons here with an interval.

    Raises:
        ValueError: ``number`` is less than 1.
    """
    if number is not None and number < 1:
        raise ValueError(f"expected a number of comparisons from 1 on, got {number}")
    found = by_method(runs)
    base = {run["seed"]: run["accuracy"] for run in found.pop(canonical(baseline), ())}
    if not base:
        return []
    differences = {
        own[0]["method"]: {
            run["seed"]: round(run["accuracy"] - base[run["seed"]], DIGITS) for run in own if run["seed"] in base
        }
        for own in found.values()
    }
    number = number or max(1, sum(len(own) > 1 for own in differences.values()))
    return [Comparison(method, baseline, own, number) for method, own in differences.items()]


def paired_images(right_a: str, right_b: str, number: int = 1) -> tuple[float, float]:
    """The difference of two classifiers on the same images, with Agresti and Min's adjusted Wald interval.

    The method adds half an image to each of the four outcomes (both right, only a, only b, none), so that the interval
    also has a width if the classifiers never differ [Agresti and Min, Statistics in Medicine 24, 2005]. Here the
    interval is centred on the observed difference; in the paper the centre is shrunk by n / (n + 2).

    Args:
        right_a, right_b: one digit per image: ``1`` if it was predicted right, ``0`` if not.
        number: how many comparisons must hold at once (Bonferroni's correction).

    Returns:
        The points by which a is above b, and half the 95 % interval.

    Raises:
        ValueError: the strings are empty, differ in length, or hold other characters.
    """
    if len(right_a) != len(right_b) or not right_a or set(right_a + right_b) - set("01"):
        raise ValueError(
            "expected two strings of the digits 0 and 1 with one for each image, got "
            f"{len(right_a)} and {len(right_b)} characters: {right_a[:20]!r} and {right_b[:20]!r}"
        )
    total = len(right_a)
    pairs = Counter(zip(right_a, right_b, strict=True))
    only_a, only_b = pairs["1", "0"], pairs["0", "1"]
    z = statistics.NormalDist().inv_cdf(1 - (1 - CONFIDENCE) / (2 * number))
    variance = (only_a + only_b + 1) - (only_a - only_b) ** 2 / (total + 2)
    return 100 * (only_a - only_b) / total, 100 * z * math.sqrt(variance) / (total + 2)


def points(value: float) -> str:
    """A difference with its sign and one decimal; values that round to zero give +0.0."""
    return f"{round(value, 1) + 0.0:+.1f}"


def mean_and_deviation(values: Sequence[float]) -> str:
    """The mean ± the sample standard deviation, with one decimal; a single value has no deviation."""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread}"


def span(centre: float, half_width: float) -> str:
    return f"{points(centre - half_width)} to {points(centre + half_width)}"


def by_method(made: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Group runs or trials by the canonical name of their method: single methods in their usual order, then others."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for one in made:
        found.setdefault(canonical(one["method"]), []).append(one)
    ordered = [name for name in RECIPES if name in found] + [name for name in found if name not in RECIPES]
    return {name: found[name] for name in ordered}
