"""Puts the main results of a device on one page.

The page has whole steps with StochNorm over plain fine-tuning's, the speed of each part over upstream's, and all goals
with their outcomes.

    python benchmarks/summary.py [FOLDER]

reads ``FOLDER/<name>/results.json`` (by default ``results/cpu`` beside this file) and writes ``summary.md``,
``steps.png`` and ``parts.png`` there. From ``results/cpu`` it also writes the goals into docs/benchmarks.md.
"""

import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import bench_bi_tuning as bi_tuning
import bench_channel_attention as attention
import bench_co_tuning as co_tuning
import bench_frozen as frozen
import bench_host_overhead as overhead
import bench_images as images
import bench_spectral_tail as tail
import bench_squared_distance as distance
import bench_step as step
import bench_stoch_norm as norm
import report
from command import RESULTS
from report import LOOKS, Case, Spread, align, error_bars, markdown, speedup

from talib_fast.storage import write_atomically

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"
Row = tuple[str, Spread]


def stoch_norm_rows(results: dict[str, Any]) -> list[Row]:
    return [
        (
            f"StochNorm, {total['label']} of ResNet-50, {total['layout']}, {total['dtype']}",
            speedup(total, norm.COMPOSITION, norm.OURS, "both"),
        )
        for total in map(norm.all_blocks, norm.groups(results["cases"]))
    ]


def squared_distance_rows(results: dict[str, Any]) -> list[Row]:
    return [
        (f"{case['label']}, ResNet-50, {case['dtype']}", speedup(case, distance.UPSTREAM, distance.OURS, "both"))
        for case in results["cases"]
        if case["label"] in (distance.DELTA, distance.ATTENTION, distance.L2_SP, distance.L2)
        and case["layout"] == "contiguous"
    ]


def channel_attention_rows(results: dict[str, Any]) -> list[Row]:
    whole = [row for row in attention.rows(results) if row["label"] == attention.ALL and "samples" in row]
    return [
        (
            f"DELTA's channel attention, ResNet-50 of {row['network']}",
            speedup(row, attention.BRUTE_FORCE, attention.EXACT, "forward"),
        )
        for row in whole
    ]


def frozen_rows(results: dict[str, Any]) -> list[Row]:
    return [
        (f"the pretrained network, {case['label']}", speedup(case, frozen.EVALUATION, frozen.OURS, "forward"))
        for case in results["cases"]
    ]


def spectral_tail_rows(results: dict[str, Any]) -> list[Row]:
    return [
        (f"BSS, {case['b']} × {case['f']} features, {case['dtype']}", speedup(case, tail.UPSTREAM, tail.OURS, "both"))
        for case in results["cases"]
        if (case["b"], case["f"], case["k"]) in ((48, 2048, 1), (128, 2048, 1))
    ]


def bi_tuning_rows(results: dict[str, Any]) -> list[Row]:
    return [
        (f"Bi-Tuning, {case['classes']} classes", speedup(case, bi_tuning.UPSTREAM, bi_tuning.OURS, "both"))
        for case in results["cases"]
        if (case["batch"], case["K"]) == (bi_tuning.B, bi_tuning.K) and case["classes"] == bi_tuning.C
    ]


def co_tuning_rows(results: dict[str, Any]) -> list[Row]:
    return [
        (case["label"], speedup(case, co_tuning.UPSTREAM, co_tuning.OURS, co_tuning.parts_of(case)[-1]))
        for case in results["cases"]
        if case["label"].startswith(("Co-Tuning's loss, 48×1000", "LWF's distillation", "relationship"))
    ]


def step_rows(results: dict[str, Any]) -> list[Row]:
    return [
        (
            f"a whole step, {case['label']}, {case['layout']}, {case['dtype']}",
            speedup(case, step.UPSTREAM, step.OURS, "forward"),
        )
        for case in results["cases"]
        if case["network"] == "resnet50" and case["way"] in ("bi_tuning", step.BOTH)
    ]


