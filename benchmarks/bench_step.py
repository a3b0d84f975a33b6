"""Time whole training steps (forward, backward, SGD): every method compared with plain fine-tuning and with upstream's.

One command measures all candidates interleaved and writes ``results.json`` (raw samples), ``table.md``, ``plot.png``::

    python benchmarks/bench_step.py [--device cuda] [--quick] [--out DIR]

``--from-json DIR`` writes the table and the plot again from ``DIR/results.json``.

The networks have random weights and are in channels_last by default:

- torchvision's ResNet-50 at 224 pixels;
- on a CPU also, at 128 pixels, the MobileNetV2 of ``finetune`` and timm's EfficientNet-B0;
- on a CPU also MobileNetV2 at 32 pixels, where the host's work for a layer counts.

All methods train in float32. StochNorm, alone and with BSS, also trains in bfloat16; EfficientNet is trained with these
two only. DELTA also runs with its pretrained network in bfloat16, and together with StochNorm. A method's step is that
of ``finetune``. Upstream's step is the same, composed as the Transfer-Learning-Library does it. With StochNorm, a plain
step without batch norms and activations is timed too, since no norm can make that part faster. ``--compile`` adds plain
fine-tuning compiled by inductor. Peak memory is the memory of a step beyond weights, gradients and optimizer state.
"Kept" is what autograd saves between the passes, except parameters, buffers and images.
"""

import argparse
import copy
import functools
import gc
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import baselines
import command
import harness
import report
import torch
from command import BOTH_DTYPES, DTYPES, QUICK_BATCH, QUICK_ROUNDS
from harness import Candidate, Feed
from report import LOOKS, Case, Goal, Spread, error_bars, speedup
from torch import Tensor, nn

from talib_fast import networks
from talib_fast.finetune.bi_tuning import BiTuning
from talib_fast.finetune.delta import IntermediateLayerGetter
from talib_fast.finetune.stochnorm import convert_model, fuse_activations
from talib_fast.images.preprocessing import Preprocessing
from talib_fast.networks import MOBILENET_DELTA_LAYERS, MobileNetV2, Network
from talib_fast.training.data import Batch
from talib_fast.training.memory import PeakMemory, release_memory
from talib_fast.training.methods import Method
from talib_fast.training.recipes import ALONE, RECIPES, weight_decay
from talib_fast.training.trainer import MOMENTUM

OPERATION = "step"
PLAIN, OURS, UPSTREAM, COMPILED, BARE = "plain", "talib_fast", "upstream", "plain compiled", "no norms"
STOCHNORM, BOTH = "stochnorm", "stochnorm + bss"
DELTA, REDUCED, WITH_DELTA = "delta", "delta, source in bfloat16", "stochnorm + delta"
WITH_STOCHNORM = (STOCHNORM, BOTH)
# what is compared with plain fine-tuning
WAYS = (*(name for name in RECIPES if name not in ALONE), BOTH, REDUCED, WITH_DELTA)
# the method of ``finetune`` that trains a way with another name; StochNorm only changes the network
TRAINED_BY = {STOCHNORM: PLAIN, BOTH: "bss", REDUCED: DELTA, WITH_DELTA: DELTA}
SAMPLES = 256  # images whose source logits LWF remembers
LR = 0.01


BATCH = {"cpu": 16, "cuda": 48}
MANY, FEW = {"cpu": 9, "cuda": 15}, {"cpu": 5, "cuda": 15}  # rounds


@dataclass(frozen=True)
class Workload:
    """A network, its training, and the goals for it."""

    build: Callable[[], Network]
    size: int
    classes: int
    rounds: Mapping[str, int]
    keys: int = 0  # in Bi-Tuning's queue, of each class
    ways: Sequence[str] = WAYS
    kept: float | None = None  # goal: at most, what StochNorm keeps for the backward pass over what plain keeps
    delta: Mapping[str, float] = field(default_factory=dict)  # goal: at most, a step with DELTA over plain's, by way


def mobilenet_v2() -> Network:
    backbone = MobileNetV2()
    return Network("mobilenet_v2", backbone, nn.Linear(backbone.out_features, 1000), None, MOBILENET_DELTA_LAYERS)


def of_library(library: str, name: str) -> Network:
    """A network with random weights."""
    return networks.cut(name, networks.library_model(library, name, pretrained=False), Preprocessing(64))


