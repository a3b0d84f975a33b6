"""All runs of a ``finetune`` command: every method with every seed, each one kept as soon as it is finished."""

import hashlib
import importlib.metadata
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from os import environ
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import networks
from ..devices import named_device, usable_device
from ..errors import UsageError, UserError, count, printable
from ..images.loading import default_workers
from ..images.preprocessing import transforms
from ..version import __version__
from . import methods, parallel, report, sources
from .data import TaskData
from .keeping import Keeper, description
from .memory import release_memory
from .options import Options
from .results import Results, locked, name_of
from .splits import Splits, split
from .tensorboard import summary_writer
from .trainer import DivergedError, Run


@dataclass(frozen=True)
class Experiment:
    """What all runs of a command share."""

    options: Options
    device: torch.device
    workers: int
    sources: sources.Sources
    network: networks.Network
    folder: Path

    def splits(self, seed: int) -> Splits:
        found = self.sources
        return split(found.train, found.val, found.test, self.options.shares, seed)


def run(options: Options, arguments: list[str]) -> None:
    """Train what is not finished yet, then print the table and write the report.

    ``arguments`` are the command line's, for the record. Raises UserError, and KeyboardInterrupt when interrupted.
    """
    device = parallel.together(lambda: usable_device(parallel.own_device(named_device(options.device))))
    if options.batch_size % parallel.world_size():
        raise UsageError(
            f"--batch-size {options.batch_size} cannot be shared out evenly among {parallel.world_size()} processes: "
            "choose a multiple of their number"
        )
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.backends.cudnn.deterministic = True  # a resumed run must repeat what an uninterrupted one does
    folder = parallel.from_first(lambda: make_folder(options))
    with ExitStack() as stack:
        parallel.from_first(lambda: stack.enter_context(locked(folder)))
        train_and_report(options, arguments, device, folder)


def train_and_report(options: Options, arguments: list[str], device: torch.device, folder: Path) -> None:
    started = time.monotonic()
    workers = default_workers() if options.workers is None else options.workers
    found = parallel.together(partial(sources.find, options))
    network = parallel.together(partial(build_network, options))
    checked = parallel.from_first(partial(sources.check, found, workers))
    images = parallel.together(partial(sources.assemble, options, found, checked))
    experiment = parallel.together(partial(prepare, options, images, network, device, workers, folder))
    for sentence in [*sources.told(images), *network.notes]:
        print(sentence)
    options = experiment.options
    results = parallel.from_first(lambda: Results(folder, settings_of(experiment), record(experiment, arguments)))
    wanted = [(method, seed) for seed in options.seeds for method in options.methods]
    if options.restart and all(results.has(*pair) for pair in wanted):
        results.forget(options.methods, options.seeds)
    todo = [pair for pair in wanted if not results.has(*pair)]
    failures: list[UserError] = []
    if todo:
        print(header(experiment, len(wanted), len(todo)), flush=True)
        results.write()
        failures = train(todo, experiment, results)
        print(f"{count(len(todo), 'run')} took {time.monotonic() - started:.0f} s.")
    else:
        print(f"Everything is finished already in {folder} ({count(len(wanted), 'run')}); --restart trains it again.")
    if results.runs:
        parallel.from_first(lambda: report.write(results.content, folder, lambda seed: experiment.splits(seed).test))
        print(report.text(results.content))
        print(f"\nWritten to {printable(folder)}: {', '.join(report.FILES)}")
        print(*closing(results.runs, folder), sep="\n")
    if failures:
        raise UserError(f"{len(failures)} of {count(len(todo), 'run')} failed: {failures[0]}")


def build_network(options: Options) -> networks.Network:
    """The pretrained network, on which all methods can run; what is quickly known to fail does so here."""
    transforms()
    if options.tensorboard:
        summary_writer()
    network = networks.build(options.network, options.wanted_size, options.weights, options.delta_layers)
    if options.sample:
        network.preprocessing = replace(network.preprocessing, crop_pct=1.0)  # a digit fills its picture
    refused = [str(error) for name in options.methods if (error := refusal(name, network))]
    if refused:
        raise UsageError("; ".join(dict.fromkeys(refused)))
    return network


def refusal(method: str, network: networks.Network) -> UsageError | None:
    """Why the method can't run on the network, if it can't."""
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
    """What the options mean for these images, which are split once for each seed to see that they suffice."""
    options = options.resolved(network.preprocessing.size, images.val is not None, images.test is not None)
    experiment = Experiment(options, device, workers, images, network, folder)
    most = max(len(experiment.splits(seed).train) for seed in options.seeds)
    return replace(experiment, options=options.with_steps(most))


