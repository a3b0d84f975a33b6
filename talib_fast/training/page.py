"""The report as one HTML file that needs no other: table, plots, mistakes, images and settings."""

import base64
import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..images.imageset import ImageSet
from ..inference import metrics
from ..inference.figures import THUMBNAIL, draw_confusion, draw_worst_mistakes
from ..plots import drawn
from .results import predictions_file, score
from .sources import TOLD

TEMPLATE = "report.html.jinja"


def html(
    results: dict[str, Any],
    folder: Path,
    title: str,
    caption: str,
    columns: Sequence[str],
    rows: Sequence[Any],
    plots: dict[str, bytes],
    test_images: Callable[[int], ImageSet],
) -> str:
    """The page's text.

    Args:
        results: what results.json holds.
        folder: where the runs' predictions are.
        columns, rows: of the table; a row has ``cells()``.
        plots: PNG files by name; none where matplotlib is missing.
        test_images: those that a seed's runs were tested on.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    best = max(results["runs"], key=score)
    return environment.get_template(TEMPLATE).render(
        title=title,
        caption=caption,
        columns=columns,
        rows=[row.cells() for row in rows],
        plots={name: data_url(content) for name, content in plots.items()},
        best=best,
        answers=answers(folder, best, test_images(best["seed"]), plotted=bool(plots)),
        findings=[(TOLD[kind], names) for kind, names in results["data"].items() if kind in TOLD and names],
        results=results,
    )


def data_url(content: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def answers(folder: Path, run: dict[str, Any], images: ImageSet, plotted: bool) -> dict[str, Any] | None:
    """What a run says of the test images, for the template; None where that was not kept."""
    try:
        predicted, probabilities = read_predictions(predictions_file(folder, run), images)
    except (OSError, ValueError, KeyError):
        return None
    matrix = metrics.confusion(images.labels, predicted, len(images.classes))
    right, total = int(matrix.diagonal().sum()), len(images)
    found: dict[str, Any] = {
        "interval": [100 * end for end in metrics.wilson_interval(right, total)],
        "balanced": 100 * metrics.balanced_accuracy(matrix),
        "classes": list(zip(images.classes, metrics.per_class(matrix), strict=True)),
    }
    if plotted:
        found["confusion"] = data_url(drawn(draw_confusion(matrix, images.classes)))
        worst = draw_worst_mistakes(
            images.labels,
            predicted,
            probabilities,
            images.classes,
            lambda place: images.read_at(place, THUMBNAIL),
        )
        found["mistakes"] = data_url(drawn(worst, "jpeg"), "jpeg")
    return found


def read_predictions(path: Path, images: ImageSet) -> tuple[Tensor, Tensor]:
    """The predicted classes, int64 [N], and their probabilities, float64 [N]; raises ValueError if of other images.

    Names are not compared: the folder may have moved since.
    """
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    if [row["class"] for row in rows] != [images.classes[label] for label in images.labels]:
        raise ValueError(f"{path} is about other images")
    places = {name: place for place, name in enumerate(images.classes)}
    predicted = torch.tensor([places[row["predicted"]] for row in rows])
    return predicted, torch.tensor([float(row["probability"]) for row in rows], dtype=torch.float64)
