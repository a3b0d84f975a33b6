"""Puts the results of gpu.sh so far into one file: ``python benchmarks/gather.py SUMMARY RESULTS JSON``."""

import json
import sys
from pathlib import Path


def main(summary: str, results: str, target: str) -> None:
    """Write ``target``.

    Args:
        summary: a text file: a line about the run, then a line for each step.
        results: a folder that has a folder for each benchmark.
        target: the JSON file.
    """
    first, *steps = Path(summary).read_text().splitlines()
    benchmarks = {
        file.parent.name: json.loads(file.read_text()) for file in sorted(Path(results).glob("*/results.json"))
    }
    Path(target).write_text(json.dumps({"run": first, "steps": steps, "benchmarks": benchmarks}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
