"""Time the frozen pretrained network: DELTA's forward pass, and the preparation of LWF and Co-Tuning.

One command measures all candidates interleaved and writes ``results.json`` (raw samples), ``table.md``, ``plot.png``::

    python benchmarks/bench_frozen.py [--device cuda] [--quick] [--out DIR]

``--from-json DIR`` writes the table and the plot again from ``DIR/results.json``.

The networks are torchvision's ResNet-50 and the MobileNetV2 of ``finetune``, with random weights, on images of 128
pixels in channels_last. A pass gives the feature maps that DELTA compares. "Evaluation" is the network in evaluation
mode without gradients, as scripts of the Transfer-Learning-Library use it. "No norms" is the same without batch norms
and activations: the rest is mostly convolutions, which no folding makes faster. LWF's labels and Co-Tuning's
relationship are those of twenty batches, and there "evaluation" is upstream's loop.
"""

import argparse
import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import baselines
import command
import harness
import report
import torch
from bench_step import BARE, WORKLOADS, leave_norms_out
from command import DTYPES
from harness import Candidate, Feed
from report import LOOKS, Case, Goal, Spread, error_bars, progress, speedup
from torch import Tensor, nn

from talib_fast.finetune.co_tuning import Relationship
from talib_fast.finetune.delta import IntermediateLayerGetter
from talib_fast.finetune.frozen import frozen
from talib_fast.finetune.lwf import collect_pretrain_labels

OPERATION = "frozen"
OURS, EVALUATION = "talib_fast", "evaluation"
NETWORKS = ("mobilenet_v2", "resnet50")
BATCH, SIZE, BATCHES, CLASSES = {"cpu": 16, "cuda": 48}, 128, 20, 10
HALF = {"cpu": ("bfloat16",), "cuda": ("bfloat16", "float16")}
PASS, LABELS, RELATIONSHIP = "DELTA's maps", "LWF's labels", "Co-Tuning's relationship"

Sides = dict[str, Callable[[Tensor], Any]]


def passes(network: nn.Module, layers: Sequence[str], device: str) -> Sides:
    """The functions that give the maps of ``layers``, by candidate."""
    bare = copy.deepcopy(network)
    leave_norms_out(bare)

    def evaluated(model: nn.Module) -> Callable[[Tensor], Any]:
        getter = IntermediateLayerGetter(model, layers, keep_output=False)
        return torch.no_grad()(lambda images: getter(images)[0])

    reduced = {dtype: frozen(network, layers, DTYPES[dtype]) for dtype in HALF[device]}
    return {OURS: frozen(network, layers), EVALUATION: evaluated(network), BARE: evaluated(bare), **reduced}


def batches_of(images: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(images, torch.arange(len(images)) % CLASSES)] * BATCHES


def labels(classifier: nn.Module, device: str) -> Sides:
    """The ways of LWF's preparation, by candidate."""

    def upstream(images: Tensor) -> Tensor:
        found = []
        with torch.no_grad():
            for batch, _ in batches_of(images):
                found.append(classifier(batch.to(device)).cpu())
        return torch.cat(found)

    return {
        OURS: lambda images: collect_pretrain_labels(batches_of(images), classifier, device, progress=False),
        EVALUATION: upstream,
    }


def relationship(classifier: nn.Module, device: str) -> Sides:
    """The ways of Co-Tuning's preparation, by candidate."""
    return {
        OURS: lambda images: Relationship(batches_of(images), classifier, device, progress=False),
        EVALUATION: lambda images: baselines.upstream_relationship(
            batches_of(images), classifier, torch.device(device)
        ),
    }


def work(name: str, device: str) -> list[tuple[str, Sides]]:
    """The labels and candidates of everything that is timed with a network."""
    torch.manual_seed(0)
    network = WORKLOADS[name].build()
    backbone = network.backbone.eval().requires_grad_(False)
    backbone.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert network.head is not None
    pool: list[nn.Module] = [nn.AdaptiveAvgPool2d(1), nn.Flatten()] if network.pool_layer is None else []
    classifier = nn.Sequential(backbone, *pool, network.head.to(device)).eval()
    return [
        (PASS, passes(backbone, network.delta_layers, device)),
        (LABELS, labels(classifier, device)),
        (RELATIONSHIP, relationship(classifier, device)),
    ]


def error(sides: Sides, images: Tensor, candidate: str) -> float:
    """The largest relative error of a layer's map against that in evaluation, in float64."""
    right = sides[EVALUATION](images)
    found = sides[candidate](images)
    return max(
        float((found[key].double() - maps.double()).norm() / maps.double().norm()) for key, maps in right.items()
    )


