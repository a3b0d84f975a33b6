"""Measures what DELTA loses when its pretrained network computes in half precision: distances, gradients, accuracy.

    python benchmarks/source_dtype.py [--dtype float16] [--seeds N] [-- FINETUNE OPTIONS]

trains delta and delta_attention by ``python -m talib_fast finetune`` at five labels per class, with the pretrained
network as it is and in half precision, and writes ``results.json`` and ``table.md``. Before that it trains delta once.
While the network drifts from the pretrained one, it compares the distance of their maps and its gradient in both
precisions. This takes a quarter of an hour on two CPU cores.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import accuracy
import command
import report
import torch
from report import align, markdown
from torch import Tensor

from talib_fast import networks
from talib_fast.finetune.frozen import frozen
from talib_fast.images.sample import load_sample
from talib_fast.ops import squared_distance
from talib_fast.storage import write_atomically
from talib_fast.training.comparison import Comparison, mean_and_deviation
from talib_fast.training.data import TaskData
from talib_fast.training.methods import Method
from talib_fast.training.splits import Shares, split
from talib_fast.training.trainer import MOMENTUM

METHODS = ("delta", "delta_attention")
LABELS, SEEDS = 5, 5
STEPS = (0, 10, 30, 60, 120)  # after which distances are compared
LR, BATCH, SIZE = 0.02, 24, 64  # as in finetune


def finetune(source_dtype: str, options: argparse.Namespace) -> dict[str, Any]:
    """The results of ``finetune`` with the pretrained network in this dtype."""
    folder = options.runs / source_dtype
    arguments = ["--method", ",".join(METHODS), "--seeds", str(options.seeds), "--labels-per-class", str(LABELS)]
    arguments += ["--source-dtype", source_dtype, "--out", str(folder), *options.finetune]
    failure = f"source_dtype.py: no results with the pretrained network in {source_dtype}"
    return accuracy.run_finetune(failure, folder, arguments)


def relative(found: Tensor, right: Tensor) -> float:
    return float((found.double() - right.double()).norm() / right.double().norm())


def distances(dtype: torch.dtype) -> list[dict[str, float]]:
    """The relative errors of distance and gradient in this dtype, at several steps of a training with delta."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = networks.build("mobilenet_v2", SIZE)
    splits = split(load_sample(), None, None, Shares(LABELS, test_images=10), seed=0)
    data = TaskData(splits, network.preprocessing, seed=0, batch_size=BATCH, augmentation="shift", device=device)
    torch.manual_seed(0)
    method = Method(network, data.num_classes, "delta", {})
    method.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    delta: Any = method.parts["delta"]
    reduced = frozen(delta.source.module, delta.layers, dtype)  # of a copy that has not been called yet
    optimizer = torch.optim.SGD(method.parameter_groups(LR), momentum=MOMENTUM, nesterov=True)
    found = []
    for step, batch in enumerate(data.batches(0, max(STEPS) + 1)):
        if step in STEPS:
            method.train()
            target, _ = delta.target_outputs(batch.images)
            maps = [map_.detach().requires_grad_() for map_ in target.values()]
            sides = []
            for source in (reduced, delta.source):
                distance = squared_distance(maps, list(source(batch.images).values()))[0]
                gradients = torch.autograd.grad(distance, maps)
                sides.append((distance.detach(), torch.cat([gradient.flatten() for gradient in gradients])))
            (distance, gradient), (exact, right) = sides
            found.append({"step": step, "distance": relative(distance, exact), "gradient": relative(gradient, right)})
        loss, _ = method.train()(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return found


def collect(options: argparse.Namespace) -> dict[str, Any]:
    compared = distances(command.DTYPES[options.dtype])
    found = {dtype: finetune(dtype, options) for dtype in ("network", options.dtype)}
    settings = found["network"]["settings"]
    del settings["source_dtype"]
    return {
        "environment": report.environment(torch.device(settings["device"])),
        "settings": settings,
        "dtype": options.dtype,
        "distances": compared,
        "runs": accuracy.runs("source_dtype", found),
    }


def tables(results: dict[str, Any]) -> list[tuple[list[list[str]], str]]:
    """Two tables with their captions: errors by step, and accuracies."""
    dtype, settings = results["dtype"], results["settings"]
    errors = [["step", "distance", "gradient"]]
    for row in results["distances"]:
        errors.append([str(row["step"]), *(f"{100 * row[name]:.2g} %" for name in ("distance", "gradient"))])
    rows = [["method", "as the network is", dtype, "difference"]]
    for method in METHODS:
        own, other = (by_seed(results, method, name) for name in ("network", dtype))
        cells = [mean_and_deviation(list(accuracies.values())) for accuracies in (own, other)]
        difference = Comparison(dtype, "network", {seed: other[seed] - own[seed] for seed in own}, 1)
        rows.append([method, *cells, f"{difference.mean:+.1f} ± {difference.half_width:.1f}"])
    seeds = len(by_seed(results, METHODS[0], "network"))
    return [
        (
            errors,
            f"Relative error of delta's distance, and of its gradient, with the pretrained MobileNetV2 in {dtype}, "
            "after that many steps on MNIST digits.",
        ),
        (
            rows,
            f"Accuracy on {settings['test_images']} test images, %, mean ± sample standard deviation over {seeds} "
            f"seeds, {LABELS} labels per class, and the mean difference of one seed's, ± half its 95 % confidence "
            "interval.",
        ),
    ]


def by_seed(results: dict[str, Any], method: str, dtype: str) -> dict[int, float]:
    """The accuracies of the runs with a method and dtype."""
    own = [run for run in results["runs"] if (run["method"], run["source_dtype"]) == (method, dtype)]
    return {run["seed"]: run["accuracy"] for run in own}


def publish(results: dict[str, Any], folder: Path) -> None:
    """Print both tables, and write them and the results."""
    write_atomically(folder / "results.json", lambda file: file.write((json.dumps(results, indent=1) + "\n").encode()))
    parts = []
    for lines, caption in tables(results):
        print(align(lines), caption, sep="\n\n", end="\n\n")
        parts += [markdown(lines), caption]
    page = "\n\n".join([*parts, report.origin(results["environment"])]) + "\n"
    write_atomically(folder / "table.md", lambda file: file.write(page.encode()))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    made.add_argument("--seeds", type=int, default=SEEDS, help="2 or more (%(default)s)")
    made.add_argument("--runs", type=Path, default=Path("runs/source_dtype"), metavar="DIR", help="%(default)s")
    made.add_argument("--out", type=Path, help="folder; results/ beside this file")
    made.add_argument("--from-json", type=Path, metavar="DIR", help="train nothing, write the tables anew")
    made.add_argument("finetune", nargs="*", metavar="-- OPTIONS", help="further options of finetune")
    options = made.parse_args(arguments)
    if options.seeds < 2:
        made.error(f"expected 2 seeds or more, got {options.seeds}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    command.collect_and_publish(
        options, collect, publish, lambda device: options.out or command.RESULTS / device / "source_dtype"
    )


if __name__ == "__main__":
    main()
