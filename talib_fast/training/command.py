"""The command ``finetune``: carry out trials, train every method with every seed, and write the results."""

import shlex
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..devices import named_device, usable_device
from ..errors import UsageError, UserError, count, printable
from ..images.loading import default_workers
from ..images.preprocessing import transforms
from ..libraries import needed
from . import halving, parallel, report, sources, trials, tuning
from .choosing import best_run, best_trial
from .data import TaskData
from .experiment import Experiment, build_network, prepare, record, settings_of, versions
from .keeping import Keeper, description
from .options import Options
from .results import Results, locked, name_of
from .search import applied
from .tensorboard import summary_writer
from .trainer import DivergedError


def run(options: Options, arguments: list[str]) -> None:
    """Train the runs that are not finished yet, print the table and write the report.

    Args:
        options: the parsed options.
        arguments: the words of the command line, for the record.

    Raises:
        UserError: something that the user can mend is wrong.
        KeyboardInterrupt: the user interrupted.
    """
    device = parallel.together(lambda: usable_device(parallel.own_device(named_device(options.device))))
    if options.batch_size % parallel.world_size():
        raise UsageError(
            f"--batch-size {options.batch_size} cannot be divided evenly among {parallel.world_size()} processes: "
            f"choose a multiple of {parallel.world_size()}"
        )
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.backends.cudnn.deterministic = True  # a resumed run must give the same result as an uninterrupted one
    folder = parallel.from_first(lambda: make_folder(options))
    with ExitStack() as stack:
        parallel.from_first(lambda: stack.enter_context(locked(folder)))
        train_and_report(options, arguments, device, folder)


def train_and_report(options: Options, arguments: list[str], device: torch.device, folder: Path) -> None:
    """Do the work of :func:`run` in an output folder that no other process writes to."""
    started = time.monotonic()
    workers = default_workers() if options.workers is None else options.workers
    found = parallel.together(partial(sources.find, options))
    parallel.together(partial(check_libraries, options))
    network = parallel.together(partial(build_network, options))
    checked = parallel.from_first(partial(sources.check, found, workers))
    images = parallel.together(partial(sources.assemble, options, found, checked))
    experiment = parallel.together(partial(prepare, options, images, network, device, workers, folder))
    for sentence in [*sources.told(images), *network.notes]:
        print(sentence)
    options = experiment.options
    results = parallel.from_first(lambda: Results(folder, settings_of(experiment), record(experiment, arguments)))
    if options.restart and finished(options, results):
        results.forget(options.methods, options.seeds)
    done = finished(options, results)
    if not done:
        print(header(experiment), flush=True)
        results.write()
    chosen = choose(experiment, results)
    wanted = [(method, seed) for seed in options.seeds for method in chosen]
    todo = [pair for pair in wanted if not results.has(*pair)]
    if not done and len(todo) < len(wanted):
        print(f"Finished already: {count(len(wanted) - len(todo), 'run')}.", flush=True)
    failures = train(todo, chosen, experiment, results) if todo else []
    if done:
        print(f"Nothing to train: {folder} has all results ({count(len(wanted), 'run')}); --restart trains again.")
    else:
        more = " and the trials" if options.tune else ""
        print(f"{count(len(todo), 'run')}{more} took {time.monotonic() - started:.0f} s.")
    if results.runs:
        parallel.from_first(lambda: report.write(results.content, folder, experiment.test_images))
        print(report.text(results.content))
        print(f"\nWritten to {printable(folder)}: {', '.join(report.files(results.content))}")
        print(*closing(results.content, folder), sep="\n")
    if left_out := [method for method in options.methods if method not in chosen and not options.auto]:
        failures.append(UserError(f"every trial of {', '.join(left_out)} diverged: lower --lr"))
    if failures:
        raise UserError(f"{len(failures)} of {count(len(wanted) + len(left_out), 'run')} failed: {failures[0]}")


def check_libraries(options: Options) -> None:
    """Raise UserError now if a library is missing that the command needs later."""
    transforms()
    if options.tensorboard:
        summary_writer()
    if options.tune:
        tuning.library()
    if len(options.seeds) > 1:
        needed("scipy.stats", "the comparison of several seeds")


def finished(options: Options, results: Results) -> bool:
    """Whether all runs that the command asks for are finished."""
    winner = best_trial(results.trials) if options.auto else None
    methods = [winner["method"]] if winner else options.methods
    return all(results.has(method, seed) for seed in options.seeds for method in methods)


def choose(experiment: Experiment, results: Results) -> dict[str, dict[str, Any]]:
    """Carry out the trials; returns the methods to train, each with the settings that its trials chose."""
    options = experiment.options
    if options.auto:
        winner, settings = halving.compete(options.methods, experiment, results)
        return {winner: settings}
    if options.tune:
        return tuning.tune(options.methods, experiment, results)
    return {method: {} for method in options.methods}


