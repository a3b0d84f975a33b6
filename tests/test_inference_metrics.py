import itertools
import math

import pytest
import torch
from network_support import library
from PIL import Image

from talib_fast.inference import figures, metrics


def make_predictions(classes=6, images=200):
    labels = torch.randint(classes - 1, (images,))  # the last class has no images, but is predicted
    logits = torch.randn(images, classes) + 1.5 * torch.nn.functional.one_hot(labels, classes)
    logits[:, 0] -= 100  # the first class is never predicted
    return labels, logits


class TestAgainstScikitLearn:
    @pytest.fixture
    def sklearn(self):
        return library("sklearn.metrics")

    def test_the_matrix_and_the_accuracies(self, sklearn):
        labels, logits = make_predictions()
        predicted = logits.argmax(1)
        matrix = metrics.confusion(labels, predicted, 6)
        assert matrix.tolist() == sklearn.confusion_matrix(labels, predicted, labels=range(6)).tolist()
        assert metrics.accuracy(matrix) == pytest.approx(sklearn.accuracy_score(labels, predicted))
        with pytest.warns(UserWarning, match="y_pred contains classes"):
            right = sklearn.balanced_accuracy_score(labels, predicted)
        assert metrics.balanced_accuracy(matrix) == pytest.approx(right)

    def test_the_top_five(self, sklearn):
        labels, logits = make_predictions(12)
        right = sklearn.top_k_accuracy_score(labels, logits, k=5, labels=range(12))
        assert metrics.among_top(logits, labels, 5).float().mean().item() == pytest.approx(right)

    def test_each_class(self, sklearn):
        labels, logits = make_predictions()
        predicted = logits.argmax(1)
        precision, recall, f1, images = sklearn.precision_recall_fscore_support(
            labels, predicted, labels=range(6), zero_division=math.nan
        )
        found = metrics.per_class(metrics.confusion(labels, predicted, 6))
        assert [one.images for one in found] == images.tolist()
        for name, right in (("precision", precision), ("recall", recall), ("f1", f1)):
            values = [math.nan if getattr(one, name) is None else getattr(one, name) for one in found]
            assert values == pytest.approx(right.tolist(), nan_ok=True)
        assert found[0].precision is None and found[5].recall is None and found[5].f1 == 0


@pytest.mark.parametrize(  # statsmodels' proportion_confint(correct, total, method="wilson")
    ("correct", "total", "interval"),
    [(8, 10, (0.4901625, 0.9433178)), (0, 10, (0.0, 0.2775328)), (10, 10, (0.7224672, 1.0)), (1, 1, (0.2065493, 1.0))],
)
def test_wilsons_interval(correct, total, interval):
    assert metrics.wilson_interval(correct, total) == pytest.approx(interval, abs=2e-7)


def test_a_class_that_nothing_has_to_do_with():
    (_, other) = metrics.per_class(torch.tensor([[3, 0], [0, 0]]))
    assert other == metrics.ClassFigures(0, None, None, None)


def test_equal_logits_are_ranked_by_class():
    logits = torch.zeros(3, 8)
    assert metrics.among_top(logits, torch.tensor([0, 4, 5]), 5).tolist() == [True, True, False]


def test_the_most_frequent_confusions():
    matrix = torch.tensor([[9, 1, 4], [0, 9, 2], [0, 0, 9]])
    assert metrics.most_confused(matrix, 2) == [(0, 2, 4), (1, 2, 2)]
    assert metrics.most_confused(torch.eye(3, dtype=torch.int64), 2) == []


class TestFigures:
    @pytest.fixture(autouse=True)
    def _matplotlib(self):
        pytest.importorskip("matplotlib")

    @pytest.mark.parametrize("number", [2, 28, 81, 200])
    def test_labels_of_a_confusion_matrix_do_not_overlap(self, number):
        matrix = torch.diag(torch.randint(1, 999, (number,)))
        matrix[1] = 0  # no images
        classes = [f"Fruit/A-Name-That-Goes-On-And-On-{place}" for place in range(number)]
        figure = figures.draw_confusion(matrix, classes)
        figure.draw_without_rendering()
        for axis in (figure.axes[0].xaxis, figure.axes[0].yaxis):
            boxes = [label.get_window_extent() for label in axis.get_ticklabels() if label.get_text()]
            assert not any(one.overlaps(other) for one, other in itertools.pairwise(boxes))
            assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0 for box in boxes)
        numbers = figure.axes[0].texts
        assert all(text.get_fontsize() >= 5.5 for text in numbers)
        if number == 28:
            assert sorted(int(text.get_text()) for text in numbers) == sorted(matrix[matrix > 0].tolist())

    def test_many_classes_go_by_number(self):
        figure = figures.draw_confusion(torch.eye(201, dtype=torch.int64), [f"class {place}" for place in range(201)])
        figure.draw_without_rendering()
        assert not any("class" in label.get_text() for label in figure.axes[0].get_xticklabels())

    def test_colours_are_shares_of_the_rows(self):
        figure = figures.draw_confusion(torch.tensor([[3, 1], [0, 200]]), ["a", "b"])
        assert figure.axes[0].images[0].get_array().tolist() == [[75, 25], [0, 100]]

    @pytest.mark.parametrize(("number", "shown"), [(1, 1), (7, 7), (60, figures.MOST_MISTAKES)])
    def test_the_most_confident_mistakes(self, number, shown):
        images = [Image.new("L", (300, 20)), torch.zeros(3, 9, 90, dtype=torch.uint8)]
        mistakes = [(images[place % 2], f"true {place}", "$predicted$" * 9, place / 100) for place in range(number)]
        figure = figures.draw_mistakes(mistakes)
        figure.draw_without_rendering()
        captions = [axes.get_title(loc="left") for axes in figure.axes if axes.images]
        assert len(captions) == shown
        assert [caption.splitlines()[1] for caption in captions] == [
            f"is true {place}" for place in reversed(range(number - shown, number))
        ]
        boxes = [axes.get_title(loc="left") and axes._left_title.get_window_extent() for axes in figure.axes]
        boxes = [box for box in boxes if box]
        assert not any(one.overlaps(other) for one, other in itertools.pairwise(boxes))
        heading = figure.get_suptitle()
        assert heading == ("Mistakes" if number == shown else "The 30 most confident of 60 mistakes")

    def test_no_mistakes(self):
        assert figures.draw_mistakes([]).get_suptitle() == "No mistakes"

    def test_percentages(self):
        assert [figures.percent(value) for value in (1.0, 0.9999, 0.9994, 0.5)] == [
            "100.0 %",
            ">99.9 %",
            "99.9 %",
            "50.0 %",
        ]

    def test_long_names(self):
        assert figures.shortened("Fruit/Apple/Golden-Delicious", 15) == "Fruit/A…licious"
        assert figures.shortened("Apple", 5) == "Apple"
