"""All runs of a ``finetune`` command: every method with every seed, each one kept as soon as it is finished."""

import json
import os
import platform
import shlex
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..storage import write_atomically
from ..version import __version__
from . import networks, parallel, report
from .common import UserError, differences
from .data import ImageSet, TaskData, load_image_folder, load_sample
from .memory import release_memory
from .options import Options
from .trainer import DivergedError, Run


class Results:
    """The finished runs of an output folder, ``results.json`` in it; raises UserError if they do not belong here.

    Every rank holds them, and rank 0 writes them.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], environment: dict[str, Any]) -> None:
        self.path = folder / "results.json"
        self.content: dict[str, Any] = {**environment, "settings": settings, "runs": []}
        if not self.path.exists():
            return
        try:
            previous = json.loads(self.path.read_text())
            self.content["runs"] = previous["runs"]
            difference = differences(previous["settings"], settings)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.path} cannot be read as results: remove it or choose another --out") from error
        if difference:
            raise UserError(
                f"{folder} holds results of other settings ({difference}): choose another --out or remove {folder}"
            )

    @property
    def runs(self) -> list[dict[str, Any]]:
        return self.content["runs"]

    def has(self, method: str, seed: int) -> bool:
        return any((run["method"], run["seed"]) == (method, seed) for run in self.runs)

    def add(self, run: dict[str, Any]) -> None:
        self.runs.append(run)
        self.write()

    def forget(self, methods: tuple[str, ...], seeds: tuple[int, ...]) -> None:
        self.content["runs"] = [run for run in self.runs if run["method"] not in methods or run["seed"] not in seeds]

    def write(self) -> None:
        text = json.dumps(self.content, indent=1) + "\n"
        parallel.from_first(lambda: write_atomically(self.path, lambda file: file.write(text.encode())))


def run(options: Options, arguments: list[str]) -> None:
    """Train what is not finished yet, then print the table and write table and plots.

    ``arguments`` are the command line's, for the record. Raises UserError, and KeyboardInterrupt when interrupted.
    """
    started = time.monotonic()
    device = parallel.together(lambda: choose_device(options.device))
    if options.batch_size % parallel.world_size():
        raise UserError(
            f"--batch-size {options.batch_size} cannot be shared out evenly among {parallel.world_size()} processes: "
            "choose a multiple of their number"
        )
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.backends.cudnn.deterministic = True  # a resumed run must repeat what an uninterrupted one does
    images = parallel.together(lambda: load_sample() if options.data == "sample" else load_image_folder(options.data))
    settings = options.settings() | {"device": device.type, "images": images.digest}
    if parallel.world_size() > 1:
        settings["processes"] = parallel.world_size()
    folder = Path(options.out)
    results = parallel.from_first(lambda: Results(make_folder(options.out), settings, environment(device, arguments)))
    wanted = [(method, seed) for seed in options.seeds for method in options.methods]
    if options.restart and all(results.has(*pair) for pair in wanted):
        results.forget(options.methods, options.seeds)
    todo = [pair for pair in wanted if not results.has(*pair)]
    if todo:
        network = parallel.together(
            lambda: networks.build(options.network, options.image_size, options.weights, options.delta_layers)
        )
        print(header(options, images, device, len(wanted), len(todo)), flush=True)
        results.write()
        failures = train(todo, network, images, options, device, settings, results, folder)
        print(f"{count(len(todo), 'run')} took {time.monotonic() - started:.0f} s.")
    else:
        print(f"Everything is finished already in {folder} ({count(len(wanted), 'run')}); --restart trains it again.")
        failures = []
    if results.runs:
        parallel.from_first(lambda: report.write(results.content, folder))
        print(report.text(results.content))
        print(f"\nWritten to {folder}: {', '.join(report.FILES)}")
    if failures:
        raise UserError(f"{len(failures)} of {count(len(todo), 'run')} failed: {failures[0]}")


def train(
    todo: list[tuple[str, int]],
    network: networks.Network,
    images: ImageSet,
    options: Options,
    device: torch.device,
    settings: dict[str, Any],
    results: Results,
    folder: Path,
) -> list[DivergedError]:
    """Carry out the runs and add them to the results; returns the errors of those that diverged."""
    data: TaskData | None = None
    failures = []
    for number, (method, seed) in enumerate(todo, 1):
        if data is None or data.seed != seed:
            data = parallel.together(partial(load_data, images, seed, options, device))
        checkpoint = folder / "checkpoints" / f"{method}-seed{seed}.pt"
        label = f"[{number}/{len(todo)}] {method}, seed {seed}"
        release_memory()
        started = time.monotonic()
        try:
            record = parallel.together(
                partial(Run, method, seed, network, data, options, device, settings, checkpoint)
            ).finish()
        except DivergedError as error:
            remove(checkpoint)  # continuing it would only diverge again
            failures.append(error)
            print(f"{label}: {error}", flush=True)
            continue
        except torch.OutOfMemoryError as error:
            raise parallel.RankError(f"{label} does not fit into the memory of {device}: lower --batch-size") from error
        results.add(record.result())
        remove(checkpoint)
        print(f"{label}: {record.accuracies[-1][1]:.1f} % after {time.monotonic() - started:.1f} s", flush=True)
    return failures


def load_data(images: ImageSet, seed: int, options: Options, device: torch.device) -> TaskData:
    return TaskData(
        images,
        labels_per_class=options.labels_per_class,
        test_images=options.test_images,
        size=options.image_size,
        seed=seed,
        batch_size=options.batch_size,
        augmentation=options.augment,
        device=device,
    )


def remove(checkpoint: Path) -> None:
    parallel.from_first(lambda: checkpoint.unlink(missing_ok=True))


def choose_device(name: str) -> torch.device:
    """The device that is meant; ``auto`` is the first GPU, else the CPU. Several processes have a GPU each."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if parallel.world_size() > 1:
            device = own_device(device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # which one depends on how torch was built
        reason = networks.first_line(error)
        raise UserError(f"the device {name} cannot be used ({reason}): choose another --device, e.g. cpu") from error
    return device


def own_device(device: torch.device) -> torch.device:
    """The device of this one of several processes."""
    if device.index is not None or device.type not in ("cpu", "cuda"):
        raise UserError(f"several processes cannot train on the device {device}: choose --device cuda or cpu")
    if device.type == "cpu":
        return device
    gpus, processes = torch.cuda.device_count(), int(os.environ["LOCAL_WORLD_SIZE"])
    if gpus < processes:
        raise UserError(
            f"{processes} processes on this machine need a GPU each, but it has {gpus}: start fewer of them, or choose "
            "--device cpu"
        )
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def make_folder(out: str) -> Path:
    folder = Path(out)
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder {folder} cannot be made ({error.strerror}): choose another --out") from error
    return folder


def environment(device: torch.device, arguments: list[str]) -> dict[str, Any]:
    """What the figures were measured with."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    launcher, times = ["python"], ""
    if parallel.world_size() > 1:
        launcher, times = (
            ["torchrun", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"]],
            f"{parallel.world_size()} × ",
        )
    return {
        "command": shlex.join([*launcher, "-m", "talib_fast", *arguments]),
        "device": f"{times}{device.type}, {name}",
        "talib_fast": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def header(options: Options, images: ImageSet, device: torch.device, wanted: int, todo: int) -> str:
    """What is about to be done, and what it will not show."""
    precision = "mixed precision" if options.amp else "float32"
    processes = f", shared out among {parallel.world_size()} processes" if parallel.world_size() > 1 else ""
    threads = f" ({torch.get_num_threads()} threads)" if device.type == "cpu" else ""
    lines = [
        f"Fine-tuning {options.network} on {images.name}: {len(images.classes)} classes, "
        f"{count(options.labels_per_class, 'label')} per class, tested on at most {options.test_images} others.",
        f"{count(wanted, 'run')} ({count(len(options.methods), 'method')}, {count(len(options.seeds), 'seed')}) of "
        f"{count(options.steps, 'step')} with {options.batch_size} images of {options.image_size} pixels, "
        f"on {device.type}{threads}, {precision}{processes}.",
    ]
    if todo < wanted:
        lines.append(f"Finished already: {wanted - todo}.")
    if len(options.seeds) == 1:
        lines.append("One seed: differences of a few points are noise.")
    return "\n".join(lines)


def count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"
