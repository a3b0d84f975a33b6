import math
import sys
from html.parser import HTMLParser

import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image
from test_training_trial_report import halved, trial, tuned

from talib_fast.images.imageset import ImageSet
from talib_fast.inference.output import write_csv
from talib_fast.training import report, trial_report
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
            "seconds": [1.0 + seed, 2.0 + seed, 3.0 + seed],
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
        "lr": 0.02,
        "tune": None,
        "candidates": None,
    }
    return {
        "command": "python -m talib_fast finetune",
        "device": device,
        "talib_fast": "1",
        "torch": "2",
        "python": "3",
        "data": {"name": data, "classes": ["a", "b"], "ignored": [], "duplicate": []},
        "settings": settings,
        "trials": [],
        "runs": runs,
    }


def add_trials(results, searched):
    results["trials"] = searched["trials"]
    results["settings"] |= searched["settings"]


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
    left, middle, right = report.draw_curves(results).axes
    assert len(left.lines) == len(middle.lines) == len(right.lines) == len(methods)
    mean = sum(seeds) / len(seeds)
    assert list(middle.lines[0].get_ydata()) == list(right.lines[0].get_ydata()) == [50, 60, pytest.approx(70 + mean)]
    assert list(middle.lines[0].get_xdata()) == [10, 20, 30]
    assert right.lines[0].get_xdata() == pytest.approx([1 + mean, 2 + mean, 3 + mean])


def test_without_matplotlib_there_is_still_a_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    results = make_results(["plain"], [0])
    add_trials(results, tuned())
    report.write(results, tmp_path, no_images)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "table.md"]
    assert "pip install matplotlib" in capsys.readouterr().out


@pytest.mark.parametrize("made", [tuned, halved])
def test_trials_have_a_table_and_a_plot_of_their_own(tmp_path, made):
    results = make_results(["plain", "l2_sp"], [0])
    add_trials(results, made())
    report.write(results, tmp_path, no_images)
    written = {path.name for path in tmp_path.iterdir()}
    assert {*written, "results.json"} == set(report.files(results))  # the experiment writes that one
    assert "trials.png" in report.files(results)
    shown = Page((tmp_path / "report.html").read_text())
    assert shown.tags.count("img") == 3
    assert [section.title for section in report.sections(results)] == [
        "Accuracy by method",
        trial_report.section(results).title,
    ]


def test_files_are_those_that_can_be_drawn(monkeypatch):
    results = make_results(["plain"], [0])
    assert report.files(results) == ["report.html", "results.json", "table.md", "accuracy.png", "curves.png"]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert report.files(results) == ["report.html", "results.json", "table.md"]


def gaining(**points):
    """Runs that gain so many points over plain fine-tuning, by seed."""
    results = make_results(["plain", *points], [0, 1, 2])
    for run in results["runs"]:
        gained = points.get(run["method"], [0, 0, 0])[run["seed"]]
        run["accuracy"] = 50.0 + 10 * run["seed"] + gained
    return results


def test_gains_over_plain_are_bold_where_the_corrected_interval_leaves_out_zero():
    # 4.303 / √3 = 2.48; of two comparisons 6.205 / √3 = 3.58
    section = report.gains(gaining(l2=[5, 6, 7], bss=[2, 3, 4])["runs"])
    assert section.rows == [("l2", "+6.0 ± 3.6", "+3.5 to +8.5", "3"), ("bss", "+3.0 ± 3.6", "+0.5 to +5.5", "3")]
    assert section.bold == {(0, 1)} and len(section.findings) == 2
    lines = section.markdown().splitlines()
    assert lines[1:4] == [
        "|---|---:|---:|---:|",
        "| l2 | **+6.0 ± 3.6** | +3.5 to +8.5 | 3 |",
        "| bss | +3.0 ± 3.6 | +0.5 to +5.5 | 3 |",
    ]
    assert lines[-2:] == [f"- {finding}" for finding in section.findings]


def test_the_page_has_the_same_gains_in_bold(tmp_path):
    report.write(gaining(l2=[5, 6, 7], bss=[2, 3, 4]), tmp_path, no_images)
    shown = Page((tmp_path / "report.html").read_text())
    assert shown.tags.count("strong") == 1
    assert shown.words.count("+6.0 ± 3.6") == shown.words.count("+3.0 ± 3.6") == 1


