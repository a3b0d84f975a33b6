import math
import sys

import pytest
from PIL import Image

from talib_fast.training import report
from talib_fast.training.options import RECIPES


def make_results(methods, seeds, device="cpu", data="sample"):
    runs = [
        {
            "method": method,
            "seed": seed,
            "accuracy": 70.0 + seed + place,
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
        "data": data,
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
        "settings": settings,
        "runs": runs,
    }


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
    assert caption.startswith("mobilenet_v2 on photos/birds: 5 labels per class, 30 steps of 24 images, 64 pixels.")


@pytest.mark.parametrize(("methods", "seeds"), [(list(RECIPES), [0, 1, 2]), (["bss"], [7])])
def test_plots(tmp_path, methods, seeds):
    results = make_results(methods, seeds, data="photos/birds")
    report.write(results, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["accuracy.png", "curves.png", "table.md"]
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
    report.write(make_results(["plain"], [0]), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["table.md"]
    assert "pip install matplotlib" in capsys.readouterr().out


def test_methods_have_colours_of_their_own():
    assert len({report.method_colour(method) for method in RECIPES}) == len(RECIPES)


def test_moving_average():
    assert report.moving_average([1, 2, 3, 6], 2) == [1, 1.5, 2.5, 4.5]
