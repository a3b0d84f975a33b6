"""How the project's plots look, and the files they become."""

import io
import warnings
from typing import Any

STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "figure.dpi": 144,
}


def drawn(figure: Any, kind: str = "png") -> bytes:
    """A Figure of matplotlib's as the content of a PNG file or, much smaller where it shows photographs, a JPEG one."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a letter of a class's name that the font does not have
        figure.savefig(file, format=kind)
    return file.getvalue()