def test_a_gain_with_one_seed_has_no_interval():
    results = gaining(l2=[5, 6, 7], bss=[2, 3, 4], delta=[1, 1, 1])
    runs = [run for run in results["runs"] if run["method"] in ("plain", "l2") or run["seed"] == 1]
    assert report.gains(runs).rows[1:] == [("delta", "+1.0", "-", "1"), ("bss", "+3.0", "-", "1")]
    runs = [run for run in runs if run["method"] != "plain" or run["seed"] != 1]
    assert report.gains(runs).rows[1:] == [("delta", "-", "-", "0"), ("bss", "-", "-", "0")]


@pytest.mark.parametrize(("methods", "seeds"), [(["l2", "bss"], [0, 1]), (["plain"], [0, 1]), (["plain", "l2"], [0])])
def test_no_gains_without_plain_another_method_and_two_seeds(methods, seeds):
    assert report.gains(make_results(methods, seeds)["runs"]) is None


def chosen(results):
    found = report.choice(results)
    return found.heading, found.run["method"], found.reason


def test_nothing_chooses_without_validation_images():
    heading, method, reason = chosen(make_results(["plain", "bss"], [0]))
    assert (heading, method) == ("The first run", "plain")
    assert (
        reason
        == "There are no validation images that could choose the best run (--tune or --method auto would choose)."
    )


def test_a_single_run_is_no_choice():
    assert chosen(make_results(["bss"], [0])) == ("The run", "bss", "")


def test_validation_images_choose():
    results = make_results(["plain", "bss", "l2"], [0])
    for run, accuracy in zip(results["runs"], (60.0, 80.0, 70.0), strict=True):
        run |= {"val_images": 1000, "val_accuracy": accuracy}
    reason = "It was chosen because it reached 80.0 % of 1,000 validation images."
    assert chosen(results) == ("The best run", "bss", reason)


def test_trials_choose():
    results = make_results(["plain", "bss", "l2"], [0])
    results["trials"] = [trial("plain", 0, 60), trial("bss", 0, 80), trial("l2", 0, 90, state="pruned")]
    reason = "Trials chose the method and the settings, which reached 80.0 % of 100 validation images."
    whole = " The model was then trained on all labelled images."
    assert chosen(results) == ("The best run", "bss", reason + whole)
    for run in results["runs"]:
        run |= {"val_images": 10, "val_accuracy": 50.0}
    assert chosen(results) == ("The best run", "bss", reason)


@pytest.mark.parametrize(("methods", "heading"), [(["plain"], "The run"), (["plain", "l2"], "The first run")])
def test_the_chosen_methods_run_may_be_missing(methods, heading):
    results = make_results(methods, [0])
    results["trials"] = [trial("bss", 0, 80)]
    assert chosen(results) == (heading, "plain", "Trials chose bss, but no run of it is finished.")


def test_methods_have_colours_of_their_own():
    methods = [*RECIPES, *(f"combination {number}" for number in range(len(report.COMBINED)))]
    colours = report.method_colours(methods)
    assert len({to_rgb(colours[method]) for method in methods}) == len(methods)


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
    results["runs"][0]["model"] = "models/plain-seed0"
    results["data"] |= {"duplicate": ["x.png = <y>.png"], "classes": ["<b>owl</b>", "tit"]}
    labels = torch.tensor([0, 0, 0, 1])
    names = tuple(f"{number}.png" for number in range(4))
    images = ImageSet(("<b>owl</b>", "tit"), labels, names, lambda index, size: Image.new("RGB", (9, 9)))
    rows = [(name, images.classes[label], "tit", "0.75") for name, label in zip(names, labels, strict=True)]
    header = ("file", "class", "predicted", "probability")
    write_csv(predictions_file(tmp_path, results["runs"][0]), header, rows)
    shown = page(results, tmp_path, images)
    text = " ".join(" ".join(shown.words).split())
    for words in (
        "The first run: plain, seed 0",
        "70.0 % of 1,234 test images are predicted right (95 % interval 4.6 to 69.9 %); "
        "the mean over the classes (balanced accuracy) is 50.0 %",
        "models/plain-seed0",
        "<b>owl</b> 3 0.0 - 0.0",
        "tit 1 100.0 25.0 40.0",
        "Files with the same content in the same class: 1 x.png = <y>.png",
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
    assert "No file was left out, and no image occurs twice." in shown.words


def test_moving_average():
    assert report.moving_average([1, 2, 3, 6], 2) == [1, 1.5, 2.5, 4.5]
