"""A network, images and options so small that a whole run takes a fraction of a second."""

import argparse
import itertools
import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from process_support import handlers_kept
from torch import nn

from talib_fast import networks
from talib_fast.images.folder import labelled
from talib_fast.images.imageset import ImageSet, from_files
from talib_fast.images.preprocessing import Preprocessing
from talib_fast.networks import Network
from talib_fast.training import experiment, options
from talib_fast.training.data import Batch, InOrder, TaskData
from talib_fast.training.experiment import Experiment, prepare, settings_of
from talib_fast.training.methods import Method
from talib_fast.training.options import Options
from talib_fast.training.results import Results
from talib_fast.training.sources import Sources
from talib_fast.training.splits import Shares, split
from talib_fast.training.trainer import Answers, DivergedError, Run

CPU = torch.device("cpu")


class Tiny(nn.Module):
    out_features = 16

    def __init__(self) -> None:
        super().__init__()
        self.block1 = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.block2 = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(inplace=True))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block2(self.block1(x))


def tiny_network(weights: Path | None = None) -> Network:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Network("tiny", Tiny(), nn.Linear(16, 7), None, ("block1", "block2"))


def register_tiny() -> None:
    """Register the small network as ``--network tiny``."""
    networks.NETWORKS["tiny"] = tiny_network


@contextmanager
def tiny_command_line() -> Iterator[None]:
    """A context in which the command line has ``--network tiny``; afterwards the signal handlers are restored.

    Garbage is not collected between runs, since that would take most of the time.
    """
    with pytest.MonkeyPatch.context() as patch, handlers_kept():
        patch.setitem(networks.NETWORKS, "tiny", tiny_network)
        patch.setattr(experiment, "release_memory", lambda: None)
        yield


def hold_until_a_signal(method: str, step: int) -> None:
    """Let this process wait in the ``step``-th step of a method until it gets SIGINT or SIGTERM.

    So the run cannot end before the signal, however late it comes.
    """
    got, tell = os.pipe()
    os.set_blocking(tell, False)
    signal.set_wakeup_fd(tell)  # each signal with a Python handler writes a byte there
    forward, numbers = Method.forward, itertools.count(1)

    def held(self: Method, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        if self.name == method and next(numbers) == step:
            os.read(got, 1)
        return forward(self, batch)

    Method.forward = held


def make_images(folder: Path, classes: int = 3, images: int = 8, size: int = 20) -> Path:
    """An image folder whose classes differ in colour."""
    generator = np.random.default_rng(0)
    for label in range(classes):
        (folder / f"class{label}").mkdir(parents=True)
        for number in range(images):
            pixels = generator.integers(0, 120, (size, size + 4, 3), dtype=np.uint8)
            pixels[..., label % 3] += 100
            Image.fromarray(pixels).save(folder / f"class{label}" / f"{number}.png")
    return folder


def images_of(labels: list[int], names: str = "abcdefgh", origin: str = "") -> ImageSet:
    """Images without content, named after their origin and their index."""
    classes = tuple(names[label] for label in range(max(labels) + 1))
    places = tuple(f"{origin}{place}" for place in range(len(labels)))
    return ImageSet(classes, torch.tensor(labels), places, lambda index, size: None)


def counts(images: ImageSet) -> list[int]:
    return torch.bincount(images.labels, minlength=len(images.classes)).tolist()


def arguments(data: Path, out: Path, *more: str) -> list[str]:
    """The command line of a small job; ``more`` is appended, so it overrides."""
    small = {
        "--network": "tiny",
        "--data": str(data),
        "--out": str(out),
        "--image-size": "16",
        "--batch-size": "6",
        "--steps": "12",
        "--labels-per-class": "4",
        "--device": "cpu",
        "--workers": "0",
        "--augment": "shift",
        "--threads": "1",
    }
    return ["finetune", *(word for pair in small.items() for word in pair), *more]


def make_options(*words: str) -> Options:
    parser = argparse.ArgumentParser()
    options.add_arguments(parser)
    return options.parse(parser.parse_args(list(words)))


def make_data(
    folder: Path,
    seed: int = 0,
    batch_size: int = 6,
    augmentation: str = "shift",
    workers: int = 0,
    val_share: float = 0.0,
) -> TaskData:
    images = from_files(labelled(folder))
    splits = split(images, None, None, Shares(4, val_share, test_images=9), seed)
    return TaskData(
        splits,
        Preprocessing(16),
        seed=seed,
        batch_size=batch_size,
        augmentation=augmentation,
        device=CPU,
        workers=workers,
    )


def make_run(
    method: str,
    data: TaskData,
    checkpoint: Path,
    *words: str,
    network: Network | None = None,
    curves: Path | None = None,
) -> Run:
    chosen = make_options("--steps", "12", *words).resolved(16, validates=False, tests=False)
    settings = chosen.settings()
    return Run(method, data, network or tiny_network(), chosen, CPU, settings, checkpoint, method, curves)


def make_experiment(
    folder: Path, *words: str, train: ImageSet, val: ImageSet | None = None, test: ImageSet | None = None
) -> Experiment:
    """The experiment that the command prepares for these images; ``words`` are its options."""
    network = tiny_network()
    network.preprocessing = Preprocessing(16)
    sources = Sources("made", train, val, test, "digest")
    return prepare(make_options("--data", "made", *words), sources, network, CPU, 0, folder)


def results_of(experiment: Experiment) -> Results:
    """The results in the experiment's folder, as the command reads them."""
    return Results(experiment.folder, settings_of(experiment), {})


def make_up_training(
    patch: pytest.MonkeyPatch,
    told: Callable[[Run], tuple[float, float]],
    diverges: Callable[[Run], bool] = lambda run: False,
) -> None:
    """Replace training and prediction: ``told`` gives the accuracy in % and the cross-entropy; no image is read.

    ``diverges`` says whether a run's next step diverges.
    """

    def step(self: Run, batches: Any) -> None:
        if diverges(self):
            raise DivergedError("made up")
        for series in (self.record.losses, self.record.cross_entropies, self.record.step_seconds):
            series.append(1.0)

    def answers(self: Run, images: InOrder) -> Answers:
        accuracy, cross_entropy = told(self)
        number = len(images.labels)
        right = torch.arange(number) < round(accuracy / 100 * number)
        predicted = torch.where(right, images.labels, (images.labels + 1) % len(images.images.classes))
        return Answers(predicted.tolist(), [0.5] * number, [cross_entropy] * number)

    patch.setattr(Run, "_step", step)
    patch.setattr(Run, "_answers", answers)


def interrupt_in_steps(patch: pytest.MonkeyPatch, *numbers: int) -> None:
    """Raise SIGINT in the middle of these steps, counted over all runs from 1 on."""
    forward, steps = Method.forward, itertools.count(1)

    def interrupted(self: Method, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        if next(steps) in numbers:
            signal.raise_signal(signal.SIGINT)
        return forward(self, batch)

    patch.setattr(Method, "forward", interrupted)


def written(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


MEASURED = ("seconds", "seconds_per_step", "preparation_seconds", "peak_mib")


def without_measured(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs or trials without times and memory, which differ between equal runs."""
    return [{name: value for name, value in entry.items() if name not in MEASURED} for entry in entries]
