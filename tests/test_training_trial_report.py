import math

import pytest

from talib_fast.training import trial_report
from talib_fast.training.comparison import by_method
from talib_fast.training.recipes import RECIPES

COLOURS = {name: f"C{place}" for place, name in enumerate([*RECIPES, "bss+stochnorm"])}


def trial(method, number, right, steps=120, rung=0, state="finished", folds=1, **settings):
    """A trial that predicted ``right`` of 100 validation images right: the first ones, shared out among the folds."""
    digits = "1" * right + "0" * (100 - right)
    size = 100 // folds
    return {
        "method": method,
        "number": number,
        "settings": settings,
        "steps": steps,
        "rung": rung,
        "state": state,
        "of_folds": folds,
        "folds": [
            {"accuracies": [[steps, 50.0]], "cross_entropy": 1.0, "right": digits[place : place + size]}
            for place in range(0, 100, size)
        ],
        "accuracy": float(right),
        "cross_entropy": 1.0,
        "seconds": 12.5,
    }


def results_of(trials, tune=None, candidates=None):
    return {"trials": trials, "settings": {"tune": tune, "candidates": candidates, "lr": 0.02}}


def tuned():
    """Trials of three methods: one has trials of every state, one is best with its defaults, one was always pruned."""
    running = trial("l2_sp", 3, 0, state="running")
    del running["accuracy"], running["cross_entropy"]
    both = {"lr": 1.0, "trade_off bss": 0.0, "trade_off stochnorm": 0.5}
    return results_of(
        [
            trial("l2_sp", 0, 60, folds=4, **{"lr": 0.02, "trade_off l2_sp": 0.01}),
            trial("l2_sp", 1, 72, folds=4, **{"lr": 0.0512345, "trade_off l2_sp": 0.1, "l2_sp.head_decay": 3}),
            trial("l2_sp", 2, 90, state="pruned", **{"lr": 0.5, "trade_off l2_sp": 1.0}),
            running,
            trial("plain", 0, 65, lr=0.02),
            trial("plain", 1, 55, lr=0.002),
            trial("bss+stochnorm", 0, 20, state="pruned", **both),
        ],
        tune=4,
    )


def halved():
    """Three methods with two candidates each: bss wins, delta reaches the last rung too, plain the first one alone."""
    first = {("plain", 0): 30, ("plain", 1): 20, ("delta", 0): 50, ("delta", 1): 49, ("bss", 0): 48, ("bss", 1): 55}
    trials = [trial(method, number, right, 30, 0, lr=0.1) for (method, number), right in first.items()]
    trials += [trial("bss", 1, 60, 60, 1, lr=0.1), trial("delta", 0, 58, 60, 1), trial("delta", 1, 57, 60, 1)]
    trials += [trial("bss", 1, 70, 120, 2, lr=0.1), trial("delta", 0, 66, 120, 2)]
    return results_of(trials, tune=2, candidates=["plain", "bss", "delta"])


def test_without_a_finished_trial_there_is_nothing_to_say():
    assert trial_report.section(results_of([])) is None
    assert trial_report.section(results_of([trial("plain", 0, 5, state="pruned")], tune=1)) is None


def test_the_settings_found_for_each_method():
    assert trial_report.section(tuned()).rows == [
        ("plain", "65.0", "65.0", "2", "0", "25", "defaults"),
        ("l2_sp", "72.0", "60.0", "2", "1", "50", "lr 0.0512, trade_off l2_sp 0.1, l2_sp.head_decay 3"),
        ("bss+stochnorm", "-", "-", "0", "1", "12", "-"),
    ]


def test_a_search_says_what_it_cost_and_what_judged_it():
    caption = trial_report.section(tuned()).caption
    assert caption.startswith(
        "Each method had 4 trials of 120 steps, and trials that fell behind were pruned: 7 trials in 88 s. "
        "Judged by 100 validation images in 4 folds. "
    )


