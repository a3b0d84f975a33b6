"""Find the images of a ``finetune`` command, and check them before anything is trained."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import UserError, count, listing, printable
from ..images.checks import Checked, check_files, duplicates
from ..images.folder import ImageFiles, labelled, parts
from ..images.imageset import ImageSet, from_files
from ..images.sample import DIGITS, load_sample
from .options import Options

SAMPLE = "the built-in sample of MNIST digits"


@dataclass(frozen=True)
class Sources:
    """All images of a command.

    Args:
        name: the name of the data, for headings.
        train: the labelled images; validation and testing take some of them if they have no images of their own.
        val, test: the images for validation and testing; None if there are no separate ones.
        digest: changes with the content of any image, its name or its class.
        findings: files that were ignored, damaged or repeated: lists of names for results.json.
    """

    name: str
    train: ImageSet
    val: ImageSet | None
    test: ImageSet | None
    digest: str
    findings: dict[str, list[str]] = field(default_factory=dict)


def find(options: Options) -> dict[str, ImageFiles]:
    """The image files that the options name, by part: train, val and test; the built-in images are no files."""
    if options.sample:
        return {"test": labelled(options.test, "--test", least=1).labelled_as(DIGITS)} if options.test else {}
    folders = parts(options.data)
    found = {"train": labelled(folders.get("train", options.data))}
    if "val" in folders:
        found["val"] = labelled(folders["val"], least=1).labelled_as(found["train"].classes)
    tested = options.test or folders.get("test")
    if tested:
        found["test"] = labelled(tested, "--test", least=1).labelled_as(found["train"].classes)
    return found


def check(found: dict[str, ImageFiles], workers: int) -> list[Checked]:
    """Decode every file once, with a progress bar; the results are in the order of the files."""
    return check_files([path for files in found.values() for path in files.paths], workers, show=True)


def assemble(options: Options, found: dict[str, ImageFiles], checked: Sequence[Checked]) -> Sources:
    """The images that can be used; raises UserError if some are damaged and ``--skip-damaged`` is not given."""
    paths = [path for files in found.values() for path in files.paths]
    findings = {"ignored": [printable(path) for files in found.values() for path in files.ignored]}
    damaged = [(printable(path), file.damage) for path, file in zip(paths, checked, strict=True) if file.damage]
    findings["damaged"] = [f"{name} ({damage})" for name, damage in damaged]
    if damaged and not options.skip_damaged:
        raise UserError(
            f"{count(len(damaged), 'image')} of {len(paths):,} cannot be read, {listing(findings['damaged'])}: replace "
            "or remove them, or leave them out with --skip-damaged"
        )
    findings |= repeated(found, checked)
    used = iter(checked)
    good = {part: without_damaged(files, [next(used) for _ in files.paths]) for part, files in found.items()}
    sets = {part: from_files(files) for part, (files, _) in good.items()}
    name = SAMPLE if options.sample else printable(options.data)
    train = load_sample() if options.sample else sets["train"]
    return Sources(name, train, sets.get("val"), sets.get("test"), content_digest(name, good), findings)


def without_damaged(files: ImageFiles, checked: Sequence[Checked]) -> tuple[ImageFiles, list[Checked]]:
    """The files that can be read."""
    kept = [index for index, file in enumerate(checked) if not file.damage]
    paths = tuple(files.paths[index] for index in kept)
    return ImageFiles(files.folder, files.classes, paths, files.labels[kept]), [checked[index] for index in kept]


def content_digest(name: str, good: dict[str, tuple[ImageFiles, list[Checked]]]) -> str:
    """Twelve hexadecimal digits that depend on every image's content, name and part, but not on the folder's place."""
    digest = hashlib.sha256(name.encode() if name == SAMPLE else b"")
    for part, (files, checked) in good.items():
        for path, file in zip(files.paths, checked, strict=True):
            place = os.fsencode(path.relative_to(files.folder))
            digest.update(b"\0".join([part.encode(), place, file.digest.encode()]))
    return digest.hexdigest()[:12]


def repeated(found: dict[str, ImageFiles], checked: Sequence[Checked]) -> dict[str, list[str]]:
    """Groups of files with the same content, in words, by kind.

    Equal files in two classes contradict each other. Equal files in two parts let a network be tested on images that it
    was trained on.
    """
    places: list[tuple[str, str, Path]] = [
        (part, files.classes[label], path)
        for part, files in found.items()
        for path, label in zip(files.paths, files.labels.tolist(), strict=True)
    ]
    groups: dict[str, list[str]] = {"contradicting": [], "in several parts": [], "duplicate": []}
    for group in duplicates(checked):
        members = [places[index] for index in group]
        if len({name for _, name, _ in members}) > 1:
            kind = "contradicting"
        elif len({part for part, _, _ in members}) > 1:
            kind = "in several parts"
        else:
            kind = "duplicate"
        groups[kind].append(" = ".join(printable(path) for _, _, path in members))
    return groups


TOLD = {
    "ignored": "Files without an image suffix, or beside the class folders",
    "damaged": "Images that cannot be read and are left out",
    "contradicting": "Files with the same content in different classes",
    "in several parts": "Files with the same content in two of training, validation and test",
    "duplicate": "Files with the same content in the same class",
}


def told(images: Sources) -> list[str]:
    """What the user should know about the images, one line each."""
    findings = images.findings.items()
    lines = [f"{TOLD[kind]}: {len(names):,} ({listing(names)})." for kind, names in findings if names]
    nested = [name for name in images.train.classes if "/" in name]
    if nested:
        lines.append(f"Class names are whole paths, since class folders are nested: {listing(nested, most=3)}.")
    return lines
