"""Trials: on which images, in what range, how they are searched and given up, and ``--tune`` from end to end."""

import json
import math
import re
import shutil
import signal
from collections import Counter

import pytest
from training_support import (
    arguments,
    counts,
    images_of,
    interrupt_in_steps,
    make_experiment,
    make_images,
    make_options,
    make_up_training,
    results_of,
    tiny_command_line,
    without_measured,
    written,
)

from talib_fast import __main__ as cli
from talib_fast.errors import UsageError, UserError
from talib_fast.training import trials, tuning
from talib_fast.training.choosing import best_trial
from talib_fast.training.methods import Method
from talib_fast.training.recipes import RECIPES, Setting
from talib_fast.training.search import applied, as_arguments, defaults, space
from talib_fast.training.trainer import Run
from talib_fast.training.tuning import SPREAD, Search


@pytest.fixture(scope="module", autouse=True)
def _tiny():
    with tiny_command_line():
        yield


# Which images judge a trial

WORDS = [
    [],
    ["--labels-per-class", "3"],
    ["--folds", "4"],
    ["--val-share", "0.25"],
    ["--test-images", "8"],
    ["--test-share", "0.4"],
    ["--labels-per-class", "3", "--folds", "2"],
]


# --val-share is refused where there are images for validation
CASES = [
    (words, parts)
    for words in WORDS
    for parts in ((), ("val",), ("test",), ("val", "test"))
    if not ("--val-share" in words and "val" in parts)
]


def made_parts(parts):
    """20 images of each of four classes to train on, and fewer in the other parts, called by where they are from."""
    numbers = {"train": 20, "val": 5, "test": 6}
    return {name: images_of([0, 1, 2, 3] * numbers[name], origin=name) for name in ("train", *parts)}


@pytest.mark.parametrize(("words", "parts"), CASES)
def test_no_image_that_tests_trains_or_judges_a_trial(words, parts, tmp_path):
    """Whatever the seeds are: a search with one of them never meets what another one tests on."""
    searched, trained, tested = set(), set(), set()
    for seeds in ("3", "7,", "9,2"):
        experiment = make_experiment(tmp_path, "--tune", "2", "--seeds", seeds, *words, **made_parts(parts))
        for part in trials.judges(experiment):
            assert part.test is None and part.val is not None
            assert not set(part.train.names) & set(part.val.names)
            searched |= {*part.train.names, *part.val.names}
        for seed in experiment.options.seeds:
            splits = experiment.splits(seed)
            assert splits.val is None and splits.test.names == experiment.test_images(seed).names
            trained |= set(splits.train.names)
            tested |= set(splits.test.names)
    assert tested and not tested & searched and not tested & trained
    assert all(name.startswith("test") for name in tested) == ("test" in parts)
    if "test" not in parts:  # one part for all seeds, of every class the same share
        share = 8 if "--test-share" in words else 4
        assert len(tested) == (8 if "--test-images" in words else 4 * share)
    if "--labels-per-class" in words:
        assert all(name.startswith("train") for name in searched)


@pytest.mark.parametrize(("words", "parts"), CASES)
def test_after_trials_all_labelled_images_train(words, parts, tmp_path):
    experiment = make_experiment(tmp_path, "--tune", "2", "--seeds", "2", *words, **made_parts(parts))
    left = 20 if "test" in parts else 12 if "--test-share" in words else 16  # of every class
    expected = {"train": left, "val": 5 * ("val" in parts)}
    if "--labels-per-class" in words:
        expected = {"train": 3, "val": 0}
    for seed in (0, 1):
        train = experiment.splits(seed).train
        assert counts(train) == [sum(expected.values())] * 4 and len(set(train.names)) == len(train)
        for origin, number in expected.items():
            assert sum(name.startswith(origin) for name in train.names) == 4 * number


def made(*words, each=250, val=None, tmp_path):
    train, test = images_of([0, 1, 2, 3] * each, origin="train"), images_of([0, 1, 2, 3], origin="test")
    return make_experiment(tmp_path, "--tune", "2", *words, train=train, test=test, val=val)


@pytest.mark.parametrize(
    ("words", "each", "judged"),
    [
        ([], 250, [25]),  # a tenth of 1,000 images is just enough
        ([], 249, [83] * 3),
        (["--val-share", "0.2"], 10, [2]),
        (["--folds", "5"], 250, [50] * 5),
        (["--labels-per-class", "250"], 300, [25]),
        (["--labels-per-class", "6"], 300, [2] * 3),
        (["--labels-per-class", "2"], 300, [1] * 2),  # so that each fold has an image of each class
        (["--labels-per-class", "8", "--folds", "4"], 300, [2] * 4),
    ],
)
def test_what_judges_a_trial_without_a_folder_for_it(words, each, judged, tmp_path):
    experiment = made(*words, each=each, tmp_path=tmp_path)
    parts = trials.judges(experiment)
    assert [counts(part.val) for part in parts] == [[number] * 4 for number in judged]
    labelled = set(experiment.splits(0).train.names)
    for part in parts:
        assert {*part.train.names, *part.val.names} == labelled
    again = trials.judges(made(*words, each=each, tmp_path=tmp_path))
    assert [part.val.names for part in again] == [part.val.names for part in parts]


