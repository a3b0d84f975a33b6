"""The command ``evaluate``: measure a trained classifier on labelled images."""

import argparse
import json
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError, UserError, count, printable
from ..images.decoding import ImageError, read
from ..images.folder import ImageFiles, labelled, parts
from ..images.loading import default_workers, loaded
from ..version import __version__
from . import metrics, output
from .figures import THUMBNAIL, draw_confusion, draw_worst_mistakes
from .model import ImageClassifier, load

TOP = 5
MOST_CONFUSIONS = 10
FILES = ("evaluation.json", "per_class.csv", "predictions.csv", "confusion.png", "mistakes.png")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    output.add_model(parser)
    parser.add_argument("images", metavar="DIR", help="labelled images, DIR/class/name.jpg; or DIR/test/class/name.jpg")
    parser.add_argument("--out", metavar="DIR", help=f"write {', '.join(FILES)} into this folder")
    output.add_loading(parser)


def run(parsed: argparse.Namespace) -> int:
    """Print the figures, and write them if --out is given; returns 1 if some images could not be read, else 0."""
    folder = folder_to_evaluate(Path(parsed.images))
    images = labelled(folder, "DIR", least=1)
    if parsed.out is not None:
        output.check_target(Path(parsed.out), "--out", folder=True)
    classifier = load(parsed.model, parsed.device)
    images = images.labelled_as(classifier.classes)
    workers = default_workers() if parsed.workers is None else parsed.workers
    outcome = classify(classifier, images, parsed.batch_size, workers)
    if not len(outcome.labels):
        output.tell_left_out(images.paths, outcome.errors)
        raise UserError(f"none of the images in {printable(folder)} can be read: replace them")
    print(report(classifier, folder, outcome))
    if parsed.out is not None:
        write(Path(parsed.out), classifier, images, outcome)
    output.tell_ignored(images.ignored)
    output.tell_left_out(images.paths, outcome.errors)
    return 1 if outcome.errors else 0


def folder_to_evaluate(folder: Path) -> Path:
    """The folder itself, or its test part if it consists of train, val and test."""
    found = parts(folder, "DIR")
    if not found:
        return folder
    if "test" not in found:
        raise UsageError(
            f"{printable(folder)} has {' and '.join(path.name for path in found.values())}, but no folder test: name "
            f"the folder of images itself, e.g. {printable(list(found.values())[-1])}"
        )
    names = ", ".join(path.name for path in found.values())
    print(f"{printable(folder)} consists of {names}: its test part is evaluated.")
    return found["test"]


@dataclass(frozen=True)
class Outcome:
    """The predictions for the images that could be read.

    Attributes:
        indices: the indices of these images among all.
        labels, predicted: int64 [B].
        probabilities: of the predicted classes, float32 [B].
        among_top: bool [B]: whether the true class is among the five most probable ones.
        matrix: confusion matrix, int64 [N, N].
        errors: by index, the errors of images that could not be read.
    """

    indices: list[int]
    labels: Tensor
    predicted: Tensor
    probabilities: Tensor
    among_top: Tensor
    matrix: Tensor
    errors: dict[int, ImageError]


def classify(classifier: ImageClassifier, images: ImageFiles, batch_size: int, workers: int) -> Outcome:
    """Predict all images; their labels must be indices into the classifier's classes."""
    indices: list[int] = []
    errors: dict[int, ImageError] = {}
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for batch in loaded(images.paths, classifier.preprocessing, batch_size, workers, "evaluate"):
        errors.update(batch.errors)
        indices += batch.indices
        logits = classifier.logits(batch.images)
        among_top = metrics.among_top(logits, images.labels[batch.indices], TOP)
        found.append((*logits.softmax(1).max(1), among_top))
    probabilities, predicted, among_top = (torch.cat(tensors) for tensors in zip(*found, strict=True))
    labels = images.labels[indices]
    matrix = metrics.confusion(labels, predicted, len(classifier.classes))
    return Outcome(indices, labels, predicted, probabilities, among_top, matrix, errors)


def figures(outcome: Outcome) -> dict[str, Any]:
    """The figures over all images, in %."""
    total, right = len(outcome.labels), int(outcome.matrix.diagonal().sum())
    found = {
        "images": total,
        "right": right,
        "accuracy_percent": 100 * metrics.accuracy(outcome.matrix),
        "accuracy_interval_95_percent": [100 * end for end in metrics.wilson_interval(right, total)],
        "balanced_accuracy_percent": 100 * metrics.balanced_accuracy(outcome.matrix),
    }
    if len(outcome.matrix) > TOP:
        found["top_5_accuracy_percent"] = 100 * int(outcome.among_top.sum()) / total
    return found


