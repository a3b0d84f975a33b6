"""A trained classifier in a folder: its weights, and everything needed to predict images with them."""

import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from .. import networks
from ..devices import usable_device
from ..errors import UsageError, UserError, first_line, printable
from ..images.decoding import read, to_rgb
from ..images.preprocessing import CROP_MODES, INTERPOLATIONS, Preprocessing, as_floats
from ..libraries import import_library, needed
from ..networks.weights import NEW_HEAD
from ..storage import synchronize, write_atomically

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["ImageClassifier", "Prediction", "load"]

FORMAT = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"
FOLDER_OF_MODELS = "models"  # in the folder --out of finetune

ImageLike: TypeAlias = "str | PathLike[str] | Image | np.ndarray | Tensor"


def save(folder: str | PathLike[str], state: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write a model's folder, completely or not at all. An existing model is replaced; other files in the folder stay.

    Args:
        folder: the folder for ``model.safetensors`` and ``config.json``; missing parents are created.
        state: state dict in the original architecture's names, contiguous tensors that share no memory.
        config: ``network``, ``head``, ``num_classes``, ``classes``, ``preprocessing`` and further entries, all of them
            JSON values. The format's number is added, and for timm's networks the entries that ``local-dir:`` reads.

    Raises:
        UserError: ``folder`` exists and holds no model.
        OSError: ``folder`` cannot be written.
    """
    from safetensors import torch as safetensors

    folder = Path(folder)
    if folder.exists() and not (folder / CONFIG).is_file():
        raise UserError(f"{printable(folder)} exists already and holds no model: remove it, or choose another folder")
    text = json.dumps({"format": FORMAT, **config, **timm_entries(config)}, indent=1, ensure_ascii=False) + "\n"
    contents = {WEIGHTS: safetensors.save(dict(state), {"format": "pt"}), CONFIG: text.encode()}
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    try:
        temporary.mkdir(parents=True)
        for name in contents:
            write_atomically(temporary / name, lambda file, name=name: file.write(contents[name]))  # type: ignore[misc]
        synchronize_folder(temporary)
        put_in_place(temporary, folder)
        synchronize_folder(folder.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def put_in_place(new: Path, folder: Path) -> None:
    """Rename ``new`` to ``folder``; other files of an existing folder are moved into it."""
    if not folder.exists():
        new.replace(folder)
        return
    old = new.with_name(f"{new.name}.old")
    folder.rename(old)
    try:
        new.rename(folder)
    except BaseException:
        old.rename(folder)
        raise
    for path in old.iterdir():
        if path.name not in (CONFIG, WEIGHTS):
            path.rename(folder / path.name)
    shutil.rmtree(old)


def synchronize_folder(folder: Path) -> None:
    """Flush a folder's directory entries to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        synchronize(descriptor)
    finally:
        os.close(descriptor)


def timm_entries(config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that ``timm.create_model("local-dir:FOLDER", pretrained=True)`` reads; empty if that cannot work."""
    if config.get("library") != "timm":
        return {}
    timm = import_library("timm")
    name = config["network"].rpartition(":")[2]
    pretrained_cfg = timm.models.get_pretrained_cfg(name)
    if pretrained_cfg is None or pretrained_cfg.classifier != config["head"]:
        return {}  # timm's own head is another module
    kept = ("tag", "fixed_input_size", "pool_size", "first_conv", "classifier", "license", "origin_url", "paper_ids")
    preprocessing = config["preprocessing"]
    size = preprocessing["size"]
    entries: dict[str, Any] = {
        "architecture": name.partition(".")[0],
        "label_names": config["classes"],
        "pretrained_cfg": {
            **{key: value for key, value in pretrained_cfg.to_dict().items() if key in kept},
            "num_classes": config["num_classes"],
            "input_size": [3, size, size],
            **{key: preprocessing[key] for key in ("mean", "std", "interpolation", "crop_pct", "crop_mode")},
        },
    }
    if pretrained_cfg.fixed_input_size and tuple(pretrained_cfg.input_size[1:]) != (size, size):
        entries["model_args"] = {"img_size": size}
    return entries


def find(model: str | PathLike[str]) -> Path:
    """The folder of a model: ``model`` itself, or the only model in an output folder of ``finetune``.

    Raises:
        UsageError: there is no model, or there are several, which the message lists.
    """
    folder = Path(model)
    if (folder / CONFIG).is_file():
        return folder
    remedy = "name the folder of a model that finetune kept, OUT/models/METHOD-seedN"
    if not folder.is_dir():
        raise UsageError(f"there is no folder {printable(folder)}: {remedy}")
    inside = folder / FOLDER_OF_MODELS if (folder / FOLDER_OF_MODELS).is_dir() else folder
    found = sorted(path.parent for path in inside.glob(f"[!.]*/{CONFIG}"))
    if not found:
        raise UsageError(f"{printable(folder)} holds no model (a folder with a {CONFIG}): {remedy}")
    if len(found) > 1:
        raise UsageError(
            f"{printable(folder)} holds {len(found)} models: name one of {', '.join(printable(path) for path in found)}"
        )
    return found[0]


def load(folder: str | PathLike[str], device: str | torch.device = "cpu") -> "ImageClassifier":
    """Load a classifier from a model's folder, or from an output folder of ``finetune`` that holds one model.

    Loading runs no code from the folder.

    Args:
        folder: the folder of a model, or the ``--out`` of ``finetune``.
        device: where to compute; ``auto``: the first GPU, else the CPU.

    Raises:
        UsageError: there is no such folder or device, or the folder holds no model or several.
        UserError: the model is damaged, has a newer format, or needs a library that is missing.
    """
    device = usable_device(device)
    folder = find(folder)
    config = read_config(folder / CONFIG)
    state = read_weights(folder / WEIGHTS)
    classes, head = len(config["classes"]), config["head"] or NEW_HEAD
    if f"{head}.weight" in state and len(state[f"{head}.weight"]) != classes:
        raise damaged(folder, f"the head has {len(state[f'{head}.weight'])} outputs for {classes} classes")
    try:
        module = networks.restored(config["network"], config["head"], classes, state)
    except UserError as error:
        raise UserError(f"{printable(folder)} cannot be loaded: {error}") from error
    return ImageClassifier(module, config).to(device)


def read_config(path: Path) -> dict[str, Any]:
    """A model's ``config.json``, checked; raises UserError."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise damaged(path, first_line(error)) from error
    if not isinstance(config, dict) or "format" not in config or "classes" not in config:
        raise UserError(
            f"{printable(path)} does not describe a model of talib_fast: name the folder of a model that finetune kept"
        )
    if isinstance(config["format"], int) and config["format"] > FORMAT:
        raise UserError(
            f"{printable(path)} has format {config['format']}, but this talib_fast reads formats up to {FORMAT}: "
            "update talib_fast"
        )
    types: dict[str, Any] = {
        "format": int,
        "network": str,
        "head": (str, type(None)),
        "num_classes": int,
        "classes": list,
    }
    for key, expected in types.items():
        if key not in config or not isinstance(config[key], expected):
            raise damaged(path, f"{key} is {'wrong' if key in config else 'missing'}")
    classes = config["classes"]
    if not classes or not all(isinstance(name, str) for name in classes) or len(set(classes)) != len(classes):
        raise damaged(path, "the classes are not distinct names")
    if len(classes) != config["num_classes"]:
        raise damaged(path, f"it names {len(classes)} classes, but num_classes is {config['num_classes']}")
    read_preprocessing(path, config)
    return config


def read_preprocessing(path: Path, config: Mapping[str, Any]) -> Preprocessing:
    try:
        fields = dict(config["preprocessing"])
        found = Preprocessing(**fields | {key: as_floats(fields[key]) for key in ("mean", "std")})
        fine = (
            isinstance(found.size, int)
            and found.size > 0
            and len(found.mean) == len(found.std) == 3
            and found.crop_pct > 0
            and found.interpolation in INTERPOLATIONS
            and found.crop_mode in CROP_MODES
        )
    except (KeyError, TypeError, ValueError):
        fine = False
    if not fine:
        raise damaged(path, "the preprocessing is missing or wrong")
    return found


def read_weights(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise damaged(path, getattr(error, "strerror", None) or first_line(error)) from error


def damaged(path: Path, reason: str) -> UserError:
    return UserError(f"{printable(path)} is damaged ({reason}): copy the model's folder again, or train it again")


@dataclass(frozen=True, eq=False)
class Prediction:
    """The prediction for one image.

    Attributes:
        label: the most probable class.
        probability: the probability of that class.
        probabilities: the probabilities of all classes, float32 [N] on the CPU, with sum 1.
        classes: the names of the N classes.
    """

    label: str
    probability: float
    probabilities: Tensor = field(repr=False)
    classes: tuple[str, ...] = field(repr=False)

    def top(self, k: int) -> list[tuple[str, float]]:
        """The ``k`` most probable classes (or all, if there are fewer) with their probabilities, in that order."""
        if k < 1:
            raise ValueError(f"expected k of at least 1, got {k}")
        values, places = self.probabilities.sort(descending=True, stable=True)
        return [
            (self.classes[place], value) for value, place in zip(values[:k].tolist(), places.tolist(), strict=False)
        ]


class ImageClassifier:
    """A trained network with its classes and its preprocessing, always in evaluation mode.

    Args:
        module: maps normalised float32 images [B, 3, S, S] to logits [B, N].
        config: the content of ``config.json``; ``classes`` and ``preprocessing`` are read.
    """

    def __init__(self, module: nn.Module, config: Mapping[str, Any]) -> None:
        self.module = module.eval()
        self.config = dict(config)
        self.classes: tuple[str, ...] = tuple(config["classes"])
        self.preprocessing = read_preprocessing(Path(CONFIG), config)
        self.device = next((tensor.device for tensor in module.state_dict().values()), torch.device("cpu"))

    def __repr__(self) -> str:
        return f"ImageClassifier({self.config.get('network')}, {len(self.classes)} classes, on {self.device})"

    def to(self, device: str | torch.device) -> "ImageClassifier":
        """Move the network to a device; returns this classifier."""
        self.device = torch.device(device)
        self.module.to(self.device)
        return self

    def predict(self, images: "ImageLike | Iterable[ImageLike]", batch_size: int = 32) -> list[Prediction]:
        """Predict one image or several; returns a list of predictions in the order of the images.

        Args:
            images: paths, Pillow images, uint8 arrays [H, W, 3] or [H, W], uint8 tensors [3, H, W], or one uint8
                tensor [B, 3, H, W]. Images may have any size, since they are scaled and cropped for the network.
            batch_size: how many images are computed at a time.

        Raises:
            TypeError, ValueError: ``images`` is something else.
            ImageError: a file cannot be read as an image.
        """
        if batch_size < 1:
            raise ValueError(f"expected a batch_size of at least 1, got {batch_size}")
        prepared = (self.prepare(image, name) for image, name in one_by_one(images))
        predictions: list[Prediction] = []
        while batch := list(islice(prepared, batch_size)):
            predictions += map(self.prediction, self.logits(torch.stack(batch)).softmax(1))
        return predictions

    def prediction(self, probabilities: Tensor) -> Prediction:
        """The prediction for float32 probabilities [N] of one image."""
        probability, place = probabilities.max(0)
        return Prediction(self.classes[int(place)], probability.item(), probabilities, self.classes)

    def prepare(self, image: "ImageLike", name: str = "the image") -> Tensor:
        """One image as uint8 [3, S, S]; ``name`` is its name in errors."""
        if isinstance(image, str | PathLike):
            return self.preprocessing(read(image))
        return self.preprocessing(as_pillow(image, name))

    def logits(self, images: Tensor) -> Tensor:
        """Prepared images, uint8 [B, 3, S, S] on any device → float32 [B, N] on the CPU."""
        size = self.preprocessing.size
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1:] != (3, size, size):
            raise ValueError(f"expected uint8 images [B, 3, {size}, {size}], got {described(images)}")
        if not len(images):
            return torch.empty(0, len(self.classes))
        self.module.eval()
        try:
            with torch.inference_mode():
                logits = self.module(self.preprocessing.normalize(images.to(self.device)))
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"{len(images)} images at once do not fit into the memory of {self.device}: choose a smaller batch size"
            ) from error
        return logits.float().cpu().clone()  # a copy made outside of inference mode is a normal tensor


def one_by_one(images: Any) -> Iterator[tuple[Any, str]]:
    """The images that were given to predict(), each with its name for errors."""
    if isinstance(images, Tensor) and images.dim() == 4:
        check_tensor(images, ("B", 3, "H", "W"), "images")
    elif isinstance(images, str | PathLike | np.ndarray | Tensor) or is_pillow(images):
        return iter([(images, "images")])
    elif isinstance(images, bytes | Mapping) or not isinstance(images, Iterable):
        raise TypeError(unfit("images", described(images)))
    return ((image, f"images[{index}]") for index, image in enumerate(images))


def as_pillow(image: Any, name: str) -> "Image":
    """An image in memory as 8-bit RGB; raises TypeError or ValueError for anything else."""
    needed("PIL.Image", "preparing images")
    from PIL import Image

    if is_pillow(image):
        try:
            return to_rgb(image)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    if isinstance(image, Tensor):
        check_tensor(image, (3, "H", "W"), name)
        return Image.fromarray(np.ascontiguousarray(image.detach().cpu().permute(1, 2, 0).numpy()))
    if not isinstance(image, np.ndarray):
        raise TypeError(unfit(name, described(image)))
    if image.dtype != np.uint8:
        raise TypeError(unfit(name, described(image)))
    if not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)) or 0 in image.shape:
        raise ValueError(unfit(name, described(image)))
    return Image.fromarray(np.ascontiguousarray(image)).convert("RGB")


def check_tensor(image: Tensor, shape: Sequence[int | str], name: str) -> None:
    if image.dtype != torch.uint8:
        raise TypeError(unfit(name, described(image)))
    if image.dim() != len(shape) or image.shape[-3] != 3 or 0 in image.shape[-3:]:
        raise ValueError(unfit(name, described(image)))


def is_pillow(image: Any) -> bool:
    try:
        from PIL import Image
    except ImportError:
        return False
    return isinstance(image, Image.Image)


def unfit(name: str, got: str) -> str:
    return (
        f"{name}: expected a path, a Pillow image, a uint8 array [H, W, 3] or [H, W], or a uint8 tensor [3, H, W] (for "
        f"several images a list of these, or one uint8 tensor [B, 3, H, W]), got {got}"
    )


def described(value: Any) -> str:
    if isinstance(value, Tensor | np.ndarray):
        kind = "tensor" if isinstance(value, Tensor) else "array"
        return f"{kind} {list(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    return type(value).__name__