def test_the_folder_for_validation_judges_where_its_images_are_labelled_ones(tmp_path):
    val = images_of([0, 1, 2, 3, 3], origin="val")
    (part,) = trials.judges(made(val=val, tmp_path=tmp_path))
    assert part.val.names == val.names and len(part.train) == 1000
    parts = trials.judges(made("--folds", "5", val=val, tmp_path=tmp_path))
    assert sorted(len(part.val) for part in parts) == [201] * 5
    assert set(val.names) < {name for part in parts for name in part.val.names}
    for words in (["--labels-per-class", "4"], ["--labels-per-class", "4", "--val-share", "0.25"]):
        parts = trials.judges(made(*words, val=val, tmp_path=tmp_path))
        assert not set(val.names) & {name for part in parts for name in (*part.train.names, *part.val.names)}
        assert sum(len(part.val) for part in parts) == (4 if "--val-share" in words else 16)
    with pytest.raises(
        UsageError, match="--val-share has no effect, because made has a folder for validation: leave it out"
    ):
        made("--val-share", "0.2", val=val, tmp_path=tmp_path)


def test_how_trials_are_judged_is_told(tmp_path):
    share, folds = made(tmp_path=tmp_path), made("--labels-per-class", "5", tmp_path=tmp_path)
    assert trials.in_words(trials.judges(share)) == "judged by 100 validation images"
    assert trials.in_words(trials.judges(folds)) == "judged by cross-validation over 20 labelled images in 3 folds"


def test_classes_of_one_image_can_judge_nothing(tmp_path):
    train, test = images_of([0, 1, 2]), images_of([0, 1, 2])
    experiment = make_experiment(tmp_path, "--tune", "2", train=train, test=test)
    with pytest.raises(UserError, match=r"no class has two labelled images, .* or leave out --tune and auto$"):
        trials.judges(experiment)


# What is searched


def searched(method, *words):
    return space(method, make_options(*words).resolved(64, validates=False, tests=False))


def bounds(settings):
    return {name: (found.default, found.low, found.high, found.log) for name, found in settings.items()}


def test_the_space_of_every_method():
    lr = {"lr": (0.02, 0.002, 0.2, True)}
    head_decay = (1e-2, 1e-4, 1.0, True)
    expected = {
        "plain": {},
        "linear": {},
        "l2": {"trade_off l2": (5e-3, 5e-3 / 30, 0.15, True)},
        "l2_sp": {"trade_off l2_sp": (1e-2, 1e-2 / 30, 0.3, True), "l2_sp.head_decay": head_decay},
        "delta": {"trade_off delta": (1e-3, 1e-3 / 30, 0.03, True), "delta.head_decay": head_decay},
        "delta_attention": {
            "trade_off delta_attention": (0.03, 1e-3, 0.9, True),
            "delta_attention.head_decay": head_decay,
        },
        "bss": {"trade_off bss": (1e-3, 1e-3 / 30, 0.03, True), "bss.k": (1, 1, 4, True)},
        "stochnorm": {"trade_off stochnorm": (0.5, 0.1, 0.9, False)},
        "co_tuning": {"trade_off co_tuning": (0.3, 0.01, 9.0, True)},
        "lwf": {"trade_off lwf": (4.0, 4 / 30, 120.0, True), "lwf.temperature": (3.0, 1.0, 10.0, True)},
        "bi_tuning": {
            "trade_off bi_tuning": (1.0, 1 / 30, 30.0, True),
            "bi_tuning.temperature": (0.07, 0.02, 0.5, True),
        },
    }
    assert list(expected) == list(RECIPES)
    for method, own in expected.items():
        found = bounds(searched(method))
        assert list(found) == [*lr, *own]
        for name, values in (lr | own).items():
            assert found[name] == pytest.approx(values), (method, name)
        assert [name for name, setting in searched(method).items() if setting.whole] == ["bss.k"] * (method == "bss")
    assert list(searched("stochnorm+bss")) == ["lr", "trade_off bss", "bss.k", "trade_off stochnorm"]