def report(classifier: ImageClassifier, folder: Path, outcome: Outcome) -> str:
    """The text for the terminal."""
    found = figures(outcome)
    low, high = found["accuracy_interval_95_percent"]
    trained = f", trained by {classifier.config['method']}" if "method" in classifier.config else ""
    lines = [
        ["model", f"{classifier.config['network']}{trained}"],
        ["images", f"{found['images']:,} in {printable(folder)}"],
        ["accuracy", f"{found['accuracy_percent']:.1f} % (95 % interval {low:.1f} to {high:.1f} %)"],
        ["balanced accuracy", f"{found['balanced_accuracy_percent']:.1f} %"],
    ]
    if "top_5_accuracy_percent" in found:
        lines.append(["top-5 accuracy", f"{found['top_5_accuracy_percent']:.1f} %"])
    names = [output.one_line(name) for name in classifier.classes]
    rows = [["class", "images", "recall, %", "precision, %", "F1, %"]]
    without = []
    for name, one in zip(names, metrics.per_class(outcome.matrix), strict=True):
        if one.images:
            rows.append([name, f"{one.images:,}", *map(in_percent, (one.recall, one.precision, one.f1))])
        else:
            without.append(name)
    table = output.aligned(rows, right=(1, 2, 3, 4))
    table.insert(1, "-" * max(map(len, table)))
    text = ["", *output.aligned(lines), "", *table]
    if without:
        text += ["", f"No images of {count(len(without), 'class')}: {', '.join(without)}"]
    pairs = metrics.most_confused(outcome.matrix, MOST_CONFUSIONS)
    if pairs:
        totals = outcome.matrix.sum(1).tolist()
        confused = [
            [f"{images:,} of {totals[true]:,}", f"{names[true]} → {names[wrong]}"] for true, wrong, images in pairs
        ]
        text += ["", "Most frequent confusions, true class → predicted class:"]
        text += [f"  {line}" for line in output.aligned(confused, right=(0,))]
    return "\n".join(text)


def in_percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def write(out: Path, classifier: ImageClassifier, images: ImageFiles, outcome: Outcome) -> None:
    """Write all files of an evaluation; the plots only if matplotlib is installed."""
    classes = classifier.classes
    one_by_one = metrics.per_class(outcome.matrix)
    text = json.dumps(record(classifier, images, outcome), indent=1, ensure_ascii=False) + "\n"
    output.write(out / "evaluation.json", lambda file: file.write(text.encode()))
    output.write_csv(
        out / "per_class.csv",
        ("class", "images", "recall_percent", "precision_percent", "f1_percent"),
        (
            [name, one.images, *("" if value is None else f"{100 * value:.6g}" for value in shares(one))]
            for name, one in zip(classes, one_by_one, strict=True)
        ),
    )
    output.write_csv(
        out / "predictions.csv",
        ("file", "class", "predicted", "probability"),
        (
            [name_below(images, index), classes[label], classes[guess], f"{probability:.6g}"]
            for index, label, guess, probability in zip(
                outcome.indices,
                outcome.labels.tolist(),
                outcome.predicted.tolist(),
                outcome.probabilities.tolist(),
                strict=True,
            )
        ),
    )
    written = list(FILES[:3])
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print("No plots are written, because matplotlib is missing: pip install matplotlib", file=sys.stderr)
    else:
        output.write_png(out / "confusion.png", draw_confusion(outcome.matrix, classes))
        worst = draw_worst_mistakes(
            outcome.labels,
            outcome.predicted,
            outcome.probabilities,
            classes,
            lambda place: read(images.paths[outcome.indices[place]], at_least=THUMBNAIL),
        )
        output.write_png(out / "mistakes.png", worst)
        written = list(FILES)
    print(f"\nWritten to {printable(out)}: {', '.join(written)}")


def record(classifier: ImageClassifier, images: ImageFiles, outcome: Outcome) -> dict[str, Any]:
    """The content of ``evaluation.json``, which does not depend on the places of the model and the images."""
    one_by_one = metrics.per_class(outcome.matrix)
    percents = ("recall_percent", "precision_percent", "f1_percent")
    return {
        **figures(outcome),
        "left_out": {printable(name_below(images, index)): error.reason for index, error in outcome.errors.items()},
        "per_class": [
            {
                "class": name,
                "images": one.images,
                **{
                    key: None if value is None else 100 * value
                    for key, value in zip(percents, shares(one), strict=True)
                },
            }
            for name, one in zip(classifier.classes, one_by_one, strict=True)
        ],
        "confusion_matrix": outcome.matrix.tolist(),
        "model": {key: classifier.config.get(key) for key in ("network", "method", "seed")},
        "versions": {"talib_fast": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def shares(one: metrics.ClassFigures) -> tuple[float | None, float | None, float | None]:
    return one.recall, one.precision, one.f1


def name_below(images: ImageFiles, index: int) -> str:
    return str(images.paths[index].relative_to(images.folder))
