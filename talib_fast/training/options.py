"""The options of ``python -m talib_fast finetune``, checked before anything is loaded, and the methods' defaults."""

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .common import UserError

AUGMENTATIONS = ("none", "shift", "shift_flip")
SOURCE_DTYPES = ("network", "bfloat16", "float16")


@dataclass(frozen=True)
class Recipe:
    """What a method adds to the cross-entropy, the trade-off it is weighted with, and the optimiser's weight decay."""

    adds: str
    trade_off: float
    weight_decay: float = 5e-4


# Tried, not tuned: most methods got one or two values, at 5 labels per class, 120 steps of 24 images and 64 pixels, on
# two seeds other than those reported, where differences of a few points are noise.
RECIPES = {
    "plain": Recipe("nothing", 0.0),
    "l2": Recipe("half the squared norm of all weights", 5e-3, weight_decay=0.0),
    "l2_sp": Recipe("half the squared distance to the pretrained weights", 1e-2, weight_decay=0.0),
    "delta": Recipe("the distance between feature maps, summed over the batch", 1e-3, weight_decay=0.0),
    "delta_attention": Recipe("that distance with channels weighted by attention", 3e-2, weight_decay=0.0),
    "bss": Recipe("the smallest squared singular value of the batch's features", 1e-3),
    "stochnorm": Recipe("no loss; the trade-off is p, the share of channels normalised by the batch", 0.5),
    "co_tuning": Recipe("the cross-entropy of the pretrained head with its mean answer per class", 0.3),
    "lwf": Recipe("the divergence of the pretrained head from its first answers", 4.0),
    "bi_tuning": Recipe("two contrastive divergences, of projections and of logits", 1.0),
}


@dataclass(frozen=True)
class Options:
    """Everything the user can choose; ``trade_offs`` holds the chosen or default value of every method."""

    methods: tuple[str, ...]
    data: str
    network: str
    weights: str | None
    delta_layers: tuple[str, ...]
    labels_per_class: int
    seeds: tuple[int, ...]
    steps: int
    batch_size: int
    image_size: int
    lr: float
    trade_offs: dict[str, float]
    source_dtype: str
    augment: str
    test_images: int
    device: str
    amp: bool
    threads: int | None
    out: str
    restart: bool

    def settings(self) -> dict[str, Any]:
        """What two runs must share for their accuracies to belong into one table, under the options' own names."""
        chosen = asdict(self)
        for name in ("methods", "seeds", "out", "restart"):
            del chosen[name]
        chosen["delta_layers"] = list(self.delta_layers)
        return chosen | {f"trade_off {name}": value for name, value in chosen.pop("trade_offs").items()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``finetune`` on a parser."""
    add = parser.add_argument
    add("--method", default="all", metavar="A,B,...", help="methods, or all (default)")
    add(
        "--data", default="sample", metavar="DIR", help="folder of images, DIR/class/name.png; default: built-in digits"
    )
    add("--network", default="mobilenet_v2", help="mobilenet_v2 (default), timm:NAME or torchvision:NAME")
    add("--weights", metavar="FILE", help="state dict to use instead of the published weights")
    add("--delta-layers", metavar="A,B,...", help="modules of the network whose outputs delta compares")
    add("--labels-per-class", type=whole(1), default=5, metavar="N", help="training images per class (%(default)s)")
    add("--seeds", type=seeds, default="1", metavar="N|A,B,...", help="how many, from 0 on, or which (%(default)s)")
    add("--steps", type=whole(1), default=120, metavar="N", help="training steps of each run (%(default)s)")
    add("--batch-size", type=whole(2), default=24, metavar="N", help="images in a step (%(default)s)")
    add("--image-size", type=whole(8), default=64, metavar="N", help="side of the images in pixels (%(default)s)")
    add("--lr", type=positive, default=0.02, help="learning rate; the backbone has a tenth of it (%(default)s)")
    add(
        "--trade-off",
        type=trade_off,
        action="append",
        default=[],
        metavar="METHOD=X",
        help="weight of what the method adds; may be repeated",
    )
    add(
        "--source-dtype",
        choices=SOURCE_DTYPES,
        default="network",
        help="what delta's and delta_attention's pretrained network computes in; network: as it was (%(default)s)",
    )
    add("--augment", choices=AUGMENTATIONS, default="shift", help="change of the training images (%(default)s)")
    add("--test-images", type=whole(1), default=1000, metavar="N", help="test on so many at most (%(default)s)")
    add("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, ...")
    add("--amp", action="store_true", help="mixed precision: bfloat16 on a CPU, float16 elsewhere")
    add("--threads", type=whole(1), metavar="N", help="CPU threads (one per core)")
    add("--out", default="runs/finetune", metavar="DIR", help="for results, plots and checkpoints (%(default)s)")
    add("--restart", action="store_true", help="train again what is finished; what was interrupted is resumed")


def describe_methods() -> str:
    """The methods, their default trade-offs and what they weight, for ``--help``."""
    lines = [f"  {name:<17}{recipe.trade_off:<7g}{recipe.adds}" for name, recipe in RECIPES.items()]
    return "\n".join(["methods, their default trade-off, and what it weights:", *lines])


def parse(arguments: argparse.Namespace) -> Options:
    """The options that the command line gave; raises UserError."""
    values = vars(arguments)
    overrides = dict(values.pop("trade_off"))
    return Options(
        methods=parse_methods(values.pop("method")),
        delta_layers=tuple(name for name in (values.pop("delta_layers") or "").split(",") if name),
        trade_offs={name: overrides.get(name, recipe.trade_off) for name, recipe in RECIPES.items()},
        **{name: values[name] for name in Options.__dataclass_fields__ if name in values},
    )


def parse_methods(text: str) -> tuple[str, ...]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if names == ["all"]:
        return tuple(RECIPES)
    for name in names:
        if name not in RECIPES:
            raise UserError(f"there is no method {name}: --method knows all, {', '.join(RECIPES)}")
    if not names:
        raise UserError(f"--method is empty: it knows all, {', '.join(RECIPES)}")
    return tuple(dict.fromkeys(names))


def whole(least: int) -> Any:
    """An argparse type: a whole number of at least ``least``."""

    def convert(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least {least}")
        return int(text)

    return convert


def positive(text: str) -> float:
    value = number(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"{text} is not greater than 0")
    return value


def number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 0")
    return value


def seeds(text: str) -> tuple[int, ...]:
    """``5`` means the seeds 0 to 4; ``0,3,7`` (or ``7,`` for a single one) lists them."""
    parts: Sequence[str] = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text} is neither a number of seeds nor a list like 0,3,7")
    if "," not in text:
        if int(text) < 1:
            raise argparse.ArgumentTypeError("at least one seed is needed")
        return tuple(range(int(text)))
    return tuple(dict.fromkeys(int(part) for part in parts))


def trade_off(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    if name not in RECIPES or name == "plain":
        raise argparse.ArgumentTypeError(f"{text} should be METHOD=VALUE with a method other than plain")
    weight = number(value)
    if name == "stochnorm" and weight > 1:
        raise argparse.ArgumentTypeError(f"stochnorm's p is a probability, {value} is greater than 1")
    return name, weight
