"""Time Bi-Tuning's training step without its networks, compared with upstream's loop over samples.

One command measures all candidates interleaved and writes ``results.json`` (raw samples), ``table.md``, ``plot.png``::

    python benchmarks/bench_bi_tuning.py [--device cuda] [--quick] [--out DIR]

``--from-json DIR`` writes the table and the plot again from ``DIR/results.json``.

Both encoders are a head and a projector on 2048 given features. A step consists of their forward passes, the updates of
the key encoder and of the queues, both contrastive losses, and the backward pass to the features and the projector. The
cases vary one of C, b and K at a time around CUB-200's C = 200 with b = 48 and K = 40.
"""

import argparse
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import command
import harness
import report
import torch
import torch.nn.functional as F
from baselines import UpstreamBiTuning
from harness import Candidate, Feed, OperatorCalls
from report import LOOKS, Case, Goal, Spread, error_bars, progress, seconds, speedup
from torch import Tensor, nn

from talib_fast.finetune.bi_tuning import BiTuning, Classifier

OPERATION = "bi_tuning"
FEATURES = 2048
C, B, K = 200, 48, 40
OVER_C = tuple((c, B, K) for c in (10, 50, 100, C, 400))
OVER_B = tuple((C, b, K) for b in (16, 32, B, 96))
OVER_K = tuple((C, B, k) for k in (10, 20, K))
SIZES = tuple(dict.fromkeys(((C, B, K), *OVER_C, *OVER_B, *OVER_K)))
PARTS = ("forward", "backward", "both")
OURS, UPSTREAM = "talib_fast", "upstream"
LIMIT = "the product for logits_y alone"
GPU_FACTOR = 20
MOST_CALLS = 60


class Given(nn.Module):
    """A backbone whose features are its inputs."""

    out_features = FEATURES

    def forward(self, x: Tensor) -> Tensor:
        return x


@dataclass(frozen=True)
class Setting:
    """Number of classes, batch size and queue length."""

    classes: int
    batch: int
    K: int
    device: str

    @property
    def label(self) -> str:
        return f"C={self.classes}, b={self.batch}, K={self.K}"

    def feed(self) -> Feed:
        torch.manual_seed(0)
        im_q, im_k = torch.randn(2, self.batch, FEATURES, device=self.device)
        labels = torch.randint(self.classes, (self.batch,), device=self.device)
        return Feed((nn.Parameter(im_q),), torch.ones((), device=self.device), (im_k, labels))

    def model(self, kind: type[BiTuning]) -> BiTuning:
        torch.manual_seed(0)
        query, key = (Classifier(Given(), self.classes, pool_layer=nn.Identity()) for _ in range(2))
        return kind(query, key, self.classes, self.K).to(self.device)

    def candidates(self) -> list[Candidate]:
        """Everything that is timed, talib_fast first."""
        found = []
        for name, kind in ((OURS, BiTuning), (UPSTREAM, UpstreamBiTuning)):
            model = self.model(kind)
            projector = tuple(model.encoder_q.projector.parameters())
            found.append(Candidate(name, functools.partial(both_losses, model), projector))
        # in the layout of the module's own product
        queue = torch.randn(self.classes * self.K, FEATURES + 1, device=self.device).T.contiguous().T
        weight = torch.randn(self.batch, FEATURES + 1, device=self.device)
        return [*found, Candidate(LIMIT, lambda *_: queue @ weight.T)]


def both_losses(model: Callable[..., Any], im_q: Tensor, im_k: Tensor, labels: Tensor) -> Tensor:
    """The sum of the contrastive losses."""
    _, logits_z, logits_y, labels_c = model(im_q, im_k, labels)
    losses = (F.kl_div(logits, labels_c, reduction="batchmean") for logits in (logits_z, logits_y))
    return sum(losses, start=logits_z.new_zeros(()))


def timed(setting: Setting, rounds: int) -> Case:
    """The raw samples of one setting."""
    progress(setting.label)
    samples, repetitions = harness.interleaved(
        torch.device(setting.device), setting.candidates(), [setting.feed()], rounds
    )
    return {
        "label": setting.label,
        "classes": setting.classes,
        "batch": setting.batch,
        "K": setting.K,
        "passes_per_sample": repetitions,
        "samples": samples,
    }


def calls(setting: Setting) -> dict[str, dict[str, int]]:
    """The number of operators that a forward pass calls outside the encoders, and how many of them ask for a value."""
    found = {}
    for name, kind in ((OURS, BiTuning), (UPSTREAM, UpstreamBiTuning)):
        model, feed = setting.model(kind), setting.feed()
        with OperatorCalls(model.encoder_q, model.encoder_k) as called:
            model(*feed.arguments)
        found[name] = {"operators": len(called.names), "values asked for": called.names.count("_local_scalar_dense")}
    return found


