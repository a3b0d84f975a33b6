"""The layers whose outputs DELTA compares: which ones by default, and where their channels are."""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError

MOST = 4  # layers by default
NAMED = "which --delta-layers names"


@dataclass(frozen=True)
class Output:
    """What a module gave in one forward pass: its shape, None if it is no tensor, and the place in their order."""

    shape: tuple[int, ...] | None
    order: int

    @property
    def channel_dim(self) -> int | None:
        """1, or -1 for tokens [B, T, C] and maps [B, a, a, C]; None where the shape can't tell."""
        match self.shape:
            case (_, _, _):
                return -1
            case (_, a, b, c) if a == b != c:
                return -1
            case (_, a, b, c) if a == b == c:
                return None
        return 1

    @property
    def resolution(self) -> tuple[int, ...] | None:
        """Height and width of a map."""
        if self.shape is None or len(self.shape) != 4:
            return None
        return self.shape[1:3] if self.channel_dim == -1 else self.shape[2:]


def outputs_of(backbone: nn.Module, images: Tensor) -> dict[str, list[Output]]:
    """What each module gives in a forward pass in evaluation mode, a list with an entry per call."""
    found: dict[str, list[Output]] = {}
    order = itertools.count()
    handles = []

    def note(name: str, output: Any) -> None:
        shape = tuple(output.shape) if isinstance(output, Tensor) else None
        found.setdefault(name, []).append(Output(shape, next(order)))

    for name, module in backbone.named_modules():
        handles.append(module.register_forward_hook(lambda module, args, output, name=name: note(name, output)))
    try:
        with torch.no_grad():
            backbone.eval()(images)
    finally:
        for handle in handles:
            handle.remove()
    return found


def default_layers(backbone: nn.Module, images: Tensor) -> tuple[tuple[str, ...], int]:
    """The modules that DELTA compares where nobody named some, in order of execution, and their channels' dimension.

    In a ResNet the last convolution of each stage, as in the paper; else the ends of stages that timm knows of, or
    those where the resolution changes; where none does, four of the blocks, evenly spaced. None where no module runs
    exactly once and gives maps or tokens.
    """
    outputs = {
        name: calls[0]
        for name, calls in outputs_of(backbone, images).items()
        if name and len(calls) == 1 and calls[0].shape is not None and len(calls[0].shape) in (3, 4)
    }
    for layers in (
        resnet_layers(backbone),
        feature_info_layers(backbone, outputs),
        ends_of_resolutions(backbone, outputs),
        evenly_spaced(longest_run(backbone, outputs)),
    ):
        if layers and all(layer in outputs for layer in layers):
            dims = [outputs[layer].channel_dim or 1 for layer in layers]
            return tuple(layer for layer, dim in zip(layers, dims, strict=True) if dim == dims[-1]), dims[-1]
    return (), 1


def resnet_layers(backbone: nn.Module) -> tuple[str, ...]:
    """The last convolution of each stage where the network is built like a ResNet, else nothing."""
    last_convs = []
    for name in ("layer1", "layer2", "layer3", "layer4"):
        stage = getattr(backbone, name, None)
        if not isinstance(stage, nn.Sequential) or not len(stage):
            return ()
        convs = [child for child, module in stage[-1].named_children() if isinstance(module, nn.Conv2d)]
        if not convs:
            return ()
        last_convs.append(f"{name}.{len(stage) - 1}.{convs[-1]}")
    return tuple(last_convs)


def feature_info_layers(backbone: nn.Module, outputs: dict[str, Output]) -> tuple[str, ...]:
    """The last layer of each resolution that timm describes, four at most, or four of the blocks where it is one."""
    described: Any = getattr(backbone, "feature_info", ())
    described = getattr(described, "info", described)
    stages = [(str(stage.get("module")), stage.get("reduction")) for stage in described if isinstance(stage, dict)]
    if not stages or any(layer not in outputs for layer, _ in stages):
        return ()
    last = {reduction: layer for layer, reduction in stages}
    return tuple(last.values())[-MOST:] if len(last) > 1 else evenly_spaced([layer for layer, _ in stages])