def train(
    todo: Sequence[tuple[str, int]],
    chosen: Mapping[str, Mapping[str, Any]],
    experiment: Experiment,
    results: Results,
) -> list[UserError]:
    """Train the runs and add them to the results.

    Args:
        todo: the (method, seed) pairs to train.
        chosen: for each method, the settings that its trials chose.

    Returns:
        The errors of runs that diverged, and of models that could not be kept.
    """
    options, folder = experiment.options, experiment.folder
    keeper = Keeper(folder, options.keep, experiment.network, describe(experiment, results), results)
    data: TaskData | None = None
    failures: list[UserError] = []
    for number, (method, seed) in enumerate(todo, 1):
        if data is None or data.seed != seed:
            data = parallel.together(partial(experiment.load, experiment.splits(seed), seed))
        name = name_of(method, seed)
        checkpoint = folder / "checkpoints" / f"{name}.pt"
        curves = folder / "tensorboard" / name if options.tensorboard else None
        label = f"[{number}/{len(todo)}] {method}, seed {seed}"
        own, settings = applied(options, chosen[method]), results.content["settings"]
        tuned = {"chosen": dict(chosen[method])} if options.tune else {}
        started = time.monotonic()
        try:
            trained = experiment.train(method, data, own, settings | tuned, checkpoint, label, curves)
        except DivergedError as error:
            experiment.remove(checkpoint)  # a continued run would diverge again
            failures.append(error)
            print(f"{label}: {error}", flush=True)
            continue
        result = trained.record.result(data) | tuned
        failure = keeper.take(trained, result)
        failures += [failure] if failure else []
        experiment.remove(checkpoint)
        print(f"{label}: {result['accuracy']:.1f} % after {time.monotonic() - started:.1f} s", flush=True)
    return failures


def make_folder(options: Options) -> Path:
    """Create the output folder; raises UserError if that fails or if it lies among the images."""
    folder = Path(options.out)
    for images in (options.test, None if options.sample else options.data):
        if images and folder.resolve().is_relative_to(Path(images).resolve()):
            raise UsageError(
                f"{printable(folder)} lies inside {printable(images)}, so its plots would be read as images: choose "
                "another --out"
            )
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the folder {printable(folder)} cannot be created ({error.strerror}): choose another --out"
        ) from error
    return folder


def describe(experiment: Experiment, results: Results) -> dict[str, Any]:
    """The entries of ``config.json`` that all models of a command share."""
    shared = description(experiment.network, experiment.sources.train.classes, versions())
    return shared | {"settings": results.content["settings"]}


def header(experiment: Experiment) -> str:
    """The lines that are printed first: images, runs, steps, device, and the budget of the trials."""
    options, device = experiment.options, experiment.device
    splits = experiment.splits(options.seeds[0])
    assert splits.test is not None
    labels = "all labels" if options.labels_per_class == "all" else f"{options.labels_per_class} labels"
    validation = f", {len(splits.val):,} for validation" if splits.val else ""
    precision = "mixed precision" if options.amp else "float32"
    processes = f", divided among {parallel.world_size()} processes" if parallel.world_size() > 1 else ""
    threads = f" ({torch.get_num_threads()} threads)" if device.type == "cpu" else ""
    many, seeds = count(len(options.methods), "method"), count(len(options.seeds), "seed")
    runs = f"{count(len(options.seeds), 'run')} of the best of {many}"
    if not options.auto:
        runs = f"{count(len(options.methods) * len(options.seeds), 'run')} ({many}, {seeds})"
    lines = [
        f"Fine-tuning {options.network} on {experiment.sources.name}: {count(len(splits.train.classes), 'class')}, "
        f"{labels} per class: {count(len(splits.train), 'image')} for training{validation}, {len(splits.test):,} for "
        "testing.",
        f"{runs} of {options.steps:,} steps with {options.batch_size} images of {options.image_size} pixels, "
        f"on {device.type}{threads}, {precision}{processes}.",
    ]
    if options.tune:
        lines.append(budget(experiment))
    if len(options.seeds) == 1:
        lines.append("One seed: differences of a few points are noise.")
    return "\n".join(lines)


def budget(experiment: Experiment) -> str:
    """The sentence that says how many trials there are and which images judge them."""
    options, parts = experiment.options, trials.judges(experiment)
    assert options.tune is not None and options.steps is not None
    judged = trials.in_words(parts)
    if not options.auto:
        return f"First, {count(options.tune, 'trial')} of settings for each method, {judged}."
    plan = halving.rungs(options.tune * len(options.methods), options.steps)
    rungs = ", ".join(f"{many} of {count(steps, 'step')}" for many, steps in plan)
    whole = halving.cost(plan) * len(parts)
    return (
        f"First, {count(options.tune, 'setting')} of each method compete, {judged}: {rungs}. This takes as long as "
        f"{whole:.0f} runs."
    )


def closing(results: Mapping[str, Any], folder: Path) -> list[str]:
    """The lines that are printed last: where the kept models are, and a command that uses one."""
    kept = [folder / run["model"] for run in results["runs"] if run.get("model")]
    if not kept:
        return []
    lines = [f"Kept: {', '.join(printable(model) for model in kept)}"]
    if len(kept) > 1 and best_run(results) is None:
        lines.append("No best method was chosen: that needs --tune N, --method auto or images for validation.")
    return [*lines, f"Try it: python -m talib_fast predict {shlex.quote(printable(kept[-1]))} IMAGES"]
