"""What a run trains and is tested on: splits, and batches from them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from training_support import CPU, make_data, make_images

from talib_fast.errors import UserError
from talib_fast.images.folder import labelled
from talib_fast.images.imageset import ImageSet, from_files
from talib_fast.images.preprocessing import Preprocessing
from talib_fast.training import data
from talib_fast.training.splits import Shares, mixed_seed, split


def images_of(labels: list[int], names: str = "abcdefgh") -> ImageSet:
    """Images without content, called by their places."""
    classes = tuple(names[label] for label in range(max(labels) + 1))
    return ImageSet(classes, torch.tensor(labels), tuple(map(str, range(len(labels)))), lambda index, size: None)


def counts(images: ImageSet) -> list[int]:
    return torch.bincount(images.labels, minlength=len(images.classes)).tolist()


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
    with pytest.raises(UserError, match="class b has 4 images, but 4 for training and at least one for testing are"):
        split(images, None, None, Shares(4), 0)
    with pytest.raises(UserError, match="class b has 4 images, but 5 for training are needed: add images or lower"):
        split(images, None, images, Shares(5), 0)
    with pytest.raises(UserError, match="class a has 1 image, but 1 for training and at least one for testing are"):
        split(images_of([0, 1, 1]), None, None, Shares(None), 0)
    with pytest.raises(UserError, match="--test-images 1 is less than one for each of the 2 classes"):
        split(images, None, None, Shares(2, test_images=1), 0)
    with pytest.raises(UserError, match="no class has two labelled images, of which one could be held out"):
        split(images, None, None, Shares(1, val_share=0.5), 0)


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