def no_rows(results: dict[str, Any]) -> list[Row]:
    """The rows of a benchmark that compares nothing with upstream's code: none."""
    return []


# each benchmark's module, and the function that gives its rows of the table of parts
BENCHMARKS: dict[str, tuple[Any, Callable[[dict[str, Any]], list[Row]]]] = {
    "stoch_norm": (norm, stoch_norm_rows),
    "squared_distance": (distance, squared_distance_rows),
    "channel_attention": (attention, channel_attention_rows),
    "frozen": (frozen, frozen_rows),
    "spectral_tail": (tail, spectral_tail_rows),
    "bi_tuning": (bi_tuning, bi_tuning_rows),
    "co_tuning": (co_tuning, co_tuning_rows),
    "step": (step, step_rows),
    "host_overhead": (overhead, no_rows),
    "images": (images, no_rows),
}


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """The results in a folder, by benchmark."""
    files = {name: folder / name / "results.json" for name in BENCHMARKS}
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}


def parts(found: dict[str, dict[str, Any]]) -> list[tuple[str, Row]]:
    """Each part's row with its benchmark's name."""
    return [(name, row) for name, results in found.items() for row in BENCHMARKS[name][1](results)]


def goals(found: dict[str, dict[str, Any]], folder: str | None) -> list[list[str]]:
    """A row per goal, with its benchmark; if ``folder`` is the folder of the results, with a link to its table."""
    lines = [[*report.GOAL_COLUMNS, "from"]]
    for name, results in found.items():
        for goal in BENCHMARKS[name][0].goals(results):
            lines.append([*goal.row(), linked(name, folder)])
    return lines


def steps(found: dict[str, dict[str, Any]]) -> list[Case]:
    """The measured steps with StochNorm in channels_last, in which all networks were trained."""
    cases = found["step"]["cases"] if "step" in found else []
    return [case for case in cases if case["way"] == step.STOCHNORM and case["layout"] == "channels_last"]


def steps_table(cases: Sequence[Case]) -> list[list[str]]:
    """A row per network and precision."""
    header = ["a step with StochNorm", "time / plain", f"{step.BARE} / plain", "upstream's time / plain"]
    lines = [[*header, "kept for backward / plain"]]
    for case in cases:
        ours, upstream = (str(step.over_plain(case, name)) for name in (step.OURS, step.UPSTREAM))
        kept = f"{step.kept_over_plain(case, step.OURS):.2f}"
        lines.append([f"{case['network']}, {case['dtype']}", ours, step.without_norms(case), upstream, kept])
    return lines


def table(rows: Sequence[tuple[str, Row]], folder: str | None) -> list[list[str]]:
    """A row per part, with its benchmark; if ``folder`` is the folder of the results, with a link to its table."""
    lines = [[label, str(spread), linked(name, folder)] for name, (label, spread) in rows]
    return [["part", "speed over upstream", "from"], *lines]


def linked(name: str, folder: str | None) -> str:
    return name if folder is None else f"[{name}]({folder}{name}/table.md)"


def draw_steps(axes: Any, cases: Sequence[Case]) -> None:
    """Two bars per network and precision, ours and upstream's, and a mark at the limit."""
    for number, (name, (colour, _)) in enumerate(zip((step.OURS, step.UPSTREAM), LOOKS, strict=False)):
        spreads = [step.over_plain(case, name) for case in cases]
        places = [row + 0.38 * (number - 0.5) for row in range(len(cases))]
        bars = error_bars(spreads)
        axes.barh(places, [s.median for s in spreads], xerr=bars, color=colour, height=0.36, label=name)
        label_bars(axes, spreads, places, digits=2)
    limits = [step.limit(case) for case in cases]
    axes.plot(limits, range(len(cases)), "|", color="black", ms=18, mew=2, label=f"limit ({step.BARE})")
    report.label_rows(axes, [f"{case['network']}, {case['dtype']}" for case in cases])
    axes.set_xlim(0, 1.12 * axes.get_xlim()[1])
    axes.xaxis.set_major_formatter("{x:g}×")
    axes.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.4 / len(cases)))
    axes.set_title("A training step with StochNorm: time over plain's, less is better", fontsize=11)


