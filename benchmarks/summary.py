"""A device's results on one page: the speed over upstream of each part, from what its own benchmark measured.

    python benchmarks/summary.py [FOLDER]

reads ``FOLDER/<name>/results.json`` (``results/cpu`` beside this file unless said) and writes ``summary.md`` and
``summary.png`` there.
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
import bench_spectral_tail as tail
import bench_squared_distance as distance
import bench_step as step
import bench_stoch_norm as norm
import report
from command import RESULTS
from report import LOOKS, Spread, align, error_bars, markdown, speedup

from talib_fast.storage import write_atomically

Row = tuple[str, Spread]


def stoch_norm_rows(results: dict[str, Any]) -> list[Row]:
    return [
        (
            f"StochNorm, {norm.network(group)['label']} of ResNet-50, {group[0]['layout']}, {group[0]['dtype']}",
            speedup(norm.network(group), norm.COMPOSITION, norm.OURS, "both"),
        )
        for group in norm.groups(results["cases"])
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
        if case["network"] == "resnet50" and case["way"] in ("stochnorm", "bi_tuning", step.BOTH)
    ]


ROWS: dict[str, Callable[[dict[str, Any]], list[Row]]] = {
    "stoch_norm": stoch_norm_rows,
    "squared_distance": squared_distance_rows,
    "channel_attention": channel_attention_rows,
    "spectral_tail": spectral_tail_rows,
    "bi_tuning": bi_tuning_rows,
    "co_tuning": co_tuning_rows,
    "step": step_rows,
}


def collect(folder: Path) -> tuple[list[tuple[str, Row]], str]:
    """Each row with its benchmark's name, and the device."""
    rows, devices = [], []
    for name, of in ROWS.items():
        file = folder / name / "results.json"
        if file.exists():
            results = json.loads(file.read_text())
            rows += [(name, row) for row in of(results)]
            devices.append(results["environment"]["device"])
    return rows, ", ".join(dict.fromkeys(devices))


def table(rows: Sequence[tuple[str, Row]], link: bool) -> list[list[str]]:
    """A row per part; ``link``: with its benchmark's own table."""
    cells = [(f"[{name}]({name}/table.md)" if link else name, label, spread) for name, (label, spread) in rows]
    return [["part", "speed over upstream", "from"], *([label, str(spread), name] for name, label, spread in cells)]


def draw(rows: Sequence[tuple[str, Row]], device: str) -> Any:
    """The figure: a bar per part."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    figure = Figure(figsize=(8.6, 1.1 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(name for name, _ in rows))
    spreads = [spread for _, (_, spread) in rows]
    colours = [LOOKS[names.index(name) % len(LOOKS)][0] for name, _ in rows]
    axes.barh(range(len(rows)), [s.median for s in spreads], xerr=error_bars(spreads), color=colours, height=0.65)
    for place, spread in enumerate(spreads):
        axes.annotate(f"{spread.median:.1f}×", (spread.upper, place), (5, 0), textcoords="offset points", va="center")
    report.label_rows(axes, [label for _, (label, _) in rows])
    axes.set_xscale("log", base=2)
    axes.set_xlim(0.8, 2 * max(spread.upper for spread in spreads))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(visible=False, axis="y")
    axes.set_title(f"Speed over upstream, {device}", fontsize=11)
    return figure


def main(folder: Path = RESULTS / "cpu") -> None:
    rows, device = collect(folder)
    if not rows:
        sys.exit(f"summary.py: {folder} holds no results of {', '.join(ROWS)}")
    caption = (
        f"{device}. How many times as long as talib_fast upstream's code takes, forward + backward where there is a "
        "backward pass, median (quartiles) of the rounds' ratios."
    )
    print(align(table(rows, link=False)), caption, sep="\n\n")
    page = f"{markdown(table(rows, link=True))}\n\n{caption}\n"
    write_atomically(folder / "summary.md", lambda file: file.write(page.encode()))
    report.write_plot(folder / "summary.png", partial(draw, rows, device))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
