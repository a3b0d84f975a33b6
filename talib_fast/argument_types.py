"""Types for options of the command line, as argparse takes them."""

import argparse
import math
from typing import Any


def whole(least: int) -> Any:
    """An argparse type: a whole number of at least ``least``."""

    def convert(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least {least}")
        return int(text)

    return convert


def positive(text: str) -> float:
    """An argparse type: a number above 0."""
    value = number(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"{text} is not greater than 0")
    return value


def number(text: str) -> float:
    """An argparse type: a finite number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 0")
    return value