def draw_parts(axes: Any, rows: Sequence[tuple[str, Row]]) -> None:
    """A bar per part."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    names = list(dict.fromkeys(name for name, _ in rows))
    spreads = [spread for _, (_, spread) in rows]
    colours = [LOOKS[names.index(name) % len(LOOKS)][0] for name, _ in rows]
    axes.barh(range(len(rows)), [s.median for s in spreads], xerr=error_bars(spreads), color=colours, height=0.65)
    label_bars(axes, spreads, range(len(rows)), digits=1)
    report.label_rows(axes, [label for _, (label, _) in rows])
    axes.set_xscale("log", base=2)
    axes.set_xlim(0.8, 2 * max(spread.upper for spread in spreads))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_title("Single parts: speed over upstream, more is better", fontsize=11)


def label_bars(axes: Any, spreads: Sequence[Spread], places: Sequence[float], digits: int) -> None:
    for place, spread in zip(places, spreads, strict=True):
        text = f"{spread.median:.{digits}f}×"
        axes.annotate(text, (spread.upper, place), (5, 0), textcoords="offset points", va="center")


def draw(draw_rows: Callable[[Any, Any], None], rows: Sequence[Any], height: float, device: str) -> Any:
    """A figure in which ``draw_rows`` draws the rows, each ``height`` inches high."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 1.3 + height * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.grid(visible=False, axis="y")
    draw_rows(axes, rows)
    figure.suptitle(device, fontsize=11)
    return figure


STEPS_CAPTION = (
    "Forward, backward and SGD, in channels_last, over the same step with BatchNorm: median (quartiles) of the rounds' "
    f"ratios, and what autograd saves for the backward pass; {step.BARE}: the step without norms and activations; from "
    "[step](step/table.md)."
)
PARTS_CAPTION = (
    "How many times as long as talib_fast upstream's code takes, forward + backward where there is a backward pass, "
    "median (quartiles) of the rounds' ratios."
)


GOALS_CAPTION = (
    "A goal is missed where any judged place misses it. The limit is what memory or arithmetic allows on this machine, "
    "by what the same run measured; the benchmark's table says how it is calculated. Where it is the speed of copy_, "
    "stores past the caches may beat it. A place whose limit leaves no room for the goal is not judged. Shown is the "
    "worst judged place."
)


def with_goals(page: str, found: dict[str, dict[str, Any]]) -> str:
    """The text of docs/benchmarks.md with the goals of these results.

    Raises:
        ValueError: the page lacks the markers.
    """
    return report.with_block(page, "goals", markdown(goals(found, "../benchmarks/results/cpu/")))


def main(folder: Path = RESULTS / "cpu") -> None:
    found = read(folder)
    cases, rows = steps(found), parts(found)
    if not rows:
        sys.exit(f"summary.py: {folder} holds no results of {', '.join(BENCHMARKS)}")
    device = ", ".join(dict.fromkeys(results["environment"]["device"] for results in found.values()))
    tables = (steps_table(cases), table(rows, None), goals(found, None))
    print(*map(align, tables), device, sep="\n\n")
    page = [
        *("## A training step with StochNorm", markdown(steps_table(cases)), STEPS_CAPTION),
        *("## Single parts", markdown(table(rows, "")), PARTS_CAPTION),
        *("## Goals and outcomes", markdown(goals(found, "")), GOALS_CAPTION),
        f"{device}.",
    ]
    write_atomically(folder / "summary.md", lambda file: file.write(("\n\n".join(page) + "\n").encode()))
    if cases:
        report.write_plot(folder / "steps.png", partial(draw, draw_steps, cases, 0.5, device))
    report.write_plot(folder / "parts.png", partial(draw, draw_parts, rows, 0.3, device))
    if folder == RESULTS / "cpu":
        text = with_goals(PAGE.read_text(), found)
        write_atomically(PAGE, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
