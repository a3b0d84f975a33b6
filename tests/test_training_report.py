import math
import sys
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from talib_fast.images.imageset import ImageSet
from talib_fast.inference.output import write_csv
from talib_fast.training import report
from talib_fast.training.recipes import RECIPES
from talib_fast.training.results import predictions_file


def make_results(methods, seeds, device="cpu", data="the built-in sample of MNIST digits"):
    runs = [
        {
            "method": method,
            "seed": seed,
            "accuracy": 70.0 + seed + place,
            "train_images": 50,
            "val_images": 0,
            "test_images": 1234,
            "model": None,
            "seconds_per_step": 0.1 * (seed + 1),
            "preparation_seconds": 3.0 if method == "delta_attention" else 0.01,
            "peak_mib": 500.0 + seed,
            "losses": [3.0 / (step + 1) for step in range(30)],
            "cross_entropies": [2.0 / (step + 1) for step in range(30)],
            "accuracies": [[10, 50.0], [20, 60.0], [30, 70.0 + seed + place]],
        }
        for place, method in enumerate(methods)
        for seed in seeds
    ]
    settings = {
        "network": "mobilenet_v2",
        "labels_per_class": 5,
        "steps": 30,
        "batch_size": 24,
        "image_size": 64,
        "device": device,
    }
    return {
        "command": "python -m talib_fast finetune",
        "device": device,
        "talib_fast": "1",
        "torch": "2",
        "python": "3",
        "data": {"name": data, "classes": ["a", "b"], "ignored": [], "duplicate": []},
        "settings": settings,
        "runs": runs,
    }


def no_images(seed):
    return ImageSet(("a", "b"), torch.tensor([0]), ("0.png",), lambda index, size: Image.new("RGB", (9, 9)))


def test_rows_hold_mean_and_sample_deviation():
    (row,) = report.rows(make_results(["plain"], [0, 1, 3])["runs"])
    assert row.mean == pytest.approx(71 + 1 / 3)
    assert row.deviation == pytest.approx(math.sqrt(sum((x - 4 / 3) ** 2 for x in (0, 1, 3)) / 2))
    assert row.seconds_per_step == pytest.approx(0.2) and row.peak_mib == 503
    assert row.cells() == ("plain", "71.3 ± 1.5", "3", "0.200", "-", "503")


def test_one_seed_shows_no_spread():
    results = make_results(["plain"], [2])
    (row,) = report.rows(results["runs"])
    assert row.deviation is None and row.cells()[1] == "72.0"
    assert "±" not in report.text(results) + report.markdown(results)
    assert "One seed: differences of a few points are noise." in report.text(results)
    several = make_results(["plain"], [0, 1])
    assert "mean ± sample standard deviation over seeds" in report.text(several)


def test_rows_come_in_the_usual_order():
    assert [row.method for row in report.rows(make_results(["bss", "plain"], [0])["runs"])] == ["plain", "bss"]


def test_a_combination_has_one_row_whatever_its_order():
    runs = make_results(["stochnorm+bss", "plain", "lwf+bss"], [0])["runs"]
    runs += make_results(["bss+stochnorm"], [1])["runs"]
    table = report.rows(runs)
    assert [row.method for row in table] == ["plain", "stochnorm+bss", "lwf+bss"] and len(table[1].accuracies) == 2


def test_text_is_aligned():
    lines = report.text(make_results(["plain", "delta_attention"], [0, 1])).splitlines()
    table = [line for line in lines if line][:4]
    assert len({len(line) for line in table}) == 1
    assert table[0].split() == ["method", "accuracy,", "%", "seeds", "s/step", "preparation,", "s", "peak", "MiB"]
    assert "3.0" in table[3]


def test_markdown_is_a_table_with_its_command():
    text = report.markdown(make_results(["plain", "l2"], [0, 1]))
    assert text.splitlines()[:3] == [
        "| method | accuracy, % | seeds | s/step | preparation, s | peak MiB |",
        "|---|---:|---:|---:|---:|---:|",
        "| plain | 70.5 ± 0.7 | 2 | 0.150 | - | 501 |",
    ]
    assert "`python -m talib_fast finetune` (cpu; talib_fast 1, torch 2, Python 3)" in text


