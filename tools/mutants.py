"""Mutation testing: change one place of the package at a time, and check whether a test fails.

    python tools/mutants.py [--mutants N] [--seed N] [--only MODULE ...] [--out FILE]

The tool draws a sample of the changes that cosmic-ray can make in talib_fast/ops and talib_fast/finetune. It makes each
change in a copy of the tree and runs the test files about the changed module. For operations they run again with
``TALIB_FAST_BACKEND=pytorch``, since PyTorch implementations do not run where kernels do. The tool prints each change
that no test notices, and the share of changes that are noticed. ``--out`` writes all changes to a JSON file. A run
takes a night: each change costs the time of the tests up to the one that fails.
"""

import argparse
import json
import os
import queue
import random
import shlex
import shutil
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cosmic_ray import plugins
from cosmic_ray.ast import ast_nodes, get_ast_from_path
from cosmic_ray.mutating import mutate_and_test
from cosmic_ray.work_item import MutationSpec, TestOutcome, WorkResult

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 3600  # seconds for the tests of one change; after that the change counts as noticed
# the test files of modules that have no test file of their own name, or more than that
TESTS = {
    "ops/activation": ["activation"],
    "ops/draw": ["stoch_norm", "checkpointing"],
    "ops/enqueue": ["bi_tuning"],
    "ops/stoch_norm": ["stoch_norm", "activation"],
    "ops/stoch_norm_formula": ["stoch_norm", "activation", "stoch_norm_step"],
    "ops/stoch_norm_operators": ["stoch_norm", "activation", "stoch_norm_step"],
    "ops/stoch_norm_step": ["stoch_norm_step", "stoch_norm", "checkpointing"],
    "finetune/calibration": ["co_tuning"],
    "finetune/conversion": ["stoch_norm", "batch_norm_tools", "norm_act"],
    "finetune/folding": ["frozen"],
    "finetune/kept": ["bi_tuning", "lwf", "delta"],
    "finetune/labels": ["co_tuning", "lwf", "bi_tuning"],
    "finetune/layer_outputs": ["layers", "delta"],
    "finetune/layers": ["layers", "attention"],
    "finetune/logits": ["knowledge_distillation", "co_tuning"],
    "finetune/norms": ["stoch_norm", "batch_norm_tools", "norm_act"],
    "finetune/packing": ["frozen"],
    "finetune/parameters": ["delta", "sharded_regularization"],
    "finetune/prediction": ["lwf", "co_tuning", "loader", "shares"],
    "finetune/ranks": ["shares", "co_tuning", "bss", "bi_tuning"],
    "finetune/relationship": ["co_tuning"],
    "finetune/replay": ["attention"],
    "finetune/separable": ["attention"],
    "finetune/stochnorm": ["stoch_norm"],
}
# the modules in ops that are no part of an operation: their tests need the compiled library, or no backend
NO_OPERATIONS = ("enqueue", "library", "snapshot")


def tests_of(module: Path) -> list[str]:
    """The test files about a module of the package: those in `TESTS`, or the file of the module's own name."""
    name = module.relative_to("talib_fast").with_suffix("").as_posix()
    return [f"tests/test_{test}.py" for test in TESTS.get(name, [module.stem])]


def changes_of(module: Path) -> list[MutationSpec]:
    """All changes of a module, except changes of ``|`` in annotations, which would make the import fail."""
    tree = get_ast_from_path(ROOT / module)
    found: list[MutationSpec] = []
    for name in sorted(plugins.operator_names()):
        operator_class = plugins.get_operator(name)
        if operator_class.arguments() or name.startswith("core/ReplaceBinaryOperator_BitOr"):
            continue
        operator = operator_class()
        places = [place for node in ast_nodes(tree) for place in operator.mutation_positions(node)]
        found += [MutationSpec(module, name, index, *place) for index, place in enumerate(places)]
    return found


def modules(only: Sequence[str]) -> list[Path]:
    every = [path for folder in ("ops", "finetune") for path in sorted((ROOT / "talib_fast" / folder).glob("*.py"))]
    every = [path.relative_to(ROOT) for path in every if path.name != "__init__.py"]
    return [path for path in every if not only or str(path.with_suffix("")).removeprefix("talib_fast/") in only]


def sampled(found: Sequence[MutationSpec], number: int, seed: int) -> list[MutationSpec]:
    return random.Random(seed).sample(list(found), min(number, len(found)))


def copy_tree(folder: Path) -> Path:
    """A copy of the tree with everything that the tests need, compiled libraries included."""
    ignored = shutil.ignore_patterns("__pycache__", ".*", "build", "runs", "results", "dist")
    return Path(shutil.copytree(ROOT, folder, ignore=ignored))


def attempt(change: MutationSpec, tree: Path) -> WorkResult:
    """Make a change in ``tree``, run the tests about its module, and undo it."""
    words = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:benchmark"]
    tests = shlex.join(["env", "-C", str(tree), f"PYTHONPATH={tree}", *words, *tests_of(change.module_path)])
    if change.module_path.parts[1] == "ops" and change.module_path.stem not in NO_OPERATIONS:
        tests = f"{tests} && TALIB_FAST_BACKEND=pytorch {tests}"
    placed = MutationSpec(
        tree / change.module_path, change.operator_name, change.occurrence, change.start_pos, change.end_pos
    )
    return mutate_and_test([placed], shlex.join(["sh", "-c", tests]), PATIENCE)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=200, metavar="N", help="number of changes (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the sample (%(default)s)")
    parser.add_argument("--only", nargs="+", default=[], metavar="MODULE", help="modules such as ops/draw (all)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N", help="changes at a time (all cores)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON file for all changes and what became of them")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    options = parse(argv)
    every = [change for module in modules(options.only) for change in changes_of(module)]
    chosen = sampled(every, options.mutants, options.seed)
    print(f"{len(chosen)} of {len(every)} changes", flush=True)
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(options.jobs) as pool:
        trees: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for job in range(options.jobs):
            trees.put(copy_tree(Path(scratch) / str(job)))

        def tried(change: MutationSpec) -> WorkResult:
            tree = trees.get()
            try:
                return attempt(change, tree)
            finally:
                trees.put(tree)

        for change, result in zip(chosen, pool.map(tried, chosen), strict=True):
            noticed = result.test_outcome == TestOutcome.KILLED
            place = f"{change.module_path}:{change.start_pos[0]}"
            results.append({"place": place, "operator": change.operator_name, "noticed": noticed, "diff": result.diff})
            print(f"{place:<48}{change.operator_name:<56}{'noticed' if noticed else 'NOT NOTICED'}", flush=True)
            if options.out:
                options.out.write_text(json.dumps(results, indent=1))
    left = [result for result in results if not result["noticed"]]
    for result in left:
        print(f"\n{result['place']}\n{result['diff']}")
    print(f"\n{len(results) - len(left)} of {len(results)} changes noticed")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