def test_the_space_lies_around_the_options():
    assert bounds(searched("plain", "--lr", "0.5"))["lr"] == pytest.approx((0.5, 0.05, 5.0, True))
    assert bounds(searched("plain", "--optimizer", "adamw"))["lr"] == pytest.approx((1e-3, 1e-4, 1e-2, True))
    assert searched("l2", "--trade-off", "l2=3")["trade_off l2"].default == 3
    assert searched("bss", "--batch-size", "3")["bss.k"].high == 3
    assert defaults(searched("bss", "--set", "bss.k=2", "--lr", "1")) == {"lr": 1.0, "trade_off bss": 1e-3, "bss.k": 2}


def test_a_default_outside_a_range_widens_it():
    assert bounds(searched("bss", "--set", "bss.k=6"))["bss.k"] == (6, 1, 6, True)
    assert bounds(searched("lwf", "--set", "lwf.temperature=20"))["lwf.temperature"] == (20, 1, 20, True)
    assert bounds(searched("stochnorm", "--trade-off", "stochnorm=1"))["trade_off stochnorm"] == (1, 0.1, 1, False)
    assert bounds(searched("stochnorm", "--trade-off", "stochnorm=0"))["trade_off stochnorm"] == (0, 0, 0.9, False)


def test_what_is_zero_on_purpose_is_not_searched():
    assert list(searched("l2", "--trade-off", "l2=0")) == ["lr"]
    assert list(searched("l2_sp", "--set", "l2_sp.head_decay=0")) == ["lr", "trade_off l2_sp"]


def test_chosen_settings_as_options():
    chosen = {"lr": 0.1, "trade_off bss": 2e-5, "bss.k": 3}
    assert as_arguments(chosen) == ["--lr", "0.1", "--trade-off", "bss=2e-05", "--set", "bss.k=3"]
    found = applied(make_options("--trade-off", "l2=7"), chosen)
    assert (found.lr, found.trade_offs["bss"], found.own["bss.k"]) == (0.1, 2e-5, 3)
    assert found.trade_offs["l2"] == 7 and found.own["lwf.temperature"] == 3.0


@pytest.mark.parametrize("method", [*RECIPES, "co_tuning+bss+stochnorm", "lwf+l2_sp"])
def test_the_options_that_are_told_are_what_a_trial_had(method):
    words = ["--trade-off", "delta=0.5", "--set", "lwf.temperature=2", "--seeds", "3"]
    search = Search(searched(method, *words), 5, method)
    for number in range(3):
        chosen = json.loads(json.dumps(search.spread(number)))
        assert make_options(*words, *as_arguments(chosen)) == applied(make_options(*words), chosen)


# How it is searched

LR = {"lr": Setting(0.02, 0.002, 0.2)}


def tried(lr, accuracy, state="finished", **more):
    fold = {"accuracies": [[2, accuracy], [4, accuracy]], "cross_entropy": 1.0, "right": "1"}
    entry = {"settings": {"lr": lr}, "state": state, "accuracy": accuracy, "folds": [fold], "cross_entropy": 1.0}
    return entry | {"steps": 4, "number": 0} | more


def test_the_first_trial_has_the_defaults_and_the_next_ones_lie_in_the_space():
    settings = searched("bss+stochnorm")
    search, earlier = Search(settings, 3, "bss+stochnorm"), []
    for number in range(8):
        found = search.following(earlier)
        assert list(found) == list(settings)
        assert all(settings[name].low <= value <= settings[name].high for name, value in found.items())
        assert isinstance(found["bss.k"], int)
        if number == 0:
            assert found == {"lr": 0.02, "trade_off bss": 1e-3, "bss.k": 1, "trade_off stochnorm": 0.5}
        earlier.append(tried(0.02, 50.0, settings=found))
    assert len({trial["settings"]["lr"] for trial in earlier}) == 8


def test_the_next_trial_is_a_function_of_the_seed_and_the_earlier_ones():
    rates = [0.02, 0.1, 0.004, 0.003, 0.15, 0.006, 0.08, 0.003]
    low_is_good, high_is_good = ([tried(lr, 50 - sign * 20 * math.log10(lr)) for lr in rates] for sign in (1, -1))
    first = Search(LR, 1, "plain")
    first.following(low_is_good[:4])  # what was asked before does not count
    expected = first.following(low_is_good)
    assert Search(LR, 1, "plain").following(json.loads(json.dumps(low_is_good))) == expected
    assert Search(LR, 2, "plain").following(low_is_good) != expected
    assert Search(LR, 1, "plain").following(high_is_good) != expected
    for seed in range(5):
        low, high = (Search(LR, seed, "plain").following(earlier)["lr"] for earlier in (low_is_good, high_is_good))
        assert low < high
    ends_early = [*low_is_good[:-1], tried(0.003, 10.0, "pruned"), tried(0.2, 0.0, "pruned", folds=[])]
    assert 0.002 <= first.following(ends_early)["lr"] <= 0.2


