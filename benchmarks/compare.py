"""Compares two runs of benchmarks by ratios within a run, which depend less on the machine's speed on that day."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report import Case, Spread, align, speedup

OURS = ("talib_fast", "exact", "taylor")  # the candidates whose speed over the others is compared
TOLERANCE = 0.05  # a smaller change of a median does not count, however near the quartiles are


@dataclass(frozen=True)
class Change:
    """The speed of talib_fast over a baseline, in the same case of two runs."""

    name: str
    before: Spread
    after: Spread

    @property
    def slower(self) -> bool:
        """Whether it is slower beyond the spread of both runs: the quartiles do not overlap."""
        return self.after.upper < self.before.lower and self.after.median < (1 - TOLERANCE) * self.before.median

    @property
    def faster(self) -> bool:
        return Change(self.name, self.after, self.before).slower

    @property
    def verdict(self) -> str:
        return "SLOWER" if self.slower else "faster" if self.faster else ""


class NothingToCompare(Exception):
    """A path has no results, or two paths have no case in common."""


def load(path: Path) -> dict[str, dict[str, Any]]:
    """The results in ``path``, by operation. It is a results.json, a folder with one, or a folder of such folders."""
    files = [path] if path.is_file() else sorted([*path.glob("results.json"), *path.glob("*/results.json")])
    found = {}
    for file in files:
        try:
            results = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise NothingToCompare(f"{file} cannot be read as results: {error}") from error
        if isinstance(results, dict) and "operation" in results:
            found[results["operation"]] = results
    if not found:
        raise NothingToCompare(f"{path} holds no benchmark's results.json")
    return found


def _by_name(results: dict[str, Any]) -> dict[str, Case]:
    """The timed cases, by a name that joins all their texts."""
    return {
        ", ".join(text for text in case.values() if isinstance(text, str)): case
        for case in results["cases"]
        if "samples" in case
    }


def changes(before: dict[str, Any], after: dict[str, Any]) -> Iterator[Change]:
    """The changes in all cases that both runs have: of forward and backward pass together, or of the forward pass."""
    old, new = _by_name(before), _by_name(after)
    for name in (name for name in old if name in new):
        shared = [candidate for candidate in old[name]["samples"] if candidate in new[name]["samples"]]
        for ours in (candidate for candidate in shared if candidate in OURS):
            for baseline in (candidate for candidate in shared if not candidate.startswith(OURS)):
                measures = [case["samples"][side] for case in (old[name], new[name]) for side in (ours, baseline)]
                part = "both" if all("backward" in measured for measured in measures) else "forward"
                spreads = [speedup(case, baseline, ours, part) for case in (old[name], new[name])]
                yield Change(f"{name}: {ours} over {baseline}", *spreads)


def compare(before: Path, after: Path) -> bool:
    """Print what changed between two runs; returns whether nothing became slower.

    Raises:
        NothingToCompare: there are no results, or no case is in both runs.
    """
    old, new = load(before), load(after)
    lines = [["speed", "before", "after", ""]]
    count = 0
    for operation in (operation for operation in old if operation in new):
        for change in changes(old[operation], new[operation]):
            count += 1
            if change.verdict:
                name = f"{operation}: {change.name}"
                lines.append([name, str(change.before), str(change.after), change.verdict])
    if not count:
        raise NothingToCompare(f"{before} and {after} have no case in common")
    regressions = sum(line[-1] == "SLOWER" for line in lines)
    if len(lines) > 1:
        print(align(lines), end="\n\n")
    print(
        f"{count} ratios, {regressions} slower and {len(lines) - 1 - regressions} faster: medians apart by more than "
        f"{TOLERANCE:.0%}, quartiles that don't meet."
    )
    return not regressions
