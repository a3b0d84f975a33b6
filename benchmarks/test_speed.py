"""Times the three operations under pytest-benchmark, to keep runs and compare them later.

    python -m pytest benchmarks --benchmark-autosave
    python -m pytest benchmarks --benchmark-compare --benchmark-compare-fail=median:20%
    python -m pytest benchmarks -k 'stoch_norm and channels_last' --device cuda --batch 48

The first command keeps a run in ``.benchmarks/``, the second compares a new run with the last one kept. All options are
pytest-benchmark's own, but for ``--device`` and ``--batch``. A test is one pass of one candidate, and a group of tests
has the candidates of one case. pytest-benchmark times one candidate after the other, so a machine that becomes slower
meanwhile shows as a difference. The ``bench_*.py`` scripts take turns instead: published figures are theirs.
"""

from collections.abc import Callable, Iterator
from typing import Any

import bench_spectral_tail as tail
import bench_squared_distance as distance
import bench_stoch_norm as norm
import pytest
import torch
from command import LAYOUTS
from harness import Candidate, Feed, Stopwatch

# a device and a batch to a case's candidates and one of their inputs
Make = Callable[[str, int], tuple[list[Candidate], Feed]]

STOCH_NORM = ((64, 56, norm.RELU), (256, 56, norm.ADD_RELU), (2048, 7, norm.NORM))  # channels, size, block
MATRICES = ((48, 2048), (128, 2048))


def stoch_norm(channels: int, size: int, block: str, layout: str) -> Make:
    def make(device: str, batch: int) -> tuple[list[Candidate], Feed]:
        setting = norm.Setting(channels, size, 1, layout, "float32", batch, device, block)
        (feed,) = setting.feeds(1)
        return norm.candidates(setting, feed), feed

    return make


def squared_distance(label: str) -> Make:
    def make(device: str, batch: int) -> tuple[list[Candidate], Feed]:
        setting = distance.Setting(label, "contiguous", "float32", batch, device)
        feed = setting.feeds()[0]
        return distance.candidates(setting, feed), feed

    return make


def spectral_tail(b: int, f: int) -> Make:
    def make(device: str, batch: int) -> tuple[list[Candidate], Feed]:
        return tail.candidates(tail.K), tail.Setting(b, f, tail.K, "float32", device).feed()

    return make


def cases() -> Iterator[tuple[str, Make, dict[str, str]]]:
    """What is timed: a label, how to make the candidates, and which of them, by names that ``-k`` can select."""
    for channels, size, block in STOCH_NORM:
        for layout in LAYOUTS:
            label = f"stoch_norm-{channels}x{size}-{block.replace(' ', '')}-{layout}"
            names = {"talib_fast": norm.OURS, "batch_norm": norm.BATCH_NORM, "upstream": norm.COMPOSITION}
            yield label, stoch_norm(channels, size, block, layout), names
    for kind in (distance.DELTA, distance.ATTENTION, distance.L2_SP, distance.L2):
        names = {"talib_fast": distance.OURS, "upstream": distance.UPSTREAM}
        yield f"squared_distance-{kind.replace(' ', '_')}", squared_distance(kind), names
    for b, f in MATRICES:
        yield f"spectral_tail-{b}x{f}", spectral_tail(b, f), {"talib_fast": tail.OURS, "upstream": tail.UPSTREAM}


@pytest.mark.parametrize("part", ["forward", "backward"])
@pytest.mark.parametrize(
    ("label", "make", "name"),
    [
        pytest.param(label, make, name, id=f"{label}-{short}")
        for label, make, names in cases()
        for short, name in names.items()
    ],
)
def test_speed(benchmark: Any, pytestconfig: pytest.Config, label: str, make: Make, name: str, part: str) -> None:
    device = pytestconfig.getoption("device")
    torch.manual_seed(0)
    candidates, feed = make(device, pytestconfig.getoption("batch"))
    candidate = next(candidate for candidate in candidates if candidate.name == name)
    stopwatch = Stopwatch(torch.device(device))

    def prepared() -> tuple[tuple[Any], dict[str, Any]]:
        output = candidate.forward(*feed.arguments) if part == "backward" else None
        stopwatch.synchronize()
        return (output,), {}

    def run(output: Any) -> None:
        if part == "backward":
            candidate.backward(output, feed)
        else:
            candidate.forward(*feed.arguments)
        stopwatch.synchronize()

    benchmark.group = f"{label}-{part}"
    benchmark.pedantic(run, setup=prepared, rounds=10, warmup_rounds=2)
