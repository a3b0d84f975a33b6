"""Predicts how long the CUDA kernels take on a GPU that is not at hand. No figure of it is a measurement.

    python benchmarks/gpu_model.py [--before FILE] [--out DIR] [--page]

writes ``results.json`` and ``table.md``: ``stoch_norm`` at ResNet-50's shapes and ``squared_distance`` on its lists,
for an H100 and an H200. ``--before`` names an older ``results.json`` to compare with. ``--page`` puts the totals into
the operations' pages in docs/operations. It needs g++, and no GPU.

gpu_launches.py has what is known of the kernels, gpu_times.py what is assumed of their times, and the arithmetic. Each
assumption stands in one place: the speeds of a GPU in `Gpu`, the steps of a kernel beside its loops in `Steps`.
"""

import argparse
import itertools
import json
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import bench_squared_distance as distance
import bench_stoch_norm as norm
import command
import report
import torch
from command import DTYPES, LAYOUTS
from gpu_launches import GPUS, ROOT, build_plans, plans, read_machine_code
from gpu_times import PASSES, Model, Steps, batch_norm_seconds
from report import Case

from talib_fast.storage import write_atomically

FOLDER = command.RESULTS / "gpu_model"
BEFORE = FOLDER / "before.json"
MACHINE_CODE = command.RESULTS / "machine_code" / "sm_90.json"
PAGES = ROOT / "docs" / "operations"
BATCH = 48
OPERATIONS = STOCH_NORM, SQUARED_DISTANCE = norm.OPERATION, distance.OPERATION
LISTS = (distance.DELTA, distance.ATTENTION, distance.L2_SP, distance.L2)


# ---- All cases


def stoch_norm_cases() -> Iterator[Case]:
    """The layers of ResNet-50 alone, and its blocks, as bench_stoch_norm.py has them."""
    for dtype, layout, (channels, size, blocks) in itertools.product(("float32", "bfloat16"), LAYOUTS, norm.LAYERS):
        for block, count in (blocks | {norm.NORM: sum(blocks.values())}).items():
            setting = norm.Setting(channels, size, count, layout, dtype, BATCH, "cuda", block)
            yield {
                "operation": STOCH_NORM, "label": setting.label, "parts": setting.parts, "shape": list(setting.shape),
                "count": count, "layout": layout, "dtype": dtype,
            }  # fmt: skip


def stoch_norm_request(case: Case, direction: str) -> str:
    batch, channels, height, width = case["shape"]
    rows = case["layout"] == "channels_last"
    view = (batch * height * width, channels, 1) if rows else (batch, channels, height * width)
    kind = "plain" if case["parts"] == [norm.NORM] else "fused"
    return " ".join(map(str, (STOCH_NORM, case["dtype"], direction, kind, *view)))


def squared_distance_cases() -> Iterator[tuple[Case, list[int]]]:
    """The lists of bench_squared_distance.py, with the numbers of elements of their tensors."""
    for dtype, label in itertools.product(("float32", "bfloat16"), LISTS):
        setting = distance.Setting(label, "contiguous", dtype, BATCH, "cuda")
        elements = [math.prod(shape) for shape in setting.shapes]
        target_bytes = sum(elements) * DTYPES[dtype].itemsize
        case = {"operation": SQUARED_DISTANCE, "label": label, "tensors": len(elements), "target_bytes": target_bytes,
                "layout": "contiguous", "dtype": dtype}  # fmt: skip
        yield case, elements


def squared_distance_request(case: Case, elements: Sequence[int]) -> str:
    sources = "none" if case["label"] == distance.L2 else "sources"
    return " ".join(map(str, (SQUARED_DISTANCE, case["dtype"], sources, *elements)))


def predict(model: Model, program: Path) -> Iterator[Case]:
    """All cases on one GPU, each with a prediction for both directions."""
    layers, lists = list(stoch_norm_cases()), list(squared_distance_cases())
    requests = [stoch_norm_request(case, direction) for case in layers for direction in PASSES]
    requests += [squared_distance_request(case, elements) for case, elements in lists]
    found = iter(plans(program, model.gpu, requests))
    for case in layers:
        own = {"gpu": model.gpu.name, **case}
        for direction in PASSES:
            plan = next(found)
            predicted = model.stoch_norm(case, direction, plan)
            batch_norm = batch_norm_seconds(case, direction, model.gpu)
            shown = {name: plan[name] for name in ("kernel", "blocks", "slices", "slice_steps", "lag")}
            own[direction] = {**asdict(predicted), "batch_norm": batch_norm, "plan": shown}
        yield own
    for (case, elements), plan in zip(lists, found, strict=True):
        own = {"gpu": model.gpu.name, **case}
        for direction in PASSES:
            own[direction] = asdict(model.squared_distance(case, direction, plan, elements))
        yield own


