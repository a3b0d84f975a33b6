"""The command ``predict``: print the most probable classes of image files."""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..argument_types import whole
from ..errors import UsageError, printable
from ..images.decoding import SUFFIXES, ImageError
from ..images.folder import below
from ..images.loading import default_workers, loaded
from . import output
from .model import ImageClassifier, Prediction, load

STANDARD_OUTPUT = "-"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    output.add_model(parser)
    parser.add_argument("images", nargs="+", metavar="FILE|DIR", help="image files, or folders of images at any depth")
    parser.add_argument(
        "--top", type=whole(1), default=1, metavar="K", help="print the K most probable classes (default: %(default)s)"
    )
    parser.add_argument(
        "--csv", metavar="FILE", help="write file, class and probability to a CSV file; - writes to stdout"
    )
    output.add_loading(parser)


def run(parsed: argparse.Namespace) -> int:
    """Print a line for every image; returns 1 if some could not be read (they are named on stderr), else 0."""
    paths, ignored = below(parsed.images)
    if not paths:
        named = ", ".join(printable(path) for path in parsed.images)
        raise UsageError(
            f"there is no image in {named}: name image files, or folders with {', '.join(sorted(SUFFIXES))}"
        )
    if parsed.csv not in (None, STANDARD_OUTPUT):
        output.check_target(Path(parsed.csv), "--csv")
    classifier = load(parsed.model, parsed.device)
    top = min(parsed.top, len(classifier.classes))
    workers = default_workers() if parsed.workers is None else parsed.workers
    errors: dict[int, ImageError] = {}
    rows: list[list[object]] = []
    layout = Layout(paths, classifier.classes)
    for index, prediction in predictions(classifier, paths, parsed.batch_size, workers, errors):
        best = prediction.top(top)
        if parsed.csv != STANDARD_OUTPUT:
            print(layout.line(index, best), flush=sys.stdout.isatty())
        rows.append([os.fsdecode(paths[index]), *(cell for label, share in best for cell in (label, f"{share:.6g}"))])
    if parsed.csv is not None:
        write_csv(parsed.csv, rows, top)
    output.tell_ignored(ignored)
    output.tell_left_out(paths, errors)
    return 1 if errors else 0


def write_csv(target: str, rows: Sequence[Sequence[object]], top: int) -> None:
    """Write file, class and probability, with further pairs of these for ``top`` > 1, to a file or to stdout."""
    header = ["file", "class", "probability"]
    header += [name for place in range(2, top + 1) for name in (f"class_{place}", f"probability_{place}")]
    if target == STANDARD_OUTPUT:
        sys.stdout.flush()
        sys.stdout.buffer.write(output.csv_content(header, rows))
    else:
        output.write_csv(Path(target), header, rows)


def predictions(
    classifier: ImageClassifier, paths: Sequence[Path], batch_size: int, workers: int, errors: dict[int, ImageError]
) -> Iterator[tuple[int, Prediction]]:
    """The index in ``paths`` and the prediction of each file that can be read; other files' errors go to ``errors``."""
    show = "" if sys.stdout.isatty() or len(paths) <= batch_size else "predict"  # on a terminal the lines are enough
    for batch in loaded(paths, classifier.preprocessing, batch_size, workers, show):
        errors.update(batch.errors)
        probabilities = classifier.logits(batch.images).softmax(1)
        yield from zip(batch.indices, map(classifier.prediction, probabilities), strict=True)


class Layout:
    """Formats lines with aligned columns; the widths come from all names, before the first prediction is known."""

    def __init__(self, paths: Sequence[Path], classes: Sequence[str]) -> None:
        self.names = [output.one_line(printable(path)) for path in paths]
        self.labels = {name: output.one_line(name) for name in classes}
        self.name_width, self.label_width = max(map(len, self.names)), max(map(len, self.labels.values()))

    def line(self, index: int, best: Sequence[tuple[str, float]]) -> str:
        cells = [f"{self.labels[label]:<{self.label_width}}  {100 * share:5.1f} %" for label, share in best]
        return "  ".join([f"{self.names[index]:<{self.name_width}}", *cells])
