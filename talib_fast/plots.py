"""The style of the project's plots, and their files."""

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
    """A matplotlib Figure as the content of a PNG file, or of a JPEG file, which is much smaller for photographs."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the font may lack a letter of a class's name
        figure.savefig(file, format=kind)
    return file.getvalue()
