"""A trained classifier in a folder: its weights, and all that is needed to use them on images."""

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
from ..storage import synchronize, write_atomically

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["ImageClassifier", "Prediction", "load"]

FORMAT = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"
FOLDER_OF_MODELS = "models"  # in finetune's --out

ImageLike: TypeAlias = "str | PathLike[str] | Image | np.ndarray | Tensor"


def save(folder: str | PathLike[str], state: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write a model's folder, whole or not at all; a model that is there is replaced, and other files in it stay.

    Args:
        folder: what is to hold ``model.safetensors`` and ``config.json``; missing parents are made.
        state: state dict in the original architecture's names, contiguous tensors that share no memory.
        config: ``network``, ``head``, ``num_classes``, ``classes``, ``preprocessing`` and what else is to be kept, all
            of it JSON. The format's number is added, and for timm's networks what its ``local-dir:`` reads.

    Raises:
        UserError: ``folder`` is there and holds no model.
        OSError: it cannot be written.
    """
    from safetensors import torch as safetensors

    folder = Path(folder)
    if folder.exists() and not (folder / CONFIG).is_file():
        raise UserError(f"{printable(folder)} is there already and holds no model: remove it or choose another folder")
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
    """Rename ``new`` to ``folder``, whose other files move along."""
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
    """Have the disk hold the names of what was written to a folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        synchronize(descriptor)
    finally:
        os.close(descriptor)


def timm_entries(config: Mapping[str, Any]) -> dict[str, Any]:
    """What ``timm.create_model("local-dir:FOLDER", pretrained=True)`` reads; empty where that cannot work."""
    if config.get("library") != "timm":
        return {}
    timm = import_library("timm")
    name = config["network"].rpartition(":")[2]
    pretrained_cfg = timm.models.get_pretrained_cfg(name)
    if pretrained_cfg is None or pretrained_cfg.classifier != config["head"]:
        return {}  # timm has its head elsewhere
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
    """The folder of the model that is meant: this one, or the only one in a folder that ``finetune`` wrote to.

    Raises UsageError where there is none, and where there are several, which it lists.
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
        raise UsageError(f"{printable(folder)} holds no model, which has a {CONFIG}: {remedy}")
    if len(found) > 1:
        raise UsageError(
            f"{printable(folder)} holds {len(found)} models: name one of {', '.join(printable(path) for path in found)}"
        )
    return found[0]


def load(folder: str | PathLike[str], device: str | torch.device = "cpu") -> "ImageClassifier":
    """The classifier in a model's folder, or in a folder of ``finetune``'s that holds one model, ready to predict.

    No code in it is run. ``device`` may be ``auto``: the first GPU, else the CPU.

    Raises:
        UsageError: there is no such folder, no model or more than one in it, or no such device.
        UserError: the model is damaged, of a newer format, or of a network whose library is missing.
    """
    device = usable_device(device)
    folder = find(folder)
    config = read_config(folder / CONFIG)
    state = read_weights(folder / WEIGHTS)
    classes, head = len(config["classes"]), config["head"] or "talib_fast_head"
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
            f"{printable(path)} does not describe a model of talib_fast's: name a folder that finetune kept a model in"
        )
    if isinstance(config["format"], int) and config["format"] > FORMAT:
        raise UserError(
            f"{printable(path)} is of format {config['format']}, and this talib_fast reads up to {FORMAT}: "
            "pip install --upgrade talib_fast"
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
        raise damaged(path, "the classes are not different names")
    if len(classes) != config["num_classes"]:
        raise damaged(path, f"it names {len(classes)} classes and says there are {config['num_classes']}")
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
    """What a classifier says of an image: the most probable class, and the probabilities of all.

    ``probabilities`` is float32 [N] on the CPU and sums to one; ``classes`` are its N names.
    """

    label: str
    probability: float
    probabilities: Tensor = field(repr=False)
    classes: tuple[str, ...] = field(repr=False)

    def top(self, k: int) -> list[tuple[str, float]]:
        """The ``k`` most probable classes with their probabilities, the first one first; all where ``k`` is more."""
        if k < 1:
            raise ValueError(f"top() wants at least 1 class, got {k}")
        values, places = self.probabilities.sort(descending=True, stable=True)
        return [
            (self.classes[place], value) for value, place in zip(values[:k].tolist(), places.tolist(), strict=False)
        ]


class ImageClassifier:
    """A trained network with its classes and its preprocessing, always in evaluation mode.

    Args:
        module: normalised float32 images [B, 3, S, S] → logits [B, N].
        config: as ``config.json`` holds it; ``classes`` and ``preprocessing`` are read.
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
        """Move the network there; returns this classifier."""
        self.device = torch.device(device)
        self.module.to(self.device)
        return self

    def predict(self, images: "ImageLike | Iterable[ImageLike]", batch_size: int = 32) -> list[Prediction]:
        """Predictions for one image or several, in their order, always as a list.

        Args:
            images: paths, images of Pillow's, uint8 arrays [H, W, 3] or [H, W], uint8 tensors [3, H, W], or one uint8
                tensor [B, 3, H, W]. Of any size: they are scaled and cut as the network wants them.
            batch_size: how many are computed at a time.

        Raises:
            TypeError, ValueError: something else was given.
            ImageError: a file cannot be read as an image.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        prepared = (self.prepare(image, name) for image, name in one_by_one(images))
        predictions: list[Prediction] = []
        while batch := list(islice(prepared, batch_size)):
            predictions += map(self.prediction, self.logits(torch.stack(batch)).softmax(1))
        return predictions

    def prediction(self, probabilities: Tensor) -> Prediction:
        """What float32 probabilities [N] of one image mean."""
        probability, place = probabilities.max(0)
        return Prediction(self.classes[int(place)], probability.item(), probabilities, self.classes)

    def prepare(self, image: "ImageLike", name: str = "the image") -> Tensor:
        """One image as uint8 [3, S, S]; ``name`` is what errors call it."""
        if isinstance(image, str | PathLike):
            return self.preprocessing(read(image))
        return self.preprocessing(as_pillow(image, name))

    def logits(self, images: Tensor) -> Tensor:
        """Prepared images, uint8 [B, 3, S, S] on any device → float32 [B, N] on the CPU."""
        size = self.preprocessing.size
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1:] != (3, size, size):
            raise ValueError(f"logits() wants uint8 [B, 3, {size}, {size}], got {described(images)}")
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
        return logits.float().cpu().clone()  # outside of inference mode: a tensor as any other


def one_by_one(images: Any) -> Iterator[tuple[Any, str]]:
    """The images that predict() was given, each with what to call it."""
    if isinstance(images, Tensor) and images.dim() == 4:
        check_tensor(images, ("B", 3, "H", "W"), "images")
    elif isinstance(images, str | PathLike | np.ndarray | Tensor) or is_pillow(images):
        return iter([(images, "images")])
    elif isinstance(images, bytes | Mapping) or not isinstance(images, Iterable):
        raise TypeError(unfit("images", described(images)))
    return ((image, f"images[{index}]") for index, image in enumerate(images))


def as_pillow(image: Any, name: str) -> "Image":
    """An image in memory as 8-bit RGB; raises TypeError or ValueError for what is none."""
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
        f"{name}: expected a path, an image of Pillow's, a uint8 array [H, W, 3] or [H, W], or a uint8 tensor "
        f"[3, H, W] (several: a list of these, or one uint8 tensor [B, 3, H, W]), got {got}"
    )


def described(value: Any) -> str:
    if isinstance(value, Tensor | np.ndarray):
        kind = "tensor" if isinstance(value, Tensor) else "array"
        return f"{kind} {list(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    return type(value).__name__