WORKLOADS = {
    "mobilenet_v2": Workload(
        mobilenet_v2, size=128, classes=10, rounds=MANY, keys=8, kept=0.75,
        delta={DELTA: 1.18, WITH_DELTA: 1.10},
    ),
    "mobilenet_v2_32": Workload(
        mobilenet_v2, size=32, classes=10, rounds=MANY, ways=(STOCHNORM,),
    ),
    "efficientnet_b0": Workload(
        functools.partial(of_library, "timm", "efficientnet_b0"), size=128, classes=10, rounds=MANY,
        ways=WITH_STOCHNORM, kept=0.78,
    ),
    "resnet50": Workload(
        functools.partial(of_library, "torchvision", "resnet50"), size=224, classes=200, rounds=FEW, keys=40,
        delta={DELTA: 1.27},
    ),
}  # fmt: skip
FULL_NETWORKS = {"cpu": tuple(WORKLOADS), "cuda": ("resnet50",)}
QUICK_NETWORKS = {"cpu": ("mobilenet_v2",), "cuda": ("resnet50",)}


@dataclass(frozen=True)
class Setting:
    """One method on one network, in one layout and precision."""

    network: str
    way: str
    layout: str
    dtype: str
    device: str
    batch: int
    rounds: int
    compiled: bool = False

    @property
    def label(self) -> str:
        return f"{self.network}, {self.way}"

    @property
    def workload(self) -> Workload:
        return WORKLOADS[self.network]


def method_of(setting: Setting, way: str, upstream: bool) -> Method:
    """The method, with made-up results of its preparation."""
    work = setting.workload
    network = work.build()
    torch.manual_seed(0)
    if way in (*WITH_STOCHNORM, WITH_DELTA):
        convert(network.backbone, RECIPES[STOCHNORM].trade_off, upstream)
    source_dtype = torch.bfloat16 if way == REDUCED else None
    way = TRAINED_BY.get(way, way)
    method = Method(network, work.classes, way, {}, source_dtype)
    part: Any = method.parts[way]
    knowledge: dict[str, Tensor] = {}
    if way == "bi_tuning":
        classifier = method.classifier
        kind = baselines.UpstreamBiTuning if upstream else BiTuning
        part.encoders = kind(classifier, copy.deepcopy(classifier), work.classes, K=work.keys)
    elif way == "delta_attention":
        for layer in part.layers:
            modules = part.source.module.get_submodule(layer).modules()
            width = [module.out_channels for module in modules if isinstance(module, nn.Conv2d)][-1]
            knowledge[layer] = torch.randn(width).softmax(0)
    elif way == "co_tuning":
        knowledge = {"relationship": torch.randn(work.classes, 1000).softmax(1)}
    elif way == "lwf":
        knowledge = {"answers": torch.randn(SAMPLES, 1000)}
    layout = torch.channels_last if setting.layout == "channels_last" else torch.contiguous_format
    method.to(setting.device, memory_format=layout)  # type: ignore[call-overload]
    method.use({name: value.to(setting.device) for name, value in knowledge.items()})
    if upstream:
        compose_as_upstream(part, way, method)
    return method.train()