def run(machine_code: Path, before: Path | None, steps: Steps) -> dict[str, Any]:
    """The results: a prediction for every case, beside the older one of ``before``."""
    kernels, compiled_by = read_machine_code(machine_code)
    older = None if before is None else read_before(before)
    with tempfile.TemporaryDirectory() as folder:
        program = build_plans(Path(folder))
        cases = [case for gpu in GPUS for case in predict(Model(gpu, kernels, steps), program)]
    where = report.environment(torch.device("cpu"))
    results = {
        "environment": {name: where[name] for name in ("date", "command", "commit")} | {"machine_code": compiled_by},
        "settings": {"batch": BATCH, "p": norm.P, "gpus": [asdict(gpu) for gpu in GPUS], "steps": asdict(steps)},
        "cases": cases,
    }
    if older is not None:
        results["before"], seconds = older
        for case in cases:
            case["before"] = seconds[identity(case)]
    return results


def identity(case: Case) -> tuple[str, ...]:
    return tuple(case[name] for name in ("operation", "gpu", "label", "layout", "dtype"))


def read_before(file: Path) -> tuple[str, dict[tuple[str, ...], dict[str, float]]]:
    """The commit of older results, and the seconds of each case's passes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file has no results of this script, or lacks a case.
    """
    if not file.exists():
        raise FileNotFoundError(f"expected the results of an older commit at {file.name}: there is no such file")
    try:
        older = json.loads(file.read_text())
        seconds = {identity(case): {part: case[part]["seconds"] for part in PASSES} for case in older["cases"]}
        commit = older["environment"]["commit"]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file.name} has no results of gpu_model.py: {type(error).__name__}: {error}") from error
    every = [*stoch_norm_cases(), *(case for case, _ in squared_distance_cases())]
    for gpu, case in itertools.product(GPUS, every):
        name = identity({"gpu": gpu.name, **case})
        if name not in seconds:
            raise ValueError(f"{file.name} lacks {', '.join(name)}")
    return commit, seconds


# ---- Tables


def summed(cases: Sequence[Case], figure: str) -> float:
    """Seconds of all layers that the cases represent, forward and backward."""
    return sum(case.get("count", 1) * case[part][figure] for case in cases for part in PASSES)


def copied(cases: Sequence[Case]) -> float:
    """Seconds of a copy of all of their floors' bytes."""
    return sum(
        case.get("count", 1) * case[part]["copy_share"] * case[part]["seconds"] for case in cases for part in PASSES
    )


def cells(cases: Sequence[Case], scale: float, digits: int) -> list[str]:
    """Older time, if known, new time, share of a copy's speed, and ratio to BatchNorm's time if there is one."""
    own = summed(cases, "seconds")
    line = []
    if "before" in cases[0]:
        before = sum(case.get("count", 1) * sum(case["before"].values()) for case in cases)
        line.append(f"{scale * before:.{digits}f}")
    line += [f"{scale * own:.{digits}f}", f"{100 * copied(cases) / own:.0f} %"]
    if cases[0]["operation"] == STOCH_NORM:
        line.append(f"{summed(cases, 'batch_norm') / own:.2f}×")
    return line


def totals(cases: Sequence[Case]) -> Iterator[tuple[str, list[Case]]]:
    """All layers alone, then all blocks of the network, for one GPU, layout and dtype."""
    alone = [case for case in cases if norm.is_alone(case)]
    count = sum(case["count"] for case in alone)
    yield f"all {count} layers", alone
    nothing_behind = {f"{channels}@{size}": blocks[norm.NORM] for channels, size, blocks in norm.LAYERS
                      if norm.NORM in blocks}  # fmt: skip
    blocks = [case for case in cases if not norm.is_alone(case)]
    blocks += [{**case, "count": nothing_behind[case["label"]]} for case in alone if case["label"] in nothing_behind]
    yield f"all {count} blocks", blocks


def grouped(results: dict[str, Any], operation: str) -> dict[tuple[str, str], dict[str, list[Case]]]:
    """An operation's cases by layout and dtype, and by GPU."""
    found: dict[tuple[str, str], dict[str, list[Case]]] = {}
    for case in results["cases"]:
        if case["operation"] == operation:
            by_gpu = found.setdefault((case["layout"], case["dtype"]), {})
            by_gpu.setdefault(case["gpu"], []).append(case)
    return found


