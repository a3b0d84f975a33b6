"""Plots of a classifier's confusion matrix, and of the images that it predicted wrong."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..plots import STYLE

MOST_MISTAKES = 30
THUMBNAIL = 256  # pixels per side
MOST_NAMED = 200  # the most classes with labels; for more, the labels or the figure would have no readable size
POINT = 1 / 72  # inches


def draw_confusion(matrix: Tensor, classes: Sequence[str]) -> Any:
    """A matplotlib Figure of a confusion matrix, int64 [N, N] with a row for each true class.

    The colours are shares of the row's images. The cells show the numbers of images if there is room for them.
    """
    import matplotlib
    from matplotlib.figure import Figure

    counts = torch.as_tensor(matrix).double()
    shares = (100 * counts / counts.sum(1, keepdim=True)).numpy()  # nan where a class has no images
    number = len(classes)
    cell = min(0.62, max(0.135, 9 / number)) if number <= MOST_NAMED else 12 / number  # inches
    font = min(9.0, 0.78 * cell / POINT)
    names = [plain(shortened(name, 30)) for name in classes]
    longest = 0.6 * font * POINT * max(len(name) for name in names) if number <= MOST_NAMED else 0.0
    width, height = max(5.2, number * cell + longest + 1.9), max(3.6, number * cell + longest + 1.4)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots()
        colours = matplotlib.colormaps["Blues"].with_extremes(bad="0.93")
        image = axes.imshow(shares, cmap=colours, vmin=0, vmax=100, interpolation="nearest")
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        axes.set(xlabel="predicted class", ylabel="true class")
        if number <= MOST_NAMED:
            axes.set_xticks(range(number), names, fontsize=font, rotation=90)
            axes.set_yticks(range(number), names, fontsize=font)
            axes.tick_params(length=0)
        bar = figure.colorbar(image, ax=axes, shrink=min(1.0, 4 / height), aspect=24, pad=0.02)
        bar.set_label("share of the true class, %")
        bar.outline.set_visible(False)
        write_counts(axes, counts.long(), shares, cell)
        figure.suptitle("Confusion matrix", x=0.01, ha="left", fontweight="bold", fontsize=11)
    return figure


def write_counts(axes: Any, counts: Tensor, shares: np.ndarray, cell: float) -> None:
    """Write the numbers of images into cells of this width (inches), unless they would be too small to read."""
    digits = len(str(int(counts.max())))
    font = min(9.0, 0.85 * cell / POINT / (0.65 * max(2, digits)))
    if font < 5.5:
        return
    for row, column in counts.nonzero().tolist():
        colour = "white" if shares[row, column] > 55 else "0.15"
        axes.text(column, row, str(int(counts[row, column])), ha="center", va="center", fontsize=font, color=colour)


def draw_mistakes(mistakes: Sequence[tuple[Any, str, str, float]], total: int | None = None) -> Any:
    """A matplotlib Figure of images that were predicted wrong, the most confident mistakes first.

    Args:
        mistakes: for each mistake the image (Pillow, or a uint8 tensor [3, H, W]), its true class, the predicted class,
            and the predicted probability in [0, 1]. At most ``MOST_MISTAKES`` are shown.
        total: the number of all mistakes, if ``mistakes`` are only some of them.
    """
    import matplotlib
    from matplotlib.figure import Figure

    shown = sorted(mistakes, key=lambda mistake: -mistake[3])[:MOST_MISTAKES]
    total = max(total or 0, len(mistakes))
    columns = min(6, max(3, math.ceil(math.sqrt(len(shown)))))
    rows = max(1, math.ceil(len(shown) / columns))
    heading = "Mistakes" if total == len(shown) else f"The {len(shown)} most confident of {total:,} mistakes"
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.95 * columns, 0.5 + 2.25 * rows if shown else 0.8), layout="constrained")
        figure.suptitle(heading if shown else "No mistakes", x=0.01, ha="left", fontweight="bold", fontsize=11)
        if not shown:
            return figure
        cells = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes in cells:
            axes.set_axis_off()
        for axes, (image, true, predicted, probability) in zip(cells, shown, strict=False):
            axes.imshow(thumbnail(image), interpolation="antialiased")
            caption = f"{percent(probability)} {shortened(predicted, 24)}\nis {shortened(true, 30)}"
            axes.set_title(plain(caption), fontsize=7.5, loc="left", linespacing=1.25)
    return figure


def draw_worst_mistakes(
    labels: Tensor, predicted: Tensor, probabilities: Tensor, classes: Sequence[str], read_at: Callable[[int], Any]
) -> Any:
    """:func:`draw_mistakes` for the most confident mistakes among all predictions.

    Args:
        labels, predicted: int64 [N].
        probabilities: of the predicted classes, [N].
        classes: names of the classes.
        read_at: gives the Pillow image at an index; only the shown images are read.
    """
    wrong = (predicted != labels).nonzero().flatten()
    worst = wrong[probabilities[wrong].argsort(descending=True, stable=True)][:MOST_MISTAKES].tolist()
    shown = []
    for place in worst:
        image = read_at(place)
        image.thumbnail((THUMBNAIL, THUMBNAIL))  # so that memory holds only one image in full size
        true, guess = classes[int(labels[place])], classes[int(predicted[place])]
        shown.append((image, true, guess, probabilities[place].item()))
    return draw_mistakes(shown, len(wrong))


def thumbnail(image: Any, side: int = THUMBNAIL) -> np.ndarray:
    """An image as uint8 [side, side, 3]: its longer side is scaled to ``side``, and the rest is white."""
    from PIL import Image, ImageOps

    if isinstance(image, Tensor):
        image = Image.fromarray(np.ascontiguousarray(image.cpu().permute(1, 2, 0).numpy()))
    return np.asarray(ImageOps.pad(image.convert("RGB"), (side, side), color="white"))


def percent(probability: float) -> str:
    """A probability in per cent; only a probability of exactly 1 is shown as 100."""
    return ">99.9 %" if 0.9995 <= probability < 1 else f"{100 * probability:.1f} %"


def shortened(name: str, most: int) -> str:
    """A name of at most so many characters; a longer name loses its middle."""
    if len(name) <= most:
        return name
    end = most // 2
    return f"{name[: most - end - 1]}…{name[-end:]}"


def plain(text: str) -> str:
    """Text in which matplotlib sees no formula."""
    return text.replace("$", r"\$")
