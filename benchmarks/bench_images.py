"""Time training steps with photographs from files, compared with steps with photographs in memory.

One command measures all candidates interleaved and writes ``results.json`` (raw samples), ``table.md``, ``plot.png``::

    python benchmarks/bench_images.py [--device cuda] [--quick] [--data DIR] [--out DIR]

``--from-json DIR`` writes the table and the plot again from ``DIR/results.json``.

A step is a step of ``finetune``: plain fine-tuning of MobileNetV2 at 224 pixels, in batches of 24, with standard
augmentation. In memory, the photographs are decoded already, and the training process augments them. From files, worker
processes do everything. "Ready" steps get batches that were prepared before. Without ``--data`` the photographs are
artificial JPEG files of 500 × 375 pixels. Memory is that of a process, its worker included, that trains a few steps on
few and on many files.
"""

import argparse
import functools
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import command
import numpy as np
import report
import torch
from bench_step import WORKLOADS
from harness import Stopwatch
from PIL import Image
from report import LOOKS, Case, Goal, Spread, error_bars, progress, speedup

from talib_fast.images.decoding import read
from talib_fast.images.folder import labelled
from talib_fast.images.imageset import ImageSet, from_files
from talib_fast.images.loading import default_workers
from talib_fast.training.data import Batch, TaskData
from talib_fast.training.methods import Method
from talib_fast.training.splits import Shares, split

OPERATION = "images"
FILES, MEMORY, READY = "files, workers", "memory", "ready"
SIZE, STEPS, PHOTOGRAPHS = 224, 4, 240
MANY = 4_000  # files, for what memory depends on
BATCH = {"cpu": 24, "cuda": 96}
QUICK_SIZE = 32


def photographs(folder: Path, count: int) -> Path:
    """JPEG files of two classes: shapes of many sizes, as a photograph has them, and some noise."""
    generator = np.random.default_rng(0)
    for number in range(count):
        layers = [
            Image.fromarray(generator.integers(0, 256, (3 * side, 4 * side, 3), dtype=np.uint8)).resize((500, 375))
            for side in (1, 4, 16, 64)
        ]
        pixels = np.mean([np.asarray(layer) for layer in layers], axis=0)
        path = folder / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(path, quality=90)
    return folder


def images_of(folder: Path, in_memory: bool = False) -> ImageSet:
    images = from_files(labelled(folder))
    if not in_memory:
        return images
    decoded = [read(name) for name in images.names]
    return replace(images, read_at=lambda index, at_least: decoded[index])


def task(images: ImageSet, options: argparse.Namespace, workers: int) -> TaskData:
    """The data of ``finetune`` for plain fine-tuning with standard augmentation."""
    network = WORKLOADS["mobilenet_v2"].build()
    preprocessing = replace(network.preprocessing, size=QUICK_SIZE if options.quick else SIZE)
    splits = split(images, None, None, Shares(None, test_share=0.1), seed=0)
    return TaskData(
        splits,
        preprocessing,
        seed=0,
        batch_size=options.batch,
        augmentation="standard",
        device=torch.device(options.device),
        workers=workers,
    )


class Training:
    """Plain fine-tuning on an endless iterator of batches."""

    def __init__(self, batches: Iterator[Batch], num_classes: int, device: str) -> None:
        self.batches = batches
        torch.manual_seed(0)
        self.method = Method(WORKLOADS["mobilenet_v2"].build().clone(), num_classes, "plain", {})
        self.method.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = torch.optim.SGD(self.method.parameter_groups(1e-3), momentum=0.9, nesterov=True)

    def steps(self) -> None:
        self.method.train()
        for _ in range(STEPS):
            loss, _ = self.method(next(self.batches))
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            loss.item()


def timed(folder: Path, options: argparse.Namespace) -> Case:
    """The raw samples: seconds per step of each candidate, one sample per round, in rotating order."""
    rounds, device = options.rounds, torch.device(options.device)
    last = 10**6
    workers = default_workers()
    sources = {
        FILES: task(images_of(folder), options, workers).batches(0, last),
        MEMORY: task(images_of(folder, in_memory=True), options, 0).batches(0, last),
        READY: iter([task(images_of(folder), options, 0).batch(0)] * (STEPS * (2 * rounds + 4))),
    }
    classes = len(images_of(folder).classes)
    candidates = {name: Training(batches, classes, options.device) for name, batches in sources.items()}
    stopwatch = Stopwatch(device)
    samples: dict[str, dict[str, list[float]]] = {name: {"step": []} for name in candidates}
    for number in range(rounds + 1):
        names = list(candidates)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            progress(f"round {number} of {rounds}, {name}")
            candidates[name].steps()  # uses up what workers have read ahead while others were timed
            seconds = stopwatch.wall(candidates[name].steps) / STEPS
            if number:  # the first round loads kernels and fills allocators
                samples[name]["step"].append(seconds)
    progress("")
    return {"label": f"MobileNetV2, {SIZE} pixels", "samples": samples, "workers": workers}


