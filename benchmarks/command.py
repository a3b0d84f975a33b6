"""The options that the benchmarks' command lines share."""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
QUICK_RESULTS = Path(__file__).parent.parent / "runs" / "benchmarks"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_DTYPES = {"cpu": ["float32"], "cuda": ["float32", "bfloat16"]}
BOTH_DTYPES = {device: ["float32", "bfloat16"] for device in ("cpu", "cuda")}
DEFAULT_ROUNDS = {"cpu": 11, "cuda": 25}
LAYOUTS = ("contiguous", "channels_last")
QUICK_BATCH, QUICK_ROUNDS = 4, 3


def parser(
    description: str | None, dtypes: bool = True, layouts: bool = True, batch: bool = True
) -> argparse.ArgumentParser:
    """A parser of the options that all benchmarks have, and of ``--dtype``, ``--layouts`` and ``--batch`` if asked."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    if dtypes:
        made.add_argument(
            "--dtype", nargs="+", choices=DTYPES, help="those that a full run has: float32, or bfloat16 too"
        )
    if layouts:
        made.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=LAYOUTS)
    if batch:
        made.add_argument("--batch", type=int, help="images")
    made.add_argument("--rounds", type=int, help="samples of each candidate")
    made.add_argument(
        "--quick",
        action="store_true",
        help=f"{f'batch {QUICK_BATCH} and ' if batch else ''}{QUICK_ROUNDS} rounds: whether it works, not how fast",
    )
    made.add_argument("--out", type=Path, help="folder; results/ beside this file, runs/ for anything but a full run")
    made.add_argument("--from-json", type=Path, metavar="DIR", help="measure nothing, write table and plot anew")
    return made


def parse(
    made: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
    operation: str,
    batches: Mapping[str, int] | None = None,
    fewest: int = 1,
    full: Callable[[argparse.Namespace], bool] = lambda options: True,
    rounds: Mapping[str, int] = DEFAULT_ROUNDS,
    dtypes: Mapping[str, list[str]] = DEFAULT_DTYPES,
) -> argparse.Namespace:
    """The parsed options, with their defaults filled in. Only a full run writes to ``results`` beside this file.

    Args:
        made: a parser of :func:`parser`, perhaps with more options.
        arguments: the words of the command line; None: those of this process.
        operation: the name of the benchmark's folder of results.
        batches: default of ``--batch`` by device; None: there is no such option.
        fewest: the smallest batch.
        full: whether the options that only this benchmark has are those of a full run.
        rounds: default of ``--rounds`` by device.
        dtypes: default of ``--dtype`` by device.
    """
    options = made.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available() and options.from_json is None:
        made.error("there is no GPU that this torch can use")
    if options.rounds is not None and options.rounds < 1:
        made.error("expected at least one round")
    whole = not (options.quick or options.rounds) and full(options)
    if "dtype" in options:
        whole = whole and not options.dtype
        options.dtype = options.dtype or dtypes[options.device]
    if "layouts" in options:
        whole = whole and set(options.layouts) == set(made.get_default("layouts"))
    if batches is not None:
        if options.batch is not None and options.batch < fewest:
            made.error(f"expected a batch of at least {fewest}")
        whole = whole and not options.batch
        options.batch = options.batch or (QUICK_BATCH if options.quick else batches[options.device])
    options.rounds = options.rounds or (QUICK_ROUNDS if options.quick else rounds[options.device])
    options.out = options.out or (RESULTS if whole else QUICK_RESULTS) / options.device / operation
    return options


def collect_and_publish(
    options: argparse.Namespace,
    collect: Callable[[argparse.Namespace], dict[str, Any]],
    publish: Callable[[dict[str, Any], Path], None],
    place: Callable[[str], Path],
) -> None:
    """Collect results and publish them in the folder ``place(device)``; or publish those of ``--from-json`` again."""
    if options.from_json:
        publish(json.loads((options.from_json / "results.json").read_text()), options.from_json)
        return
    results = collect(options)
    publish(results, place(results["settings"]["device"]))
