"""Runs all benchmarks, each in a process of its own, and prints how many goals each reached; or compares two runs.

    python benchmarks/suite.py [--device cuda] [--quick] [--only NAME ...] [--out DIR]
    python benchmarks/suite.py --compare BEFORE AFTER

A full run writes ``results/<device>/<name>/`` beside this file (results.json, table.md and plot.png), and a summary of
all. ``--quick`` takes minutes and writes below ``runs/``; it shows whether everything works, not how fast. The exit
status is 1 if a benchmark fails; a missed goal is no failure. ``--compare`` takes two results.json, or two folders of
results. Its exit status is 1 if talib_fast became slower than before, compared with a baseline and beyond the spread of
both runs.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import compare
import summary
from command import QUICK_RESULTS, RESULTS
from report import align

FOLDER = Path(__file__).parent
NAMES = tuple(sorted(path.stem.removeprefix("bench_") for path in FOLDER.glob("bench_*.py")))


def run_one(name: str, device: str, quick: bool, folder: Path) -> list[str]:
    """Run a benchmark, which prints its own table; returns its row of the table at the end."""
    print(f"== {name}", flush=True)
    started = time.monotonic()
    script = str(FOLDER / f"bench_{name}.py")
    command = [sys.executable, script, "--device", device, "--out", os.path.relpath(folder)]
    failed = subprocess.run([*command, *(["--quick"] if quick else [])]).returncode
    seconds = f"{time.monotonic() - started:.0f} s"
    if failed:
        return [name, "FAILED", "", seconds]
    goals = json.loads((folder / "results.json").read_text())["goals"]
    judged = [goal["passed"] for goal in goals if goal["passed"] is not None]
    return [name, "measured", f"{sum(judged)} of {len(judged)}", seconds]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    made.add_argument("--quick", action="store_true", help="few rounds and small batches")
    made.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help=f"of {', '.join(NAMES)}")
    made.add_argument("--out", type=Path, help="folder; results/ beside this file, runs/ with --quick")
    made.add_argument("--compare", nargs=2, type=Path, metavar=("BEFORE", "AFTER"), help="measure nothing")
    options = made.parse_args(arguments)
    options.out = options.out or (QUICK_RESULTS if options.quick else RESULTS) / options.device
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if options.compare:
        try:
            sys.exit(0 if compare.compare(*options.compare) else 1)
        except compare.NothingToCompare as error:
            sys.exit(f"suite.py: {error}")
    lines = [run_one(name, options.device, options.quick, options.out / name) for name in options.only]
    if set(options.only) == set(NAMES):
        summary.main(options.out)
    print(align([["benchmark", "", "goals passed", "time"], *lines]), flush=True)
    sys.exit(any(line[1] == "FAILED" for line in lines))


if __name__ == "__main__":
    main()
