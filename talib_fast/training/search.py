"""The search space of a method: its settings and their ranges."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .options import Options
from .recipes import ALONE, RECIPES, Setting, parse

LR_FACTOR, TRADE_OFF_FACTOR = 10, 30  # the range extends by this factor to either side of the option's value
P = Setting(0.5, 0.1, 0.9, log=False)  # StochNorm's trade-off is a probability


def space(method: str, options: Options) -> dict[str, Setting]:
    """The settings of a method by name (``lr``, ``trade_off bss``, ``bss.k``), with the options' values as defaults."""
    assert options.lr is not None
    found = {"lr": around(options.lr, LR_FACTOR)}
    for part in parse(method):
        trade_off = options.trade_offs[part]
        if part == "stochnorm":
            found[f"trade_off {part}"] = from_default(P, trade_off)
        elif part not in ALONE:
            found[f"trade_off {part}"] = around(trade_off, TRADE_OFF_FACTOR)
        for name, setting in RECIPES[part].own.items():
            if name == "k":
                setting = replace(setting, high=min(setting.high, options.batch_size))
            found[f"{part}.{name}"] = from_default(setting, options.own[f"{part}.{name}"])
    # a value of zero was chosen on purpose, and a logarithmic scale has no place for it
    return {name: setting for name, setting in found.items() if setting.default or not setting.log}


def around(default: float, factor: float) -> Setting:
    return Setting(default, default / factor, default * factor)


def from_default(setting: Setting, default: float) -> Setting:
    """The setting with another default; its range is widened if needed to contain it."""
    return replace(setting, default=default, low=min(setting.low, default), high=max(setting.high, default))


def defaults(settings: Mapping[str, Setting]) -> dict[str, Any]:
    return {name: setting.default for name, setting in settings.items()}


def applied(options: Options, chosen: Mapping[str, Any]) -> Options:
    """The options with the chosen settings, which are named as in :func:`space`."""
    trade_offs = {name: chosen.get(f"trade_off {name}", value) for name, value in options.trade_offs.items()}
    own = {name: chosen.get(name, value) for name, value in options.own.items()}
    return replace(options, lr=chosen.get("lr", options.lr), trade_offs=trade_offs, own=own)


def in_words(chosen: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in chosen.items())


def as_arguments(chosen: Mapping[str, Any]) -> list[str]:
    """The words of a command line that give exactly these settings."""
    arguments = []
    for name, value in chosen.items():
        if name == "lr":
            arguments += ["--lr", repr(value)]
        elif name.startswith("trade_off "):
            arguments += ["--trade-off", f"{name.removeprefix('trade_off ')}={value!r}"]
        else:
            arguments += ["--set", f"{name}={value!r}"]
    return arguments
