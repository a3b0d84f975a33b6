"""Time the losses that Co-Tuning and LWF add to a training step, and their preparation, compared with upstream's.

One command measures all candidates interleaved and writes ``results.json`` (raw samples), ``table.md``, ``plot.png``::

    python benchmarks/bench_co_tuning.py [--device cuda] [--quick] [--out DIR]

``--from-json DIR`` writes the table and the plot again from ``DIR/results.json``.

The losses take logits of 48 or 256 images over ImageNet's 1000 classes or ImageNet-21k's 21,843 classes. The
relationship has the rows of 48 labels among 200 classes. The preparation is a pass over 4800 samples with given source
logits, so that the network's time does not hide the preparation's.
"""

import argparse
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import baselines
import command
import harness
import numpy as np
import report
import torch
import torch.nn.functional as F
from harness import Candidate, Feed
from report import LOOKS, Case, Goal, error_bars, progress, speedup
from torch import Tensor, nn

from talib_fast.finetune.co_tuning import CoTuningLoss, Relationship
from talib_fast.finetune.knowledge_distillation import KnowledgeDistillationLoss
from talib_fast.finetune.lwf import collect_pretrain_labels

OPERATION = "co_tuning"
OURS, UPSTREAM, CROSS_ENTROPY = "talib_fast", "upstream", "cross_entropy"
BATCH, SOURCE_CLASSES, TARGET_CLASSES, SAMPLES = 48, 1000, 200, 4800
LOSS_SHAPES = ((BATCH, SOURCE_CLASSES), (256, SOURCE_CLASSES), (BATCH, 21843))
PRETRAIN_LABELS = f"LWF's labels, {SAMPLES} samples"
PARTS = ("forward", "backward", "both")
SLACK = 0.9  # what is not to be slower may seem to be by noise


def losses(device: torch.device) -> list[tuple[str, list[Candidate], list[Feed]]]:
    """Label, candidates and inputs of each loss and shape."""
    found = []
    for shape in LOSS_SHAPES:
        torch.manual_seed(0)
        logits, target = torch.randn(2, *shape, device=device)
        sides: dict[str, Callable[..., Tensor]] = {
            OURS: CoTuningLoss(),
            UPSTREAM: baselines.upstream_co_tuning,
            CROSS_ENTROPY: F.cross_entropy,
        }
        feed = Feed((nn.Parameter(logits),), torch.ones((), device=device), (target.softmax(1),))
        label = "Co-Tuning's loss, {}×{}".format(*shape)
        found.append((label, [Candidate(name, function, ()) for name, function in sides.items()], [feed]))
    torch.manual_seed(0)
    student, teacher = torch.randn(2, BATCH, SOURCE_CLASSES, device=device)
    distillation: dict[str, Callable[..., Tensor]] = {
        OURS: KnowledgeDistillationLoss(T=3),
        UPSTREAM: functools.partial(baselines.upstream_distillation, T=3),
    }
    feed = Feed((nn.Parameter(student),), torch.ones((), device=device), (teacher,))
    candidates = [Candidate(name, function, ()) for name, function in distillation.items()]
    return [*found, (f"LWF's distillation, {BATCH}×{SOURCE_CLASSES}", candidates, [feed])]


def source_logits() -> tuple[Tensor, Tensor]:
    """Logits and labels of all samples."""
    torch.manual_seed(0)
    return 3 * torch.randn(SAMPLES, SOURCE_CLASSES), torch.arange(SAMPLES) % TARGET_CLASSES


def in_batches(logits: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(logits.split(BATCH), labels.split(BATCH), strict=True))


def preparations(device: torch.device) -> list[tuple[str, list[Candidate], list[Feed]]]:
    """Label, candidates and inputs of everything without a backward pass."""
    logits, labels = source_logits()
    batches, given = in_batches(logits, labels), nn.Identity()
    relationship = Relationship(batches, given, device)
    # upstream's script looks rows up on the host, for labels that have not gone to the device yet
    wanted = torch.randint(TARGET_CLASSES, (BATCH,))
    rows: dict[str, Callable[..., Tensor]] = {
        OURS: lambda labels: relationship.lookup(labels.to(device)),
        UPSTREAM: lambda labels: torch.from_numpy(relationship.relationship[labels]).to(device).float(),
    }
    tables: dict[str, Callable[..., Any]] = {
        OURS: lambda _: Relationship(batches, given, device),
        UPSTREAM: lambda _: baselines.upstream_relationship(batches, given, device),
    }
    remembered: dict[str, Callable[..., Any]] = {
        OURS: lambda _: collect_pretrain_labels(batches, given, device),
        UPSTREAM: lambda _: torch.cat([given(x.to(device)).detach().cpu() for x, _ in batches]),
    }
    return [
        (label, [Candidate(name, function) for name, function in sides.items()], [Feed((), wanted, (wanted,))])
        for label, sides in (
            (f"rows of the relationship, {BATCH} labels", rows),
            (f"relationship, {SAMPLES} samples", tables),
            (PRETRAIN_LABELS, remembered),
        )
    ]


