"""What the benchmarks' command lines share."""

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
    """A parser of the options that every benchmark has, and of those that most have."""
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
    """The options with their defaults: ``batches``, if any, ``rounds`` and ``dtypes`` by device.

    Only a full run writes beside the benchmarks.
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
    """Publish what ``collect`` finds, where ``place`` says by the device's type; or anew what --from-json holds."""
    if options.from_json:
        publish(json.loads((options.from_json / "results.json").read_text()), options.from_json)
        return
    results = collect(options)
    publish(results, place(results["settings"]["device"]))
