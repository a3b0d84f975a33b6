"""L2, L2-SP and DELTA: distances to the pretrained network, in its parameters and in its feature maps.

L2-SP: Explicit Inductive Bias for Transfer Learning with Convolutional Networks, ICML 2018
(https://arxiv.org/abs/1802.01483). DELTA: DEep Learning Transfer using Feature Map with Attention, ICLR 2019
(https://openreview.net/forum?id=rkgbwsAcYm).
"""

import functools
import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch
import torch.nn as nn
from torch import Tensor

from ..checks import check_module
from ..ops import squared_distance
from .attention import channel_attention
from .layers import IntermediateLayerGetter, check_channel_dim, get_attribute, unwrap

__all__ = [
    "AttentionBehavioralRegularization",
    "BehavioralRegularization",
    "IntermediateLayerGetter",
    "L2Regularization",
    "OrderedDict",
    "SPRegularization",
    "channel_attention",
    "functools",
    "get_attribute",
    "nn",  # scripts take these names, too, from `import *`
    "torch",
]


class _ModelRegularization(nn.Module):
    """Looks at a model's parameters without owning them: they are in nobody's state dict twice."""

    model: nn.Module
    target_model: nn.Module

    def _watch(self, name: str, model: nn.Module) -> None:
        check_module(model, name)
        object.__setattr__(self, name, model)  # past nn.Module's registry of submodules


class L2Regularization(_ModelRegularization):
    """Sum of ½‖w‖² over a model's parameters.

    Args:
        model: looked at, not owned: not a submodule.

    Returns:
        A 0-dim tensor on the parameters' device, in float32 at least.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._watch("model", model)

    def forward(self) -> Tensor:
        return squared_distance(list(self.model.parameters()))[0]


class SPRegularization(_ModelRegularization):
    """Sum of ½‖w − w₀‖² over the target's parameters, matched by name with the source's values now (L2-SP).

    The starting point w₀ is a copy, so training the source model, or giving the same model twice, does no harm. It
    moves with this module, and to the parameters' device when they are elsewhere, but is in no state dict.

    Args:
        source_model: the pretrained model.
        target_model: looked at, not owned: not a submodule.
        unmatched: what becomes of target parameters that the source has none for, as those of a new head: ``warn``
            leaves them out and lists them once, ``ignore`` leaves them out silently, ``penalize`` draws them to
            zero, ``error`` raises.

    Returns:
        A 0-dim tensor on the parameters' device, in float32 at least.

    Raises:
        TypeError, ValueError: an argument is not as above, no parameter matches, or two of one name differ in shape.
    """

    def __init__(self, source_model: nn.Module, target_model: nn.Module, unmatched: str = "warn") -> None:
        super().__init__()
        if unmatched not in ("warn", "ignore", "penalize", "error"):
            raise ValueError(f"expected unmatched to be warn, ignore, penalize or error, got {unmatched!r}")
        check_module(source_model, "source_model")
        self._watch("target_model", target_model)
        self._names: list[str] = []
        start = dict(unwrap(source_model).named_parameters())
        missing = []
        for name, parameter in unwrap(target_model).named_parameters():
            if name not in start:
                missing.append(name)
                if unmatched != "penalize":
                    continue
            elif start[name].shape != parameter.shape:
                raise ValueError(
                    f"expected parameter {name!r} of one shape in both models, got {list(start[name].shape)} in the "
                    f"source and {list(parameter.shape)} in the target: leave a new head out of the models compared"
                )
            value = start[name].detach().clone() if name in start else torch.zeros_like(parameter)
            self.register_buffer(f"start_{len(self._names)}", value, persistent=False)
            self._names.append(name)
        if missing and unmatched == "error":
            raise ValueError(f"the source model has no parameters for {missing}")
        if len(missing) == len(list(target_model.parameters())) and missing:
            raise ValueError(
                f"no parameter of the target has its name in the source: {missing[:5]} against {list(start)[:5]}"
            )
        if missing and unmatched == "warn":
            warnings.warn(f"not regularised, because the source model has no such parameters: {missing}", stacklevel=2)

    def forward(self) -> Tensor:
        parameters = dict(unwrap(self.target_model).named_parameters())
        targets, sources = [], []
        for j, name in enumerate(self._names):
            if name not in parameters:
                raise RuntimeError(f"the target model has lost its parameter {name!r} since the regulariser was made")
            start = getattr(self, f"start_{j}")
            if start.device != parameters[name].device:
                start = start.to(parameters[name].device)
                setattr(self, f"start_{j}", start)
            targets.append(parameters[name])
            sources.append(start)
        return squared_distance(targets, sources)[0]


LayerOutputs = Mapping[str, Tensor] | Sequence[Tensor]


def _paired(source: LayerOutputs, target: LayerOutputs) -> tuple[list[str], list[Tensor], list[Tensor]]:
    """Layer names and the two models' feature maps, matched by name (by position for sequences)."""
    by_name = []
    for model, outputs in (("source", source), ("target", target)):
        if isinstance(outputs, Mapping):
            by_name.append(dict(outputs))
        elif isinstance(outputs, Sequence):
            by_name.append({str(j): output for j, output in enumerate(outputs)})
        else:
            raise TypeError(f"expected the {model}'s layer outputs as a mapping, got {type(outputs).__name__}")
    sources, targets = by_name
    for model, here, there in (("source", sources, targets), ("target", targets, sources)):
        lacking = [name for name in there if name not in here]
        if lacking:
            raise ValueError(f"the {model}'s outputs lack layers {lacking}; there are {list(here)}")
    for name, output in targets.items():
        for model, value in (("source", sources[name]), ("target", output)):
            if not isinstance(value, Tensor):
                raise TypeError(f"expected layer {name!r} of the {model} to be a tensor, got {type(value).__name__}")
        if sources[name].shape != output.shape:
            raise ValueError(
                f"expected layer {name!r} of one shape in both models, got {list(sources[name].shape)} in the source "
                f"and {list(output.shape)} in the target"
            )
    return list(targets), [sources[name] for name in targets], list(targets.values())


