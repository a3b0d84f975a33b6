"""Small generated images in folders, on which the examples run without any photographs.

    python examples/generated_images.py FOLDER

writes ``FOLDER/PART/CLASS/NUMBER.png`` with the parts train, val and test and four classes. Each class is a pattern in
colours of its own. The images are always the same ones.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

IMAGES_PER_CLASS = {"train": 40, "val": 20, "test": 20}
SIDE = 64  # pixels
HUES = {"checks": (0.9, 0.6, 0.2), "dots": (0.2, 0.7, 0.4), "rings": (0.3, 0.4, 0.9), "stripes": (0.8, 0.3, 0.7)}


def draw(name: str, random: np.random.Generator) -> Image.Image:
    """One image of a class: its pattern, shifted, scaled, in colours near its own, with noise."""
    y, x = np.mgrid[:SIDE, :SIDE] + random.uniform(0, SIDE, (2, 1, 1))
    wave = 2 * np.pi / random.uniform(10, 20)
    pattern = {
        "checks": np.sign(np.sin(wave * x) * np.sin(wave * y)),
        "dots": np.sin(wave * x) + np.sin(wave * y) - 1,
        "rings": np.sin(wave * np.hypot(x - SIDE, y - SIDE)),
        "stripes": np.sin(wave * x),
    }[name]
    colour = np.array(HUES[name]) + random.normal(0, 0.15, 3)
    pixels = colour * (0.7 + 0.3 * pattern[..., None]) + random.normal(0, 0.1, (SIDE, SIDE, 3))
    return Image.fromarray(np.uint8(255 * pixels.clip(0, 1)))


def generate(folder: Path = Path("runs/generated_images")) -> Path:
    """Write the images unless the folder is there, and return it. Several processes may call it at once."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        random = np.random.default_rng(0)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            for part, count in IMAGES_PER_CLASS.items():
                for name in HUES:
                    place = Path(scratch, "images", part, name)
                    place.mkdir(parents=True)
                    for number in range(count):
                        draw(name, random).save(place / f"{number}.png")
            try:
                Path(scratch, "images").rename(folder)
            except OSError:  # another process was faster
                if not folder.exists():
                    raise
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    generate(parser.parse_args().folder)
