"""Split images into training, validation and test images, as a function of the seed."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError, count
from ..images.imageset import ImageSet


@dataclass(frozen=True)
class Splits:
    """The images of one seed's runs, or of a trial.

    ``val`` is None if no images are held out for validation. ``test`` is None in trials.
    """

    train: ImageSet
    val: ImageSet | None
    test: ImageSet | None


@dataclass(frozen=True)
class Shares:
    """How images are split.

    Args:
        labels_per_class: number of labelled images per class, for training and validation; None: all.
        val_share: share of the labelled images for validation, if there are no separate images for it.
        test_share: share of all images for testing, if there are no separate images for it and ``labels_per_class`` is
            None.
        test_images: the most images to test on; None: all.
    """

    labels_per_class: int | None
    val_share: float = 0.0
    test_share: float = 0.2
    test_images: int | None = None


def split(train: ImageSet, val: ImageSet | None, test: ImageSet | None, shares: Shares, seed: int) -> Splits:
    """The training, validation and test images of a seed; parts that are None are taken from the training images.

    Each part has the same share of every class. Raises UserError if a class has too few images.
    """
    most = shares.test_images
    chosen, spare = labelled(train, shares, test is None, seed)
    if test is None:
        tested = train.part(torch.cat(limited(spare, most)))
    else:
        # all seeds share one test set, so that their figures can be compared
        members = shuffled(test.labels, len(test.classes), seeded_generator(0, "test"))
        tested = test if most is None or most >= len(test) else test.part(torch.cat(limited(members, most)))
    validated = val
    if val is None and shares.val_share:
        held = [held_out(members, shares.val_share) for members in chosen]
        validated = train.part(
            torch.cat([members[len(members) - n :] for members, n in zip(chosen, held, strict=True)])
        )
        chosen = [members[: len(members) - n] for members, n in zip(chosen, held, strict=True)]
        if not len(validated):
            raise UserError(
                "no class has two labelled images, of which one could be held out for validation: add images, raise "
                "--labels-per-class, or give --val-share 0"
            )
    return Splits(train.part(torch.cat(chosen)), validated, tested)


def test_part(images: ImageSet, share: float) -> tuple[ImageSet, ImageSet]:
    """Split off a share of every class for testing, the same for all seeds; returns (the rest, the test images)."""
    members = shuffled(images.labels, len(images.classes), seeded_generator(0, "test"))
    held = [held_out(own, share) for own in members]
    kept = [own[: len(own) - n] for own, n in zip(members, held, strict=True)]
    tested = [own[len(own) - n :] for own, n in zip(members, held, strict=True)]
    if not sum(held):
        raise UserError(
            "no class has two images, of which one could be held out for testing: add images, or give --test"
        )
    return images.part(torch.cat(kept)), images.part(torch.cat(tested))


def folded(images: ImageSet, folds: int, seed: int) -> list[Splits]:
    """Stratified K-fold cross-validation: every image of a class with two or more images validates in one fold.

    The only image of a class is always trained on. Raises UserError if no class has two images, or if there are too few
    images for the folds.
    """
    members = shuffled(images.labels, len(images.classes), seeded_generator(seed, "folds"))
    if max(map(len, members)) < 2:
        raise UserError(
            "no class has two labelled images, one to train on and one that judges trials: add images, or leave out "
            "--tune and auto"
        )
    judging = sum(len(own) for own in members if len(own) > 1)
    if judging < folds:
        raise UserError(
            f"--folds {folds} is more than the {judging} labelled images in classes of two or more, but each fold "
            "needs one: lower it, or add images"
        )
    place = torch.full((len(images),), -1)
    following = 0
    for own in members:
        if len(own) > 1:  # each class starts at the fold after the previous class's last, so folds have equal sizes
            place[own] = (torch.arange(len(own)) + following) % folds
            following += len(own)
    indices = torch.arange(len(images))
    return [
        Splits(images.part(indices[place != fold]), images.part(indices[place == fold]), None) for fold in range(folds)
    ]


def labelled(images: ImageSet, shares: Shares, tests: bool, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """For each class, the labelled images and the rest.

    With ``tests`` the rest is for testing, so each class needs at least one image of it.
    """
    members = shuffled(images.labels, len(images.classes), seeded_generator(seed, "split"))
    wanted = shares.labels_per_class
    chosen, spare = [], []
    for name, own in zip(images.classes, members, strict=True):
        needed = (wanted or 1) + tests
        if len(own) < needed:
            use = "for training and at least one for testing" if tests else "for training"
            remedy = "or lower --labels-per-class" if wanted and wanted > 1 else "to that class, or remove it"
            raise UserError(
                f"class {name} has {count(len(own), 'image')}, but needs {wanted or 1} {use}: add images {remedy}"
            )
        train = wanted or len(own) - (held_out(own, shares.test_share) if tests else 0)
        chosen.append(own[:train])
        spare.append(own[train:])
    return chosen, spare


def shuffled(labels: Tensor, classes: int, generator: torch.Generator) -> list[Tensor]:
    """The images of each class, in random order."""
    found = []
    for label in range(classes):
        members = (labels == label).nonzero().flatten()
        found.append(members[torch.randperm(len(members), generator=generator)])
    return found


def held_out(members: Tensor, share: float) -> int:
    """The number of a class's images that a share holds out: rounded, at least one, but never all."""
    return min(max(round(share * len(members)), 1), len(members) - 1)


def limited(members: Sequence[Tensor], most: int | None) -> list[Tensor]:
    """At most ``most`` images: the same number of each class, or all of a class that has fewer."""
    if most is None:
        return list(members)
    occupied = sum(len(own) > 0 for own in members)
    if most < occupied:
        raise UserError(f"--test-images {most} is less than one image for each of the {occupied} classes: raise it")
    taken = [0] * len(members)
    while (left := most - sum(taken)) > 0:
        open_classes = [c for c, own in enumerate(members) if taken[c] < len(own)]
        if not open_classes:
            break
        share = max(1, left // len(open_classes))
        for c in open_classes[:left]:
            taken[c] = min(taken[c] + share, len(members[c]))
    return [own[:n] for own, n in zip(members, taken, strict=True)]


def seeded_generator(seed: int, *purpose: str | int) -> torch.Generator:
    """A generator for this combination of arguments; the seed is mixed since only 32 bits of torch's seed count."""
    return torch.Generator().manual_seed(mixed_seed(seed, *purpose))


def mixed_seed(seed: int, *purpose: str | int) -> int:
    """A seed in [0, 2**32) that differs between purposes and steps."""
    return zlib.crc32(repr((seed, *purpose)).encode())