def test_the_first_settings_cover_the_ranges_with_the_same_learning_rates_for_every_method():
    spaces = {method: searched(method) for method in ("plain", "bss+stochnorm", "lwf")}
    for seed in range(5):
        found = {
            method: [Search(settings, seed, method).spread(number) for number in range(9)]
            for method, settings in spaces.items()
        }
        rates = {tuple(each["lr"] for each in own) for own in found.values()}
        assert len(rates) == 1
        default, *spread = rates.pop()
        assert default == 0.02 and all(0.002 <= lr <= 0.2 for lr in spread)
        places = [math.log10(lr / 0.002) / 2 for lr in spread]
        for many in (2, 4, 8):  # every part of the range has its own
            assert sorted(int((place - places[0]) % 1 * many + 1e-6) for place in places[:many]) == list(range(many))
        assert {each["bss.k"] for each in found["bss+stochnorm"]} == {1, 2, 3, 4}
        assert len({each["trade_off stochnorm"] for each in found["bss+stochnorm"]}) == 9
    other = [Search(spaces["plain"], seed, "plain").spread(1)["lr"] for seed in range(5)]
    assert len(set(other)) == 5
    search = Search(spaces["lwf"], 1, "lwf")
    trials = []
    for number in range(SPREAD + 1):
        trials.append(tried(0.02, 50.0 + number, settings=search.following(trials)))
    assert [trial["settings"] for trial in trials] == [search.spread(number) for number in range(SPREAD + 1)]
    assert search.following(trials) != search.spread(SPREAD + 1)


def test_a_setting_at_a_share_of_its_range():
    assert [Setting(1, 1, 4, whole=True).at(share) for share in (0, 0.24, 0.26, 0.99)] == [1, 1, 2, 4]
    assert [Setting(1, 0.25, 4).at(share) for share in (0, 0.25, 0.5)] == [0.25, 0.5, 1.0]
    assert Setting(0.5, 0.1, 0.9, log=False).at(0.75) == pytest.approx(0.7)
    assert Setting(1, 0.1, 0.7).at(1 - 2**-53) <= 0.7


def searching(tmp_path, *words, each=25):
    """An experiment whose trials are judged on one part, of 100 images where there are 25 of each class."""
    words = ("--steps", "12", "--val-share", "0.5", *words)
    train, test = images_of([0, 1, 2, 3] * 2 * each, origin="train"), images_of([0, 1, 2, 3], origin="test")
    return make_experiment(tmp_path, *words, train=train, test=test)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_better_learning_rate_is_found(seed, tmp_path, monkeypatch):
    """Where 0.1 gives 90 %, a tenth of it 30 % and the default 48 %."""

    def told(run):
        return 90 - 60 * abs(math.log10(run.options.lr / 0.1)), 1.0

    make_up_training(monkeypatch, told)
    experiment = searching(tmp_path, "--tune", "15", "--seeds", f"{seed},")
    results = results_of(experiment)
    chosen = tuning.tune(["plain"], experiment, results)
    assert results.trials[0]["settings"] == {"lr": 0.02} and results.trials[0]["accuracy"] == 48
    best = max(trial["accuracy"] for trial in results.trials if trial["state"] == "finished")
    assert best >= 80 and 0.068 < chosen["plain"]["lr"] < 0.147


def test_every_method_gets_as_many_trials(tmp_path, monkeypatch):
    make_up_training(monkeypatch, lambda run: (50 + len(run.record.method), 1.0))
    experiment = searching(tmp_path, "--tune", "6")
    results = results_of(experiment)
    chosen = tuning.tune(["plain", "bss+l2", "bss"], experiment, results)
    assert list(chosen) == ["plain", "bss+l2", "bss"]
    assert [(trial["method"], trial["number"]) for trial in results.trials] == [
        (method, number) for method in chosen for number in range(6)
    ]
    assert {trial["state"] for trial in results.trials} == {"finished"}
    assert {(trial["steps"], trial["rung"], trial["of_folds"]) for trial in results.trials} == {(12, 0, 1)}
    rates = [[trial["settings"]["lr"] for trial in results.trials if trial["method"] == method] for method in chosen]
    assert rates[0][:5] == rates[1][:5] == rates[2][:5] and rates[0][0] == 0.02
    assert rates[0][5] != rates[2][5]  # then each has a search of its own
    assert written(tmp_path)["trials"] == json.loads(json.dumps(results.trials))


def number_of(run):
    """A made up run's trial, from 1 on, and fold."""
    number, fold = re.search(r"trial (\d+) of \d+(?:, fold (\d+))?", run.title).groups()
    return int(number), int(fold or 1)


def outcomes(tmp_path, monkeypatch, told, *words, diverges=lambda run: False):
    """States and numbers of evaluations of plain's trials, and the settings that they chose."""
    with monkeypatch.context() as patch:
        make_up_training(patch, told, diverges)
        experiment = searching(tmp_path, *words)
        results = results_of(experiment)
        chosen = tuning.tune(["plain"], experiment, results)
    found = [(trial["state"], [len(fold["accuracies"]) for fold in trial["folds"]]) for trial in results.trials]
    return found, chosen, results.trials


