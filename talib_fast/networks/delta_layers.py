"""The layers whose outputs DELTA compares: the default layers, and the dimension of their channels."""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError

MOST = 4  # the most default layers
NAMED = "which --delta-layers names"


@dataclass(frozen=True)
class Output:
    """A module's output in one forward pass: its shape (None if it is no tensor), and its place among all calls."""

    shape: tuple[int, ...] | None
    order: int

    @property
    def channel_dim(self) -> int | None:
        """Dimension of the channels: -1 for tokens [B, T, C] and maps [B, a, a, C], None for [B, a, a, a], else 1."""
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
        """Height and width of a map; None if the output is no map."""
        if self.shape is None or len(self.shape) != 4:
            return None
        return self.shape[1:3] if self.channel_dim == -1 else self.shape[2:]


def outputs_of(backbone: nn.Module, images: Tensor) -> dict[str, list[Output]]:
    """The outputs of each module in a forward pass in evaluation mode: a list with one entry per call."""
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
    """The modules that DELTA compares by default, in order of execution, and the dimension of their channels.

    The first of these that exists is taken:

    - in a ResNet, the last convolution of each stage, as in the paper;
    - the ends of the stages that timm describes;
    - the last layers before the resolution changes;
    - four of the blocks, evenly spaced.

    There are no default modules if no module runs exactly once and gives maps or tokens.
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
    """The last convolution of each stage if the network is built like a ResNet, else nothing."""
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
    """The last layer of each resolution that timm describes, at most four; if there is one, four of the blocks."""
    described: Any = getattr(backbone, "feature_info", ())
    described = getattr(described, "info", described)
    stages = [(str(stage.get("module")), stage.get("reduction")) for stage in described if isinstance(stage, dict)]
    if not stages or any(layer not in outputs for layer, _ in stages):
        return ()
    last = {reduction: layer for layer, reduction in stages}
    return tuple(last.values())[-MOST:] if len(last) > 1 else evenly_spaced([layer for layer, _ in stages])


def ends_of_resolutions(backbone: nn.Module, outputs: dict[str, Output]) -> tuple[str, ...]:
    """The last layer of each resolution among the children of one container, at most four.

    The container is the one whose children have the most resolutions, and among equals the one nearest to the root.
    Returns nothing if no container has two resolutions.
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
    """The largest set of children in one container with the same class and output shape, such as transformer blocks.

    Returns nothing if no container has two such children.
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
    """For every module with children, these children with their full names, from the root downwards."""
    pending = [("", backbone)]
    while pending:
        name, module = pending.pop(0)
        children = [(f"{name}.{child}" if name else child, held) for child, held in module.named_children()]
        if children:
            yield children
        pending += children


def evenly_spaced(layers: Sequence[str]) -> tuple[str, ...]:
    """Four evenly spaced layers with the last one among them: of 12 layers those at 2, 5, 8 and 11."""
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
    """The dimension of the channels in these layers' outputs; raises UsageError if DELTA cannot compare them."""
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
