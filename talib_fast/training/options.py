"""The options of ``python -m talib_fast finetune``, checked before anything is loaded, and their defaults."""

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
STEPS, EPOCHS = 120, 10  # whichever takes longer, where neither is given
SAMPLE_LABELS, SAMPLE_SIZE, SAMPLE_TEST_IMAGES = 5, 64, 1000
VAL_SHARE = 0.1  # of all labelled images, where there are no images for validation
AUTO, AUTO_TRIALS = "auto", 3
# what says where runs came from and where they go, and changes nothing in their figures
RECORDS = (
    *("methods", "data", "test", "skip_damaged", "weights", "epochs", "seeds", "device", "threads", "workers"),
    *("out", "keep", "tensorboard", "restart"),
)


@dataclass(frozen=True)
class Options:
    """Everything the user can choose.

    ``trade_offs`` holds the chosen or default value of every method, ``own`` those of the settings that one method has.
    None is what :meth:`resolved` finds out from the data and the network. With ``auto`` the methods compete, by
    successive halving; with ``tune`` each one's settings are searched in so many trials.
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
        """How the images are split, of resolved options."""
        labels, most = (None if value == "all" else value for value in (self.labels_per_class, self.test_images))
        assert not isinstance(labels, str) and not isinstance(most, str)
        return Shares(labels, self.val_share or 0.0, self.test_share, most)

    @property
    def wanted_size(self) -> int | None:
        """Side of the images; None: what the network was pretrained with."""
        return self.image_size or (SAMPLE_SIZE if self.sample else None)

    def resolved(self, size: int, validates: bool, tests: bool) -> "Options":
        """The defaults that depend on the data and the network filled in.

        Args:
            size: side of the images that the network takes.
            validates, tests: whether there are images of their own for validation and testing.
        """
        labels = self.labels_per_class or (SAMPLE_LABELS if self.sample else "all")
        unused = self.tune and labels != "all"  # are the images for validation, with a number of labels
        if validates and self.val_share is not None and not unused:
            raise UsageError(f"--val-share has no use where {self.data} has a folder for validation: leave it out")
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
        """The number of steps filled in, for so many training images."""
        if self.steps is not None:
            return self
        needed = math.ceil((self.epochs or EPOCHS) * training_images / self.batch_size)
        return replace(self, steps=needed if self.epochs else max(needed, STEPS))

    def settings(self) -> dict[str, Any]:
        """What two runs must share for their accuracies to belong into one table, under the options' own names.

        Files count by their content, which the caller adds, and not by their path.
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
        help="folder of images, DIR/class/name.jpg, or DIR/{train,val,test}/class/name.jpg; the class is the path of "
        "the folder that holds the image, so class folders may be nested; default: built-in digits",
    )
    add(
        "--test",
        metavar="DIR",
        help="folder of images to test on, DIR/class/name.jpg (--data's, if it has one)",
    )
    add(
        "--labels-per-class",
        type=whole_or_all,
        metavar="N|all",
        help=f"labelled images of each class (all; {SAMPLE_LABELS} of the digits)",
    )
    add(
        "--val-share",
        type=share,
        metavar="S",
        help=f"share of the labelled images held out for validation, where --data has none for it ({VAL_SHARE}, or 0 "
        "with a number of labels per class)",
    )
    add(
        "--folds",
        type=whole(2),
        metavar="K",
        help="for --tune: K-fold cross-validation over the labelled images (where these are few: 3)",
    )
    add(
        "--test-share",
        type=share,
        default=Shares.test_share,
        metavar="S",
        help="share of all images held out for testing, where there is no folder for it and all are labelled "
        "(%(default)s)",
    )
    add(
        "--test-images",
        type=whole_or_all,
        metavar="N|all",
        help=f"test on so many at most (all; {SAMPLE_TEST_IMAGES} of what a number of labels per class leaves over)",
    )
    add("--skip-damaged", action="store_true", help="leave out image files that can't be read")
    add("--image-size", type=whole(8), metavar="N", help=f"side in pixels (the network's; {SAMPLE_SIZE} for digits)")
    add(
        "--augment",
        choices=(*SHIFTS, *CROPS),
        help="change of the training images; standard: random crop, flip and colours (standard; shift for digits)",
    )


def add_network_arguments(add: Any) -> None:
    add("--network", default="mobilenet_v2", help="mobilenet_v2 (default), timm:NAME or torchvision:NAME")
    add("--weights", metavar="FILE", help="state dict, .pth or .safetensors, to use instead of the published weights")
    add("--delta-layers", metavar="A,B,...", help="modules of the network whose outputs delta compares")


