"""What the commands on a trained model have in common: their options, and the files and lines that they write."""

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

MODEL_HELP = "folder of a model that finetune kept, or finetune's --out if it holds one model"


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)


def add_loading(parser: argparse.ArgumentParser) -> None:
    """The options of how images are decoded and computed."""
    parser.add_argument("--device", default="auto", metavar="D", help="auto (the first GPU, else the CPU), cpu, cuda:1")
    parser.add_argument(
        "--batch-size", type=whole(1), default=32, metavar="N", help="images computed at a time (default 32)"
    )
    parser.add_argument(
        "--workers", type=whole(0), metavar="N", help="processes that decode images (default: one per core)"
    )


def check_target(path: Path, name: str, folder: bool = False) -> None:
    """Raise UsageError if a file or folder, which ``name`` asks for, cannot be written there; nothing is made yet."""
    if path.exists() and path.is_dir() != folder:
        wrong, right = ("a file", "a folder") if folder else ("a folder", "a file")
        raise UsageError(f"{printable(path)} is {wrong}, and {name} wants {right}: choose another name")
    place = path if folder else path.parent
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise UsageError(f"nothing can be written to {printable(place)}: choose another {name}")


def write(path: Path, fill: Callable[[IO[bytes]], object]) -> None:
    """Write a file as a whole, or raise UserError and leave what was there."""
    try:
        write_atomically(path, fill)
    except OSError as error:
        raise UserError(
            f"{printable(path)} cannot be written ({error.strerror or error}): make room or choose another place"
        ) from error


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    content = csv_content(header, rows)
    write(path, lambda file: file.write(content))


def csv_content(header: Sequence[str], rows: Iterable[Sequence[object]]) -> bytes:
    """CSV in UTF-8, in which names of files keep their bytes."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue().encode("utf-8", "surrogateescape")


def write_png(path: Path, figure: Any) -> None:
    content = drawn(figure)
    write(path, lambda file: file.write(content))


def one_line(text: str) -> str:
    """Text without line breaks and the like, which become escapes."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def aligned(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Lines of cells one below the other; the columns in ``right`` end at the same place."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if place in right else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def tell_left_out(paths: Sequence[Path], errors: Mapping[int, ImageError]) -> None:
    """Say on stderr which of the images could not be read."""
    if errors:
        of = f"{len(errors):,} of {count(len(paths), 'image')}"
        print(
            f"talib_fast: {of} could not be read and {'is' if len(errors) == 1 else 'are'} left out:", file=sys.stderr
        )
    for index, error in sorted(errors.items()):
        print(f"  {one_line(printable(paths[index]))}: {error.reason}", file=sys.stderr)


def tell_ignored(ignored: Sequence[Path]) -> None:
    """Say on stderr how many files have no suffix of an image's."""
    if ignored:
        named = ", ".join(one_line(printable(path)) for path in ignored[:3]) + (", ..." if len(ignored) > 3 else "")
        print(f"talib_fast: {count(len(ignored), 'file')} ignored, by suffix no images: {named}", file=sys.stderr)