def goals(results: dict[str, Any]) -> list[Goal]:
    """The goals, with the figures that decide them."""
    ours, found = results["calls"][OURS], []
    if results["settings"]["device"] == "cuda":
        main = [case for case in results["cases"] if (case["classes"], case["batch"], case["K"]) == (C, B, K)]
        found.append(
            Goal(
                f"forward + backward at least {GPU_FACTOR}× upstream at C={C}, b={B}, K={K}",
                GPU_FACTOR,
                {case["label"]: speedup(case, UPSTREAM, OURS, "both").median for case in main},
                limits={case["label"]: limit(case).median for case in main},
            )
        )
    return [
        *found,
        Goal(
            f"fewer than {MOST_CALLS} operators called outside the encoders",
            MOST_CALLS - 1,
            {"forward": ours["operators"]},
            at_most=True,
        ),
        Goal("no value asked for on the host", 0, {"forward": ours["values asked for"]}, at_most=True),
    ]


def limit(case: Case) -> Spread:
    """Upstream's time over that of the product which every way has to compute."""
    pairs = zip(seconds(case, UPSTREAM, "both"), seconds(case, LIMIT, "forward"), strict=True)
    return Spread.of([upstream / product for upstream, product in pairs])


def table(results: dict[str, Any]) -> list[list[str]]:
    """A row per size."""
    gpu = results["settings"]["device"] == "cuda"
    header = ["sizes", *(f"{part} / upstream" for part in PARTS), "limit"]
    if gpu:
        header += ["host-bound / upstream", "both, µs"]
    lines = [header]
    for case in results["cases"]:
        line = [case["label"], *(str(speedup(case, UPSTREAM, OURS, part)) for part in PARTS), str(limit(case))]
        if gpu:
            line.append(str(speedup(case, UPSTREAM, OURS, "wall")))
            line.append(f"{1e6 * Spread.of(seconds(case, OURS, 'both')).median:.0f}")
        lines.append(line)
    return lines


CAPTION = (
    "Columns with / : how many times as long as talib_fast upstream's loop over samples takes, median (quartiles) of "
    "the rounds' ratios. limit: how many times as long as PyTorch's product of the queue of features with the classes' "
    "weights upstream's step takes, which is the most that a step with that product can gain. Operators called in a "
    "forward pass outside the encoders: {ours} against {upstream}; {ours_asked} and {upstream_asked} of them ask for a "
    "value on the host."
)


def caption(results: dict[str, Any]) -> str:
    ours, upstream = (results["calls"][name] for name in (OURS, UPSTREAM))
    return CAPTION.format(
        ours=ours["operators"],
        upstream=upstream["operators"],
        ours_asked=ours["values asked for"],
        upstream_asked=upstream["values asked for"],
    )


def draw(results: dict[str, Any]) -> Any:
    """The figure: speed over upstream against C, b and K."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 3.6), layout="constrained")
    by_size = {(case["classes"], case["batch"], case["K"]): case for case in results["cases"]}
    panels = (
        ("classes", OVER_C, f"b={B}, K={K}"),
        ("batch", OVER_B, f"C={C}, K={K}"),
        ("K", OVER_K, f"C={C}, b={B}"),
    )
    for axes, (name, sizes, rest) in zip(figure.subplots(1, 3, sharey=True), panels, strict=True):
        cases = [by_size[size] for size in sizes]
        shown = {
            "talib_fast": [speedup(case, UPSTREAM, OURS, "both") for case in cases],
            "limit": [limit(case) for case in cases],
        }
        for (label, spreads), (colour, marker) in zip(shown.items(), LOOKS, strict=False):
            axes.errorbar(
                [case[name] for case in cases], [s.median for s in spreads], yerr=error_bars(spreads),
                fmt=f"{marker}-", color=colour, ms=4.5, lw=1.2, label=label,
            )  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_yticks([1, 2, 4, 8, 16, 32], ["1×", "2×", "4×", "8×", "16×", "32×"])
        axes.set_xlabel(name)
        axes.set_title(rest, fontsize=10)
        axes.set_xticks([case[name] for case in cases], [str(case[name]) for case in cases])
        axes.minorticks_off()
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    title = "Bi-Tuning: speed over upstream's loop, forward + backward of a step without its networks"
    report.entitle(figure, title, results)
    return figure


def publish(results: dict[str, Any], folder: Path) -> None:
    """Print the results, and write the table and the plot."""
    draw_results = functools.partial(draw, results)
    report.publish(results, folder, table(results), caption(results), goals(results), draw_results)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    made = command.parser(__doc__, dtypes=False, layouts=False, batch=False)
    return command.parse(made, arguments, OPERATION)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure everything that the options ask for."""
    settings = [Setting(*size, options.device) for size in SIZES]
    return {
        "operation": OPERATION,
        "environment": report.environment(torch.device(options.device)),
        "settings": {"device": options.device, "rounds": options.rounds, "units": "seconds per step"},
        "calls": calls(settings[0]),
        "cases": (timed(setting, options.rounds) for setting in settings),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    report.run(parse(arguments), run, goals, publish)


if __name__ == "__main__":
    main()
