"""The options, files and lines that the commands ``predict``, ``evaluate`` and ``export`` share."""

import argparse
import csv
import io
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from ..argument_types import whole
from ..errors import UsageError, UserError, count, printable
from ..images.decoding import ImageError
from ..plots import drawn
from ..storage import write_atomically

MODEL_HELP = "folder of a model that finetune kept, or the --out of finetune if it holds one model"


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)


def add_loading(parser: argparse.ArgumentParser) -> None:
    """Declare the options for decoding and computing images."""
    parser.add_argument(
        "--device", default="auto", metavar="D", help="auto (default: the first GPU, else the CPU), cpu, cuda, cuda:1"
    )
    parser.add_argument(
        "--batch-size", type=whole(1), default=32, metavar="N", help="images computed at a time (default: %(default)s)"
    )
    parser.add_argument(
        "--workers",
        type=whole(0),
        metavar="N",
        help="processes that decode images (default: one per core, 8 at most)",
    )


def check_target(path: Path, name: str, folder: bool = False) -> None:
    """Raise UsageError if a file (or a folder) cannot be written at ``path``; nothing is written yet.

    ``name`` is the option or argument that gave the path.
    """
    if path.exists() and path.is_dir() != folder:
        wrong, right = ("a file", "a folder") if folder else ("a folder", "a file")
        raise UsageError(f"{printable(path)} is {wrong}, but {name} needs {right}: choose another name")
    place = path if folder else path.parent
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise UsageError(f"nothing can be written to {printable(place)}: choose another {name}")


def write(path: Path, fill: Callable[[IO[bytes]], object]) -> None:
    """Write a file completely, or raise UserError and leave the existing file as it is."""
    try:
        write_atomically(path, fill)
    except OSError as error:
        raise UserError(
            f"{printable(path)} cannot be written ({error.strerror or error}): make room, or choose another place"
        ) from error


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    content = csv_content(header, rows)
    write(path, lambda file: file.write(content))


def csv_content(header: Sequence[str], rows: Iterable[Sequence[object]]) -> bytes:
    """CSV in UTF-8; names of files that are not UTF-8 keep their bytes."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue().encode("utf-8", "surrogateescape")


def write_png(path: Path, figure: Any) -> None:
    content = drawn(figure)
    write(path, lambda file: file.write(content))


def one_line(text: str) -> str:
    """Text in which line breaks and other unprintable characters are replaced by escapes."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def aligned(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Lines with aligned columns; the columns in ``right`` are aligned to the right, all others to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if place in right else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def tell_left_out(paths: Sequence[Path], errors: Mapping[int, ImageError]) -> None:
    """Print on stderr which images could not be read."""
    if errors:
        of = f"{len(errors):,} of {count(len(paths), 'image')}"
        print(
            f"talib_fast: {of} could not be read and {'is' if len(errors) == 1 else 'are'} left out:", file=sys.stderr
        )
    for index, error in sorted(errors.items()):
        print(f"  {one_line(printable(paths[index]))}: {error.reason}", file=sys.stderr)


def tell_ignored(ignored: Sequence[Path]) -> None:
    """Print on stderr how many files were ignored because they have no image suffix."""
    if ignored:
        named = ", ".join(one_line(printable(path)) for path in ignored[:3]) + (", ..." if len(ignored) > 3 else "")
        print(f"talib_fast: {count(len(ignored), 'file')} without an image suffix ignored: {named}", file=sys.stderr)