def test_hopeless_trials_end_early(tmp_path, monkeypatch):
    """The fourth one, and no earlier than after half of the evaluations, though it is the worst from the first on."""

    def told(run):
        return {1: 60, 2: 5, 3: 10, 4: 2, 5: 70}[number_of(run)[0]], 1.0

    found, chosen, tried = outcomes(tmp_path, monkeypatch, told, "--tune", "5")
    assert found == [("finished", [6])] * 3 + [("pruned", [4]), ("finished", [6])]
    assert tried[3]["folds"][0]["accuracies"][-1] == (8, 2.0) and tried[3]["accuracy"] == 2
    assert chosen["plain"] == tried[4]["settings"]
    assert not list((tmp_path / "checkpoints").glob("*"))


def test_a_trial_that_was_given_up_is_never_chosen(tmp_path, monkeypatch):
    def told(run):
        if number_of(run)[0] == 4:
            return 55, 1.0
        return (40 if run.record.step == 12 else 60), 1.0

    found, chosen, tried = outcomes(tmp_path, monkeypatch, told, "--tune", "4")
    assert found[3] == ("pruned", [4]) and tried[3]["accuracy"] == 55
    assert chosen["plain"] == tried[0]["settings"]  # of the equal ones the first


def test_the_last_evaluation_gives_no_trial_up(tmp_path, monkeypatch):
    def told(run):
        return (90 if run.record.step == 12 and number_of(run)[0] != 4 else 50), 1.0

    found, chosen, _ = outcomes(tmp_path, monkeypatch, told, "--tune", "4")
    assert found == [("finished", [6])] * 4 and chosen["plain"] == {"lr": 0.02}


FOLDED = ("--tune", "4", "--labels-per-class", "10", "--folds", "2")


def folded(tmp_path, monkeypatch, told):
    experiment = make_experiment(
        tmp_path, "--steps", "12", *FOLDED, train=images_of([0, 1] * 20), test=images_of([0, 1], origin="test")
    )
    make_up_training(monkeypatch, told)
    results = results_of(experiment)
    tuning.tune(["plain"], experiment, results)
    return results.trials


def test_a_trial_is_given_up_by_the_mean_of_its_folds(tmp_path, monkeypatch):
    """Others have 60 % in both folds: 80 and 20 % are on their mean less than that from the first evaluation on."""

    def told(run):
        number, fold = number_of(run)
        return 60 if number < 4 else {1: 80, 2: 20}[fold], 1.0

    tried = folded(tmp_path, monkeypatch, told)
    assert [len(trial["folds"]) for trial in tried] == [2] * 4
    # the best evaluation of a trial is what counts, so one that was good once goes on
    assert tried[3]["state"] == "finished" and tried[3]["accuracy"] == 50
    assert trials.intermediate(tried[3]["folds"]) == [80.0] * 6 + [50.0] * 6


def test_a_trial_may_be_given_up_in_and_after_any_fold_but_the_last(tmp_path, monkeypatch):
    def told(run):
        number, fold = number_of(run)
        if number < 4:
            return (90 if fold == 2 or run.record.step == 12 else 50), 1.0
        return 50, 1.0

    tried = folded(tmp_path, monkeypatch, told)
    assert [len(trial["folds"]) for trial in tried] == [2, 2, 2, 1]
    assert tried[3]["state"] == "pruned" and len(tried[3]["folds"][0]["accuracies"]) == 6


def test_what_the_folds_say_together(tmp_path, monkeypatch):
    tried = folded(tmp_path, monkeypatch, lambda run: ((70, 1.0), (50, 0.5))[number_of(run)[1] - 1])
    assert tried[0]["accuracy"] == pytest.approx(60) and tried[0]["cross_entropy"] == pytest.approx(0.75)
    assert [Counter(fold["right"]) for fold in tried[0]["folds"]] == [{"1": 7, "0": 3}, {"1": 5, "0": 5}]
    uneven = [{"right": "110", "cross_entropy": 1.0}, {"right": "1", "cross_entropy": 3.0}]
    assert trials.summary(uneven) == {"accuracy": 75.0, "cross_entropy": 1.5}


