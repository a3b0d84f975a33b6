import argparse
import csv
import importlib.util
import json
import os
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from inference_support import CLASSES, PREPROCESSING, make_image, make_images, make_model
from network_support import library
from PIL import Image

from talib_fast.errors import UsageError, UserError
from talib_fast.inference import evaluate, export, model, predict

SIX = ("a", "b", "c", "d", "e", "unseen")


def run(command, *arguments):
    """What ``python -m talib_fast COMMAND ...`` returns; options of decoding are for few images."""
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    loading = [] if command is export else ["--workers", "0", "--device", "cpu"]
    return command.run(parser.parse_args([*map(str, arguments), *loading]))


@pytest.fixture
def kept(tmp_path):
    make_model(tmp_path / "kept")
    return tmp_path / "kept"


@pytest.fixture
def images(tmp_path):
    make_images(tmp_path / "images", ("x", "y/deep"), each=2)
    return tmp_path / "images"


def read_csv(path):
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        return list(csv.reader(file))


class TestPredict:
    def test_a_line_for_every_image(self, kept, images, capsys):
        make_image(9).save(images / "single.png")
        assert run(predict, kept, images / "single.png", images) == 0
        lines = capsys.readouterr().out.splitlines()
        paths = [images / name for name in ("single.png", "single.png", "x/0.png", "x/1.png", "y/deep/0.png")]
        assert len(lines) == 6 and len({line.rindex("%") for line in lines}) == 1
        for line, path in zip(lines, paths, strict=False):
            (right,) = model.load(kept).predict(path)
            assert line.split() == [str(path), right.label, f"{100 * right.probability:.1f}", "%"]

    @pytest.mark.parametrize("top", [2, 9])
    def test_the_top_classes_in_csv(self, kept, images, tmp_path, capsys, top):
        assert run(predict, kept, images, "--top", top, "--csv", tmp_path / "new" / "out.csv") == 0
        header, *rows = read_csv(tmp_path / "new" / "out.csv")
        shown = min(top, 4)
        assert header[:3] == ["file", "class", "probability"] and len(header) == 1 + 2 * shown
        assert header[3:5] == ["class_2", "probability_2"]
        assert len(rows) == len(capsys.readouterr().out.splitlines()) == 4
        for name, *cells in rows:
            (right,) = model.load(kept).predict(name)
            labels, probabilities = zip(*right.top(shown), strict=True)
            assert tuple(cells[::2]) == labels
            assert [float(cell) for cell in cells[1::2]] == pytest.approx(probabilities, rel=1e-4)

    def test_csv_on_standard_output_alone(self, kept, images, capfdbinary):
        assert run(predict, kept, images, "--csv", "-") == 0
        output = capfdbinary.readouterr().out.decode().splitlines()
        assert output[0] == "file,class,probability" and len(output) == 5

    def test_names_of_any_bytes(self, kept, tmp_path, capsys):
        folder = tmp_path / "images"
        folder.mkdir()
        make_image().save(folder / "1.png")
        for name in (b"caf\xe9.png", b"two\nlines.png"):
            os.link(folder / "1.png", os.fsencode(folder) + b"/" + name)
        assert run(predict, kept, folder, "--csv", tmp_path / "out.csv") == 0
        output = capsys.readouterr().out
        assert len(output.encode().splitlines()) == 3
        assert r"caf\xe9.png" in output and r"two\nlines.png" in output
        names = {os.path.basename(os.fsencode(row[0])) for row in read_csv(tmp_path / "out.csv")[1:]}
        assert names == {b"1.png", b"caf\xe9.png", b"two\nlines.png"}

    def test_damaged_images_are_told_and_the_others_predicted(self, kept, images, tmp_path, capsys):
        (images / "x" / "0.png").write_bytes((images / "x" / "1.png").read_bytes()[:200])
        (images / "x" / "notes.txt").touch()
        assert run(predict, kept, images, "--csv", tmp_path / "out.csv", "--batch-size", 1) == 1
        output, errors = capsys.readouterr()
        assert len(output.splitlines()) == 3 and len(read_csv(tmp_path / "out.csv")) == 4
        assert "1 of 4 images could not be read and is left out:" in errors
        assert f"  {images / 'x' / '0.png'}: " in errors
        assert f"1 file without an image suffix ignored: {images / 'x' / 'notes.txt'}" in errors

    def test_decoding_processes_change_nothing(self, kept, images, capsys):
        parser = argparse.ArgumentParser()
        predict.add_arguments(parser)
        outputs = []
        for workers in ("0", "2"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of fork, from Python 3.12 on
                predict.run(parser.parse_args([str(kept), str(images), "--workers", workers, "--batch-size", "3"]))
            outputs.append(capsys.readouterr().out)
        assert outputs[0] == outputs[1]

    def test_wrong_use(self, kept, images, tmp_path):
        (tmp_path / "empty").mkdir()
        empty = r"there is no image in \S*/empty: name image files, or folders with .avif, .bmp"
        with pytest.raises(UsageError, match=empty):
            run(predict, kept, tmp_path / "empty")
        with pytest.raises(UsageError, match="there is no file or folder nowhere"):
            run(predict, kept, "nowhere")
        with pytest.raises(UsageError, match="is a folder, but --csv needs a file"):
            run(predict, kept, images, "--csv", tmp_path)
        with pytest.raises(UsageError, match="there is no folder nothing"):
            run(predict, "nothing", images)
        for option in ("--top", "--batch-size"):
            with pytest.raises(SystemExit):
                run(predict, kept, images, option, "0")

    def test_a_csv_that_cannot_be_written(self, kept, images):
        with pytest.raises(UsageError, match=r"nothing can be written to \S*kept/config.json"):
            run(predict, kept, images, "--csv", kept / "config.json" / "out.csv")


class TestEvaluate:
    @pytest.fixture
    def labelled(self, tmp_path):
        """A model of six classes, and images of five."""
        make_model(tmp_path / "out" / "models" / "bss-seed0", classes=SIX)
        make_images(tmp_path / "data", SIX[:5], each=4)
        return tmp_path

    def test_figures_against_scikit_learn(self, labelled, capsys):
        sklearn = library("sklearn.metrics")
        pytest.importorskip("matplotlib")
        assert run(evaluate, labelled / "out", labelled / "data", "--out", labelled / "evaluation") == 0
        rows = read_csv(labelled / "evaluation" / "predictions.csv")
        assert rows[0] == ["file", "class", "predicted", "probability"]
        true, predicted = [row[1] for row in rows[1:]], [row[2] for row in rows[1:]]
        classifier = model.load(labelled / "out")
        for name, label, guess, probability in rows[1:]:
            assert name.split("/")[0] == label
            (right,) = classifier.predict(labelled / "data" / name)
            assert (guess, float(probability)) == (right.label, pytest.approx(right.probability, rel=1e-4))
        found = json.loads((labelled / "evaluation" / "evaluation.json").read_text())
        assert found["images"] == 20 and found["left_out"] == {}
        assert found["accuracy_percent"] == pytest.approx(100 * sklearn.accuracy_score(true, predicted))
        recall = sklearn.recall_score(true, predicted, labels=SIX[:5], average=None, zero_division=0)
        assert found["balanced_accuracy_percent"] == pytest.approx(100 * np.mean(recall))
        assert [one["recall_percent"] for one in found["per_class"]] == [*(100 * recall).tolist(), None]
        assert found["confusion_matrix"] == sklearn.confusion_matrix(true, predicted, labels=SIX).tolist()
        ranked = [[label for label, _ in classifier.predict(labelled / "data" / row[0])[0].top(5)] for row in rows[1:]]
        top = sum(label in best for label, best in zip(true, ranked, strict=True)) / 20
        assert found["top_5_accuracy_percent"] == pytest.approx(100 * top)
        per_class = read_csv(labelled / "evaluation" / "per_class.csv")
        assert [row[:2] for row in per_class[1:]] == [[name, "0" if name == "unseen" else "4"] for name in SIX]
        assert per_class[6][2] == ""
        for name in ("confusion.png", "mistakes.png"):
            with Image.open(labelled / "evaluation" / name) as image:
                assert min(image.size) > 100
        output = capsys.readouterr().out
        low, high = found["accuracy_interval_95_percent"]
        assert f"{found['accuracy_percent']:.1f} % (95 % interval {low:.1f} to {high:.1f} %)" in output
        assert f"20 in {labelled / 'data'}" in output and "No images of 1 class: unseen" in output
        assert "top-5 accuracy" in output and "Most frequent confusions" in output
        assert "Written to" in output

    def test_the_test_part_of_a_split_folder(self, labelled, capsys):
        for part in ("train", "val", "test"):
            make_images(labelled / "split" / part, SIX[:3], each=1)
        assert run(evaluate, labelled / "out", labelled / "split") == 0
        output = capsys.readouterr().out
        assert "split consists of " in output and ": its test part is evaluated.\n" in output
        assert (
            f"3 in {labelled / 'split' / 'test'}" in output and "timm:test_resnet.r160_in1k, trained by bss" in output
        )
        (labelled / "split" / "test").rename(labelled / "elsewhere")
        with pytest.raises(
            UsageError, match=r"has train and val, but no folder test: name the folder of images itself, e.g. "
        ):
            run(evaluate, labelled / "out", labelled / "split")

    def test_a_folder_that_is_no_class(self, labelled):
        (labelled / "data" / "a").rename(labelled / "data" / "unsen")
        with pytest.raises(UsageError, match=r"unsen, .*unseen"):
            run(evaluate, labelled / "out", labelled / "data")

    def test_damaged_images_are_left_out_and_told_at_the_end(self, labelled, capsys):
        (labelled / "data" / "a" / "1.png").write_text("no image")
        (labelled / "data" / "a" / "notes.txt").touch()
        assert run(evaluate, labelled / "out", labelled / "data", "--out", labelled / "evaluation") == 1
        output, errors = capsys.readouterr()
        assert "19 in" in output and "1 of 20 images could not be read" in errors
        assert "1 file without an image suffix ignored" in errors
        found = json.loads((labelled / "evaluation" / "evaluation.json").read_text())
        assert found["images"] == 19 and found["left_out"] == {"a/1.png": "it has no known format"}
        for path in (labelled / "data").glob("*/*.png"):
            path.write_text("no image")
        with pytest.raises(UserError, match=r"none of the images in .* can be read"):
            run(evaluate, labelled / "out", labelled / "data")

    def test_the_record_does_not_depend_on_where_things_lie(self, labelled):
        run(evaluate, labelled / "out", labelled / "data", "--out", labelled / "one")
        (labelled / "data").rename(labelled / "other")
        run(evaluate, labelled / "out" / "models", labelled / "other", "--out", labelled / "two", "--batch-size", 3)
        for name in ("evaluation.json", "per_class.csv"):
            assert (labelled / "one" / name).read_text() == (labelled / "two" / name).read_text()

    def test_without_matplotlib(self, labelled, monkeypatch, capsys):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        assert run(evaluate, labelled / "out", labelled / "data", "--out", labelled / "evaluation") == 0
        assert "No plots are written, because matplotlib is missing: pip install matplotlib" in capsys.readouterr().err
        assert sorted(path.name for path in (labelled / "evaluation").iterdir()) == sorted(evaluate.FILES[:3])

    def test_few_classes_have_no_top_five(self, kept, tmp_path, capsys):
        make_images(tmp_path / "data", CLASSES[:3], each=1)
        assert run(evaluate, kept, tmp_path / "data") == 0
        assert "top-5" not in capsys.readouterr().out
        with pytest.raises(UsageError, match="is a file, but --out needs a folder"):
            run(evaluate, kept, tmp_path / "data", "--out", kept / "config.json")


NETWORKS = {
    "timm:test_vit": "head",
    "timm:test_efficientnet": "classifier",
    "timm:resnet18": "fc",
    "torchvision:mobilenet_v2": "classifier.1",
}


class TestExport:
    @pytest.mark.parametrize("name", NETWORKS)
    def test_onnx_as_others_run_it(self, tmp_path, capfd, name):
        onnxruntime = pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
        preprocessing = replace(PREPROCESSING, size=160 if "vit" in name else 64)
        make_model(tmp_path / "kept", (name, NETWORKS[name]), preprocessing=preprocessing)
        (tmp_path / "model.onnx").write_text("an old one")
        assert run(export, tmp_path / "kept", tmp_path / "model.onnx") == 0
        output, errors = capfd.readouterr()
        assert output.startswith(f"{tmp_path / 'model.onnx'}: ") and len(output.splitlines()) == 4 and errors == ""
        assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "model.onnx"]
        session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
        assert [entry.name for entry in session.get_inputs()] == ["images"]
        assert [entry.name for entry in session.get_outputs()] == ["logits"]
        metadata = session.get_modelmeta().custom_metadata_map
        assert tuple(json.loads(metadata["classes"])) == CLASSES
        settings = json.loads(metadata["preprocessing"])
        assert settings["size"] == preprocessing.size and settings["mean"] == list(preprocessing.mean)
        pixels = torch.randint(0, 256, (5, 3, settings["size"], settings["size"]), dtype=torch.uint8)
        mean, std = (np.array(settings[key], np.float32).reshape(3, 1, 1) for key in ("mean", "std"))
        (logits,) = session.run(None, {"images": (pixels.numpy().astype(np.float32) / 255 - mean) / std})
        right = model.load(tmp_path / "kept").logits(pixels)
        torch.testing.assert_close(torch.from_numpy(logits), right, rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("name", NETWORKS)
    def test_torch_export(self, tmp_path, capfd, name):
        preprocessing = replace(PREPROCESSING, size=160 if "vit" in name else 64)
        make_model(tmp_path / "kept", (name, NETWORKS[name]), preprocessing=preprocessing)
        assert run(export, tmp_path / "kept", tmp_path / "model.pt2") == 0
        output, errors = capfd.readouterr()
        assert "Checked by torch.export.load" in output and errors == ""
        files = {"classes": "", "preprocessing": ""}
        program = torch.export.load(tmp_path / "model.pt2", extra_files=files)
        assert tuple(json.loads(files["classes"])) == CLASSES
        pixels = torch.randint(0, 256, (5, 3, preprocessing.size, preprocessing.size), dtype=torch.uint8)
        right = model.load(tmp_path / "kept").logits(pixels)
        found = program.module()(preprocessing.normalize(pixels))
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
    def test_a_wrong_file_is_not_written(self, kept, monkeypatch, suffix):
        for package in ("onnxruntime", "onnxscript"):
            pytest.importorskip(package)
        target = kept.parent / f"model{suffix}"
        target.write_text("an old one")
        make = export.EXPORTERS[suffix]

        def make_wrong(classifier, name):
            exported = make(classifier, name)
            return replace(exported, compute=lambda images: exported.compute(images) + 1)

        monkeypatch.setitem(export.EXPORTERS, suffix, make_wrong)
        with pytest.raises(UserError, match=r"is not written: its logits of 1 images differ from the network's by 1"):
            run(export, kept, target)
        assert target.read_text() == "an old one"
        assert sorted(path.name for path in kept.parent.iterdir()) == ["kept", target.name]

    @pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
    def test_a_network_that_cannot_be_exported(self, kept, monkeypatch, suffix):
        for package in ("onnxruntime", "onnxscript"):
            pytest.importorskip(package)

        class Unexportable(torch.nn.Module):
            def forward(self, images):
                return images.flatten(1)[:, :4] if images.sum().item() > 0 else images.flatten(1)[:, 4:8]

        class Classifier(model.ImageClassifier):
            def __init__(self, module, config):
                super().__init__(Unexportable(), config)

        monkeypatch.setattr(model, "ImageClassifier", Classifier)
        with pytest.raises(UserError, match=r"cannot be exported \(.+\): choose another format"):
            run(export, kept, kept.parent / f"model{suffix}")
        assert [path.name for path in kept.parent.iterdir()] == ["kept"]

    def test_missing_packages(self, kept, monkeypatch):
        find_spec = importlib.util.find_spec
        missing = ("onnxscript", "onnxruntime")
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else find_spec(name))
        with pytest.raises(UserError, match=r"needs onnxscript and onnxruntime.*: pip install onnxscript onnxruntime$"):
            run(export, kept, kept.parent / "model.onnx")

    def test_wrong_use(self, kept):
        with pytest.raises(UsageError, match=r"model.pth does not end in .onnx or .pt2: choose one of these formats"):
            run(export, kept, "model.pth")
        (kept.parent / "folder.onnx").mkdir()
        with pytest.raises(UsageError, match="is a folder, but FILE needs a file"):
            run(export, kept, kept.parent / "folder.onnx")
