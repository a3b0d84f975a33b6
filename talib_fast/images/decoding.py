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

# the suffixes of torchvision, GIF, and those with which browsers save JPEG and AVIF files
SUFFIXES = frozenset(
    {".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
BACKGROUND = (255, 255, 255)  # the colour behind transparent images


class ImageError(UserError):
    """A file cannot be read as an image; ``reason`` says why in a few words."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name} cannot be read as an image ({reason}): replace it or remove it")
        self.name, self.reason = name, reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.name, self.reason)  # pickles the error, which a worker sends to its parent process


def read(source: str | PathLike | IO[bytes] | bytes, at_least: int | None = None, name: str | None = None) -> "Image":
    """The image in a file as 8-bit RGB, rotated as its EXIF data say, with transparent parts on white.

    Args:
        source: path, open file or content.
        at_least: a large JPEG may be decoded at a reduced size (1/2, 1/4 or 1/8) whose sides are at least this long,
            which is cheap; None: full size.
        name: the image's name in errors; None: its path.

    Raises:
        ImageError: the file is damaged, has no known format, has more pixels than Pillow's limit, or has more than 16
            bits per channel.
    """
    needed("PIL.Image", "reading images")
    from PIL import Image, UnidentifiedImageError

    name = name or (printable(source) if isinstance(source, str | PathLike) else "the image")
    file: Any = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large images, and of metadata that change no pixel
            with Image.open(file) as image:
                if at_least is not None:
                    image.draft("RGB", (at_least, at_least))
                return to_rgb(image)
    except UnidentifiedImageError as error:
        raise ImageError(name, "it has no known format") from error
    except Image.DecompressionBombError as error:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 1_000_000
        raise ImageError(name, f"it has more than {most} megapixels") from error
    except (OSError, SyntaxError, ValueError, EOFError, TypeError, IndexError, MemoryError) as error:  # of decoders
        raise ImageError(name, getattr(error, "strerror", None) or str(error) or type(error).__name__) from error


def to_rgb(image: "Image") -> "Image":
    """An opened Pillow image as 8-bit RGB; raises ValueError for 32 bits per pixel, whose range is not known."""
    import numpy as np
    from PIL import Image

    kind = image.format
    image = upright(image)
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "I" and kind in ("PNG", "PPM"):  # some versions of Pillow give 16-bit greys in this mode
        return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        # such a file does not say which values mean black and white
        raise ValueError("it has 32 bits per pixel, convert it to 8 or 16")
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        image = Image.new("RGBA", layers.size, (*BACKGROUND, 255))
        image.alpha_composite(layers)
    return image.convert("RGB")


def upright(image: "Image") -> "Image":
    """An opened Pillow image, rotated as its EXIF data say; unchanged if they cannot be read.

    Pillow's ``exif_transpose`` also rewrites all metadata, and so fails if any of them are damaged.
    """
    from PIL import ExifTags, Image

    image.load()  # raises an error for damaged pixels, but not for damaged metadata
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # each kind of damage raises its own error
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
