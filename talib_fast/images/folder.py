"""Image files in folders, and their classes."""

import difflib
import os
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UsageError, UserError, count, printable
from .decoding import SUFFIXES

PARTS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


@dataclass(frozen=True)
class ImageFiles:
    """Image files with their classes.

    Attributes:
        folder: the folder that holds the class folders.
        classes: names of the classes.
        paths: the files.
        labels: int64 [N], indices into ``classes``.
        ignored: files in the folder that are no images.
    """

    folder: Path
    classes: tuple[str, ...]
    paths: tuple[Path, ...]
    labels: Tensor
    ignored: tuple[Path, ...] = ()

    def labelled_as(self, classes: Sequence[str]) -> "ImageFiles":
        """The same images with indices into other ``classes``; raises UsageError if a class is not among them."""
        places_of = {composed(name): place for place, name in enumerate(classes)}
        for name in self.classes:
            if composed(name) not in places_of:
                near = ", ".join(difflib.get_close_matches(name, classes, n=3) or classes[:3])
                raise UsageError(
                    f"{printable(self.folder)} has a class {name}, which is not one of the {len(classes)} known "
                    f"classes: rename or remove that folder (similar names: {near})"
                )
        places = torch.tensor([places_of[composed(name)] for name in self.classes])
        return ImageFiles(self.folder, tuple(classes), self.paths, places[self.labels], self.ignored)


def labelled(folder: str | Path, option: str = "--data", least: int = 2) -> ImageFiles:
    """The images below a folder. An image's class is the path of its folder, relative to ``folder``.

    For example, ``Fruit/Apple/1.jpg`` has the class ``Fruit/Apple``, and ``Apple/1.jpg`` has the class ``Apple``.
    Hidden files and folders are left out.

    Args:
        folder: the folder that holds the class folders.
        option: the option that named the folder, for errors.
        least: the least number of classes.

    Raises:
        UsageError: there are fewer than ``least`` classes; or ``least`` is at least 2 and a class folder is empty.
    """
    folder = existing(folder, option)
    members: dict[str, list[Path]] = {}
    ignored: list[Path] = []
    for path, is_image in walk(folder):
        if is_image and path.parent != folder:
            members.setdefault(class_name(path.parent, folder), []).append(path)
        else:
            ignored.append(path)
    for child in subfolders(folder) if least > 1 else ():
        name = class_name(child, folder)
        if not any(held == name or held.startswith(f"{name}/") for held in members):
            suffixes = ", ".join(sorted(SUFFIXES))
            raise UsageError(f"{printable(child)} holds no image: add some ({suffixes}) or remove it")
    classes = sorted(members)
    if len(classes) < least:
        raise UsageError(
            f"{printable(folder)} has {count(len(classes), 'class')} of images, but {least} or more are needed: "
            "put the images of each class into a folder of its own, class/name.png"
        )
    labels = torch.tensor([label for label, name in enumerate(classes) for _ in members[name]])
    paths = tuple(path for name in classes for path in members[name])
    return ImageFiles(folder, tuple(classes), paths, labels, tuple(ignored))


def class_name(child: Path, folder: Path) -> str:
    """The name of the class of the images in ``child``, a folder below ``folder``."""
    return composed(printable(child.relative_to(folder)))


def composed(name: str) -> str:
    """A name in Unicode's composed form (NFC): file systems store é as one letter, or as e and an accent."""
    return unicodedata.normalize("NFC", name)


def parts(folder: str | Path, option: str = "--data") -> dict[str, Path]:
    """The folders ``train``, ``val`` and ``test`` of a folder that consists of these; empty for any other folder.

    A folder consists of these parts if its ``train`` contains folders, and if no other folder in it holds images.
    ``valid`` and ``validation`` are other names for ``val``.

    Raises:
        UsageError: there are two folders for one part, a part ``train`` is missing, or other folders hold images.
    """
    folder = existing(folder, option)
    found: dict[str, Path] = {}
    rest = []
    for child in subfolders(folder):
        part = PARTS.get(child.name.lower())
        if part is None:
            rest.append(child)
        elif part in found:
            raise UsageError(
                f"{printable(folder)} has both {found[part].name} and {child.name}: remove or rename one of them"
            )
        else:
            found[part] = child
    rest = [child for child in rest if any(is_image for _, is_image in walk(child))]
    if rest and len(found) < 2:
        return {}  # the only folder with a part's name may be a class, such as a class "train" of vehicles
    if rest:
        raise UsageError(
            f"{printable(folder)} has {printable(rest[0].name)} beside {' and '.join(found)}: move it elsewhere, or "
            "name the folders of images one by one (--data, --test)"
        )
    if found and "train" not in found:
        raise UsageError(
            f"{printable(folder)} has {' and '.join(found)}, but no folder train: name the folder of images itself"
        )
    return found if found and any(subfolders(found["train"])) else {}


def below(paths: Sequence[str | Path]) -> tuple[list[Path], list[Path]]:
    """The image files at ``paths`` and in folders there at any depth, in order; and the files that are no images.

    A file that is named itself counts as an image whatever its suffix. Raises UsageError if a path does not exist.
    """
    images: list[Path] = []
    ignored: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            for file, is_image in walk(path):
                (images if is_image else ignored).append(file)
        elif path.exists():
            images.append(path)
        else:
            raise UsageError(f"there is no file or folder {printable(path)}: name image files, or folders of them")
    return images, ignored


def existing(folder: str | Path, option: str) -> Path:
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(f"there is no folder {printable(folder)}: {option} needs a folder of images, class/name.png")
    return folder


def walk(folder: Path, seen: frozenset[str] = frozenset()) -> Iterator[tuple[Path, bool]]:
    """All files below a folder that are not hidden, and whether each has an image's suffix; sorted by name."""
    real = os.path.realpath(folder)
    if real in seen:  # a link to one of its own parent folders
        return
    children = listed(folder)
    for child in children:
        if not child.is_dir():
            yield child, child.suffix.lower() in SUFFIXES and child.is_file()
    for child in children:
        if child.is_dir():
            yield from walk(child, seen | {real})


def subfolders(folder: Path) -> list[Path]:
    return [child for child in listed(folder) if child.is_dir()]


def listed(folder: Path) -> list[Path]:
    """The files and folders in a folder that are not hidden, sorted by name."""
    try:
        return sorted(child for child in folder.iterdir() if not child.name.startswith("."))
    except OSError as error:
        raise UserError(f"{printable(folder)} cannot be listed ({error.strerror}): make it readable") from error