def test_diverged_trials_are_noted_and_never_chosen(tmp_path, monkeypatch):
    """Nor do they count among those that must be finished before one is given up."""

    def diverges(run):
        return number_of(run)[0] == 2 and run.record.step == 7

    def told(run):
        return {1: 60, 2: 99, 3: 60, 4: 2, 5: 2}[number_of(run)[0]], 1.0

    found, chosen, tried = outcomes(tmp_path, monkeypatch, told, "--tune", "5", diverges=diverges)
    assert found == [("finished", [6]), ("pruned", []), ("finished", [6]), ("finished", [6]), ("pruned", [4])]
    assert tried[1]["diverged"] and tried[1]["accuracy"] == 0.0 and chosen["plain"] == {"lr": 0.02}
    assert trials.told(tried[1]).endswith(": diverged") and trials.told(tried[0]) == "lr 0.02: 60.0 %"
    assert trials.told(tried[4]).endswith(": 2.0 % when it was pruned")


def test_a_method_whose_trials_all_diverge_is_left_out(tmp_path, monkeypatch):
    make_up_training(monkeypatch, lambda run: (50, 1.0), lambda run: run.record.method == "l2")
    experiment = searching(tmp_path, "--tune", "2")
    results = results_of(experiment)
    assert list(tuning.tune(["l2", "plain"], experiment, results)) == ["plain"]
    assert Counter(trial["method"] for trial in results.trials) == {"l2": 2, "plain": 2}
    with pytest.raises(UserError, match="every trial diverged: lower --lr, the centre of the searched range"):
        tuning.tune(["l2"], experiment, results)


def test_the_best_trial():
    assert best_trial([]) is None and best_trial([tried(0.1, 90, "pruned"), tried(0.1, 90, "running")]) is None
    by_accuracy = [tried(0.1, 70), tried(0.2, 80, cross_entropy=9.0), tried(0.3, 99, "pruned")]
    assert best_trial(by_accuracy)["settings"] == {"lr": 0.2}
    by_cross_entropy = [tried(0.1, 70, cross_entropy=2.0), tried(0.2, 70, cross_entropy=1.0)]
    assert best_trial(by_cross_entropy)["settings"] == {"lr": 0.2}
    by_number = [tried(0.1, 70, number=3), tried(0.2, 70, number=1), tried(0.3, 70, number=2)]
    assert best_trial(by_number)["settings"] == {"lr": 0.2}
    by_length = [tried(0.1, 99, steps=10), tried(0.2, 50, steps=20), tried(0.3, 80, "pruned", steps=40)]
    assert best_trial(by_length)["settings"] == {"lr": 0.2}


@pytest.mark.parametrize("step", [1, 3, 8, 9, 12])
def test_an_interrupt_in_any_step_changes_no_decision(step, tmp_path, monkeypatch):
    """Of the fourth trial, which is given up after step 8 in any case."""

    def told(run):
        return (2 if number_of(run)[0] == 4 else 60), 1.0

    expected, _, whole = outcomes(tmp_path / "whole", monkeypatch, told, "--tune", "5")
    assert expected[3] == ("pruned", [4])
    with monkeypatch.context() as patch:
        make_up_training(patch, told)
        made_up, trial = Run._step, 4 if step <= 8 else 5

        def interrupted(self, batches):
            if number_of(self)[0] == trial and self.record.step == step - 1:
                signal.raise_signal(signal.SIGINT)
            made_up(self, batches)

        patch.setattr(Run, "_step", interrupted)
        experiment = searching(tmp_path / "out", "--tune", "5")
        with pytest.raises(KeyboardInterrupt):
            tuning.tune(["plain"], experiment, results_of(experiment))
    assert len(list((tmp_path / "out" / "checkpoints").iterdir())) == 1
    found, _, tried = outcomes(tmp_path / "out", monkeypatch, told, "--tune", "5")
    assert found == expected
    assert json.loads(json.dumps(without_measured(tried))) == json.loads(json.dumps(without_measured(whole)))


# The command


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("tuned") / "images")


TUNED = ("--method", "plain,bss", "--tune", "4", "--folds", "2", "--steps", "6", "--seeds", "2")


@pytest.fixture(scope="module")
def tuned(images):
    """The folder of a search that nothing interrupted; nothing else may write into it."""
    out = images.parent / "out"
    assert cli.main(arguments(images, out, *TUNED)) == 0
    return out


def best_of(entries):
    """By hand: accuracy, then cross-entropy, then the order."""
    return sorted(entries, key=lambda trial: (-trial["accuracy"], trial["cross_entropy"]))[0]