def peak_mib(folder: Path, options: argparse.Namespace) -> float:
    """The peak memory of a process that trains a few steps on a folder, and of its largest worker."""
    words = [sys.executable, __file__, "--memory-of", str(folder), "--device", options.device]
    words += ["--batch", str(options.batch), *(["--quick"] if options.quick else [])]
    return float(subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout)


def train_and_tell(options: argparse.Namespace) -> None:
    """Print the peak memory in MiB of a few steps on the files of a folder, and of one pass over its test images."""
    data = task(images_of(options.memory_of), options, 1)
    training = Training(data.batches(0, 2 * STEPS), data.num_classes, options.device)
    training.steps()
    assert data.test is not None
    for _ in data.test:
        pass
    del training
    usages = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(sum(usages) / 2**10)


def goals(results: dict[str, Any]) -> list[Goal]:
    """The goals, with the figures that decide them."""
    (case,) = results["cases"]
    growth = case["peak_mib"][str(case["files"][1])] / case["peak_mib"][str(case["files"][0])]
    return [
        Goal("a step with files at most as long as with images in memory", 1.0, {"step": over(case, FILES)}, True),
        Goal(f"memory with {case['files'][1]:,} files at most 1.05× that with {case['files'][0]:,}", 1.05,
             {"peak": growth}, True),
    ]  # fmt: skip


def over(case: Case, candidate: str) -> float:
    return ratio(case, candidate).median


def ratio(case: Case, candidate: str) -> Spread:
    """A step's time over that with images in memory."""
    return speedup(case, candidate, MEMORY, "step")


def table(results: dict[str, Any]) -> list[list[str]]:
    (case,) = results["cases"]
    lines = [["photographs from", "step, ms", f"step / {MEMORY}'s"]]
    for name in (FILES, MEMORY, READY):
        step = Spread.of([1e3 * seconds for seconds in case["samples"][name]["step"]])
        lines.append([name, f"{step.median:.0f} ({step.lower:.0f}–{step.upper:.0f})", str(ratio(case, name))])
    return lines


def caption(results: dict[str, Any]) -> str:
    (case,) = results["cases"]
    few, many = case["files"]
    return (
        f"Plain fine-tuning of {case['label']}, batch {results['settings']['batch']}, standard augmentation: median "
        f"(quartiles) of the rounds, {STEPS} steps each. {FILES}: {case['workers']} processes decode and augment; "
        f"{MEMORY}: decoded before, augmented in the training process; {READY}: batches made before. Peak memory of a "
        f"training process and a worker: {case['peak_mib'][str(few)]:.0f} MiB with {few:,} files, "
        f"{case['peak_mib'][str(many)]:.0f} MiB with {many:,}."
    )


def draw(results: dict[str, Any]) -> Any:
    """The figure: a step's time over that with images in memory."""
    from matplotlib.figure import Figure

    (case,) = results["cases"]
    figure = Figure(figsize=(7.2, 2.4), layout="constrained")
    axes = figure.subplots()
    names = (FILES, MEMORY, READY)
    for row, (name, (colour, marker)) in enumerate(zip(names, LOOKS, strict=False)):
        spread = ratio(case, name)
        axes.errorbar([spread.median], [row], xerr=error_bars([spread]), fmt=marker, color=colour, ms=5)
    report.label_rows(axes, names)
    axes.set_xlim(left=0)
    report.entitle(figure, "A training step by where its photographs come from, over memory's", results)
    return figure


def publish(results: dict[str, Any], folder: Path) -> None:
    """Print the results, and write the table and the plot."""
    report.publish(results, folder, table(results), caption(results), goals(results), functools.partial(draw, results))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    made = command.parser(__doc__, dtypes=False, layouts=False)
    made.add_argument("--data", type=Path, metavar="DIR", help="photographs, DIR/class/name.jpg; made if not given")
    made.add_argument("--memory-of", type=Path, metavar="DIR", help=argparse.SUPPRESS)
    return command.parse(made, arguments, OPERATION, batches=BATCH, fewest=2)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure everything that the options ask for."""
    with tempfile.TemporaryDirectory() as temporary:
        made = photographs(Path(temporary) / "few", PHOTOGRAPHS // (5 if options.quick else 1))
        case = timed(options.data or made, options)
        few = len(labelled(made).paths)
        many = few if options.quick else MANY
        copies = Path(temporary) / "many"
        for number, path in zip(range(many), [*labelled(made).paths] * (many // few + 1), strict=False):
            target = copies / path.parent.name / f"{number}.jpg"
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, target)
        case["files"] = [few, many]
        case["peak_mib"] = {str(few): peak_mib(made, options), str(many): peak_mib(copies, options)}
    return {
        "operation": OPERATION,
        "environment": report.environment(torch.device(options.device)),
        "settings": {
            **{"device": options.device, "rounds": options.rounds, "batch": options.batch},
            **{"data": options.data and options.data.name, "units": "seconds per step"},
        },
        "cases": [case],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if options.memory_of:
        train_and_tell(options)
    else:
        report.run(options, run, goals, publish)


if __name__ == "__main__":
    main()
