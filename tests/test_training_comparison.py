import math
import subprocess
import sys

import pytest
from process_support import PATIENCE
from scipy import stats

from talib_fast.training.comparison import Comparison, by_method, comparisons, mean_and_deviation, paired_images, points


def runs(**accuracies):
    """By method; the seeds count from 0, None where there is no run."""
    return [
        {"method": method.replace("_and_", "+"), "seed": seed, "accuracy": accuracy}
        for method, own in accuracies.items()
        for seed, accuracy in enumerate(own)
        if accuracy is not None
    ]


def test_the_interval_is_the_paired_t_tests():
    plain, other = [60.0, 64.5, 58.0, 61.5, 66.0], [63.0, 65.0, 62.5, 61.0, 70.5]
    (found,) = comparisons(runs(plain=plain, bss=other))
    low, high = stats.ttest_rel(other, plain).confidence_interval(0.95)
    assert found.mean == pytest.approx(2.4)
    assert (found.mean - found.half_width, found.mean + found.half_width) == pytest.approx((low, high))
    assert found.corrected_half_width == found.half_width  # it is the only one
    assert found.differences == {0: 3.0, 1: 0.5, 2: 4.5, 3: -0.5, 4: 4.5}


def test_the_correction_is_bonferronis():
    # differences 1, 2 and 3: deviation 1, and the quantiles of a table of Student's t with two degrees of freedom
    made = runs(plain=[50.0, 50.0, 50.0], bss=[51.0, 52.0, 53.0])
    (alone,), (among,) = comparisons(made), comparisons(made, number=5)
    assert alone.half_width == among.half_width == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
    assert among.corrected_half_width == pytest.approx(9.9248 / math.sqrt(3), rel=1e-4)  # 1 - 0.05 / 10 = 0.995


def test_what_has_an_interval_is_counted():
    found = comparisons(runs(plain=[50, 51, 52], l2=[51, 52, 55], delta=[50, 50, 51], bss=[None, 52], lwf=[None] * 9))
    assert [(one.method, one.number) for one in found] == [("l2", 2), ("delta", 2), ("bss", 2)]


def test_only_common_seeds_count_whatever_their_order():
    made = runs(bss=[None, 54.0, 51.0, 60.0], plain=[50.0, 51.0, 52.0])
    (found,) = comparisons(reversed(made))
    assert found.differences == {1: 3.0, 2: -1.0} and found.mean == 1.0


def test_a_baseline_without_runs_and_another_baseline():
    made = runs(bss=[50.0, 51.0], stochnorm_and_bss=[51.0, 53.0])
    assert comparisons(made) == [] == comparisons([])
    (found,) = comparisons(made, baseline="bss")
    assert (found.method, found.baseline, found.mean) == ("stochnorm+bss", "bss", 1.5)


def test_a_combination_is_one_method_whatever_its_order():
    made = runs(plain=[50.0, 50.0], bss_and_stochnorm=[51.0])
    made.append({"method": "stochnorm+bss", "seed": 1, "accuracy": 53.0})
    (found,) = comparisons(made)
    assert found.differences == {0: 1.0, 1: 3.0}
    assert list(by_method(made)) == ["plain", "bss+stochnorm"]


def test_equal_differences_show_no_spread_though_they_are_rounded():
    (found,) = comparisons(runs(plain=[70.1, 68.3, 55.7], bss=[72.1, 70.3, 57.7]))  # 1.9999999999999858 among them
    assert found.mean == 2.0 and found.half_width == found.corrected_half_width == 0.0
    assert not found.beyond_chance
    assert found.sentence() == (
        "bss: +2.0 points compared with plain, the same for all 3 seeds, so there is no interval."
    )


def test_no_number_below_one():
    with pytest.raises(ValueError, match="got 0"):
        comparisons(runs(plain=[1.0], bss=[2.0]), number=0)


@pytest.mark.parametrize(
    ("differences", "number", "beyond", "sentence"),
    [
        ([], 1, False, "bss: no seed in common with plain, so nothing can be compared."),
        ([4], 1, False, "bss: +4.0 points compared with plain, with one seed, which shows no difference."),
        # mean ± 4.303 / √3 = 2.48 alone, ± 9.925 / √3 = 5.73 among five
        ([5, 6, 7], 1, True, "bss: better than plain, +6.0 points (+3.5 to +8.5) over 3 seeds, beyond chance."),
        (
            *([-5, -6, -7], 5, True),
            "bss: worse than plain, -6.0 points (-11.7 to -0.3) over 3 seeds, beyond chance even among 5 comparisons.",
        ),
        (
            *([2, 3, 4], 5, False),
            "bss: +3.0 points compared with plain over 3 seeds (+0.5 to +5.5), but this may be chance among 5 "
            "comparisons: corrected, -2.7 to +8.7.",
        ),
        (
            *([-1, 0, 1], 1, False),
            "bss: no difference to plain is shown: -2.5 to +2.5 points over 3 seeds.",
        ),
    ],
)
def test_sentences(differences, number, beyond, sentence):
    found = Comparison("bss", "plain", dict(enumerate(differences)), number)
    assert found.beyond_chance is beyond
    assert found.sentence() == sentence


def test_paired_images():
    # 100 images: both right 60, only a 20, only b 8, none 12; half of one is added to each
    a, b = "1" * 60 + "1" * 20 + "0" * 8 + "0" * 12, "1" * 60 + "0" * 20 + "1" * 8 + "0" * 12
    # the variance of a share's difference with 20.5 and 8.5 of 102: (29 - 12² / 102) / 102²
    half = 100 * 1.959964 * math.sqrt(29 - 144 / 102) / 102
    assert paired_images(a, b) == pytest.approx((12.0, half), rel=1e-6)
    assert paired_images(b, a) == pytest.approx((-12.0, half), rel=1e-6)
    assert paired_images(a, b, number=10)[1] == pytest.approx(half * 2.807034 / 1.959964, rel=1e-6)
    assert half == pytest.approx(10.093, abs=1e-3)


def test_paired_images_that_never_differ():
    difference, half = paired_images("1100", "1100")
    assert difference == 0 and half == pytest.approx(100 * 1.959964 / 6, rel=1e-6)


@pytest.mark.parametrize(("a", "b"), [("10", "1"), ("", ""), ("12", "10")])
def test_paired_images_of_other_kinds(a, b):
    with pytest.raises(ValueError, match=f"got {len(a)} and {len(b)} characters"):
        paired_images(a, b)


def test_points_have_one_zero():
    assert [points(value) for value in (-0.04, 0.0, 0.06, -2.0)] == ["+0.0", "+0.0", "+0.1", "-2.0"]
    assert [mean_and_deviation(values) for values in ([50.0, 51.0, 52.0], [70.25])] == ["51.0 ± 1.0", "70.2"]


def test_scipy_is_only_imported_for_an_interval():
    code = (
        "import sys, talib_fast.training.comparison as c; c.paired_images('1', '0'); assert 'scipy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE)