def test_a_tuned_command(tuned):
    found = written(tuned)
    assert found["settings"]["tune"] == 4 and found["settings"]["candidates"] is None and "optuna" in found
    assert [(trial["method"], trial["number"]) for trial in found["trials"]] == [
        (method, number) for method in ("plain", "bss") for number in range(4)
    ]
    for trial in found["trials"]:
        assert trial["of_folds"] == 2 and trial["steps"] == 6 and trial["seconds"] > 0
        if trial["state"] == "finished":
            right = "".join(fold["right"] for fold in trial["folds"])
            assert len(right) == 12 and trial["accuracy"] == pytest.approx(100 * right.count("1") / 12)
    assert found["trials"][4]["settings"] == {"lr": 0.02, "trade_off bss": 1e-3, "bss.k": 1}
    assert [(run["seed"], run["method"]) for run in found["runs"]] == [
        *((0, "plain"), (0, "bss"), (1, "plain"), (1, "bss"))
    ]
    for run in found["runs"]:
        finished = [one for one in found["trials"] if one["method"] == run["method"] and one["state"] == "finished"]
        assert run["chosen"] == best_of(finished)["settings"]
        # of 8 images of a class 2 test, and 4 of the others are labelled, all of which train
        assert (run["train_images"], run["val_images"], run["test_images"]) == (12, 0, 6) and "val_accuracy" not in run
        assert run["accuracies"][-1] == [6, run["accuracy"]]
    assert not list((tuned / "checkpoints").iterdir()) and (tuned / "trials.png").exists()


def test_the_model_of_the_best_trials_method_is_kept(tuned):
    found = written(tuned)
    best = best_of([trial for trial in found["trials"] if trial["state"] == "finished"])
    (model,) = (tuned / "models").iterdir()
    assert model.name == f"{best['method']}-seed0"
    assert [run["method"] for run in found["runs"] if run["model"]] == [best["method"]]
    config = json.loads((model / "config.json").read_text())
    assert config["chosen"] == best["settings"] and config["settings"] == found["settings"]
    by = f"the accuracy of its method's best trial, {best['accuracy']:.1f} % of 12 images"  # and not of tested runs
    assert config["chosen_by"] == by
    run = next(run for run in found["runs"] if run["model"])
    assert config["figures"] == {"test_accuracy": run["accuracy"], "test_images": 6, "train_images": 12}


@pytest.fixture
def out(tuned, tmp_path):
    """A copy of that folder."""
    return shutil.copytree(tuned, tmp_path / "out")


def test_what_is_finished_is_not_tried_again(images, out, monkeypatch, capsys):
    before = written(out)
    monkeypatch.setattr(Run, "_step", lambda *args: pytest.fail("trained again"))
    assert cli.main(arguments(images, out, *TUNED)) == 0
    assert "Nothing to train: " in capsys.readouterr().out and written(out) == before


def test_an_interrupted_search_ends_as_an_uninterrupted_one(images, tuned, tmp_path, monkeypatch, capsys):
    """Interrupted in plain's first trial, in that one's second fold, in a trial of bss and in a run."""
    words = arguments(images, tmp_path / "out", *TUNED)
    for step, place in ((3, "plain-trial0-"), (7, "plain-trial0-"), (41, "bss-trial0-"), (50, "-seed")):
        with monkeypatch.context() as patch:
            interrupt_in_steps(patch, step)
            assert cli.main(words) == 130
        assert "interrupted; the same command continues" in capsys.readouterr().err
        (checkpoint,) = (tmp_path / "out" / "checkpoints").iterdir()
        assert place in checkpoint.name
    assert cli.main(words) == 0
    found, whole = written(tmp_path / "out"), written(tuned)
    assert without_measured(found["trials"]) == without_measured(whole["trials"])
    assert without_measured(found["runs"]) == without_measured(whole["runs"])


def test_restart_tries_everything_again(images, tuned, out, monkeypatch):
    changed = written(out)
    for entry in (*changed["trials"], *changed["runs"]):
        entry["accuracy"] = 1.5
    (out / "results.json").write_text(json.dumps(changed))
    assert cli.main(arguments(images, out, *TUNED, "--restart")) == 0
    assert without_measured(written(out)["trials"]) == without_measured(written(tuned)["trials"])
    assert without_measured(written(out)["runs"]) == without_measured(written(tuned)["runs"])


def test_more_methods_and_seeds_tune_only_what_is_new(images, tuned, out, monkeypatch):
    names, forward = [], Method.forward
    monkeypatch.setattr(Method, "forward", lambda self, batch: (names.append(self.name), forward(self, batch))[1])
    more = [*TUNED, "--method", "plain,linear", "--seeds", "3"]
    assert cli.main(arguments(images, out, *more)) == 0
    found, before = written(out), written(tuned)
    assert found["trials"][:8] == before["trials"]
    assert [(trial["method"], trial["number"]) for trial in found["trials"][8:]] == [
        ("linear", number) for number in range(4)
    ]
    assert [(run["method"], run["seed"]) for run in found["runs"][4:]] == [
        *(("linear", 0), ("linear", 1), ("plain", 2), ("linear", 2))
    ]
    assert names.count("plain") == 6 and "bss" not in names
    assert found["runs"][6]["chosen"] == found["runs"][0]["chosen"]


