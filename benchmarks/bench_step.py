"""Times whole training steps, forward, backward and SGD: every method against plain fine-tuning and against upstream's.

One command measures all candidates interleaved and writes ``results.json`` (raw samples), ``table.md``, ``plot.png``::

    python benchmarks/bench_step.py [--device cuda] [--quick] [--out DIR]

``--from-json DIR`` writes the table and the plot anew from ``DIR/results.json``.

The networks are ResNet-50 at 224 pixels and, on a CPU, the main job's MobileNetV2 at 64, with random weights. A
method's step is the main job's; upstream's is the same with its parts composed as the Transfer-Learning-Library does.
Peak memory is what a step takes beyond weights, gradients and optimizer state.
"""

import argparse
import copy
import functools
import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import baselines
import command
import harness
import report
import torch
from command import DTYPES, QUICK_BATCH, QUICK_ROUNDS
from harness import Candidate, Feed
from report import LOOKS, Case, Goal, Spread, error_bars, progress, speedup
from resnet import ResNet50
from torch import Tensor, nn

from talib_fast.finetune.bi_tuning import BiTuning
from talib_fast.finetune.stochnorm import convert_model
from talib_fast.training import networks
from talib_fast.training.data import Batch
from talib_fast.training.memory import PeakMemory, release_memory
from talib_fast.training.methods import METHODS, TEMPERATURE, Method
from talib_fast.training.networks import MOBILENET_DELTA_LAYERS, MobileNetV2, Network
from talib_fast.training.options import RECIPES
from talib_fast.training.trainer import MOMENTUM

OPERATION = "step"
PLAIN, OURS, UPSTREAM = "plain", "talib_fast", "upstream"
BOTH = "stochnorm + bss"
WAYS = (*(name for name in METHODS if name != PLAIN), BOTH)  # what is compared with plain fine-tuning
SAMPLES = 256  # images whose source logits LWF remembers
LR = 0.01


@dataclass(frozen=True)
class Workload:
    """What a network is trained on."""

    build: Callable[[], Network]
    size: int
    batch: Mapping[str, int]
    classes: int
    keys: int  # in Bi-Tuning's queue, of each class
    rounds: Mapping[str, int]


def mobilenet_v2() -> Network:
    backbone = MobileNetV2()
    return Network("mobilenet_v2", backbone, nn.Linear(backbone.out_features, 1000), None, MOBILENET_DELTA_LAYERS)


WORKLOADS = {
    "mobilenet_v2": Workload(mobilenet_v2, 64, {"cpu": 24, "cuda": 24}, 10, 8, {"cpu": 31, "cuda": 31}),
    "resnet50": Workload(
        lambda: networks.cut("resnet50", ResNet50(), 64), 224, {"cpu": 16, "cuda": 48}, 200, 40, {"cpu": 5, "cuda": 15}
    ),
}
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

    @property
    def label(self) -> str:
        return f"{self.network}, {self.way}"

    @property
    def workload(self) -> Workload:
        return WORKLOADS[self.network]


def method_of(setting: Setting, way: str, upstream: bool) -> Method:
    """The method with all that it learns before the first step, made up."""
    work = setting.workload
    network = work.build()
    torch.manual_seed(0)
    if way in ("stochnorm", BOTH):
        convert(network.backbone, RECIPES["stochnorm"].trade_off, upstream)
        way = PLAIN if way == "stochnorm" else "bss"
    method = METHODS[way](network, work.classes, RECIPES[way].trade_off)
    knowledge: dict[str, Tensor] = {}
    if way == "bi_tuning":
        classifier = method.classifier
        kind = baselines.UpstreamBiTuning if upstream else BiTuning
        method.encoders = kind(classifier, copy.deepcopy(classifier), work.classes, K=work.keys)
    elif way == "delta_attention":
        for layer in method.layers:  # type: ignore[union-attr]
            modules = method.source.get_submodule(layer).modules()  # type: ignore[union-attr]
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
        compose_as_upstream(method, way)
    return method.train()


def convert(backbone: nn.Module, p: float, upstream: bool) -> None:
    """Turn every BatchNorm into ours, or into upstream's composition."""
    if not upstream:
        convert_model(backbone, p)
        return
    for module in list(backbone.modules()):
        for name, child in module.named_children():
            if type(child) is nn.BatchNorm2d:
                setattr(module, name, baselines.UpstreamComposition(child.num_features, p))