def train(todo: Sequence[tuple[str, int]], experiment: Experiment, results: Results) -> list[UserError]:
    """Carry out the runs and add them to the results; returns the errors of those that diverged or can't be kept."""
    options, network, device, folder = experiment.options, experiment.network, experiment.device, experiment.folder
    keeper = Keeper(folder, options.keep, network, describe(experiment, results), results)
    settings = results.content["settings"]
    data: TaskData | None = None
    failures: list[UserError] = []
    for number, (method, seed) in enumerate(todo, 1):
        if data is None or data.seed != seed:
            data = parallel.together(partial(load_data, experiment, seed))
        name = name_of(method, seed)
        checkpoint = folder / "checkpoints" / f"{name}.pt"
        curves = folder / "tensorboard" / name if options.tensorboard else None
        label = f"[{number}/{len(todo)}] {method}, seed {seed}"
        release_memory()
        started = time.monotonic()
        try:
            built = partial(Run, method, seed, network, data, options, device, settings, checkpoint, curves)
            prepared = parallel.together(built)
            result = prepared.finish().result(data)
        except DivergedError as error:
            remove(checkpoint)  # continuing it would only diverge again
            failures.append(error)
            print(f"{label}: {error}", flush=True)
            continue
        except torch.OutOfMemoryError as error:
            raise parallel.RankError(f"{label} does not fit into the memory of {device}: lower --batch-size") from error
        failure = keeper.take(prepared, result)
        failures += [failure] if failure else []
        remove(checkpoint)
        print(f"{label}: {result['accuracy']:.1f} % after {time.monotonic() - started:.1f} s", flush=True)
    return failures


def load_data(experiment: Experiment, seed: int) -> TaskData:
    options = experiment.options
    assert options.augment is not None
    return TaskData(
        experiment.splits(seed),
        experiment.network.preprocessing,
        seed=seed,
        batch_size=options.batch_size,
        augmentation=options.augment,
        device=experiment.device,
        workers=experiment.workers,
    )


def remove(checkpoint: Path) -> None:
    parallel.from_first(lambda: checkpoint.unlink(missing_ok=True))


def make_folder(options: Options) -> Path:
    folder = Path(options.out)
    for images in (options.test, None if options.sample else options.data):
        if images and folder.resolve().is_relative_to(Path(images).resolve()):
            raise UsageError(
                f"{printable(folder)} lies in {printable(images)}, where its plots would be taken for images: choose "
                "another --out"
            )
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the folder {printable(folder)} cannot be made ({error.strerror}): choose another --out"
        ) from error
    return folder


def settings_of(experiment: Experiment) -> dict[str, Any]:
    """What the runs of one table share."""
    options = experiment.options
    settings = options.settings() | {"device": experiment.device.type, "images": experiment.sources.digest}
    if options.weights:
        settings["weights"] = hashlib.sha256(Path(options.weights).read_bytes()).hexdigest()[:12]
    if parallel.world_size() > 1:
        settings["processes"] = parallel.world_size()
    return settings


def record(experiment: Experiment, arguments: list[str]) -> dict[str, Any]:
    """What the figures were measured with, and on which images."""
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
    used = {"PIL": "pillow", "torchvision": "torchvision", "timm": "timm"}
    return found | {name: importlib.metadata.version(name) for module, name in used.items() if module in sys.modules}


def describe(experiment: Experiment, results: Results) -> dict[str, Any]:
    """What all models of a command say of themselves."""
    shared = description(experiment.network, experiment.sources.train.classes, versions())
    return shared | {"settings": results.content["settings"]}


def header(experiment: Experiment, wanted: int, todo: int) -> str:
    """What is about to be done, and what it will not show."""
    options, device = experiment.options, experiment.device
    splits = experiment.splits(options.seeds[0])
    labels = "all labels" if options.labels_per_class == "all" else f"{options.labels_per_class} labels"
    validation = f", {len(splits.val):,} for validation" if splits.val else ""
    precision = "mixed precision" if options.amp else "float32"
    processes = f", shared out among {parallel.world_size()} processes" if parallel.world_size() > 1 else ""
    threads = f" ({torch.get_num_threads()} threads)" if device.type == "cpu" else ""
    lines = [
        f"Fine-tuning {options.network} on {experiment.sources.name}: {count(len(splits.train.classes), 'class')}, "
        f"{labels} per class: {count(len(splits.train), 'image')} for training{validation}, {len(splits.test):,} for "
        "testing.",
        f"{count(wanted, 'run')} ({count(len(options.methods), 'method')}, {count(len(options.seeds), 'seed')}) of "
        f"{options.steps:,} steps with {options.batch_size} images of {options.image_size} pixels, "
        f"on {device.type}{threads}, {precision}{processes}.",
    ]
    if todo < wanted:
        lines.append(f"Finished already: {wanted - todo}.")
    if len(options.seeds) == 1:
        lines.append("One seed: differences of a few points are noise.")
    return "\n".join(lines)


def closing(runs: Sequence[dict[str, Any]], folder: Path) -> list[str]:
    """Where the kept models are, and what to do with one."""
    kept = [folder / run["model"] for run in runs if run.get("model")]
    if not kept:
        return []
    names = ", ".join(printable(model) for model in kept)
    return [f"Kept: {names}", f"Try it: python -m talib_fast predict {shlex.quote(printable(kept[-1]))} IMAGES"]
