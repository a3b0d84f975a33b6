import errno
import json
import os
import shutil
import stat
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from inference_support import CLASSES, PREPROCESSING, make_image, make_model, make_network
from network_support import library
from PIL import Image
from safetensors.torch import load_file, save_file

from talib_fast.errors import UsageError, UserError
from talib_fast.images.decoding import ImageError
from talib_fast.images.preprocessing import Preprocessing
from talib_fast.inference import model

MOBILENET = "torchvision:mobilenet_v2", "classifier.1"


@pytest.fixture
def kept(tmp_path):
    make_model(tmp_path / "kept")
    return tmp_path / "kept"


@pytest.fixture
def classifier(kept):
    return model.load(kept)


def edit(folder, **entries):
    config = json.loads((folder / model.CONFIG).read_text())
    (folder / model.CONFIG).write_text(json.dumps(config | entries))


def timm_config(network, head, preprocessing):
    """What is said of a network of timm's with two classes."""
    named = {"library": "timm", "network": f"timm:{network}", "head": head}
    return named | {"num_classes": 2, "classes": ["a", "b"], "preprocessing": preprocessing}


class TestOtherLibrariesLoadIt:
    @pytest.mark.parametrize(
        "network",
        [("timm:test_resnet.r160_in1k", "fc"), ("timm:test_efficientnet", "classifier"), ("timm:test_vit", "head")],
        ids=lambda network: network[0],
    )
    def test_timm_with_logits_and_preprocessing(self, tmp_path, network):
        timm = library("timm")
        preprocessing = replace(PREPROCESSING, size=160)
        net = make_model(tmp_path / "kept", network, preprocessing=preprocessing)
        loaded = timm.create_model(f"local-dir:{tmp_path / 'kept'}", pretrained=True).eval()
        image = make_image(width=300, height=200)
        transform = timm.data.create_transform(**timm.data.resolve_model_data_config(loaded))
        with torch.no_grad():
            images = transform(image)[None]
            logits = loaded(images)
            torch.testing.assert_close(logits, net(images), rtol=0, atol=0)
        assert tuple(loaded.pretrained_cfg["label_names"]) == CLASSES
        (prediction,) = model.load(tmp_path / "kept").predict(image)
        torch.testing.assert_close(prediction.probabilities, logits.softmax(1)[0])

    def test_torchvision_strictly(self, tmp_path):
        net = make_model(tmp_path / "kept", MOBILENET)
        other = make_network(MOBILENET[0], len(CLASSES)).eval()
        other.load_state_dict(load_file(tmp_path / "kept" / model.WEIGHTS), strict=True)
        x = torch.randn(2, 3, 64, 64)
        torch.testing.assert_close(other(x), net(x), rtol=0, atol=0)

    def test_timm_is_told_nothing_where_its_head_is_elsewhere(self, tmp_path):
        config = timm_config("test_resnet", "other", {"size": 64})
        assert model.timm_entries(config) == {}

    def test_timm_builds_networks_of_another_image_size(self, tmp_path):
        timm = library("timm")
        net = timm.create_model("test_vit", num_classes=2, img_size=96).eval()
        model.save(tmp_path / "kept", net.state_dict(), timm_config("test_vit", "head", asdict(Preprocessing(96))))
        loaded = timm.create_model(f"local-dir:{tmp_path / 'kept'}", pretrained=True).eval()
        x = torch.randn(2, 3, 96, 96)
        torch.testing.assert_close(loaded(x), net(x), rtol=0, atol=0)


