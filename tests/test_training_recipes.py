import itertools

import pytest

from talib_fast.errors import UsageError
from talib_fast.training.recipes import RECIPES, canonical, own_defaults, parse, weight_decay


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("plain", "plain"),
        ("stochnorm+bss", "bss+stochnorm"),
        (" stochnorm + bss ", "bss+stochnorm"),
        ("bss+stochnorm+co_tuning", "co_tuning+bss+stochnorm"),
        ("stochnorm+delta", "delta+stochnorm"),
        ("l2+lwf", "lwf+l2"),
    ],
)
def test_order_of_the_parts_does_not_matter(name, expected):
    assert canonical(name) == expected and "+".join(parse(expected)) == expected


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "sgd",
            r"there is no method sgd: choose from all, plain, linear, l2,.* and combinations such as bss\+stoch",
        ),
        ("bss+sgd", r"there is no method sgd in bss\+sgd"),
        ("bss+", r"there is no method \(empty\) in bss\+"),
        ("", r"there is no method \(empty\): "),
        ("bss+stochnorm+bss", r"bss\+stochnorm\+bss names bss twice: leave one out"),
    ],
)
def test_wrong_names(name, message):
    with pytest.raises(UsageError, match=message):
        parse(name)


def combines(first, second):
    if {first, second} & {"plain", "linear"}:
        return False
    one_of = ({"co_tuning", "lwf", "bi_tuning"}, {"l2", "l2_sp", "delta", "delta_attention"})
    if any({first, second} <= group for group in one_of):
        return False
    return not ("bi_tuning" in (first, second) and {first, second} & {"delta", "delta_attention"})


@pytest.mark.parametrize(("first", "second"), [*itertools.combinations(RECIPES, 2)])
def test_which_pairs_combine(first, second):
    for name in (f"{first}+{second}", f"{second}+{first}", f"{first}+{second}+bss"):
        if "bss" in (first, second) and name.count("bss") > 1:
            continue
        if combines(first, second):
            assert set(parse(name)) >= {first, second}
        else:
            with pytest.raises(UsageError, match=r"cannot be combined, because .*: leave one of them out") as refused:
                parse(name)
            assert "bss" in name or all(part in str(refused.value) for part in (first, second))


def test_weight_decay_is_the_smallest_of_the_parts():
    assert weight_decay("bss") == weight_decay("bss+stochnorm") == RECIPES["bss"].weight_decay > 0
    assert weight_decay("delta+stochnorm") == weight_decay("co_tuning+l2_sp") == 0


def test_own_settings_and_their_defaults():
    assert own_defaults() == {
        "l2_sp.head_decay": 1e-2,
        "delta.head_decay": 1e-2,
        "delta_attention.head_decay": 1e-2,
        "bss.k": 1,
        "lwf.temperature": 3.0,
        "bi_tuning.temperature": 0.07,
    }
    for recipe in RECIPES.values():
        for setting in recipe.own.values():
            assert setting.low <= setting.default <= setting.high and setting.meaning
            assert setting.low > 0 or not setting.log
