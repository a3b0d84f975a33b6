"""``--method auto``: the rungs of successive halving, who gets to the next one, and the command from end to end."""

import io
import itertools
import json
import math
import re
import shutil
from collections import Counter
from contextlib import redirect_stdout

import pytest
from training_support import (
    arguments,
    images_of,
    interrupt_in_steps,
    make_experiment,
    make_images,
    make_up_training,
    results_of,
    tiny_command_line,
    without_measured,
    written,
)

from talib_fast import __main__ as cli
from talib_fast.errors import UserError
from talib_fast.training import halving
from talib_fast.training.methods import Method
from talib_fast.training.recipes import RECIPES
from talib_fast.training.trainer import Run


@pytest.fixture(scope="module", autouse=True)
def _tiny():
    with tiny_command_line():
        yield


@pytest.mark.parametrize(
    ("candidates", "steps", "expected", "cost"),
    [
        (22, 120, [(22, 15), (11, 30), (6, 60), (3, 120)], (22 / 8 + 11 / 4 + 6 / 2 + 3)),
        (33, 120, [(33, 15), (17, 30), (9, 60), (5, 120)], (33 / 8 + 17 / 4 + 9 / 2 + 5)),
        (4, 1000, [(4, 250), (2, 500), (1, 1000)], 3),
        (3, 101, [(3, 51), (2, 101)], 2 + 3 * 51 / 101),
        (1, 120, [(1, 120)], 1),
        (1, 1, [(1, 1)], 1),
        (22, 1, [(22, 1)], 22),
        (22, 29, [(22, 29)], 22),  # half of them would be too few to learn anything
        (22, 30, [(22, 15), (11, 30)], 22),
    ],
)
def test_rungs_and_their_cost(candidates, steps, expected, cost):
    assert halving.rungs(candidates, steps) == expected
    assert halving.cost(expected) == pytest.approx(cost)


def test_any_rungs_halve_and_double():
    for candidates in range(1, 70):
        for steps in (1, 2, 14, 15, 16, 30, 59, 60, 61, 119, 240, 999, 5000):
            plan = halving.rungs(candidates, steps)
            assert plan[0][0] == candidates and plan[-1][1] == steps
            for (many, short), (fewer, long) in itertools.pairwise(plan):
                assert fewer == math.ceil(many / 2) and short == math.ceil(long / 2) and short >= 15


METHODS = ("plain", "l2", "bss")


def competing(tmp_path, *words, methods=METHODS):
    """Candidates judged on 100 images, in three rungs where they are four or more."""
    words = ("--steps", "60", "--val-share", "0.5", "--tune", "2", *words)
    train, test = images_of([0, 1, 2, 3] * 50, origin="train"), images_of([0, 1, 2, 3], origin="test")
    experiment = make_experiment(tmp_path, *words, train=train, test=test)
    return lambda results: halving.compete(methods, experiment, results), results_of(experiment)


def ranks(results, rung):
    return [(trial["method"], trial["number"]) for trial in results.trials if trial["rung"] == rung]


def test_the_better_half_goes_on(tmp_path, monkeypatch):
    """By accuracy, then cross-entropy; by what they say in that rung, whatever they said before."""
    said = {
        15: {"plain": ((10, 1.0), (50, 2.0)), "l2": ((50, 1.0), (40, 1.0)), "bss": ((60, 9.0), (50, 1.5))},
        30: {"l2": ((20, 1.0), None), "bss": ((30, 1.0), (30, 0.5))},
        60: {"bss": ((80, 1.0), (70, 1.0))},
    }

    def told(run):
        number = 0 if run.options.lr == 0.02 else 1
        return said[run.steps][run.record.method][number]

    make_up_training(monkeypatch, told)
    compete, results = competing(tmp_path)
    winner, settings = compete(results)
    everyone = [(method, number) for method in METHODS for number in (0, 1)]
    # of 50 % the smaller cross-entropies go on: l2's first and bss's second, not plain's second
    assert ranks(results, 0) == everyone and ranks(results, 1) == [("bss", 0), ("l2", 0), ("bss", 1)]
    assert ranks(results, 2) == [("bss", 1), ("bss", 0)]
    assert (winner, settings) == ("bss", {"lr": 0.02, "trade_off bss": 1e-3, "bss.k": 1})
    for rung, steps in enumerate((15, 30, 60)):
        assert {trial["steps"] for trial in results.trials if trial["rung"] == rung} == {steps}
    first = {(trial["method"], trial["number"]): trial["settings"] for trial in results.trials if trial["rung"] == 0}
    assert all(trial["settings"] == first[trial["method"], trial["number"]] for trial in results.trials)
    assert first["plain", 0] == {"lr": 0.02} and first["l2", 0] == {"lr": 0.02, "trade_off l2": 5e-3}
    assert len({first[method, 1]["lr"] for method in METHODS}) == 1
    assert {trial["state"] for trial in results.trials} == {"finished"}


