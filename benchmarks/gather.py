"""Puts what gpu.sh found so far into one JSON: ``python benchmarks/gather.py SUMMARY RESULTS JSON``."""

import json
import sys
from pathlib import Path


def main(summary: str, results: str, target: str) -> None:
    """SUMMARY is a line of its own and one per step; RESULTS a folder with a folder for each benchmark."""
    first, *steps = Path(summary).read_text().splitlines()
    benchmarks = {
        file.parent.name: json.loads(file.read_text()) for file in sorted(Path(results).glob("*/results.json"))
    }
    Path(target).write_text(json.dumps({"run": first, "steps": steps, "benchmarks": benchmarks}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