def ends_of_resolutions(backbone: nn.Module, outputs: dict[str, Output]) -> tuple[str, ...]:
    """The last layer of each resolution among the children of one container, four at most.

    It is the container whose children have the most resolutions, of several the one nearest to the root. Nothing where
    there are fewer than two.
    """
    best: dict[tuple[int, ...], str] = {}
    for children in levels(backbone):
        by_order = sorted((outputs[name].order, name) for name, module in children if name in outputs)
        modules = dict(children)
        ends = {
            resolution: name
            for _, name in by_order
            if (resolution := outputs[name].resolution) and not is_global_pooling(modules[name], resolution)
        }
        if len(ends) > max(len(best), 1):
            best = ends
    return tuple(sorted(best.values(), key=lambda name: outputs[name].order))[-MOST:]


def is_global_pooling(module: nn.Module, resolution: tuple[int, ...]) -> bool:
    return resolution == (1, 1) and not any(True for _ in module.parameters())


def longest_run(backbone: nn.Module, outputs: dict[str, Output]) -> list[str]:
    """The children of one class and output shape that are most in a container, as a transformer's blocks are.

    Nothing where there is no container with two such children.
    """
    longest: list[str] = []
    for children in levels(backbone):
        kinds = {name: (type(module), outputs[name].shape) for name, module in children if name in outputs}
        if not kinds:
            continue
        kind, number = Counter(kinds.values()).most_common(1)[0]
        if number > max(len(longest), 1):
            longest = sorted((name for name in kinds if kinds[name] == kind), key=lambda name: outputs[name].order)
    return longest


def levels(backbone: nn.Module) -> Iterator[list[tuple[str, nn.Module]]]:
    """The children, with their whole names, of every module that has some, those nearest to the root first."""
    pending = [("", backbone)]
    while pending:
        name, module = pending.pop(0)
        children = [(f"{name}.{child}" if name else child, held) for child, held in module.named_children()]
        if children:
            yield children
        pending += children


def evenly_spaced(layers: Sequence[str]) -> tuple[str, ...]:
    """Four of them, the last one included: of 12 those numbered 2, 5, 8 and 11."""
    if len(layers) <= MOST:
        return tuple(layers)
    return tuple(layers[len(layers) * part // MOST - 1] for part in range(1, MOST + 1))


def check_named(name: str, backbone: nn.Module, layers: Sequence[str]) -> None:
    """Raise UsageError unless the network has modules of these names."""
    modules = dict(backbone.named_modules(remove_duplicate=False))
    for layer in layers:
        if not layer or layer not in modules:
            raise UsageError(f"{name} has no module {layer}, {NAMED}; it has {outline(modules)}")


def channel_dim_of(name: str, backbone: nn.Module, layers: Sequence[str], images: Tensor) -> int:
    """The dimension of the channels in these layers' outputs; UsageError where they can't be compared."""
    outputs = outputs_of(backbone, images)
    dims: dict[int, str] = {}
    for layer in layers:
        calls = outputs.get(layer, [])
        if len(calls) != 1:
            raise UsageError(f"{name} runs {layer}, {NAMED}, {len(calls)} times instead of once: name another module")
        if calls[0].shape is None or len(calls[0].shape) < 2:
            raise UsageError(f"{name}'s {layer}, {NAMED}, does not give a batch of maps or tokens: name another module")
        if calls[0].channel_dim is not None:
            dims.setdefault(calls[0].channel_dim, layer)
    if len(dims) > 1:
        raise UsageError(
            f"{name} has the channels of {dims[1]} in dimension 1 and those of {dims[-1]} in the last one: let "
            "--delta-layers name modules of one kind"
        )
    return next(iter(dims), 1)


def outline(modules: dict[str, nn.Module]) -> str:
    top = [name for name in modules if name and name.count(".") < 2]
    return ", ".join(top[:12]) + (", ..." if len(top) > 12 else "")