def test_rivals_are_compared_with_the_winner_after_the_same_steps():
    results = halved()
    delta, plain = trial_report.rivals(results["trials"], results["trials"][-2])
    assert (delta.trial["method"], delta.trial["number"], delta.trial["steps"]) == ("delta", 0, 120)
    assert (plain.trial["method"], plain.trial["number"], plain.trial["steps"]) == ("plain", 0, 30)
    assert (delta.winner["accuracy"], plain.winner["accuracy"]) == (70, 55)
    assert (delta.difference, plain.difference) == (-4, -25)
    # Agresti and Min's width for 4 and 25 images on which they differ; 2.2414 is the normal quantile of 1 - 0.05 / 4
    assert delta.half_width == pytest.approx(100 * 2.241403 * math.sqrt(5 - 16 / 102) / 102)
    assert plain.half_width == pytest.approx(100 * 2.241403 * math.sqrt(26 - 625 / 102) / 102)
    assert not delta.told_apart and plain.told_apart


def test_how_close_the_others_came():
    section = trial_report.section(halved())
    assert section.rows == [
        ("bss", "120", "70.0", "-", "-", "lr 0.1"),
        ("delta", "120", "66.0", "70.0", "-4.0 ± 4.8", "defaults"),
        ("plain", "30", "30.0", "55.0", "-25.0 ± 9.8", "defaults"),
    ]
    assert section.findings == [
        "These images show no difference to bss for delta.",
        "Worse than bss beyond chance, after the same steps: plain.",
        "Candidates with fewer than 120 steps might have caught up with more steps.",
    ]
    assert section.caption.startswith(
        "3 methods with 2 settings each competed, and the better half of each rung went on: 6 of 30 steps, 3 of 60 "
        "steps, 2 of 120 steps, in 2.29 min. Judged by 100 validation images. "
    )


def test_a_candidate_is_the_same_whatever_the_order_of_its_parts():
    trials = [trial("stochnorm+bss", 0, 50, 30, 0), trial("bss+stochnorm", 0, 60, 60, 1), trial("plain", 0, 40, 30, 0)]
    (plain,) = trial_report.rivals(trials, trials[1])
    assert plain.difference == -10


def test_a_winner_without_rivals():
    section = trial_report.section(results_of([trial("bss", 0, 50)], tune=3, candidates=["bss"]))
    assert section.rows == [("bss", "120", "50.0", "-", "-", "defaults")] and not section.findings


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (119.0, "119 s"), (120.0, "2 min"), (7199, "120 min"), (9000.0, "2.5 h")]
)
def test_durations(seconds, words):
    assert trial_report.duration([{"seconds": seconds / 2}, {"seconds": seconds / 2}, {}]) == words


def test_the_plot_of_a_search():
    figure = trial_report.draw(tuned(), "title", COLOURS)
    panels = {axes.get_title(): axes for axes in figure.axes if axes.get_title()}
    assert list(panels) == ["plain", "l2_sp", "bss+stochnorm\nbss", "bss+stochnorm\nstochnorm"]
    default, chosen, pruned = panels["l2_sp"].lines
    assert [line.get_xdata()[0] for line in panels["l2_sp"].lines] == [0.02, 0.0512345, 0.5]
    assert [line.get_ydata()[0] for line in panels["l2_sp"].lines] == [60, 72, 90]
    assert [line.get_marker() for line in (default, chosen, pruned)] == ["s", "*", "o"]
    assert pruned.get_markerfacecolor() == "none" and default.get_markerfacecolor() != "none"
    # ten times the default has the last colour, and so has what is further out; a trade-off of 0 has the first
    assert chosen.get_color() == pruned.get_color() != default.get_color()
    (zero,), (half) = panels["bss+stochnorm\nbss"].lines, panels["bss+stochnorm\nstochnorm"].lines
    assert half[0].get_color() == default.get_color() and len({zero.get_color(), chosen.get_color()}) == 2
    assert panels["plain"].get_xscale() == "log"


def test_the_plot_of_halving():
    results = halved()
    figure = trial_report.draw(results, "title", COLOURS)
    (axes,) = figure.axes
    lines = {(line.get_color(), tuple(line.get_ydata())): line for line in axes.lines}
    assert len(axes.lines) == 6
    winner = lines[COLOURS["bss"], (55, 60, 70)]
    assert tuple(winner.get_xdata()) == (30, 60, 120)
    assert all(line.get_linewidth() < winner.get_linewidth() for line in axes.lines if line is not winner)
    assert lines[COLOURS["delta"], (50, 58, 66)] and lines[COLOURS["plain"], (30,)]
    names = [label.get_text() for label in figure.legends[0].get_texts()]
    assert names == list(by_method(results["trials"])) == ["plain", "delta", "bss"]
