"""The sections of a report, and the report as one HTML file that needs no other file."""

import base64
import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..images.imageset import ImageSet
from ..inference import metrics
from ..inference.figures import THUMBNAIL, draw_confusion, draw_worst_mistakes
from ..inference.output import aligned
from ..plots import drawn
from .results import predictions_file
from .sources import TOLD

TEMPLATE = "report.html.jinja"


@dataclass(frozen=True)
class Section:
    """A part of a report: a table, what its figures mean, and what they show.

    Attributes:
        columns: the headings of the columns.
        caption: what the figures mean, in a few sentences.
        findings: what the figures show, one sentence each.
        words: the columns with text, aligned to the left; all others are aligned to the right.
        bold: the bold cells in Markdown and HTML, (row, column).
        plots: the plots of the section: name and description.
    """

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    caption: str
    findings: Sequence[str] = ()
    words: tuple[int, ...] = (0,)
    bold: frozenset[tuple[int, int]] = frozenset()
    plots: Mapping[str, str] = field(default_factory=dict)

    def text(self) -> str:
        """The section for a terminal."""
        rule = tuple("-" * max(map(len, column)) for column in zip(self.columns, *self.rows, strict=True))
        right = [place for place in range(len(self.columns)) if place not in self.words]
        table = aligned([self.columns, rule, *self.rows], right)
        return "\n".join([*table, "", self.caption, *(["", *self.findings] if self.findings else [])])

    def markdown(self) -> str:
        """The section in Markdown."""
        rule = "".join("|---" if place in self.words else "|---:" for place in range(len(self.columns)))
        cells = [
            [f"**{cell}**" if (row, column) in self.bold else cell for column, cell in enumerate(own)]
            for row, own in enumerate(self.rows)
        ]
        table = [f"| {' | '.join(self.columns)} |", f"{rule}|", *(f"| {' | '.join(own)} |" for own in cells)]
        findings = [f"- {finding}" for finding in self.findings]
        return "\n".join([*table, "", self.caption, *(["", *findings] if findings else [])])


@dataclass(frozen=True)
class Choice:
    """The run that a page shows in detail, its heading, and how it was chosen; no reason if there is only one run."""

    run: dict[str, Any]
    heading: str
    reason: str


def html(
    results: dict[str, Any],
    folder: Path,
    title: str,
    sections: Sequence[Section],
    choice: Choice,
    plots: Mapping[str, bytes],
    test_images: Callable[[int], ImageSet],
) -> str:
    """The HTML text of the page.

    Args:
        results: the content of results.json.
        folder: the output folder, which holds the runs' predictions.
        title: the page's heading.
        sections: the tables of the page.
        choice: the run that is shown in detail.
        plots: PNG files by name; empty if matplotlib is missing.
        test_images: ``test_images(seed)`` gives the images that the seed's runs were tested on.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    run = choice.run
    return environment.get_template(TEMPLATE).render(
        title=title,
        sections=sections,
        plots={name: data_url(content) for name, content in plots.items()},
        choice=choice,
        run=run,
        answers=answers(folder, run, test_images(run["seed"]), plotted=bool(plots)),
        findings=[(TOLD[kind], names) for kind, names in results["data"].items() if kind in TOLD and names],
        results=results,
    )


def data_url(content: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def answers(folder: Path, run: dict[str, Any], images: ImageSet, plotted: bool) -> dict[str, Any] | None:
    """A run's figures on the test images, for the template; None if its predictions cannot be read."""
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
    """The predicted classes, int64 [N], and their probabilities, float64 [N].

    The names of the files are not compared, since the folder of images may have moved.

    Raises:
        ValueError: the file is about other images.
    """
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    if [row["class"] for row in rows] != [images.classes[label] for label in images.labels]:
        raise ValueError(f"{path} is about other images")
    places = {name: place for place, name in enumerate(images.classes)}
    predicted = torch.tensor([places[row["predicted"]] for row in rows])
    return predicted, torch.tensor([float(row["probability"]) for row in rows], dtype=torch.float64)
