"""Count and time DELTA's channel attention, compared with running the whole network once for every channel.

One command writes ``results.json`` (raw samples), ``table.md`` and ``plot.png``::

    python benchmarks/bench_channel_attention.py [--device cuda] [--quick] [--out DIR]

``--from-json DIR`` writes the table and the plot again from ``DIR/results.json``.

Operations are counted with ``torch.utils.flop_counter`` while the public function runs, on ResNet-50 and on a quarter
of its width. They are compared with a forward pass per channel and one for the whole network. Times are those of the
smaller network, trained for a moment on artificial classes so that its channels matter. Everything is for one batch.
"""

import argparse
import copy
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import baselines
import command
import harness
import report
import torch
import torch.nn.functional as F
from harness import Candidate, Feed
from report import LOOKS, Case, Goal, error_bars, progress, speedup
from resnet import CHANNEL_LAYERS, ResNet50
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from talib_fast.finetune.delta import channel_attention

OPERATION = "channel_attention"
BRUTE_FORCE, EXACT, TAYLOR = "brute force", "exact", "taylor"
LIMIT = "limit"
ALL = "all four"
BATCHES = {"cpu": 16, "cuda": 48}
RANKED_BATCHES = 10
CLASSES, TRAINING_STEPS = 10, 150

# the convolutions and linear layers that are the first behind a layer to mix its channels
FIRST_TO_MIX = dict(
    zip(
        CHANNEL_LAYERS,
        [*([f"layer{n}.0.conv1", f"layer{n}.0.downsample.0"] for n in (2, 3, 4)), ["fc"]],
        strict=True,
    )
)


@dataclass(frozen=True)
class Network:
    """A ResNet-50 of some width on square images."""

    label: str
    width: int
    image: int


FULL = Network("ResNet-50, 224²", 64, 224)
SMALL = Network("quarter width, 64²", 16, 64)

Batch = tuple[Tensor, Tensor]


def trained(network: Network, batch: int, device: torch.device) -> tuple[nn.Module, list[Batch]]:
    """The network after a short training, in evaluation mode, and batches that it has not seen."""
    torch.manual_seed(0)
    scenes = torch.randn(CLASSES, 3, 8, 8, device=device)

    def draw(count: int) -> Batch:
        labels = torch.randint(CLASSES, (count,), device=device)
        scene = scenes[labels] + 2 * torch.randn(count, 3, 8, 8, device=device)
        x = F.interpolate(scene, (network.image, network.image), mode="bilinear")
        return x + 0.5 * torch.randn_like(x), labels

    model = ResNet50(network.width, CLASSES).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(TRAINING_STEPS):
        x, labels = draw(2 * batch)
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
    return model.eval(), [draw(batch) for _ in range(RANKED_BATCHES)]


def channels_of(model: nn.Module, layer: str) -> int:
    return len(model.get_submodule(layer).get_parameter("weight"))


def ways(model: nn.Module, layer: str) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """The ways to compute the attention ``[C]`` of a layer from a batch."""

    def ours(x: Tensor, labels: Tensor, method: str) -> Tensor:
        return channel_attention(model, [(x, labels)], [layer], method=method, progress=False)[layer]

    return {
        BRUTE_FORCE: functools.partial(baselines.upstream_channel_attention, model, layer),
        EXACT: functools.partial(ours, method="exact"),
        TAYLOR: functools.partial(ours, method="taylor"),
    }


