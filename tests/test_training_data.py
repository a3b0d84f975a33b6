"""What a run trains and is tested on: splits, and batches from them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from training_support import CPU, counts, images_of, make_data, make_images

from talib_fast.errors import UserError
from talib_fast.images.folder import labelled
from talib_fast.images.imageset import ImageSet, from_files
from talib_fast.images.preprocessing import Preprocessing
from talib_fast.training import data, splits
from talib_fast.training.splits import Shares, folded, mixed_seed, split


def test_split_is_stratified_disjoint_and_repeatable():
    images = images_of(list(range(5)) * 30)
    found = split(images, None, None, Shares(4, test_images=50), seed=1)
    assert counts(found.train) == [4] * 5 and counts(found.test) == [10] * 5 and found.val is None
    assert not set(found.train.names) & set(found.test.names)
    again = split(images, None, None, Shares(4, test_images=50), seed=1)
    assert again.train.names == found.train.names and again.test.names == found.test.names
    assert split(images, None, None, Shares(4, test_images=50), seed=2).train.names != found.train.names


def test_split_takes_what_there_is():
    images = images_of([0] * 5 + [1] * 20 + [2] * 9)
    found = split(images, None, None, Shares(4, test_images=1000), seed=0)
    assert counts(found.test) == [1, 16, 5]
    assert len({*found.train.names, *found.test.names}) == 34
    assert counts(split(images, None, None, Shares(4, test_images=10), seed=0).test) == [1, 5, 4]


def test_all_labels_are_shared_out_in_every_class():
    images = images_of([0] * 100 + [1] * 10 + [2] * 3)
    found = split(images, None, None, Shares(None, val_share=0.25, test_share=0.2), seed=0)
    assert counts(found.test) == [20, 2, 1]
    assert counts(found.val) == [20, 2, 1]
    assert counts(found.train) == [60, 6, 1]
    assert sorted(map(int, (*found.train.names, *found.val.names, *found.test.names))) == list(range(113))


def test_validation_takes_some_of_the_labels():
    images = images_of([0] * 30 + [1] * 30)
    found = split(images, None, None, Shares(5, val_share=0.2, test_images=20), seed=0)
    assert counts(found.train) == [4, 4] and counts(found.val) == [1, 1] and counts(found.test) == [10, 10]
    whole = split(images, None, None, Shares(5, test_images=20), seed=0)
    assert {*found.train.names, *found.val.names} == set(whole.train.names)


def test_images_of_their_own_validate_and_test():
    train, val, test = images_of([0] * 8 + [1] * 9), images_of([1, 1]), images_of([0] * 6 + [1] * 2)
    val = ImageSet(train.classes, val.labels, val.names, val.read_at)
    found = split(train, val, test, Shares(8), seed=3)
    assert counts(found.train) == [8, 8] and found.val is val and found.test is test
    limited = [split(train, val, test, Shares(2, test_images=4), seed).test for seed in (3, 4)]
    assert counts(limited[0]) == [2, 2] and limited[0].names == limited[1].names  # one test for all seeds


def test_split_says_what_is_missing():
    images = images_of([0] * 5 + [1] * 4)
    with pytest.raises(UserError, match="class b has 4 images, but needs 4 for training and at least one for testing"):
        split(images, None, None, Shares(4), 0)
    with pytest.raises(UserError, match="class b has 4 images, but needs 5 for training: add images or lower"):
        split(images, None, images, Shares(5), 0)
    with pytest.raises(UserError, match="class a has 1 image, but needs 1 for training and at least one for testing"):
        split(images_of([0, 1, 1]), None, None, Shares(None), 0)
    with pytest.raises(UserError, match="--test-images 1 is less than one image for each of the 2 classes"):
        split(images, None, None, Shares(2, test_images=1), 0)
    with pytest.raises(UserError, match="no class has two labelled images, of which one could be held out"):
        split(images, None, None, Shares(1, val_share=0.5), 0)


def test_one_part_tests_whatever_the_seed_is():
    images = images_of([0] * 20 + [1] * 7 + [2] * 2 + [3])
    kept, tested = splits.test_part(images, 0.2)
    assert counts(tested) == [4, 1, 1, 0] and counts(kept) == [16, 6, 1, 1]  # never all images of a class
    assert sorted(map(int, (*kept.names, *tested.names))) == list(range(30))
    assert splits.test_part(images, 0.2)[1].names == tested.names
    assert counts(splits.test_part(images, 0.9)[1]) == [18, 6, 1, 0]
    assert counts(splits.test_part(images, 0.0)[1]) == [1, 1, 1, 0]
    assert set(tested.names) - set(map(str, (*range(4), 20, 27)))  # not the first of each class
    with pytest.raises(UserError, match=r"no class has two images, of which one .* testing: add images, or give --te"):
        splits.test_part(images_of([0, 1, 2]), 0.2)


@pytest.mark.parametrize("folds", [2, 3, 5])
def test_folds_are_stratified_disjoint_and_whole(folds):
    images = images_of([0] * 11 + [1] * 7 + [2] * 2 + [3] + [4] * 3 + [5])
    found = folded(images, folds, seed=4)
    everything = set(images.names)
    judging = [name for part in found for name in part.val.names]
    assert len(found) == folds and sorted(map(int, judging)) == [n for n in range(25) if n not in (20, 24)]
    for part in found:
        assert part.test is None and set(part.train.names) == everything - set(part.val.names)
        assert {"20", "24"} <= set(part.train.names)  # the only images of their classes
        assert min(counts(part.train)) >= 1
    sizes = [len(part.val) for part in found]
    assert max(sizes) - min(sizes) <= 1 and sum(sizes) == 23
    for label in range(6):
        of_label = [int((part.val.labels == label).sum()) for part in found]
        assert max(of_label) - min(of_label) <= 1


def test_folds_are_a_function_of_the_seed():
    images = images_of([0, 1, 2] * 10)
    names = [[part.val.names for part in folded(images, 3, seed)] for seed in (0, 0, 1)]
    assert names[0] == names[1] != names[2]


def test_folds_say_what_is_missing():
    with pytest.raises(UserError, match=r"no class has two labelled images, .*: add images, or leave out --tune and a"):
        folded(images_of([0, 1, 2]), 2, seed=0)
    images = images_of([0, 0, 1, 1, 2])
    assert [counts(part.val) for part in folded(images, 4, seed=0)] == [[1, 0, 0]] * 2 + [[0, 1, 0]] * 2
    message = "--folds 5 is more than the 4 labelled images in classes of two or more, .*: lower it, or add"
    with pytest.raises(UserError, match=message):
        folded(images, 5, seed=0)


def test_two_sets_of_images_joined(tmp_path):
    first, second = (from_files(labelled(make_images(tmp_path / name, images=3, size=size))) for name, size in SIZES)
    joined = first.joined(second)
    assert joined.classes == first.classes and joined.names == (*first.names, *second.names) and len(joined) == 18
    assert joined.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2] * 2
    for place, name in enumerate(joined.names):
        with Image.open(name) as image:
            assert joined.read_at(place, None).tobytes() == image.convert("RGB").tobytes()
    part = joined.part(torch.tensor([17, 0, 9]))
    assert [part.read_at(place, None).size[1] for place in range(3)] == [12, 20, 12]
    assert part.labels.tolist() == [2, 0, 0] and part.names == (second.names[8], first.names[0], second.names[0])
    held = [ImageSet(one.classes, one.labels, one.names, one.read_at, small=True) for one in (first, second)]
    assert held[0].joined(held[1]).small and not held[0].joined(second).small and not first.joined(held[1]).small


SIZES = (("first", 20), ("second", 12))


@pytest.mark.parametrize("augmentation", ["shift", "standard", "randaugment"])
def test_batches_are_a_function_of_seed_and_step(tmp_path, augmentation):
    folder = make_images(tmp_path / "images")
    task = make_data(folder, augmentation=augmentation)
    found = task.batch(7, views=2)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    *_, in_a_row = make_data(folder, augmentation=augmentation, workers=2).batches(4, 8, views=2)
    assert torch.get_rng_state().equal(state)  # whatever else is random is not disturbed
    for mine, other in zip(found.views, in_a_row.views, strict=True):
        assert mine.equal(other)
    assert found.labels.equal(in_a_row.labels) and found.indices.equal(in_a_row.indices)
    assert found.images.shape == (6, 3, 16, 16) and found.images.dtype == torch.float32
    assert not found.views[0].equal(found.views[1])
    assert not task.batch(8).indices.equal(found.indices)
    assert not make_data(folder, seed=1, augmentation=augmentation).batch(7).images.equal(found.images)
    assert task.train.labels[found.indices].equal(found.labels)


@pytest.mark.parametrize("batch_size", [6, 7, 12, 30])
def test_every_image_comes_once_per_epoch(tmp_path, batch_size):
    task = make_data(make_images(tmp_path / "images"), batch_size=batch_size)
    stream = torch.cat([found.indices for found in task.batches(0, 24)])
    assert len(stream) == 24 * batch_size
    for epoch in stream[: len(stream) // 12 * 12].split(12):
        assert epoch.sort().values.equal(torch.arange(12))


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_keep_the_order(tmp_path, monkeypatch, workers):
    monkeypatch.setattr(data, "READ_PIXELS", 5 * 16**2)
    task = make_data(make_images(tmp_path / "images"), augmentation="none", workers=workers)
    batches = list(task.train)
    assert len(task.train) == len(batches) == 3
    assert torch.cat([labels for _, labels in batches]).equal(task.train.labels)
    assert next(iter(task.train))[0].equal(batches[0][0])
    images = torch.cat([images for images, _ in batches])
    found = task.batch(0)
    assert found.images.equal(images[found.indices])
    assert torch.cat([images for images, _ in task.train.part(slice(1, None, 3))]).equal(images[1::3])


def test_small_images_in_memory_are_the_same_as_files(tmp_path):
    files = from_files(labelled(make_images(tmp_path / "images")))
    held = ImageSet(files.classes, files.labels, files.names, files.read_at, small=True)
    found = []
    for images in (files, held):
        splits = split(images, None, None, Shares(4, test_images=9), seed=0)
        task = make_data(tmp_path / "images")
        task = data.TaskData(
            splits, task.train.preprocessing, seed=0, batch_size=6, augmentation="shift", device=task.device
        )
        part = task.test.part(slice(2, 7))
        found.append([task.batch(3).images, *(images for images, _ in task.test), *(images for images, _ in part)])
    for of_files, of_memory in zip(*found, strict=True):
        assert of_files.equal(of_memory)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_is_damaged_later_is_named(tmp_path, workers):
    folder = make_images(tmp_path / "images")
    task = make_data(folder, workers=workers)
    for path in folder.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"\.png cannot be read as an image \(it has no known format\): replace it"):
        task.batch(0)
    with pytest.raises(UserError, match=r"\.png cannot be read"):
        list(task.test)


@pytest.mark.parametrize(("most", "reads"), [(2**20, 9), (100, 18)], ids=["few", "many"])
def test_few_images_are_read_once(most, reads, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "HELD_BYTES", most)
    read, images = [], make_data(make_images(tmp_path / "images")).test.images
    counted = replace(images, read_at=lambda *place: (read.append(place), images.read_at(*place))[1])
    loader = data.InOrder(counted, Preprocessing(16), CPU)
    passes = [torch.cat([batch for batch, _ in loader]) for _ in range(2)]
    assert passes[0].equal(passes[1]) and len(read) == reads


def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    """Of a thousand images no more are decoded than the batches that were asked for need."""
    folder = tmp_path / "images"
    for name in "ab":
        (folder / name).mkdir(parents=True)
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / name / "0.png")
        for number in range(1, 500):
            (folder / name / f"{number}.png").symlink_to("0.png")
    files = labelled(folder)
    reads = []

    def counted(index: int, at_least: int | None) -> Image.Image:
        reads.append(index)
        return Image.new("RGB", (8, 8))

    images = ImageSet(files.classes, files.labels, tuple(map(str, files.paths)), counted)
    splits = split(images, None, None, Shares(None), seed=0)
    preprocessing = make_data(folder).train.preprocessing
    task = data.TaskData(
        splits, preprocessing, seed=0, batch_size=6, augmentation="standard", device=torch.device("cpu")
    )
    next(iter(task.batches(0, 1000)))
    assert len(reads) == 6


def test_seeds_differ_between_purposes_and_steps():
    seeds = {mixed_seed(seed, purpose, step) for seed in range(5) for purpose in ("a", "b") for step in range(50)}
    assert len(seeds) == 500
    assert all(0 <= seed < 2**32 for seed in seeds)
