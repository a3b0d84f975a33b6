"""The options of ``python -m talib_fast finetune`` and their defaults, checked before anything is loaded."""

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..argument_types import number, positive, whole
from ..errors import UsageError
from ..images.augmentation import CROPS, SHIFTS
from .recipes import ALONE, RECIPES, canonical, own_defaults
from .schedules import SCHEDULES
from .splits import Shares

SOURCE_DTYPES = ("network", "bfloat16", "float16")
LEARNING_RATES = {"sgd": 0.02, "adamw": 1e-3}
KEEP = ("best", "all", "none")
STEPS, EPOCHS = 120, 10  # the default is the longer of the two
SAMPLE_LABELS, SAMPLE_SIZE, SAMPLE_TEST_IMAGES = 5, 64, 1000
VAL_SHARE = 0.1  # of all labelled images, if there is no folder for validation
AUTO, AUTO_TRIALS = "auto", 3
# options that do not change a run's figures, or that are recorded in another form
RECORDS = (
    *("methods", "data", "test", "skip_damaged", "weights", "epochs", "seeds", "device", "threads", "workers"),
    *("out", "keep", "tensorboard", "restart"),
)


@dataclass(frozen=True)
class Options:
    """All options of the command.

    ``trade_offs`` holds the chosen or default trade-off of every method. ``own`` holds the settings that only one
    method has. :meth:`resolved` and :meth:`with_steps` replace None by a default that depends on the data and the
    network. With ``auto`` the methods compete by successive halving. ``tune`` is the number of trials in which each
    method's settings are searched.
    """

    methods: tuple[str, ...]
    auto: bool
    data: str
    test: str | None
    labels_per_class: int | str | None
    val_share: float | None
    folds: int | None
    test_share: float
    test_images: int | str | None
    skip_damaged: bool
    network: str
    weights: str | None
    delta_layers: tuple[str, ...]
    image_size: int | None
    augment: str | None
    seeds: tuple[int, ...]
    steps: int | None
    epochs: int | None
    batch_size: int
    optimizer: str
    lr: float | None
    weight_decay: float | None
    schedule: str
    warmup: int
    class_weights: bool
    trade_offs: dict[str, float]
    own: dict[str, float]
    source_dtype: str
    tune: int | None
    evaluations: int
    device: str
    amp: bool
    threads: int | None
    workers: int | None
    out: str
    keep: str
    tensorboard: bool
    restart: bool

    @property
    def sample(self) -> bool:
        return self.data == "sample"

    @property
    def shares(self) -> Shares:
        """How the images are split; the options must be resolved."""
        labels, most = (None if value == "all" else value for value in (self.labels_per_class, self.test_images))
        assert not isinstance(labels, str) and not isinstance(most, str)
        return Shares(labels, self.val_share or 0.0, self.test_share, most)

    @property
    def wanted_size(self) -> int | None:
        """Side of the images in pixels; None: the network's own."""
        return self.image_size or (SAMPLE_SIZE if self.sample else None)

    def resolved(self, size: int, validates: bool, tests: bool) -> "Options":
        """The options with the defaults that depend on the data and the network.

        Args:
            size: side of the images that the network takes.
            validates, tests: whether there are separate images for validation and for testing.

        Raises:
            UsageError: ``--val-share`` is given although there are images for validation.
        """
        labels = self.labels_per_class or (SAMPLE_LABELS if self.sample else "all")
        val_is_unused = self.tune and labels != "all"  # then trials are judged by a share of the labelled images
        if validates and self.val_share is not None and not val_is_unused:
            raise UsageError(
                f"--val-share has no effect, because {self.data} has a folder for validation: leave it out"
            )
        val_share = VAL_SHARE if self.val_share is None and labels == "all" else self.val_share
        return replace(
            self,
            labels_per_class=labels,
            val_share=self.val_share if self.tune else 0.0 if validates else val_share or 0.0,
            test_images=self.test_images or (SAMPLE_TEST_IMAGES if not tests and labels != "all" else "all"),
            image_size=size,
            augment=self.augment or ("shift" if self.sample else "standard"),
            lr=LEARNING_RATES[self.optimizer] if self.lr is None else self.lr,
        )

    def with_steps(self, training_images: int) -> "Options":
        """The options with the number of steps for so many training images."""
        if self.steps is not None:
            return self
        needed = math.ceil((self.epochs or EPOCHS) * training_images / self.batch_size)
        return replace(self, steps=needed if self.epochs else max(needed, STEPS))

    def settings(self) -> dict[str, Any]:
        """The settings, by option name, that runs must share so that one table can compare them.

        The caller adds the content of files; their paths do not count.
        """
        chosen = asdict(self)
        for name in RECORDS:
            del chosen[name]
        chosen["delta_layers"] = list(self.delta_layers)
        chosen["candidates"] = list(self.methods) if chosen.pop("auto") else None
        own = chosen.pop("own")
        return chosen | {f"trade_off {name}": value for name, value in chosen.pop("trade_offs").items()} | own


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``finetune`` on a parser."""
    add_data_arguments(parser.add_argument_group("images").add_argument)
    add_network_arguments(parser.add_argument_group("network").add_argument)
    add_training_arguments(parser.add_argument_group("training"))
    add_run_arguments(parser.add_argument_group("runs").add_argument)


def add_data_arguments(add: Any) -> None:
    add(
        "--data",
        default="sample",
        metavar="DIR",
        help="folder of images: DIR/class/name.jpg, or DIR/{train,val,test}/class/name.jpg; the class is the path of "
        "the image's folder, so class folders may be nested (default: built-in digits)",
    )
    add(
        "--test",
        metavar="DIR",
        help="folder of images to test on, DIR/class/name.jpg (default: --data's folder test, if it has one)",
    )
    add(
        "--labels-per-class",
        type=whole_or_all,
        metavar="N|all",
        help=f"use so many labelled images of each class (default: all; {SAMPLE_LABELS} for the digits)",
    )
    add(
        "--val-share",
        type=share,
        metavar="S",
        help="share of the labelled images held out for validation if --data has no folder for it (default: "
        f"{VAL_SHARE}, or 0 with a number of labels per class)",
    )
    add(
        "--folds",
        type=whole(2),
        metavar="K",
        help="with --tune: judge trials by K-fold cross-validation over the labelled images (default: 3 if these are "
        "few)",
    )
    add(
        "--test-share",
        type=share,
        default=Shares.test_share,
        metavar="S",
        help="share of all images held out for testing if there is no folder for it and all labels are used "
        "(default: %(default)s)",
    )
    add(
        "--test-images",
        type=whole_or_all,
        metavar="N|all",
        help=f"test on at most so many images (default: all, or {SAMPLE_TEST_IMAGES} with a number of labels per class "
        "and no folder for testing)",
    )
    add("--skip-damaged", action="store_true", help="leave out image files that cannot be read")
    add(
        "--image-size",
        type=whole(8),
        metavar="N",
        help=f"side of the images in pixels (default: the network's; {SAMPLE_SIZE} for the digits)",
    )
    add(
        "--augment",
        choices=(*SHIFTS, *CROPS),
        help="augmentation of the training images; standard: random crop, flip and colours (default: standard; shift "
        "for the digits)",
    )


def add_network_arguments(add: Any) -> None:
    add("--network", default="mobilenet_v2", help="mobilenet_v2 (default), timm:NAME or torchvision:NAME")
    add("--weights", metavar="FILE", help="state dict (.pth or .safetensors) to use instead of the published weights")
    add(
        "--delta-layers",
        metavar="A,B,...",
        help="modules of the network whose outputs delta and delta_attention compare",
    )


def add_training_arguments(group: Any) -> None:
    add = group.add_argument
    add(
        "--method",
        default="all",
        metavar="A,B+C,...",
        help="methods, and combinations of methods joined by +; all (default): each method alone; auto: all methods "
        "compete, together with the combinations named beside it, and the best is trained",
    )
    add(
        "--tune",
        type=whole(1),
        metavar="N",
        help="search each method's learning rate, trade-off and own settings in N trials, judged by labelled images "
        f"that are not test images (with auto: N settings of each method compete, default {AUTO_TRIALS})",
    )
    length = group.add_mutually_exclusive_group()
    length.add_argument(
        "--steps",
        type=whole(1),
        metavar="N",
        help=f"training steps of each run (default: {STEPS} or {EPOCHS} epochs, whichever is more)",
    )
    length.add_argument("--epochs", type=whole(1), metavar="N", help="how often a run sees each training image")
    add("--batch-size", type=whole(2), default=24, metavar="N", help="images in a step (default: %(default)s)")
    add(
        "--optimizer",
        choices=tuple(LEARNING_RATES),
        default="sgd",
        help="SGD with Nesterov momentum, or AdamW (default: %(default)s)",
    )
    rates = ", ".join(f"{rate:g} with {name}" for name, rate in LEARNING_RATES.items())
    add("--lr", type=positive, help=f"learning rate; the backbone's is a tenth of it (default: {rates})")
    add(
        "--weight-decay",
        type=number,
        metavar="X",
        help="weight decay of the methods that use the optimiser's (default: each method's own)",
    )
    add(
        "--schedule",
        choices=tuple(SCHEDULES),
        default="step",
        help="schedule of the learning rate (default: %(default)s)",
    )
    add(
        "--warmup",
        type=whole(0),
        default=0,
        metavar="N",
        help="steps over which the learning rate rises (default: %(default)s)",
    )
    add("--class-weights", action="store_true", help="give all classes the same weight, however many images each has")
    add(
        "--trade-off",
        type=trade_off,
        action="append",
        default=[],
        metavar="METHOD=X",
        help="weight of the method's term in the loss; may be repeated",
    )
    add(
        "--set",
        type=own_setting,
        action="append",
        default=[],
        metavar="METHOD.NAME=X",
        help="a setting that only one method has; may be repeated",
    )
    add(
        "--source-dtype",
        choices=SOURCE_DTYPES,
        default="network",
        help="dtype in which the pretrained network of delta and delta_attention computes; network: its own dtype "
        "(default: %(default)s)",
    )


def add_run_arguments(add: Any) -> None:
    add(
        "--seeds",
        type=seeds,
        default="1",
        metavar="N|A,B,...",
        help="number of seeds, counted from 0, or a list of seeds (default: %(default)s)",
    )
    add(
        "--evaluations",
        type=whole(1),
        default=6,
        metavar="N",
        help="how often a run's accuracy is measured, the last step included (default: %(default)s)",
    )
    add("--device", default="auto", help="auto (default: the first GPU, else the CPU), cpu, cuda, cuda:1, ...")
    add("--amp", action="store_true", help="mixed precision: bfloat16 on a CPU, float16 elsewhere")
    add("--threads", type=whole(1), metavar="N", help="CPU threads (default: one per core)")
    add(
        "--workers",
        type=whole(0),
        metavar="N",
        help="processes that read images (default: one per core, 8 at most)",
    )
    add(
        "--out",
        default="runs/finetune",
        metavar="DIR",
        help="folder for results, models and checkpoints (default: %(default)s)",
    )
    add(
        "--keep",
        choices=KEEP,
        default="best",
        help="models to keep; best: chosen by trials or validation images, or without them one model of each method "
        "(default: %(default)s)",
    )
    add("--tensorboard", action="store_true", help="write curves for TensorBoard to the folder tensorboard in --out")
    add("--restart", action="store_true", help="train finished runs again; interrupted runs are resumed")


def describe_methods() -> str:
    """The methods with their default trade-offs, their terms and their own settings, for ``--help``."""
    lines = []
    for name, recipe in RECIPES.items():
        lines.append(f"  {name:<17}{recipe.trade_off:<7g}{recipe.adds}")
        lines += [f"{'':<26}--set {name}.{own}={value.default:g}: {value.meaning}" for own, value in recipe.own.items()]
    return "\n".join(["methods, their default trade-off, and the term that it weights:", *lines])


def parse(arguments: argparse.Namespace) -> Options:
    """The options of a parsed command line; raises UsageError."""
    values = vars(arguments)
    overrides = dict(values.pop("trade_off"))
    methods, auto = parse_methods(values.pop("method"))
    if auto and values["tune"] is None:
        values["tune"] = AUTO_TRIALS
    options = Options(
        methods=methods,
        auto=auto,
        delta_layers=tuple(name for name in (values.pop("delta_layers") or "").split(",") if name),
        trade_offs={name: overrides.get(name, recipe.trade_off) for name, recipe in RECIPES.items()},
        own=own_defaults() | dict(values.pop("set")),
        **{name: values[name] for name in Options.__dataclass_fields__ if name in values},
    )
    check_together(options)
    return options


def check_together(options: Options) -> None:
    """Raise UsageError if options contradict each other."""
    if options.own["bss.k"] > options.batch_size:
        raise UsageError(
            f"--set bss.k={options.own['bss.k']:g} is more than the number of singular values of a batch of "
            f"{options.batch_size}: lower it, or raise --batch-size"
        )
    if options.folds and not options.tune:
        raise UsageError("--folds has no effect without trials: add --tune N or --method auto, or leave it out")
    if options.folds and options.val_share is not None:
        raise UsageError("--folds and --val-share are two ways to judge a trial: leave one of them out")
    if options.tune and options.val_share == 0:
        raise UsageError("trials need images that judge them: leave out --val-share 0")
    if options.tune and options.labels_per_class == 1:
        raise UsageError(
            "trials need two labelled images of a class, one to train on and one that judges: raise "
            "--labels-per-class 1, or leave out --tune and auto"
        )


def parse_methods(text: str) -> tuple[tuple[str, ...], bool]:
    """The methods that ``--method`` names, and whether they compete."""
    names = [name.replace(" ", "") for name in text.split(",") if name.strip()]
    if not names:
        raise UsageError(f"--method is empty: choose from all, {AUTO}, {', '.join(RECIPES)}")
    auto = AUTO in names
    if auto or "all" in names:
        names = [*RECIPES, *(name for name in names if name not in (AUTO, "all"))]
    chosen: dict[str, str] = {}
    for name in names:
        chosen.setdefault(canonical(name), name)
    return tuple(chosen.values()), auto


def whole_or_all(text: str) -> int | str:
    return "all" if text == "all" else whole(1)(text)


def share(text: str) -> float:
    value = number(text)
    if value >= 1:
        raise argparse.ArgumentTypeError(f"{text} is not less than 1")
    return value


def seeds(text: str) -> tuple[int, ...]:
    """The seeds: ``5`` means 0 to 4, and ``0,3,7`` is a list (``7,`` for a single seed)."""
    parts: Sequence[str] = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text} is neither a number of seeds nor a list like 0,3,7")
    if "," not in text:
        if int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text} is less than one seed")
        return tuple(range(int(text)))
    return tuple(dict.fromkeys(int(part) for part in parts))


def trade_off(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    if name not in RECIPES or name in ALONE:
        without = " and ".join(ALONE)
        raise argparse.ArgumentTypeError(f"{text} should be METHOD=VALUE with a method other than {without}")
    weight = number(value)
    if name == "stochnorm" and weight > 1:
        raise argparse.ArgumentTypeError(f"{value} is greater than 1, but stochnorm's trade-off p is a probability")
    return name, weight


def own_setting(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    defaults = own_defaults()
    if name not in defaults:
        raise argparse.ArgumentTypeError(f"{text} should be METHOD.NAME=VALUE with one of {', '.join(defaults)}")
    method, _, own = name.partition(".")
    if RECIPES[method].own[own].whole:
        return name, whole(1)(value)
    return name, positive(value) if own == "temperature" else number(value)