class TestSave:
    def test_whole_and_readable_by_others(self, kept):
        assert sorted(path.name for path in kept.iterdir()) == [model.CONFIG, model.WEIGHTS]
        assert [path.name for path in kept.parent.iterdir()] == ["kept"]
        modes = {path.name: path.stat().st_mode for path in kept.iterdir()}
        assert modes[model.CONFIG] == modes[model.WEIGHTS]
        assert "Äpfel" in (kept / model.CONFIG).read_text(encoding="utf-8")

    def test_replaces_a_model_and_keeps_other_files(self, kept):
        (kept / "notes.txt").write_text("mine")
        make_model(kept, method="delta")
        assert model.load(kept).config["method"] == "delta"
        assert (kept / "notes.txt").read_text() == "mine"
        assert [path.name for path in kept.parent.iterdir()] == ["kept"]

    def test_leaves_what_is_no_model(self, tmp_path):
        (tmp_path / "photos").mkdir()
        (tmp_path / "photos" / "1.jpg").write_bytes(b"x")
        with pytest.raises(UserError, match="photos exists already and holds no model"):
            make_model(tmp_path / "photos")
        assert [path.name for path in tmp_path.rglob("*")] == ["photos", "1.jpg"]

    @pytest.mark.parametrize("name", ["fsync", "rename"])
    def test_a_failure_leaves_the_old_one(self, kept, monkeypatch, name):
        rename = Path.rename

        def fail(*arguments):
            if name == "rename" and not str(arguments[1]).endswith("kept"):
                return rename(*arguments)
            monkeypatch.undo()
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os if name == "fsync" else Path, name, fail)
        with pytest.raises(OSError, match=r"No space left on device: .*kept"):
            make_model(kept, method="delta")
        assert model.load(kept).config["method"] == "bss"
        assert [path.name for path in kept.parent.iterdir()] == ["kept"]

    def test_a_file_system_that_cannot_synchronize_folders(self, tmp_path, monkeypatch):
        fsync = os.fsync

        def refuse(descriptor):
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                raise OSError(errno.EINVAL, "Invalid argument")
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", refuse)
        make_model(tmp_path / "kept")
        assert model.load(tmp_path / "kept").classes == CLASSES

    def test_a_place_that_is_no_folder(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(OSError, match=r"file/kept"):
            make_model(tmp_path / "file" / "kept")


class TestFind:
    def test_the_only_one_in_an_output_folder(self, tmp_path):
        make_model(tmp_path / "out" / "models" / "bss-seed0")
        (tmp_path / "out" / "models" / ".unfinished").mkdir()
        (tmp_path / "out" / "models" / ".unfinished" / model.CONFIG).touch()
        for place in ("out", "out/models", "out/models/bss-seed0"):
            assert model.find(tmp_path / place) == tmp_path / "out" / "models" / "bss-seed0"
        assert model.load(tmp_path / "out").classes == CLASSES

    def test_several_are_listed(self, tmp_path):
        for name in ("b", "a"):
            (tmp_path / "models" / name).mkdir(parents=True)
            (tmp_path / "models" / name / model.CONFIG).touch()
        with pytest.raises(UsageError, match=r"holds 2 models: name one of \S*/models/a, \S*/models/b$"):
            model.find(tmp_path)

    def test_none(self, tmp_path):
        with pytest.raises(
            UsageError, match=r"holds no model \(a folder with a config.json\): name the folder of a model"
        ):
            model.find(tmp_path)
        with pytest.raises(UsageError, match="there is no folder nowhere: name"):
            model.find("nowhere")


class TestLoad:
    @pytest.mark.parametrize(
        ("entries", "message"),
        [
            (
                {"format": 2},
                r"config.json has format 2, but this talib_fast reads formats up to 1: update talib_fast",
            ),
            ({"format": "x"}, r"is damaged \(format is wrong\)"),
            ({"network": None}, r"is damaged \(network is wrong\)"),
            ({"classes": ["a", "a", "b", "c"]}, r"is damaged \(the classes are not distinct names\)"),
            ({"classes": []}, r"is damaged \(the classes are not distinct names\)"),
            ({"classes": ["a", "b"]}, r"is damaged \(it names 2 classes, but num_classes is 4\)"),
            ({"classes": ["a", "b"], "num_classes": 2}, r"is damaged \(the head has 4 outputs for 2 classes\): copy"),
            ({"preprocessing": {}}, r"is damaged \(the preprocessing is missing or wrong\)"),
            ({"preprocessing": None}, r"is damaged \(the preprocessing is missing or wrong\)"),
            (
                {"network": "timm:test_vit", "head": "head"},
                "cannot be loaded: .* have no head head: fine-tune",
            ),
        ],
        ids=str,
    )
    def test_a_config_that_is_wrong(self, kept, entries, message):
        edit(kept, **entries)
        with pytest.raises(UserError, match=message):
            model.load(kept)

    @pytest.mark.parametrize("key", ["size", "mean", "std", "interpolation", "crop_pct", "crop_mode", "other"])
    def test_a_preprocessing_that_is_wrong(self, kept, key):
        preprocessing = json.loads((kept / model.CONFIG).read_text())["preprocessing"]
        edit(kept, preprocessing=preprocessing | {key: [1.0] if key in ("mean", "std") else -1})
        with pytest.raises(UserError, match="the preprocessing is missing or wrong"):
            model.load(kept)

    def test_an_entry_that_is_missing(self, kept):
        config = json.loads((kept / model.CONFIG).read_text())
        del config["head"]
        (kept / model.CONFIG).write_text(json.dumps(config))
        with pytest.raises(UserError, match=r"is damaged \(head is missing\)"):
            model.load(kept)

    @pytest.mark.parametrize("text", ["{", "", "\xff"])
    def test_a_config_that_is_no_json(self, kept, text):
        (kept / model.CONFIG).write_bytes(text.encode("latin-1"))
        with pytest.raises(UserError, match=r"config.json is damaged \(.*\): copy the model's folder again, or train"):
            model.load(kept)

    @pytest.mark.parametrize("content", ["[]", '{"model_type": "bert"}'])
    def test_somebody_elses_config(self, kept, content):
        (kept / model.CONFIG).write_text(content)
        with pytest.raises(UserError, match="does not describe a model of talib_fast: name"):
            model.load(kept)

    def test_weights_that_are_missing_or_damaged(self, kept):
        content = (kept / model.WEIGHTS).read_bytes()
        (kept / model.WEIGHTS).write_bytes(content[: len(content) // 2])
        with pytest.raises(UserError, match=r"model.safetensors is damaged \(.*\): copy"):
            model.load(kept)
        (kept / model.WEIGHTS).unlink()
        with pytest.raises(UserError, match=r"model.safetensors is damaged \(No such file or directory.*\): copy"):
            model.load(kept)

    def test_weights_that_lack_one(self, kept):
        state = load_file(kept / model.WEIGHTS)
        del state["conv1.0.weight"]
        save_file(state, kept / model.WEIGHTS)
        with pytest.raises(UserError, match="kept cannot be loaded"):
            model.load(kept)

    def test_a_device_that_is_not_there(self, kept):
        with pytest.raises(UsageError, match="the device fast cannot be used"):
            model.load(kept, "fast")
        assert model.load(kept, "auto").device.type in ("cpu", "cuda")

    def test_a_moved_folder(self, kept, tmp_path):
        shutil.move(kept, tmp_path / "elsewhere")
        assert model.load(str(tmp_path / "elsewhere")).classes == CLASSES


class TestPredict:
    def test_every_kind_of_image_gives_the_same(self, classifier, tmp_path):
        image = make_image()
        image.save(tmp_path / "image.png")
        array = np.asarray(image)
        tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
        (right,) = classifier.predict(image)
        kinds = [tmp_path / "image.png", str(tmp_path / "image.png"), image, array, array[:, ::1], tensor]
        for given in (*kinds, tensor[None], kinds[:1], (kind for kind in kinds[:1])):
            (found,) = classifier.predict(given)
            assert torch.equal(found.probabilities, right.probabilities)
        assert len(classifier.predict(kinds)) == len(kinds)
        assert torch.equal(torch.from_numpy(array.copy()).permute(2, 0, 1), tensor)

    def test_probabilities_labels_and_the_top(self, classifier):
        (prediction,) = classifier.predict(make_image())
        with torch.no_grad():
            pixels = PREPROCESSING.normalize(PREPROCESSING(make_image())[None])
            right = classifier.module(pixels).softmax(1)[0]
        torch.testing.assert_close(prediction.probabilities, right)
        assert prediction.label == CLASSES[right.argmax()]
        assert prediction.probability == pytest.approx(right.max().item())
        assert [label for label, _ in prediction.top(9)] == [CLASSES[place] for place in right.argsort(descending=True)]
        assert prediction.top(2)[0] == (prediction.label, prediction.probability)
        assert len(prediction.top(2)) == 2
        with pytest.raises(ValueError, match="expected k of at least 1, got 0"):
            prediction.top(0)

    def test_batches_of_any_size(self, classifier):
        images = [make_image(seed, 60 + seed, 80) for seed in range(7)]
        right = torch.stack([prediction.probabilities for prediction in classifier.predict(images)])
        for batch_size in (1, 3, 7):
            found = classifier.predict(iter(images), batch_size=batch_size)
            torch.testing.assert_close(torch.stack([prediction.probabilities for prediction in found]), right)
        assert classifier.predict([]) == []
        with pytest.raises(ValueError, match="expected a batch_size of at least 1, got 0"):
            classifier.predict(images, batch_size=0)

    def test_grey_and_transparent_images(self, classifier):
        grey = make_image().convert("L")
        (right,) = classifier.predict(grey.convert("RGB"))
        for given in (grey, np.asarray(grey)):
            assert torch.equal(classifier.predict(given)[0].probabilities, right.probabilities)
        clear = Image.new("RGBA", (80, 80), (255, 0, 0, 0))
        (right,) = classifier.predict(Image.new("RGB", (80, 80), "white"))
        assert torch.equal(classifier.predict(clear)[0].probabilities, right.probabilities)

    def test_leaves_the_callers_state(self, classifier):
        classifier.module.train()  # would change the running statistics
        state = {name: tensor.clone() for name, tensor in classifier.module.state_dict().items()}
        random = torch.get_rng_state()
        (prediction,) = classifier.predict(make_image())
        assert torch.is_grad_enabled() and not prediction.probabilities.is_inference()
        assert torch.equal(torch.get_rng_state(), random)
        assert not classifier.module.training
        for name, tensor in classifier.module.state_dict().items():
            assert torch.equal(tensor, state[name])

    @pytest.mark.parametrize(
        ("images", "error", "message"),
        [
            (5, TypeError, "images: expected a path, .*, got int"),
            (b"x", TypeError, "got bytes"),
            ([make_image(), None], TypeError, r"images\[1\]: expected .* got NoneType"),
            (torch.zeros(3, 8, 8), TypeError, r"got tensor \[3, 8, 8\] of float32"),
            (torch.zeros(2, 3, 8, 8), TypeError, r"images: .* got tensor \[2, 3, 8, 8\] of float32"),
            (torch.zeros(8, 8, 3, dtype=torch.uint8), ValueError, r"got tensor \[8, 8, 3\] of uint8"),
            (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), ValueError, r"got tensor \[2, 1, 8, 8\] of uint8"),
            (torch.zeros(3, 0, 8, dtype=torch.uint8), ValueError, r"got tensor \[3, 0, 8\]"),
            (np.zeros((8, 8, 3)), TypeError, r"got array \[8, 8, 3\] of float64"),
            (np.zeros((2, 8, 8, 3), np.uint8), ValueError, r"got array \[2, 8, 8, 3\] of uint8"),
            (Image.new("F", (8, 8)), ValueError, "images: it has 32 bits per pixel"),
        ],
        ids=lambda value: "" if not isinstance(value, str) else value[:20],
    )
    def test_what_is_no_image(self, classifier, images, error, message):
        with pytest.raises(error, match=message):
            classifier.predict(images)

    def test_a_file_that_is_no_image(self, classifier, tmp_path):
        (tmp_path / "notes.jpg").write_text("no image")
        with pytest.raises(ImageError, match=r"notes\.jpg cannot be read as an image"):
            classifier.predict(tmp_path / "notes.jpg")

    def test_logits_of_prepared_images(self, classifier):
        assert classifier.logits(torch.zeros(2, 3, 64, 64, dtype=torch.uint8)).shape == (2, 4)
        assert classifier.logits(torch.zeros(0, 3, 64, 64, dtype=torch.uint8)).shape == (0, 4)
        expected = r"expected uint8 images \[B, 3, 64, 64\], got tensor \[1, 3, 32, 32\] of uint8"
        with pytest.raises(ValueError, match=expected):
            classifier.logits(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))

    def test_on_any_device(self, kept, device):
        right = model.load(kept).predict(make_image())
        found = model.load(kept, device).predict(make_image())
        torch.testing.assert_close(found[0].probabilities, right[0].probabilities, rtol=1e-3, atol=1e-4)