def flops(model: nn.Module, layer: str, x: Tensor, labels: Tensor) -> dict[str, int]:
    """Floating-point operations for the attention of one layer, and the fewest of an exact way.

    The fewest: one pass of the whole network, and for every channel what follows the first layers that mix them.
    """

    def count(work: Callable[[], object]) -> FlopCounterMode:
        with FlopCounterMode(display=False) as counter:
            work()
        return counter

    with torch.no_grad():
        forward = count(lambda: model(x))
    way, whole, channels = ways(model, layer), forward.get_total_flops(), channels_of(model, layer)
    names = [name for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    behind = set(names[names.index(layer) + 1 :]) - set(FIRST_TO_MIX[layer])
    counts = forward.get_flop_counts()
    afresh = sum(sum(counts[f"{type(model).__name__}.{name}"].values()) for name in behind)
    return {
        BRUTE_FORCE: (channels + 1) * whole,
        EXACT: count(lambda: way[EXACT](x, labels)).get_total_flops(),
        TAYLOR: count(lambda: way[TAYLOR](x, labels)).get_total_flops(),
        LIMIT: whole + channels * afresh,
    }


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's, of vectors without ties."""
    ranks = torch.stack([values.argsort().argsort().double() for values in (a, b)])
    return torch.corrcoef(ranks)[0, 1].item()


def counted(network: Network, device: torch.device) -> Iterator[Case]:
    """Operations of one image, without times."""
    torch.manual_seed(0)
    model = ResNet50(network.width, CLASSES).to(device).eval()
    x = torch.randn(1, 3, network.image, network.image, device=device)
    for layer in CHANNEL_LAYERS:
        progress(f"{network.label} {layer}: operations")
        channels = channels_of(model, layer)
        found = flops(model, layer, x, torch.zeros(1, dtype=torch.long, device=device))
        yield {"network": network.label, "label": layer, "channels": channels, "flops": found}


def measured(network: Network, batch: int, rounds: int, device: torch.device) -> Iterator[Case]:
    """Operations, raw samples, and the differences between the ways."""
    progress(f"{network.label}: training")
    model, batches = trained(network, batch, device)
    first = batches[0]
    estimated = channel_attention(model, batches, CHANNEL_LAYERS, method="taylor", progress=False)
    exact = channel_attention(model, batches, CHANNEL_LAYERS, progress=False)
    for case in counted(network, device):
        layer = case["label"]
        progress(f"{network.label} {layer}: time")
        way = ways(model, layer)
        truth = ways(copy.deepcopy(model).double(), layer)[BRUTE_FORCE](first[0].double(), first[1])
        errors = {
            name: (way[name](*first) - truth).abs().max().item() / truth.mean().item() for name in (BRUTE_FORCE, EXACT)
        }
        candidates = [Candidate(name, attention) for name, attention in way.items()]
        samples, _ = harness.interleaved(device, candidates, [Feed((), first[0], first)], rounds)
        correlation = rank_correlation(estimated[layer], exact[layer])
        yield {**case, "errors": errors, "rank_correlation": correlation, "samples": samples}


def together(cases: Sequence[Case]) -> Case:
    """All layers of a network, one after the other."""
    whole = {
        "network": cases[0]["network"],
        "label": ALL,
        "channels": sum(case["channels"] for case in cases),
        "flops": {way: sum(case["flops"][way] for case in cases) for way in cases[0]["flops"]},
    }
    if "samples" not in cases[0]:
        return whole
    samples = {
        way: {
            "forward": [sum(times) for times in zip(*(case["samples"][way]["forward"] for case in cases), strict=True)]
        }
        for way in cases[0]["samples"]
    }
    return {**whole, "samples": samples}


def rows(results: dict[str, Any]) -> list[Case]:
    """The cases of each network, followed by one for all of its layers together."""
    networks: dict[str, list[Case]] = {}
    for case in results["cases"]:
        networks.setdefault(case["network"], []).append(case)
    return [row for cases in networks.values() for row in (*cases, together(cases))]


def fewer(case: Case, way: str) -> float:
    """The operations of brute force over those of a way."""
    return case["flops"][BRUTE_FORCE] / case["flops"][way]


def goals(results: dict[str, Any]) -> list[Goal]:
    """The goals, with the figures that decide them."""
    timed = [row for row in rows(results) if row["label"] == ALL and "samples" in row]
    return [
        Goal(
            "at least 8× faster than brute force on the smaller network",
            8,
            {f"{row['label']} layers": speedup(row, BRUTE_FORCE, EXACT, "forward").median for row in timed},
        ),
        Goal(
            "the exact way's error over that of brute force in the same precision at most 2",
            2,
            {
                case["label"]: case["errors"][EXACT] / case["errors"][BRUTE_FORCE]
                for case in results["cases"]
                if "errors" in case
            },
            at_most=True,
        ),
    ]


def table(results: dict[str, Any]) -> list[list[str]]:
    """A row per layer, and one for all of a network's layers."""
    header = [
        "network", "layer", "channels", "operations / exact", "limit", "operations / taylor", "time / exact",
        "time / taylor", "error, brute force", "error, exact", "taylor's rank correlation",
    ]  # fmt: skip
    lines = [header]
    for row in rows(results):
        line = [row["network"], row["label"], str(row["channels"])]
        line += [f"{fewer(row, way):,.2f}" for way in (EXACT, LIMIT, TAYLOR)]
        if "samples" in row:
            line += [str(speedup(row, BRUTE_FORCE, way, "forward")) for way in (EXACT, TAYLOR)]
        if "errors" in row:
            line += [f"{row['errors'][way]:.1e}" for way in (BRUTE_FORCE, EXACT)]
            line.append(f"{row['rank_correlation']:.2f}")
        lines.append(line + ["–"] * (len(header) - len(line)))
    return lines


CAPTION = (
    "Columns with / : how many times as much brute force, a forward pass per channel, takes as the other; of times the "
    "median (quartiles) of the rounds' ratios. limit: brute force's operations over the fewest of an exact way, which "
    "runs everything behind the first layers that mix the channels once for every channel. Errors: the largest of a "
    "weight in float32, against brute force in float64, over the mean weight. Rank correlation: Spearman's of the "
    f"weights with exact's, {RANKED_BATCHES} batches."
)


def draw(results: dict[str, Any]) -> Any:
    """The figure: brute force over the other ways by layer, a panel for operations and one for time."""
    from matplotlib.figure import Figure

    found = rows(results)
    timed = [row for row in found if "samples" in row]
    counted = [row for row in found if row["network"] == FULL.label] or timed
    figure = Figure(figsize=(9.5, 3.8), layout="constrained")
    for axes, shown, title in zip(figure.subplots(1, 2), (counted, timed), ("operations, {}", "time, {}"), strict=True):
        places = range(len(shown))
        for way, (colour, marker) in zip((EXACT, TAYLOR), LOOKS, strict=False):
            if shown is counted:
                axes.plot([fewer(row, way) for row in shown], places, marker, color=colour, label=way)
                continue
            spreads = [speedup(row, BRUTE_FORCE, way, "forward") for row in shown]
            axes.errorbar(
                [s.median for s in spreads],
                places,
                xerr=error_bars(spreads),
                fmt=marker,
                color=colour,
                lw=1.2,
                label=way,
            )
        if shown is counted:
            axes.plot(
                [fewer(row, LIMIT) for row in shown], places, "|", color="0.3", ms=14, label="limit of an exact way"
            )
        report.label_rows(axes, [f"{row['label']} ({row['channels']})" for row in shown])
        axes.set_title(title.format(shown[0]["network"]), fontsize=10)
        axes.set_xscale("log")
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    figure.suptitle(
        f"Channel attention: how many times as much brute force takes\n{results['environment']['device']}", fontsize=11
    )
    return figure


def publish(results: dict[str, Any], folder: Path) -> None:
    """Print the results, and write the table and the plot."""
    report.publish(results, folder, table(results), CAPTION, goals(results), functools.partial(draw, results))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    return command.parse(command.parser(__doc__, dtypes=False, layouts=False), arguments, OPERATION, BATCHES)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure everything that the options ask for."""
    device = torch.device(options.device)
    return {
        "operation": OPERATION,
        "environment": report.environment(device),
        "settings": {
            "device": options.device,
            "batch": options.batch,
            "rounds": options.rounds,
            "ranked_batches": RANKED_BATCHES,
            "units": "seconds per batch",
        },
        "cases": itertools.chain(
            () if options.quick else counted(FULL, device),
            measured(SMALL, options.batch, options.rounds, device),
        ),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    report.run(parse(arguments), run, goals, publish)


if __name__ == "__main__":
    main()