@pytest.mark.parametrize(("device", "words"), [("cpu", "the whole process's"), ("cuda", "the GPU's")])
def test_caption_says_whose_memory(device, words):
    caption = report.caption(make_results(["plain"], [0], device, data="photos/birds"))
    assert caption.endswith(f"Peak memory: {words}.")
    assert caption.startswith("mobilenet_v2 on photos/birds: 5 labels per class, 30 steps of 24 images, 64 pixels. ")
    assert "Tested on 1,234 images." in caption


@pytest.mark.parametrize(("methods", "seeds"), [(list(RECIPES), [0, 1, 2]), (["bss"], [7])])
def test_plots(tmp_path, methods, seeds):
    results = make_results(methods, seeds, data="photos/birds")
    report.write(results, tmp_path, no_images)
    written = sorted(path.name for path in tmp_path.iterdir())
    assert written == ["accuracy.png", "curves.png", "report.html", "table.md"]
    for name in ("accuracy.png", "curves.png"):
        with Image.open(tmp_path / name) as image:
            assert image.width > 900 and len(image.convert("RGB").getcolors(10**6)) > 5
    axes = report.draw_accuracy(results).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == methods
    left, right = report.draw_curves(results).axes
    assert len(left.lines) == len(right.lines) == len(methods)
    last = right.lines[0].get_ydata()[-1]
    assert last == pytest.approx(70 + sum(seeds) / len(seeds))


def test_without_matplotlib_there_is_still_a_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report.write(make_results(["plain"], [0]), tmp_path, no_images)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "table.md"]
    assert "pip install matplotlib" in capsys.readouterr().out


def test_methods_have_colours_of_their_own():
    combined = ["bss+stochnorm", "lwf+bss"]
    colours = report.method_colours([*RECIPES, *combined])
    assert len({colours[method] for method in [*RECIPES, *combined]}) == len(RECIPES) + 2


class Page(HTMLParser):
    """What a page shows, and what it asks the network for."""

    def __init__(self, text):
        super().__init__()
        self.words, self.tags, self.sources = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        self.words.append(data)


def page(results, folder, images):
    report.write(results, folder, lambda seed: images)
    return Page((folder / "report.html").read_text())


def test_the_page_has_all_of_it_and_asks_for_nothing_else(tmp_path):
    results = make_results(["plain", "bss+stochnorm"], [0, 1], data="photos/<birds>")
    results["runs"][3]["model"] = "models/bss+stochnorm-seed1"
    results["data"] |= {"duplicate": ["x.png = <y>.png"], "classes": ["<b>owl</b>", "tit"]}
    labels = torch.tensor([0, 0, 0, 1])
    names = tuple(f"{number}.png" for number in range(4))
    images = ImageSet(("<b>owl</b>", "tit"), labels, names, lambda index, size: Image.new("RGB", (9, 9)))
    rows = [(name, images.classes[label], "tit", "0.75") for name, label in zip(names, labels, strict=True)]
    header = ("file", "class", "predicted", "probability")
    write_csv(predictions_file(tmp_path, results["runs"][3]), header, rows)
    shown = page(results, tmp_path, images)
    text = " ".join(" ".join(shown.words).split())
    for words in (
        "The best run: bss+stochnorm, seed 1",
        "72.0 % of 1,234 test images are right (95 % interval 4.6 to 69.9 %); the mean over the classes is 50.0 %",
        "It was chosen by the test images themselves, so this figure is too high.",
        "models/bss+stochnorm-seed1",
        "<b>owl</b> 3 0.0 - 0.0",
        "tit 1 100.0 25.0 40.0",
        "Files with the same content in one class: 1 x.png = <y>.png",
        "python -m talib_fast finetune",
    ):
        assert words in text
    assert "b" not in shown.tags  # names are text
    assert shown.tags.count("img") == 4 and all(source.startswith("data:image/") for source in shown.sources)


def test_the_page_without_predictions_or_of_other_images(tmp_path):
    results = make_results(["plain"], [0])
    images = no_images(0)
    assert "Figures of each class" not in page(results, tmp_path, images).words
    rows = [("0.png", "b", "a", "1")]
    write_csv(predictions_file(tmp_path, results["runs"][0]), ("file", "class", "predicted", "probability"), rows)
    shown = page(results, tmp_path, images)
    assert "Figures of each class" not in shown.words and shown.tags.count("img") == 2
    assert "No file was left out, and no image is there twice." in shown.words


def test_moving_average():
    assert report.moving_average([1, 2, 3, 6], 2) == [1, 1.5, 2.5, 4.5]
