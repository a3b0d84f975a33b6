"""Image files of any kind as 8-bit RGB."""

import io
import warnings
from os import PathLike
from typing import IO, TYPE_CHECKING, Any

from ..errors import UserError, printable
from ..libraries import needed

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["ImageError"]

# torchvision's, GIF, and under which browsers save JPEGs and AVIF
SUFFIXES = frozenset(
    {".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
BACKGROUND = (255, 255, 255)  # what is seen behind transparent images


class ImageError(UserError):
    """A file that can't be read as an image; ``reason`` says why in a few words."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name} cannot be read as an image ({reason}): replace it or remove it")
        self.name, self.reason = name, reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.name, self.reason)  # by which a worker's error reaches the process that asked


def read(source: str | PathLike | IO[bytes] | bytes, at_least: int | None = None, name: str | None = None) -> "Image":
    """The image in a file as 8-bit RGB, the way up that its camera says, transparent parts on white.

    Args:
        source: path, open file or content.
        at_least: sides that may be halved while they stay this long, which makes decoding large JPEGs cheap.
        name: what to call it in errors; its path by default.

    Raises:
        ImageError: damaged, of no known format, above Pillow's limit of pixels, or of more than 16 bits a channel.
    """
    needed("PIL.Image", "reading images")
    from PIL import Image, UnidentifiedImageError

    name = name or (printable(source) if isinstance(source, str | PathLike) else "the image")
    file: Any = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images, and of metadata that no pixel depends on
            with Image.open(file) as image:
                if at_least is not None:
                    image.draft("RGB", (at_least, at_least))
                return to_rgb(image)
    except UnidentifiedImageError as error:
        raise ImageError(name, "it has no known format") from error
    except Image.DecompressionBombError as error:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 1_000_000
        raise ImageError(name, f"it has more than {most} megapixels") from error
    except (OSError, SyntaxError, ValueError, EOFError, TypeError, IndexError, MemoryError) as error:  # by decoder
        raise ImageError(name, getattr(error, "strerror", None) or str(error) or type(error).__name__) from error


def to_rgb(image: "Image") -> "Image":
    """An opened image of Pillow's as 8-bit RGB; raises ValueError where bits would be lost that matter."""
    import numpy as np
    from PIL import Image

    kind = image.format
    image = upright(image)
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "I" and kind in ("PNG", "PPM"):  # how Pillow gives their 16-bit greys, or gave them
        return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        # what is black and white in such a file is known to who made it, and not said in it
        raise ValueError("it has 32 bits a pixel, convert it to 8 or 16")
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        image = Image.new("RGBA", layers.size, (*BACKGROUND, 255))
        image.alpha_composite(layers)
    return image.convert("RGB")


def upright(image: "Image") -> "Image":
    """An opened image of Pillow's the way up that its camera says, or as it lies where that can't be read.

    Pillow's ``exif_transpose`` rewrites all metadata as well, and fails where any of them is damaged.
    """
    from PIL import ExifTags, Image

    image.load()  # damaged pixels are an error, damaged metadata none
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # each kind of damage has its own
        orientation = None
    turn = Image.Transpose
    turns = {
        2: turn.FLIP_LEFT_RIGHT,
        3: turn.ROTATE_180,
        4: turn.FLIP_TOP_BOTTOM,
        5: turn.TRANSPOSE,
        6: turn.ROTATE_270,
        7: turn.TRANSVERSE,
        8: turn.ROTATE_90,
    }
    return image.transpose(turns[orientation]) if orientation in turns else image