def test_the_longest_trials_name_the_winner(tmp_path, monkeypatch):
    """Though the accuracy of another one, that did not get as far, was higher."""
    said = {("plain", 30): 80, ("l2", 30): 90, ("l2", 60): 40}
    make_up_training(monkeypatch, lambda run: (said[run.record.method, run.steps], 1.0))
    compete, results = competing(tmp_path, "--tune", "1", methods=("plain", "l2"))
    assert compete(results)[0] == "l2"
    assert [(trial["method"], trial["rung"]) for trial in results.trials] == [("plain", 0), ("l2", 0), ("l2", 1)]


def test_a_trial_is_trained_with_a_rungs_steps_and_its_share_of_the_warmup(tmp_path, monkeypatch):
    seen = []

    def told(run):
        seen.append((run.steps, run.options.warmup, run.record.step))
        return 50, 1.0

    make_up_training(monkeypatch, told)
    compete, results = competing(tmp_path, "--warmup", "20", "--tune", "1", methods=("plain", "l2"))
    compete(results)
    assert {(steps, warmup) for steps, warmup, _ in seen} == {(30, 10), (60, 20)}
    assert [step for steps, _, step in seen if steps == 60] == [60]  # nothing is given up on its way


def test_diverged_candidates_drop_out(tmp_path, monkeypatch):
    make_up_training(monkeypatch, lambda run: (50, 1.0), lambda run: run.record.method != "bss")
    compete, results = competing(tmp_path)
    assert compete(results)[0] == "bss"
    assert ranks(results, 1) == [("bss", 0), ("bss", 1)]  # no more are left
    assert Counter(bool(trial.get("diverged")) for trial in results.trials if trial["rung"] == 0) == {True: 4, False: 2}


def test_nothing_but_diverged_candidates_is_told(tmp_path, monkeypatch):
    make_up_training(monkeypatch, lambda run: (50, 1.0), lambda run: True)
    compete, results = competing(tmp_path)
    with pytest.raises(UserError, match="every candidate diverged: lower --lr, the centre of the searched range"):
        compete(results)
    assert len(results.trials) == 6


# The command

AUTO = ("--method", "auto,stochnorm+bss", "--tune", "1", "--steps", "30", "--val-share", "0.5", "--seeds", "2")
SIZES = [(12, 15), (6, 30)]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("auto") / "images")


@pytest.fixture(scope="module")
def told(images):
    """What the command says that nothing interrupted, and its folder, into which nothing else may write."""
    out = images.parent / "out"
    with redirect_stdout(io.StringIO()) as said:
        assert cli.main(arguments(images, out, *AUTO)) == 0
    return said.getvalue(), out


def by_merit(trials):
    """By hand: accuracy, then cross-entropy, then the order in which they came."""
    return sorted(trials, key=lambda trial: (-trial["accuracy"], trial["cross_entropy"], trial["number"]))


def test_all_methods_compete(told):
    said, out = told
    found = written(out)
    assert "1 run of the best" not in said and "2 runs of the best of 12 methods of 30 steps" in said
    assert (
        "First, 1 setting of each method compete, judged by 6 validation images: 12 of 15 steps, 6 of 30 steps. This "
        "takes as long as 12 runs." in said
    )
    rungs = [[trial for trial in found["trials"] if trial["rung"] == rung] for rung in (0, 1)]
    assert [(len(rung), rung[0]["steps"]) for rung in rungs] == SIZES and len(found["trials"]) == 18
    assert [trial["method"] for trial in rungs[0]] == [*RECIPES, "stochnorm+bss"]
    assert [trial["method"] for trial in rungs[1]] == [trial["method"] for trial in by_merit(rungs[0])[:6]]
    assert all(len(fold["right"]) == 6 for trial in found["trials"] for fold in trial["folds"])
    assert {trial["settings"]["lr"] for trial in found["trials"]} == {0.02}
    assert found["settings"]["candidates"] == [*RECIPES, "stochnorm+bss"] and "auto" not in found["settings"]