def test_another_number_of_trials_needs_another_folder(images, out, capsys):
    assert cli.main(arguments(images, out, *TUNED, "--tune", "5")) == 1
    assert "holds results of other settings (tune was 4 and is now 5)" in capsys.readouterr().err
    assert cli.main(arguments(images, out, *TUNED, "--method", "auto")) == 1
    assert "(candidates was not given and is now ['plain', 'linear', 'l2', " in capsys.readouterr().err


def test_a_better_method_takes_the_place_of_the_model(images, tmp_path, monkeypatch, capsys):
    """By its best trial, though its runs are tested to be worse."""

    def told(run):
        accuracy = {"plain": 50, "bss": 75, "l2": 100}[run.record.method]
        return (accuracy if run.data.test is None else 100 - accuracy), 1.0

    make_up_training(monkeypatch, told)
    kept = []
    for methods in ("bss,plain", "l2,bss", "plain,l2,bss"):
        words = arguments(images, tmp_path / "out", *TUNED, "--tune", "1", "--method", methods, "--seeds", "4,2")
        assert cli.main(words) == 0
        kept.append([path.name for path in (tmp_path / "out" / "models").iterdir()])
        assert f"Kept: {tmp_path / 'out' / 'models' / kept[-1][0]}\n" in capsys.readouterr().out
    assert kept == [["bss-seed4"], ["l2-seed4"], ["l2-seed4"]]
    tested = {run["method"]: run["accuracy"] for run in written(tmp_path / "out")["runs"]}
    assert tested["plain"] == 50 > tested["bss"] > tested["l2"] == 0


def test_methods_go_on_where_all_trials_of_one_diverge(images, tmp_path, monkeypatch, capsys):
    make_up_training(monkeypatch, lambda run: (50, 1.0), lambda run: run.record.method == "l2")
    words = arguments(images, tmp_path / "out", *TUNED, "--method", "plain,l2", "--tune", "2", "--seeds", "1")
    for _ in range(2):  # and again, by the same command
        assert cli.main(words) == 1
        out, err = capsys.readouterr()
        told = [line for line in err.splitlines() if line.startswith("talib_fast")]
        assert told == ["talib_fast: 1 of 2 runs failed: every trial of l2 diverged: lower --lr"]
        assert "accuracy, %" in out and [run["method"] for run in written(tmp_path / "out")["runs"]] == ["plain"]
    words = arguments(images, tmp_path / "none", *TUNED, "--method", "l2", "--tune", "2")
    assert cli.main(words) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "talib_fast: every trial diverged: lower --lr, the centre of the searched range"


@pytest.fixture(scope="module")
def parts(images):
    """Of each class 4 images to train on, 2 for validation and 2 to test on."""
    folder = images.parent / "parts"
    for path in images.rglob("*.png"):
        part = "train" if int(path.stem) < 4 else "val" if int(path.stem) < 6 else "test"
        (folder / part / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / part / path.parent.name)
    return folder


def test_runs_have_the_settings_that_were_chosen(parts, tmp_path):
    """The options that are told for them repeat a run without any trials."""
    words = ("--method", "bss", "--steps", "6", "--labels-per-class", "3", "--lr", "0.01")  # which is too low
    assert cli.main(arguments(parts, tmp_path / "tuned", *words, "--tune", "5")) == 0
    (run,) = written(tmp_path / "tuned")["runs"]
    chosen = run["chosen"]
    assert chosen["lr"] != 0.01 and chosen["trade_off bss"] != 1e-3
    told = as_arguments(chosen)
    # the folder for validation, which labels of a number leave unused after trials, would be what a run is followed by
    shutil.copytree(parts / "train", tmp_path / "train")
    assert cli.main(arguments(tmp_path / "train", tmp_path / "out", *words, "--test", str(parts / "test"), *told)) == 0
    (repeated,) = written(tmp_path / "out")["runs"]
    for series in ("losses", "cross_entropies", "accuracies", "accuracy", "train_images", "test_images"):
        assert repeated[series] == run[series], series


def test_trials_and_runs_on_a_folder_of_parts(parts, tmp_path, monkeypatch):
    """What judges the trials is trained on afterwards, and the test folder is for the runs alone."""
    seen = []
    finish = Run.finish

    def noted(self, until=None):
        sets = (self.data.train, self.data.val, self.data.test)
        seen.append([None if one is None else [name.split("/")[-3] for name in one.images.names] for one in sets])
        return finish(self, until)

    make_up_training(monkeypatch, lambda run: (50, 1.0))
    monkeypatch.setattr(Run, "finish", noted)
    more = ("--method", "plain", "--tune", "2", "--steps", "2", "--labels-per-class", "all")
    assert cli.main(arguments(parts, tmp_path / "out", *more)) == 0
    assert seen[:2] == [[["train"] * 12, ["val"] * 6, None]] * 2
    assert [part and Counter(part) for part in seen[2]] == [{"train": 12, "val": 6}, None, {"test": 6}]
    assert len(seen) == 3