def add_training_arguments(group: Any) -> None:
    add = group.add_argument
    add(
        "--method",
        default="all",
        metavar="A,B+C,...",
        help="methods, several at once joined by +; all (default): each alone; auto: all compete, with other "
        "combinations that are named beside it, and the best is trained",
    )
    add(
        "--tune",
        type=whole(1),
        metavar="N",
        help="search each method's learning rate, trade-off and own settings in N trials, judged on labelled images "
        f"that are not for testing (auto: {AUTO_TRIALS} settings of each method)",
    )
    length = group.add_mutually_exclusive_group()
    length.add_argument(
        "--steps",
        type=whole(1),
        metavar="N",
        help=f"training steps of each run ({STEPS} or {EPOCHS} epochs, whichever is more)",
    )
    length.add_argument("--epochs", type=whole(1), metavar="N", help="how often a run sees each training image")
    add("--batch-size", type=whole(2), default=24, metavar="N", help="images in a step (%(default)s)")
    add(
        "--optimizer",
        choices=tuple(LEARNING_RATES),
        default="sgd",
        help="SGD with Nesterov momentum, or AdamW (%(default)s)",
    )
    rates = ", ".join(f"{rate:g} with {name}" for name, rate in LEARNING_RATES.items())
    add("--lr", type=positive, help=f"learning rate; the backbone has a tenth of it ({rates})")
    add("--weight-decay", type=number, metavar="X", help="instead of the methods' own, where they have one")
    add("--schedule", choices=tuple(SCHEDULES), default="step", help="of the learning rate (%(default)s)")
    add(
        "--warmup",
        type=whole(0),
        default=0,
        metavar="N",
        help="steps over which the learning rate rises (%(default)s)",
    )
    add("--class-weights", action="store_true", help="let the classes count alike, however many images each has")
    add(
        "--trade-off",
        type=trade_off,
        action="append",
        default=[],
        metavar="METHOD=X",
        help="weight of what the method adds; may be repeated",
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
        help="what delta's and delta_attention's pretrained network computes in; network: as it was (%(default)s)",
    )


def add_run_arguments(add: Any) -> None:
    add("--seeds", type=seeds, default="1", metavar="N|A,B,...", help="how many, from 0 on, or which (%(default)s)")
    add(
        "--evaluations",
        type=whole(1),
        default=6,
        metavar="N",
        help="how often a run is measured on its way, the last step included (%(default)s)",
    )
    add("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, ...")
    add("--amp", action="store_true", help="mixed precision: bfloat16 on a CPU, float16 elsewhere")
    add("--threads", type=whole(1), metavar="N", help="CPU threads (one per core)")
    add("--workers", type=whole(0), metavar="N", help="processes that read images (one per core, 8 at most)")
    add("--out", default="runs/finetune", metavar="DIR", help="for results, models and checkpoints (%(default)s)")
    add(
        "--keep",
        choices=KEEP,
        default="best",
        help="models to keep; best: by trials or validation images, one of each method without them (%(default)s)",
    )
    add("--tensorboard", action="store_true", help="write curves for TensorBoard, to tensorboard/ in --out")
    add("--restart", action="store_true", help="train again what is finished; what was interrupted is resumed")


def describe_methods() -> str:
    """The methods, their default trade-offs, what they weight and their own settings, for ``--help``."""
    lines = []
    for name, recipe in RECIPES.items():
        lines.append(f"  {name:<17}{recipe.trade_off:<7g}{recipe.adds}")
        lines += [f"{'':<26}--set {name}.{own}={value.default:g}: {value.meaning}" for own, value in recipe.own.items()]
    return "\n".join(["methods, their default trade-off, and what it weights:", *lines])


def parse(arguments: argparse.Namespace) -> Options:
    """The options that the command line gave; raises UsageError."""
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
    """Raise UsageError where options do not fit together."""
    if options.own["bss.k"] > options.batch_size:
        raise UsageError(
            f"--set bss.k={options.own['bss.k']:g} is more than there are singular values in a batch of "
            f"{options.batch_size}: lower it, or raise --batch-size"
        )
    if options.folds and not options.tune:
        raise UsageError("--folds are for trials, and there are none: add --tune N or --method auto, or leave it out")
    if options.folds and options.val_share is not None:
        raise UsageError("--folds and --val-share are two ways to judge a trial: leave one of them out")
    if options.tune and options.val_share == 0:
        raise UsageError("trials have to be judged on some images: leave out --val-share 0")
    if options.tune and options.labels_per_class == 1:
        raise UsageError(
            "trials need two labelled images of a class, to train on one and to judge by the other: raise "
            "--labels-per-class 1, or leave out --tune and auto"
        )


def parse_methods(text: str) -> tuple[tuple[str, ...], bool]:
    """The methods, and whether they compete."""
    names = [name.replace(" ", "") for name in text.split(",") if name.strip()]
    if not names:
        raise UsageError(f"--method is empty: it knows all, {AUTO}, {', '.join(RECIPES)}")
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
    if name not in RECIPES or name in ALONE:
        without = " and ".join(ALONE)
        raise argparse.ArgumentTypeError(f"{text} should be METHOD=VALUE with a method other than {without}")
    weight = number(value)
    if name == "stochnorm" and weight > 1:
        raise argparse.ArgumentTypeError(f"stochnorm's p is a probability, {value} is greater than 1")
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