class Composed(nn.Module):
    """A function in a module's place."""

    def __init__(self, function: Callable[..., Tensor], *first: Any) -> None:
        super().__init__()
        self.function, self.first = function, first

    def forward(self, *arguments: Any) -> Tensor:
        return self.function(*self.first, *arguments)


def compose_as_upstream(method: Any, way: str) -> None:
    """Put upstream's compositions where the method has the project's parts."""
    backbone = list(method.classifier.backbone.parameters())
    if way == "l2":
        method.squared_norm = Composed(baselines.upstream_l2, list(method.classifier.parameters()))
    elif way == "l2_sp":
        method.distance = Composed(baselines.upstream_l2, backbone, [weight.detach().clone() for weight in backbone])
    elif way in ("delta", "delta_attention"):
        attention = [[method.knowledge[layer] for layer in method.layers]] if way == "delta_attention" else []
        distance = baselines.upstream_attention if attention else baselines.upstream_behavioral
        method.distance = Composed(lambda source, target: distance([*source.values()], [*target.values()], *attention))
    elif way == "bss":
        method.shrinkage = Composed(lambda features: baselines.upstream_spectral_tail(features, 1))
    elif way == "co_tuning":
        method.source_loss = baselines.upstream_co_tuning
    elif way == "lwf":
        method.source_loss = functools.partial(baselines.upstream_distillation, T=TEMPERATURE)
    if way in ("l2_sp", "delta", "delta_attention"):
        method.head_norm = Composed(baselines.upstream_l2, list(method.classifier.head.parameters()))


def step_of(setting: Setting, way: str, upstream: bool = False) -> Callable[..., Tensor]:
    """A training step on a batch, which returns the loss."""
    method = method_of(setting, way, upstream)
    recipe = RECIPES["bss" if way == BOTH else way]
    optimizer = torch.optim.SGD(
        method.classifier.get_parameters(LR), momentum=MOMENTUM, nesterov=True, weight_decay=recipe.weight_decay
    )
    autocast = torch.autocast(setting.device, DTYPES[setting.dtype], enabled=setting.dtype != "float32")

    def step(labels: Tensor, indices: Tensor, *views: Tensor) -> Tensor:
        with autocast:
            loss, _ = method(Batch(views[: method.views], labels, indices))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def sides(setting: Setting) -> dict[str, Callable[[], Callable[..., Tensor]]]:
    """How to make each candidate's step, ours first."""
    return {
        OURS: lambda: step_of(setting, setting.way),
        PLAIN: lambda: step_of(setting, PLAIN),
        UPSTREAM: lambda: step_of(setting, setting.way, upstream=True),
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
    """The raw samples of one setting; a sample's ``forward`` is a whole step."""
    candidates = [Candidate(name, make()) for name, make in sides(setting).items()]
    samples, _ = harness.interleaved(torch.device(setting.device), candidates, [feed_of(setting)], setting.rounds)
    return {
        "label": setting.label,
        **{name: getattr(setting, name) for name in ("network", "way", "layout", "dtype", "batch")},
        "samples": samples,
    }


def peak_bytes(setting: Setting) -> dict[str, int]:
    """By how much a step raises memory at its peak, when weights and optimizer state are there."""
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
    """How many times as long as plain fine-tuning's a candidate's step takes."""
    return speedup(case, candidate, PLAIN, "forward")


def goals(results: dict[str, Any]) -> list[Goal]:
    """What is to be reached, with the figures that decide it."""
    device = results["settings"]["device"]

    def figures(*ways: str) -> dict[str, float]:
        return {
            f"{case['label']}, {case['layout']}, {case['dtype']}": over_plain(case, OURS).median
            for case in results["cases"]
            if case["way"] in ways
        }

    if device == "cuda":
        return [Goal("StochNorm + BSS at most 1.02× plain fine-tuning", 1.02, figures(BOTH), at_most=True)]
    return [Goal("StochNorm faster than BatchNorm, below 1×", 1.0, figures("stochnorm"), at_most=True)]


def table(results: dict[str, Any]) -> list[list[str]]:
    """A row per method, layout and precision."""
    header = ["step", "layout", "dtype", f"time / {PLAIN}", f"{UPSTREAM} / talib_fast", f"memory / {PLAIN}"]
    lines = [[*header, f"{UPSTREAM}'s memory / {PLAIN}"]]
    for case in results["cases"]:
        peaks = case["peak_bytes"]
        lines.append(
            [
                *(case["label"], case["layout"], case["dtype"]),
                *(str(over_plain(case, OURS)), str(speedup(case, UPSTREAM, OURS, "forward"))),
                *(f"{peaks[name] / peaks[PLAIN]:.2f}" for name in (OURS, UPSTREAM)),
            ]
        )
    return lines


CAPTION = (
    "A step is forward, backward and SGD with Nesterov's momentum. Times: median (quartiles) of the rounds' ratios. "
    "Memory: what a step takes at its peak beyond weights, gradients and optimizer state."
)


def draw(results: dict[str, Any]) -> Any:
    """The figure: time over plain fine-tuning's by method, ours and upstream's, a panel per network and layout."""
    from matplotlib.figure import Figure

    panels: dict[str, list[Case]] = {}
    for case in results["cases"]:
        panels.setdefault(f"{case['network']}, {case['layout']}, {case['dtype']}", []).append(case)
    most = max(map(len, panels.values()))
    figure = Figure(figsize=(3.2 + 3.4 * len(panels), 1.7 + 0.32 * most), layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False)
    for axes, (title, cases) in zip(grid.flat, panels.items(), strict=True):
        for number, (name, (colour, marker)) in enumerate(zip((OURS, UPSTREAM), LOOKS, strict=False)):
            spreads = [over_plain(case, name) for case in cases]
            places = [place + 0.2 * (number - 0.5) for place in range(len(cases))]
            middles = [spread.median for spread in spreads]
            bars = error_bars(spreads)
            axes.errorbar(middles, places, xerr=bars, fmt=marker, color=colour, ms=4.5, lw=1.2, label=name)
        axes.set_title(title, fontsize=10)
        axes.set_xlim(left=0)
        report.label_rows(axes, [case["way"] for case in cases])
    handles, names = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2, frameon=False)
    report.entitle(figure, "A training step: time over plain fine-tuning's", results)
    return figure