def total_rows(results: dict[str, Any], operation: str) -> list[list[str]]:
    """The table of an operation's page: a header, and a row for each layout and dtype."""
    names = [gpu["name"] for gpu in results["settings"]["gpus"]]
    times = ["before, ms", "predicted, ms"] if "before" in results else ["predicted, ms"]
    columns = [*times, "of a copy", *(["over BatchNorm"] if operation == STOCH_NORM else [])]
    lines = [["", "layout", "dtype", *(f"{name}: {column}" for name in names for column in columns), "measured"]]
    for (layout, dtype), by_gpu in grouped(results, operation).items():
        if operation == STOCH_NORM:
            rows = zip(*(totals(cases) for cases in by_gpu.values()), strict=True)
            named = [(pairs[0][0], [cases for _, cases in pairs]) for pairs in rows]
        else:
            labels = [case["label"] for case in next(iter(by_gpu.values()))]
            named = [(label, [[case] for cases in by_gpu.values() for case in cases if case["label"] == label])
                     for label in labels]  # fmt: skip
        digits = 1 if operation == STOCH_NORM else 3
        for label, of_gpus in named:
            figures = [cell for cases in of_gpus for cell in cells(cases, 1e3, digits)]
            lines.append([label, layout, dtype, *figures, ""])
    return lines


def case_rows(results: dict[str, Any], operation: str) -> list[list[str]]:
    """A header, and a row for every case with its limit on each GPU."""
    names = [gpu["name"] for gpu in results["settings"]["gpus"]]
    times = ["before, µs"] if "before" in results else []
    ratio = ["over BatchNorm"] if operation == STOCH_NORM else []
    columns = [*times, "both, µs", "of a copy", *ratio, "forward, µs", "backward, µs", "longest"]
    lines = [["", "layout", "dtype", *(f"{name}: {column}" for name in names for column in columns)]]
    for (layout, dtype), by_gpu in grouped(results, operation).items():
        for same in zip(*by_gpu.values(), strict=True):
            label = f"{same[0]['label']}×{same[0]['count']}" if "count" in same[0] else same[0]["label"]
            figures = []
            for case in same:
                figures += cells([case], 1e6, 1)
                figures += [f"{1e6 * case[part]['seconds']:.1f}" for part in PASSES]
                figures.append(" / ".join(case[part]["limit"] for part in PASSES))
            lines.append([label, layout, dtype, *figures])
    return lines


CAPTION = (
    "**A prediction, not a measurement**: by benchmarks/gpu_model.py, ±25 %, for forward and backward pass at batch "
    "{batch}. Of a copy: the floor's bytes per second over those of a large copy_ ({copies}). Over BatchNorm: how many "
    "times as long nn.BatchNorm2d takes, whose time is assumed, not predicted. Longest, forward / backward: work "
    "(fixed steps, latency and instructions of the blocks), memory (DRAM) or cache (what L2 moves)."
)


def caption(results: dict[str, Any]) -> str:
    copies = ", ".join(f"{gpu['name']} {gpu['copy'] / 1e12:.1f} TB/s" for gpu in results["settings"]["gpus"])
    text = CAPTION.format(batch=results["settings"]["batch"], copies=copies)
    if "before" in results:
        text += f" Before: commit {results['before']}."
    return text


def publish(results: dict[str, Any], folder: Path) -> None:
    """Print the totals; write ``table.md`` with every case."""
    where = results["environment"]
    said = caption(results)
    origin = f"`{where['command']}` ({where['date']}; commit {where['commit']}; {where['machine_code']})"
    parts = [said]
    for operation in OPERATIONS:
        rows = total_rows(results, operation)
        print(report.align(rows), end="\n\n")
        parts += [f"## {operation}", report.markdown(rows), report.markdown(case_rows(results, operation))]
    print(said)
    text = "\n\n".join([*parts, origin]) + "\n"
    write_atomically(folder / "table.md", lambda file: file.write(text.encode()))


def page_of(operation: str) -> Path:
    return PAGES / f"{operation}.md"


def page_with_table(page: str, results: dict[str, Any], operation: str) -> str:
    """The text of an operation's page, with its totals between the markers.

    Raises:
        ValueError: the page lacks the markers.
    """
    return report.with_block(page, f"gpu_model, {operation}", report.markdown(total_rows(results, operation)))


def write_pages(results: dict[str, Any]) -> None:
    texts = {name: page_with_table(page_of(name).read_text(), results, name) for name in OPERATIONS}
    for name, text in texts.items():
        page_of(name).write_text(text)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, metavar="FILE", default=BEFORE if BEFORE.exists() else None,
                        help="an older results.json; before.json beside the committed results")  # fmt: skip
    parser.add_argument("--machine-code", type=Path, metavar="FILE", default=MACHINE_CODE, help="that of sm_90")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder; results/gpu_model beside this file")
    parser.add_argument("--page", action="store_true", help="write the totals into docs/operations as well")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    try:
        results = run(options.machine_code, options.before, Steps())
        report.write_json(results, options.out)
        results = json.loads((options.out / "results.json").read_text())
        publish(results, options.out)
        if options.page:
            write_pages(results)
    except (OSError, ValueError, RuntimeError) as error:
        sys.exit(f"gpu_model.py: {error}")


if __name__ == "__main__":
    main()