def convert(backbone: nn.Module, p: float, upstream: bool) -> None:
    """Turn every BatchNorm into StochNorm, fused with its activation, or into upstream's composition."""
    if not upstream:
        fuse_activations(convert_model(backbone, p))
        return
    for module in list(backbone.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                composed = baselines.UpstreamComposition(child.num_features, p, eps=child.eps, momentum=child.momentum)
                act = getattr(child, "act", None)  # timm's norms have it in them
                setattr(module, name, composed if act is None else nn.Sequential(composed, act))


class Composed(nn.Module):
    """A module that calls a function."""

    def __init__(self, function: Callable[..., Any], *first: Any) -> None:
        super().__init__()
        self.function, self.first = function, first

    def forward(self, *arguments: Any) -> Tensor:
        return self.function(*self.first, *arguments)


def compose_as_upstream(part: Any, way: str, method: Method) -> None:
    """Replace the functions of a part by upstream's compositions."""
    backbone = list(method.classifier.backbone.parameters())
    if way == "l2":
        part.squared_norm = Composed(baselines.upstream_l2, list(method.classifier.parameters()))
    elif way == "l2_sp":
        part.distance = Composed(baselines.upstream_l2, backbone, [weight.detach().clone() for weight in backbone])
    elif way in ("delta", "delta_attention"):
        attention = [[method.knowledge[layer] for layer in part.layers]] if way == "delta_attention" else []
        distance = baselines.upstream_attention if attention else baselines.upstream_behavioral
        part.distance = Composed(lambda source, target: distance([*source.values()], [*target.values()], *attention))
        getter = IntermediateLayerGetter(part.source.module, part.layers, keep_output=False)
        part.source = Composed(torch.no_grad()(lambda images: getter(images)[0]))
    elif way == "bss":
        part.shrinkage = Composed(lambda features: baselines.upstream_spectral_tail(features, 1))
    elif way == "co_tuning":
        part.source_loss = Composed(baselines.upstream_co_tuning)
    elif way == "lwf":
        temperature = RECIPES["lwf"].own["temperature"].default
        part.source_loss = Composed(functools.partial(baselines.upstream_distillation, T=temperature))
    if way in ("l2_sp", "delta", "delta_attention"):
        part.head_norm = Composed(baselines.upstream_l2, list(method.head.parameters()))


def leave_norms_out(module: nn.Module) -> None:
    """Replace batch norms and activations by nothing. timm's norms contain their activations."""
    for name, child in module.named_children():
        if isinstance(child, (nn.BatchNorm2d, nn.ReLU, nn.ReLU6, nn.SiLU)):
            setattr(module, name, nn.Identity())
        else:
            leave_norms_out(child)


class Step:
    """A training step on a batch; called, it returns the loss."""

    def __init__(
        self, setting: Setting, way: str, upstream: bool = False, compiled: bool = False, bare: bool = False
    ) -> None:
        self.method = method_of(setting, way, upstream)
        if bare:
            leave_norms_out(self.method.classifier.backbone)
        if compiled:
            self.method.classifier.backbone.compile(dynamic=False)
        self.optimizer = torch.optim.SGD(
            self.method.parameter_groups(LR),
            momentum=MOMENTUM,
            nesterov=True,
            weight_decay=weight_decay(STOCHNORM if way == STOCHNORM else TRAINED_BY.get(way, way)),
        )
        self.autocast = torch.autocast(setting.device, DTYPES[setting.dtype], enabled=setting.dtype != "float32")

    def __call__(self, labels: Tensor, indices: Tensor, *views: Tensor) -> Tensor:
        with self.autocast:
            loss, _ = self.method(Batch(views[: self.method.views], labels, indices))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def kept_bytes(self, arguments: Sequence[Tensor]) -> int:
        """The bytes that autograd keeps for the backward pass, without parameters, buffers and the batch."""
        given = (*self.method.parameters(), *self.method.buffers(), *arguments)
        return harness.kept_bytes(lambda: self(*arguments), given)


def sides(setting: Setting) -> dict[str, Callable[[], Step]]:
    """Functions that make the step of each side, talib_fast's first."""
    return {
        OURS: lambda: Step(setting, setting.way),
        PLAIN: lambda: Step(setting, PLAIN),
        UPSTREAM: lambda: Step(setting, setting.way, upstream=True),
    }


def feed_of(setting: Setting) -> Feed:
    """A batch: labels, places in the training set, and two views of the images."""
    torch.manual_seed(0)
    work, device = setting.workload, setting.device
    layout = torch.channels_last if setting.layout == "channels_last" else torch.contiguous_format
    views = [
        torch.randn(setting.batch, 3, work.size, work.size, device=device).contiguous(memory_format=layout)
        for _ in range(2)
    ]
    labels = torch.arange(setting.batch, device=device) % work.classes
    return Feed((), torch.ones((), device=device), (labels, torch.arange(setting.batch, device=device), *views))


def timed(setting: Setting) -> Case:
    """The raw samples of one setting, whose ``forward`` is a whole step, and the bytes kept for its backward pass."""
    feed = feed_of(setting)
    steps = {name: make() for name, make in sides(setting).items()}
    kept = {name: step.kept_bytes(feed.arguments) for name, step in steps.items()}
    if setting.compiled:
        steps[COMPILED] = Step(setting, PLAIN, compiled=True)
    if setting.way == STOCHNORM:
        steps[BARE] = Step(setting, PLAIN, bare=True)
    candidates = [Candidate(name, step) for name, step in steps.items()]
    samples, _ = harness.interleaved(torch.device(setting.device), candidates, [feed], setting.rounds)
    return {
        "label": setting.label,
        **{name: getattr(setting, name) for name in ("network", "way", "layout", "dtype", "batch")},
        "kept_bytes": kept,
        "samples": samples,
    }


def peak_bytes(setting: Setting) -> dict[str, int]:
    """The bytes by which a step raises memory at its peak, above weights and optimizer state."""
    device, arguments = torch.device(setting.device), feed_of(setting).arguments
    peaks = {}
    for name, make in sides(setting).items():
        step = make()
        step(*arguments)  # makes gradients and optimizer state
        gc.collect()
        release_memory()
        peak = PeakMemory(device)
        before = peak.mib()
        step(*arguments)
        peaks[name] = round((peak.mib() - before) * 2**20)
        del step
    return peaks


def over_plain(case: Case, candidate: str) -> Spread:
    """The time of a candidate's step over plain fine-tuning's."""
    return speedup(case, candidate, PLAIN, "forward")


def kept_over_plain(case: Case, candidate: str) -> float:
    """The bytes that a candidate keeps for its backward pass, over plain fine-tuning's."""
    return case["kept_bytes"][candidate] / case["kept_bytes"][PLAIN]


def without_norms(case: Case) -> str:
    """The time of a step without norms and activations over plain fine-tuning's."""
    return str(over_plain(case, BARE)) if BARE in case["samples"] else "-"


def limit(case: Case) -> float:
    """The step without norms and activations over plain fine-tuning's, which no step with StochNorm can beat."""
    return over_plain(case, BARE).median


def by_bytes(case: Case) -> float:
    """A step with StochNorm over plain fine-tuning's, if both moved their bytes equally fast.

    The convolutions stay. Where no cache holds an activation, a fused norm and activation move 8 times its bytes, and
    separate ones move 13 times its bytes (docs/operations/stoch_norm.md).
    """
    return limit(case) + (1 - limit(case)) * 8 / 13


def measured(results: dict[str, Any], names: Sequence[str]) -> list[str]:
    """The candidates among ``names`` that were timed in any case."""
    return [name for name in names if any(name in case["samples"] for case in results["cases"])]


def place(case: Case) -> str:
    return f"{case['label']}, {case['layout']}, {case['dtype']}"


def goals(results: dict[str, Any]) -> list[Goal]:
    """The goals, with the figures that decide them."""
    cases = results["cases"]
    if results["settings"]["device"] == "cuda":
        figures = {place(case): over_plain(case, OURS).median for case in cases if case["way"] == BOTH}
        return [Goal("StochNorm + BSS at most 1.02× plain fine-tuning", 1.02, figures, at_most=True)]
    stochastic = [case for case in cases if case["way"] == STOCHNORM]
    found = []
    for network, work in WORKLOADS.items():
        if work.kept is not None:
            figures = {place(case): kept_over_plain(case, OURS) for case in stochastic if case["network"] == network}
            text = f"StochNorm keeps at most {work.kept:g}× as much for the backward pass: {network}"
            found.append(Goal(text, work.kept, figures, at_most=True))
        for way, most in work.delta.items():
            named = [case for case in cases if (case["network"], case["way"]) == (network, way)]
            figures = {place(case): over_plain(case, OURS).median for case in named}
            found.append(Goal(f"a step at most {most:g}× plain's: {network}, {way}", most, figures, at_most=True))
    figures = {place(case): over_plain(case, OURS).median for case in stochastic}
    limits = {place(case): limit(case) for case in stochastic}
    beyond = {place(case): figures[place(case)] / by_bytes(case) for case in stochastic}
    return [
        Goal("StochNorm's step at most 1× plain's", 1.0, figures, at_most=True, limits=limits),
        Goal("StochNorm's step at most 1.05× what its bytes suggest", 1.05, beyond, at_most=True),
        *found,
    ]


def table(results: dict[str, Any]) -> list[list[str]]:
    """A row per method, layout and precision."""
    against = measured(results, (UPSTREAM, COMPILED))
    header = ["step", "layout", "dtype", f"time / {PLAIN}", f"{BARE} / {PLAIN}"]
    header += [f"{name} / talib_fast" for name in against]
    for what in ("peak", "kept"):
        header += [f"{what} / {PLAIN}", f"{UPSTREAM}'s {what} / {PLAIN}"]
    lines = [header]
    for case in results["cases"]:
        peaks = case["peak_bytes"]
        speeds = (str(speedup(case, name, OURS, "forward")) if name in case["samples"] else "-" for name in against)
        lines.append(
            [
                *(case["label"], case["layout"], case["dtype"], str(over_plain(case, OURS)), without_norms(case)),
                *speeds,
                *(f"{peaks[name] / peaks[PLAIN]:.2f}" for name in (OURS, UPSTREAM)),
                *(f"{kept_over_plain(case, name):.2f}" for name in (OURS, UPSTREAM)),
            ]
        )
    return lines


CAPTION = (
    "A step is forward, backward and SGD with Nesterov's momentum. Times: median (quartiles) of the rounds' ratios. "
    f"{BARE}: plain without batch norms and activations, which StochNorm cannot be faster than, so that it is the "
    "limit beside the goals. What the bytes suggest: the step without norms and 8/13 of the rest, the share of the "
    "bytes that a fused norm has to move. Peak: what a step takes at most beyond weights, gradients and optimizer "
    "state; kept: what autograd saves for the backward pass, but for parameters, buffers and images."
)


def draw(results: dict[str, Any]) -> Any:
    """The figure: time over plain fine-tuning's by method, ours and the others', a panel per network."""
    from matplotlib.figure import Figure

    panels: dict[str, list[Case]] = {}
    for case in results["cases"]:
        panels.setdefault(case["network"], []).append(case)
    most = max(map(len, panels.values()))
    names = measured(results, (OURS, UPSTREAM, COMPILED, BARE))
    figure = Figure(figsize=(3.2 + 3.6 * len(panels), 1.7 + 0.32 * most), layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False)
    for axes, (title, cases) in zip(grid.flat, panels.items(), strict=True):
        for number, (name, (colour, marker)) in enumerate(zip(names, LOOKS, strict=False)):
            rows = [row for row, case in enumerate(cases) if name in case["samples"]]
            spreads = [over_plain(cases[row], name) for row in rows]
            places = [row + 0.2 * (number - 0.5) for row in rows]
            middles = [spread.median for spread in spreads]
            bars = error_bars(spreads)
            axes.errorbar(middles, places, xerr=bars, fmt=marker, color=colour, ms=4.5, lw=1.2, label=name)
        axes.set_title(title, fontsize=10)
        axes.set_xlim(left=0)
        report.label_rows(axes, [f"{case['way']}, {case['layout']}, {case['dtype']}" for case in cases])
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    report.entitle(figure, "A training step: time over plain fine-tuning's", results)
    return figure


def publish(results: dict[str, Any], folder: Path) -> None:
    """Print the results, and write the table and the plot."""
    report.publish(results, folder, table(results), CAPTION, goals(results), functools.partial(draw, results))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    made = command.parser(__doc__)
    made.set_defaults(layouts=["channels_last"])
    made.add_argument(
        "--networks", nargs="+", choices=WORKLOADS, help="on a GPU resnet50, on a CPU all, with --quick mobilenet_v2"
    )
    made.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="methods; all")
    made.add_argument("--compile", action="store_true", help="plain fine-tuning compiled too, beside stochnorm")
    by_network = dict.fromkeys(("cpu", "cuda"), 0)

    def full(options: argparse.Namespace) -> bool:
        return not (options.networks or options.batch) and len(options.ways) == len(WAYS)

    return command.parse(made, arguments, OPERATION, full=full, rounds=by_network, dtypes=BOTH_DTYPES)