def publish(results: dict[str, Any], folder: Path) -> None:
    """Print what came out, and write table and plot."""
    report.publish(results, folder, table(results), CAPTION, goals(results), functools.partial(draw, results))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    made = command.parser(__doc__)
    made.add_argument(
        "--networks", nargs="+", choices=WORKLOADS, help="on a GPU resnet50, on a CPU both, with --quick mobilenet_v2"
    )
    made.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="methods; all")
    by_network = dict.fromkeys(("cpu", "cuda"), 0)

    def full(options: argparse.Namespace) -> bool:
        return not (options.networks or options.batch) and len(options.ways) == len(WAYS)

    return command.parse(made, arguments, OPERATION, full=full, rounds=by_network)


def settings(options: argparse.Namespace) -> list[Setting]:
    """What the options ask for. MobileNetV2 is trained in channels_last alone, as the main job does."""
    asked = []
    for network in options.networks or (QUICK_NETWORKS if options.quick else FULL_NETWORKS)[options.device]:
        work = WORKLOADS[network]
        batch = options.batch or (QUICK_BATCH if options.quick else work.batch[options.device])
        rounds = options.rounds or (QUICK_ROUNDS if options.quick else work.rounds[options.device])
        for layout in options.layouts if network == "resnet50" else ("channels_last",):
            for dtype in options.dtype:
                asked += [Setting(network, way, layout, dtype, options.device, batch, rounds) for way in options.ways]
    return asked


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure everything that the options ask for."""
    asked = settings(options)
    cases = harness.measure(asked, timed, peak_bytes, asked[0])
    progress("")
    rounds = " or ".join(sorted({str(setting.rounds) for setting in asked}, key=int))
    return {
        "operation": OPERATION,
        "environment": report.environment(torch.device(options.device)),
        "settings": {"device": options.device, "rounds": rounds, "units": "seconds per step"},
        "cases": cases,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    report.run(parse(arguments), run, goals, publish)


if __name__ == "__main__":
    main()