def error(device: torch.device) -> float:
    """The largest relative error of a relationship against its formula in float64."""
    logits, labels = source_logits()
    batches = in_batches(logits, labels)
    rows = logits.double().softmax(1).numpy()
    expected = np.stack([rows[labels == c].mean(0) for c in range(TARGET_CLASSES)])
    return float(np.abs(Relationship(batches, nn.Identity(), device).relationship / expected - 1).max())


def parts_of(case: Case) -> Sequence[str]:
    return PARTS if "backward" in case["samples"][OURS] else PARTS[:1]


def goals(results: dict[str, Any]) -> list[Goal]:
    """The goals, with the figures that decide them."""
    return [
        Goal(
            f"no loss and no relationship slower than upstream (at least {SLACK}×, for noise)",
            SLACK,
            {
                case["label"]: speedup(case, UPSTREAM, OURS, parts_of(case)[-1]).median
                for case in results["cases"]
                if case["label"] != PRETRAIN_LABELS
            },
        ),
        Goal(
            f"Co-Tuning's loss no slower than {CROSS_ENTROPY} (at least {SLACK}×, for noise)",
            SLACK,
            {
                case["label"]: speedup(case, CROSS_ENTROPY, OURS, "both").median
                for case in results["cases"]
                if CROSS_ENTROPY in case["samples"]
            },
        ),
        Goal("relative error of a relationship at most 1e-6", 1e-6, {"float32": results["error"]}, at_most=True),
    ]


def table(results: dict[str, Any]) -> list[list[str]]:
    """A row per piece of work."""
    lines = [["work", *(f"{part} / upstream" for part in PARTS), f"both / {CROSS_ENTROPY}"]]
    for case in results["cases"]:
        line = [case["label"], *(str(speedup(case, UPSTREAM, OURS, part)) for part in parts_of(case))]
        if CROSS_ENTROPY in case["samples"]:
            line.append(str(speedup(case, CROSS_ENTROPY, OURS, "both")))
        lines.append(line + ["–"] * (len(lines[0]) - len(line)))
    return lines


CAPTION = (
    "Columns with / : how many times as long as talib_fast the other takes, median (quartiles) of the rounds' ratios. "
    f"{CROSS_ENTROPY}: PyTorch's, with probabilities. LWF's labels are the same copies as upstream's on a CPU, and "
    "some microseconds a batch to check them."
)


def draw(results: dict[str, Any]) -> Any:
    """The figure: speed over upstream by piece of work."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots()
    cases = results["cases"]
    spreads = [speedup(case, UPSTREAM, OURS, parts_of(case)[-1]) for case in cases]
    colour, marker = LOOKS[0]
    axes.errorbar([s.median for s in spreads], range(len(cases)), xerr=error_bars(spreads), fmt=marker, color=colour)
    report.label_rows(axes, [case["label"] for case in cases])
    axes.set_xlim(left=0)
    report.entitle(figure, "Co-Tuning and LWF: speed over upstream, losses forward + backward", results)
    return figure


def publish(results: dict[str, Any], folder: Path) -> None:
    """Print the results, and write the table and the plot."""
    report.publish(results, folder, table(results), CAPTION, goals(results), functools.partial(draw, results))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    made = command.parser(__doc__, dtypes=False, layouts=False, batch=False)
    return command.parse(made, arguments, OPERATION)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure everything that the options ask for."""
    device = torch.device(options.device)

    def cases() -> Iterator[Case]:
        for label, candidates, feeds in (*losses(device), *preparations(device)):
            progress(label)
            samples, repetitions = harness.interleaved(device, candidates, feeds, options.rounds)
            yield {"label": label, "passes_per_sample": repetitions, "samples": samples}

    return {
        "operation": OPERATION,
        "environment": report.environment(device),
        "settings": {"device": options.device, "rounds": options.rounds, "units": "seconds per pass"},
        "error": error(device),
        "cases": cases(),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    report.run(parse(arguments), run, goals, publish)


if __name__ == "__main__":
    main()