def settings(options: argparse.Namespace) -> list[Setting]:
    """What the options ask for: all methods in float32, those with StochNorm in other dtypes too."""
    asked = []
    for network in options.networks or (QUICK_NETWORKS if options.quick else FULL_NETWORKS)[options.device]:
        work = WORKLOADS[network]
        batch = options.batch or (QUICK_BATCH if options.quick else BATCH[options.device])
        rounds = options.rounds or (QUICK_ROUNDS if options.quick else work.rounds[options.device])
        for layout, dtype in itertools.product(options.layouts, options.dtype):
            for way in options.ways:
                if way in work.ways and (dtype == "float32" or way in WITH_STOCHNORM):
                    compiled = options.compile and way == STOCHNORM
                    asked.append(Setting(network, way, layout, dtype, options.device, batch, rounds, compiled))
    return asked


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure everything that the options ask for."""
    asked = settings(options)
    rounds = " or ".join(sorted({str(setting.rounds) for setting in asked}, key=int))
    return {
        "operation": OPERATION,
        "environment": report.environment(torch.device(options.device)),
        "settings": {"device": options.device, "rounds": rounds, "units": "seconds per step"},
        "cases": harness.measure(asked, timed, peak_bytes, asked[0]),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    report.run(parse(arguments), run, goals, publish)


if __name__ == "__main__":
    main()
