"""Classification metrics from a confusion matrix, int64 [N, N] with a row for each true class."""

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor


def confusion(labels: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """The confusion matrix, int64 [N, N], of labels and predictions, int64 [B]: rows are true classes."""
    return torch.bincount(labels * classes + predicted, minlength=classes**2).view(classes, classes)


def accuracy(matrix: Tensor) -> float:
    """The share of the images that were predicted right."""
    return int(matrix.diagonal().sum()) / int(matrix.sum())


def wilson_interval(correct: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """The Wilson score interval of a share; it lies within [0, 1] and holds for few images too."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = correct / total
    centre = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    reach = z / (1 + z**2 / total) * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    return (0.0 if correct == 0 else centre - reach), (1.0 if correct == total else centre + reach)


def balanced_accuracy(matrix: Tensor) -> float:
    """The mean recall of the classes that have images."""
    recalls = [figures.recall for figures in per_class(matrix) if figures.recall is not None]
    return sum(recalls) / len(recalls)


def among_top(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """Bool [B]: whether the true class has one of the ``k`` largest logits; of equal logits, the first class wins."""
    ranked = logits.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return (ranked == labels[:, None]).any(1)


@dataclass(frozen=True)
class ClassFigures:
    """The figures of one class: shares in [0, 1], or None if undefined.

    Recall is undefined if the class has no images, precision if the class is never predicted, and F1 if both are
    undefined.
    """

    images: int
    recall: float | None
    precision: float | None
    f1: float | None


def per_class(matrix: Tensor) -> list[ClassFigures]:
    """The figures of each class, in the order of the matrix."""
    right, true, predicted = (counts.tolist() for counts in (matrix.diagonal(), matrix.sum(1), matrix.sum(0)))
    return [
        ClassFigures(
            true[i], share(right[i], true[i]), share(right[i], predicted[i]), f1(right[i], true[i], predicted[i])
        )
        for i in range(len(matrix))
    ]


def f1(right: int, true: int, predicted: int) -> float | None:
    return share(2 * right, true + predicted)


def share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def most_confused(matrix: Tensor, most: int) -> list[tuple[int, int, int]]:
    """At most ``most`` triples (true class, predicted class, images), the most frequent confusions first."""
    wrong = matrix - matrix.diagonal().diag()
    pairs = [(true, predicted, int(wrong[true, predicted])) for true, predicted in wrong.nonzero().tolist()]
    return sorted(pairs, key=lambda pair: -pair[2])[:most]