def test_the_winner_alone_is_trained_and_kept(told):
    said, out = told
    found = written(out)
    winner = by_merit([trial for trial in found["trials"] if trial["rung"] == 1])[0]
    assert [(run["method"], run["seed"]) for run in found["runs"]] == [(winner["method"], 0), (winner["method"], 1)]
    for run in found["runs"]:
        assert run["chosen"] == winner["settings"]
        # of 8 images of a class 2 test and 4 are labelled, two of which judged the trials
        assert (run["train_images"], run["val_images"], run["test_images"]) == (12, 0, 6) and "val_accuracy" not in run
    (model,) = (out / "models").iterdir()
    assert model.name == f"{winner['method']}-seed0" and f"Kept: {model}" in said
    config = json.loads((model / "config.json").read_text())
    by = f"the accuracy of its method's best trial, {winner['accuracy']:.1f} % of 6 images"
    assert config["chosen_by"] == by and config["chosen"] == winner["settings"]
    assert not list((out / "checkpoints").iterdir())


@pytest.fixture
def out(told, tmp_path):
    """A copy of that folder."""
    return shutil.copytree(told[1], tmp_path / "out")


def test_what_is_finished_does_not_compete_again(images, out, monkeypatch, capsys):
    before = written(out)
    monkeypatch.setattr(Run, "_step", lambda *args: pytest.fail("trained again"))
    assert cli.main(arguments(images, out, *AUTO)) == 0
    assert "Nothing to train: " in capsys.readouterr().out and written(out) == before


def test_another_seed_trains_the_winner_alone(images, out, monkeypatch):
    before, steps, forward = written(out), [], Method.forward
    monkeypatch.setattr(Method, "forward", lambda self, batch: (steps.append(self.name), forward(self, batch))[1])
    assert cli.main(arguments(images, out, *AUTO, "--seeds", "3")) == 0
    found = written(out)
    assert found["trials"] == before["trials"] and found["runs"][:2] == before["runs"] and len(steps) == 30
    assert (found["runs"][2]["seed"], found["runs"][2]["method"]) == (2, before["runs"][0]["method"])
    assert [run["model"] for run in found["runs"]] == [before["runs"][0]["model"], None, None]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "auto"], "candidates was ['plain', "),
        (["--method", "auto,stochnorm+bss,delta+stochnorm"], "candidates was ['plain', "),
        (["--method", "plain"], "'stochnorm+bss'] and is now not given"),
        (["--tune", "2"], "tune was 1 and is now 2"),
    ],
)
def test_other_candidates_need_another_folder(images, out, words, message, capsys):
    assert cli.main(arguments(images, out, *AUTO, *words)) == 1
    err = capsys.readouterr().err
    assert message in err and "holds results of other settings" in err and err.count("\n") == 1


def test_an_interrupted_competition_ends_as_an_uninterrupted_one(images, told, tmp_path, monkeypatch):
    """In the third candidate, in the last rung, and in the winner's second run."""
    words = arguments(images, tmp_path / "out", *AUTO)
    first = 12 * 15
    for step, place in ((35, r"l2-trial0-steps15"), (first - 35 + 40, r"-trial0-steps30"), (180 - 40 + 50, "-seed1")):
        with monkeypatch.context() as patch:
            interrupt_in_steps(patch, step)
            assert cli.main(words) == 130
        (checkpoint,) = (tmp_path / "out" / "checkpoints").iterdir()
        assert re.search(place, checkpoint.name)
    assert cli.main(words) == 0
    found, whole = written(tmp_path / "out"), written(told[1])
    assert without_measured(found["trials"]) == without_measured(whole["trials"])
    assert without_measured(found["runs"]) == without_measured(whole["runs"])


def test_restart_lets_everyone_compete_again(images, out, monkeypatch):
    """Another method wins then, whose runs and model alone are there."""
    before = written(out)["runs"][0]["method"]
    other = "l2" if before != "l2" else "plain"
    make_up_training(monkeypatch, lambda run: (100 if run.record.method == other else 0, 1.0))
    assert cli.main(arguments(images, out, *AUTO, "--restart")) == 0
    found = written(out)
    assert [(run["method"], run["seed"]) for run in found["runs"]] == [(other, 0), (other, 1)]
    assert len(found["trials"]) == 18 and [path.name for path in (out / "models").iterdir()] == [f"{other}-seed0"]
