"""The command ``export``: write a trained classifier as an ONNX file or as a torch.export program."""

import argparse
import contextlib
import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UsageError, UserError, first_line, printable
from ..libraries import needed
from ..version import __version__
from . import output
from .model import ImageClassifier, load

INPUT, OUTPUT = "images", "logits"
BATCH = 2  # batch of the traced example; torch.export would treat a batch of one as a constant
CHECKED = (1, 3)  # other batch sizes, on which the file must compute the same as the network
TOLERANCE = 1e-3  # relative to the largest logit; another order of float32 operations differs by a hundredth of it
LARGEST = 2**31 - 1  # the most bytes of one ONNX file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    output.add_model(parser)
    parser.add_argument("file", metavar="FILE.onnx|FILE.pt2", help="the file to write: ONNX, or for torch.export.load")


def run(parsed: argparse.Namespace) -> int:
    """Export, check that the result computes the same as the network, and write the file; returns 0."""
    path = Path(parsed.file)
    if path.suffix.lower() not in EXPORTERS:
        raise UsageError(f"{printable(path)} does not end in {' or '.join(EXPORTERS)}: choose one of these formats")
    export = EXPORTERS[path.suffix.lower()]
    output.check_target(path, "FILE")
    if path.suffix.lower() == ".onnx":
        require("onnx", "onnxscript", "onnxruntime")
    classifier = load(parsed.model)
    exported = export(classifier, printable(path))
    difference = largest_difference(classifier, exported.compute, printable(path))
    output.write(path, lambda file: file.write(exported.content))
    size = classifier.preprocessing.size
    print(
        f"{printable(path)}: {len(exported.content) / 2**20:.1f} MiB, {exported.kind}\n"
        f"  {INPUT}: float32 [batch, 3, {size}, {size}], normalised (see its metadata)\n"
        f"  {OUTPUT}: float32 [batch, {len(classifier.classes)}]\n"
        f"Checked by {exported.checker} on batches of {' and '.join(map(str, CHECKED))} images: the logits differ from "
        f"the network's by at most {difference:.1g}."
    )
    return 0


def require(*packages: str) -> None:
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(
            f"exporting to ONNX needs {' and '.join(missing)}, not installed here: pip install {' '.join(missing)}"
        )


@dataclass(frozen=True)
class Exported:
    """The content of a file, and a function that computes with it.

    Attributes:
        content: the bytes of the file.
        kind: the format, in words.
        checker: the library that ``compute`` uses.
        compute: normalised images → logits.
    """

    content: bytes
    kind: str
    checker: str
    compute: Callable[[Tensor], Tensor]


def to_onnx(classifier: ImageClassifier, name: str) -> Exported:
    onnxruntime = needed("onnxruntime", "exporting to ONNX")
    shapes = ({0: torch.export.Dim("batch")},)
    with told(name):
        program = torch.onnx.export(
            classifier.module,
            (example(classifier),),
            dynamo=True,
            verbose=False,
            external_data=False,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=shapes,
        )
        assert program is not None
        program.model.metadata_props.update(metadata(classifier))
        proto = program.model_proto
        if proto.ByteSize() > LARGEST:
            raise ValueError("an ONNX file holds at most 2 GiB, choose .pt2")
        content = proto.SerializeToString()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def compute(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])

    opset = next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))
    return Exported(content, f"ONNX, opset {opset}", f"onnxruntime {onnxruntime.__version__}", compute)


def to_pt2(classifier: ImageClassifier, name: str) -> Exported:
    with told(name):
        program = torch.export.export(
            classifier.module, (example(classifier),), dynamic_shapes=({0: torch.export.Dim("batch")},)
        )
        file = io.BytesIO()
        torch.export.save(program, file, extra_files=metadata(classifier))
        content = file.getvalue()
        compute = torch.export.load(io.BytesIO(content)).module()
    return Exported(content, f"torch.export of torch {torch.__version__}", "torch.export.load", compute)


EXPORTERS: dict[str, Callable[[ImageClassifier, str], Exported]] = {".onnx": to_onnx, ".pt2": to_pt2}


def example(classifier: ImageClassifier, batch: int = BATCH) -> Tensor:
    """Random images, normalised as photographs are."""
    size = classifier.preprocessing.size
    images = torch.randint(
        0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    return classifier.preprocessing.normalize(images).contiguous()


def metadata(classifier: ImageClassifier) -> dict[str, str]:
    """The file's metadata for its users, as JSON: classes, preprocessing, network and method."""
    kept = {key: classifier.config.get(key) for key in ("classes", "preprocessing", "network", "method")}
    return {key: json.dumps(value, ensure_ascii=False) for key, value in kept.items()} | {"talib_fast": __version__}


@contextlib.contextmanager
def told(name: str) -> Iterator[None]:
    """A context that hides the exporter's output and turns its errors into UserErrors of one sentence."""
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    except Exception as error:  # the exporter raises its own errors and those of the traced module
        raise UserError(
            f"{name} cannot be exported ({first_line(cause(error))[:300]}): choose another format, "
            f"{' or '.join(EXPORTERS)}"
        ) from error
    finally:
        logging.disable(disabled)


def cause(error: BaseException) -> BaseException:
    """The first error in a chain of errors that were raised from each other."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def largest_difference(classifier: ImageClassifier, compute: Callable[[Tensor], Tensor], name: str) -> float:
    """The largest difference between the logits of file and network; raises UserError if it exceeds the tolerance."""
    largest = 0.0
    for batch in CHECKED:
        images = example(classifier, batch)
        with told(name), torch.inference_mode():
            right, found = classifier.module(images), compute(images)
            difference = (found - right).abs().max().item() if found.shape == right.shape else float("inf")
        if not difference <= TOLERANCE * right.abs().max().item():
            raise UserError(
                f"{name} is not written: its logits of {batch} images differ from the network's by {difference:.1e}; "
                f"choose another format, {' or '.join(EXPORTERS)}"
            )
        largest = max(largest, difference)
    return largest