class BehavioralRegularization(nn.Module):
    """Sum over layers of ½‖t − s‖², summed over the batch (DELTA without attention).

    Inputs:
        layer_outputs_source: feature maps by layer name, detached.
        layer_outputs_target: feature maps of the same names and shapes.

    Returns:
        A 0-dim tensor on the maps' device, in float32 at least.

    Raises:
        TypeError, ValueError: a layer is missing on one side, is no tensor, or differs in shape.
    """

    def forward(self, layer_outputs_source: LayerOutputs, layer_outputs_target: LayerOutputs) -> Tensor:
        _, sources, targets = _paired(layer_outputs_source, layer_outputs_target)
        return squared_distance(targets, sources)[0]


class AttentionBehavioralRegularization(nn.Module):
    """Sum over layers of ½·C·a_c/P·‖t_bc − s_bc‖², with P positions per channel (H·W of an image): DELTA.

    Args:
        channel_attention: one vector ``[C]`` per layer, by name or in the order of the outputs; see
            :func:`channel_attention`. They move with this module, and to the maps' device when these are elsewhere,
            but are in no state dict.
        channel_dim: dimension of the channels: 1 for images, -1 for tokens ``[b, t, C]``; not 0, the batch's.

    Inputs:
        layer_outputs_source: feature maps of at least two dimensions by layer name, detached.
        layer_outputs_target: feature maps of the same names and shapes.

    Returns:
        A 0-dim tensor on the maps' device, in float32 at least.

    Raises:
        TypeError, ValueError: a layer or its attention is missing, is no tensor, or its shape does not fit.
    """

    def __init__(self, channel_attention: Mapping[str, Tensor] | Sequence[Tensor], channel_dim: int = 1) -> None:
        super().__init__()
        check_channel_dim(channel_dim)
        self.channel_dim = channel_dim
        self._names = list(channel_attention) if isinstance(channel_attention, Mapping) else None
        values = list(channel_attention.values() if isinstance(channel_attention, Mapping) else channel_attention)
        self._layers = len(values)
        for j, attention in enumerate(values):
            if not isinstance(attention, Tensor) or attention.dim() != 1 or not attention.is_floating_point():
                got = list(attention.shape) if isinstance(attention, Tensor) else type(attention).__name__
                raise TypeError(f"expected channel attention {j} to be a floating-point vector [C], got {got}")
            self.register_buffer(f"attention_{j}", attention.detach(), persistent=False)

    @property
    def channel_attention(self) -> list[Tensor]:
        """The attention vectors ``[C]``, one per layer."""
        return [getattr(self, f"attention_{j}") for j in range(self._layers)]

    def extra_repr(self) -> str:
        return f"layers={self._names or self._layers}, channel_dim={self.channel_dim}"

    def forward(self, layer_outputs_source: LayerOutputs, layer_outputs_target: LayerOutputs) -> Tensor:
        names, sources, targets = _paired(layer_outputs_source, layer_outputs_target)
        if self._names is not None and set(self._names) != set(names):
            raise ValueError(f"expected outputs of the layers {self._names} that attention is there for, got {names}")
        if len(names) != self._layers:
            raise ValueError(
                f"expected outputs of {self._layers} layers, as many as attentions, got {len(names)}: {names}"
            )
        weights = []
        for j, (name, target) in enumerate(zip(names, targets, strict=True)):
            index = j if self._names is None else self._names.index(name)
            attention = getattr(self, f"attention_{index}")
            if not -target.dim() < self.channel_dim < target.dim():
                raise ValueError(
                    f"layer {name!r} has no batch and channel dimension {self.channel_dim}: {list(target.shape)}"
                )
            channels = target.size(self.channel_dim)
            if attention.size(0) != channels:
                raise ValueError(f"expected {attention.size(0)} channels in layer {name!r}, got {list(target.shape)}")
            if attention.device != target.device:
                attention = attention.to(target.device)
                setattr(self, f"attention_{index}", attention)
            positions = max(target.numel() // max(target.size(0) * channels, 1), 1)
            weights.append(attention * (channels / positions))
        return squared_distance(targets, sources, weights, self.channel_dim)[0]
