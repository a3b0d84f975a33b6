"""The images, network, device and settings that all runs and trials of a ``finetune`` command share."""

import hashlib
import importlib.metadata
import platform
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from os import environ
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import networks
from ..errors import UsageError, printable
from ..images.imageset import ImageSet
from ..version import __version__
from . import methods, parallel, sources
from .data import TaskData
from .memory import release_memory
from .options import Options
from .splits import Splits, split, test_part
from .trainer import Record, Run


@dataclass(frozen=True)
class Experiment:
    """The images, network, device and options that all runs of a command share."""

    options: Options
    device: torch.device
    workers: int
    sources: sources.Sources
    network: networks.Network
    folder: Path

    @property
    def val_is_labelled(self) -> bool:
        """Whether the validation images count as labelled images; if so, runs after trials train on them too."""
        return self.sources.val is not None and self.options.labels_per_class == "all"

    def splits(self, seed: int) -> Splits:
        """The images of a seed's runs. After trials, runs need no validation and train on all labelled images."""
        found = self.sources
        if not self.options.tune:
            return split(found.train, found.val, found.test, self.options.shares, seed)
        labelled = found.train
        if found.val is not None and self.val_is_labelled:
            labelled = labelled.joined(found.val)
        return split(labelled, None, found.test, replace(self.options.shares, val_share=0.0), seed)

    def test_images(self, seed: int) -> ImageSet:
        tested = self.splits(seed).test
        assert tested is not None
        return tested

    def load(self, splits: Splits, seed: int) -> TaskData:
        assert self.options.augment is not None
        return TaskData(
            splits,
            self.network.preprocessing,
            seed=seed,
            batch_size=self.options.batch_size,
            augmentation=self.options.augment,
            device=self.device,
            workers=self.workers,
        )

    def train(
        self,
        method: str,
        data: TaskData,
        options: Options,
        settings: dict[str, Any],
        checkpoint: Path,
        title: str,
        curves: Path | None = None,
        until: Callable[[Record], bool] | None = None,
    ) -> Run:
        """Train a run until it is finished or ``until`` ends it; for the arguments see :class:`Run`."""
        release_memory()
        network, device = self.network, self.device
        try:
            built = partial(Run, method, data, network, options, device, settings, checkpoint, title, curves)
            run = parallel.together(built)
            run.finish(until)
        except torch.OutOfMemoryError as error:
            raise parallel.RankError(f"{title} does not fit into the memory of {device}: lower --batch-size") from error
        return run

    def remove(self, checkpoint: Path) -> None:
        parallel.from_first(lambda: checkpoint.unlink(missing_ok=True))


def build_network(options: Options) -> networks.Network:
    """The pretrained network; raises UsageError if one of the methods cannot run on it."""
    network = networks.build(options.network, options.wanted_size, options.weights, options.delta_layers)
    if options.sample:
        network.preprocessing = replace(network.preprocessing, crop_pct=1.0)  # a digit fills its whole image
    refused = [str(error) for name in options.methods if (error := refusal(name, network))]
    if refused:
        raise UsageError("; ".join(dict.fromkeys(refused)))
    return network


def refusal(method: str, network: networks.Network) -> UsageError | None:
    """The error that says why the method cannot run on the network, or None if it can."""
    try:
        methods.check(method, network)
    except UsageError as error:
        return error
    return None


def prepare(
    options: Options,
    images: sources.Sources,
    network: networks.Network,
    device: torch.device,
    workers: int,
    folder: Path,
) -> Experiment:
    """Resolve the options for these images, and check for every seed that there are enough images.

    Trials must not see the test images of any seed. So with trials, all seeds share one set of test images.
    """
    if options.tune and images.test is None:
        train, test = test_part(images.train, options.test_share)
        images = replace(images, train=train, test=test)
    options = options.resolved(network.preprocessing.size, images.val is not None, images.test is not None)
    experiment = Experiment(options, device, workers, images, network, folder)
    most = max(len(experiment.splits(seed).train) for seed in options.seeds)
    return replace(experiment, options=options.with_steps(most))


def settings_of(experiment: Experiment) -> dict[str, Any]:
    """The settings that all runs of one table share."""
    options = experiment.options
    settings = options.settings() | {"device": experiment.device.type, "images": experiment.sources.digest}
    if options.tune:
        settings["seed of trials"] = options.seeds[0]
    if options.weights:
        settings["weights"] = hashlib.sha256(Path(options.weights).read_bytes()).hexdigest()[:12]
    if parallel.world_size() > 1:
        settings["processes"] = parallel.world_size()
    return settings


def record(experiment: Experiment, arguments: list[str]) -> dict[str, Any]:
    """The command, device, versions and images behind the figures, for results.json."""
    found, device = experiment.sources, experiment.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    launcher, times = ["python"], ""
    if parallel.world_size() > 1:
        launcher = ["torchrun", "--nproc-per-node", environ["LOCAL_WORLD_SIZE"]]
        times = f"{parallel.world_size()} × "
    return {
        "command": printable(shlex.join([*launcher, "-m", "talib_fast", *arguments])),
        "device": f"{times}{device.type}, {name}",
        **versions(),
        "data": {"name": found.name, "classes": list(found.train.classes), **found.findings},
    }


def versions() -> dict[str, str]:
    found = {
        "talib_fast": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
    used = {"PIL": "pillow", "torchvision": "torchvision", "timm": "timm", "optuna": "optuna"}
    return found | {name: importlib.metadata.version(name) for module, name in used.items() if module in sys.modules}