def over_evaluation(case: Case, candidate: str) -> Spread:
    """A candidate's time over that of evaluation."""
    return speedup(case, candidate, EVALUATION, "forward")


def goals(results: dict[str, Any]) -> list[Goal]:
    """The goals, with the figures that decide them."""
    passes = [case for case in results["cases"] if case["work"] == PASS]
    rest = [case for case in results["cases"] if case["work"] != PASS]
    bare = {case["network"]: over_evaluation(case, BARE).median for case in passes}
    figures = {case["network"]: over_evaluation(case, OURS).median for case in passes}
    faster = {case["label"]: speedup(case, EVALUATION, OURS, "forward").median for case in rest}
    limits = {case["label"]: 1 / bare[case["network"]] for case in rest}
    return [
        Goal("the pass at most 0.8× evaluation's", 0.8, figures, at_most=True, limits=bare),
        Goal("preparation of LWF and Co-Tuning at least 1.2× as fast", 1.2, faster, limits=limits),
    ]


def table(results: dict[str, Any]) -> list[list[str]]:
    """A row per network and piece of work."""
    names = [BARE, *HALF[results["settings"]["device"]]]
    lines = [["work", f"{OURS} / {EVALUATION}", *(f"{name} / {EVALUATION}" for name in names)]]
    lines[0] += [f"error, {name}" for name in (OURS, *names[1:])]
    for case in results["cases"]:
        times = [str(over_evaluation(case, name)) if name in case["samples"] else "–" for name in (OURS, *names)]
        errors = [f"{case['errors'][name]:.0e}" if "errors" in case else "–" for name in (OURS, *names[1:])]
        lines.append([f"{case['work']}, {case['network']}", *times, *errors])
    return lines


CAPTION = (
    f"Times over {EVALUATION}'s: median (quartiles) of the rounds' ratios. {OURS}: batch norms folded and "
    f"weights packed, in float32; bfloat16, float16: in that dtype besides; {BARE}: evaluation without batch norms and "
    "activations, which is also the limit beside the goals. Error: the largest relative error of a layer's map."
)


def draw(results: dict[str, Any]) -> Any:
    """The figure: time over evaluation's by piece of work."""
    from matplotlib.figure import Figure

    cases = results["cases"]
    figure = Figure(figsize=(8.4, 3.6), layout="constrained")
    axes = figure.subplots()
    names = [OURS, *HALF[results["settings"]["device"]], BARE]
    for number, (name, (colour, marker)) in enumerate(zip(names, LOOKS, strict=False)):
        rows = [row for row, case in enumerate(cases) if name in case["samples"]]
        spreads = [over_evaluation(cases[row], name) for row in rows]
        places = [row + 0.18 * (number - 1) for row in rows]
        bars = error_bars(spreads)
        axes.errorbar([s.median for s in spreads], places, xerr=bars, fmt=marker, color=colour, ms=4.5, label=name)
    report.label_rows(axes, [f"{case['work']}, {case['network']}" for case in cases])
    axes.set_xlim(left=0)
    axes.legend(frameon=False, ncols=len(names), loc="upper center", bbox_to_anchor=(0.4, -0.1))
    report.entitle(figure, "The pretrained network: time over evaluation's", results)
    return figure


def publish(results: dict[str, Any], folder: Path) -> None:
    """Print the results, and write the table and the plot."""
    report.publish(results, folder, table(results), CAPTION, goals(results), functools.partial(draw, results))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    made = command.parser(__doc__, dtypes=False, layouts=False)
    return command.parse(made, arguments, OPERATION, batches=BATCH)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure everything that the options ask for."""
    device = torch.device(options.device)
    torch.manual_seed(0)
    images = torch.randn(options.batch, 3, SIZE, SIZE, device=device).contiguous(memory_format=torch.channels_last)
    feeds = [Feed((), torch.ones((), device=device), (images,))]

    def cases() -> Iterator[Case]:
        for network in NETWORKS:
            for kind, sides in work(network, options.device):
                progress(f"{kind}, {network}")
                case: Case = {"label": f"{kind}, {network}", "work": kind, "network": network}
                if kind == PASS:
                    case["errors"] = {name: error(sides, images, name) for name in (OURS, *HALF[options.device])}
                candidates = [Candidate(name, function) for name, function in sides.items()]
                case["samples"], _ = harness.interleaved(device, candidates, feeds, options.rounds)
                yield case

    return {
        "operation": OPERATION,
        "environment": report.environment(device),
        "settings": {
            **{"device": options.device, "rounds": options.rounds, "batch": options.batch},
            "units": "seconds per pass",
        },
        "cases": cases(),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    report.run(parse(arguments), run, goals, publish)


if __name__ == "__main__":
    main()
