"""L2, L2-SP and DELTA: distances to the pretrained network, in its parameters and in its feature maps.

L2-SP: Explicit Inductive Bias for Transfer Learning with Convolutional Networks, ICML 2018
(https://arxiv.org/abs/1802.01483). DELTA: DEep Learning Transfer using Feature Map with Attention, ICLR 2019
(https://openreview.net/forum?id=rkgbwsAcYm).
"""

import functools
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ..checks import check_module, is_dtensor
from ..ops import squared_distance
from .attention import channel_attention
from .kept import KeptTensors
from .layer_outputs import IntermediateLayerGetter
from .layers import check_channel_dim, get_attribute
from .names import FLATTENED, by_plain_name, parameters_by_name, plain_name
from .parameters import check_parameter, check_start, half_squared_distance, is_flattened, is_of_integers

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


class _ModelRegularization(KeptTensors):
    """Looks at a model's parameters without owning them: they are in nobody's state dict twice."""

    _watched: str

    def __setattr__(self, name: str, value: Any) -> None:
        if name == self._watched:
            check_module(value, name)
            object.__setattr__(self, name, value)  # past nn.Module's registry of submodules
        else:
            super().__setattr__(name, value)


def _own_copy(tensor: Tensor) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return tensor.detach().clone()


def _warn_of_integers(names: list[str]) -> None:
    if names:
        warnings.warn(f"not regularised, because they hold no floating-point numbers: {names}", stacklevel=3)


class L2Regularization(_ModelRegularization):
    """Sum of ½‖w‖² over a model's parameters.

    Complex parameters count by their squared modulus, float8 ones in float32; frozen ones of integers, as quantized
    layers have them, are left out, and a warning lists them once. Parameters may lie on several devices. Those that
    ``torch.distributed.fsdp.fully_shard`` has sharded are summed over all ranks, each of which has to call this and
    gets the gradient of its own shards.

    Args:
        model: looked at, not owned: not a submodule.

    Returns:
        A 0-dim tensor on the first parameter's device, in float32 at least; every rank gets the same.

    Raises:
        TypeError: ``model`` is no module, or a parameter is sparse, a partial sum or a flattened shard of
            FullyShardedDataParallel.
    """

    model: nn.Module
    _watched = "model"

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        if is_flattened(model):
            raise TypeError(f"expected the model's parameters in their own shapes, {FLATTENED}")
        _warn_of_integers([name for name, parameter in parameters_by_name(model).items() if is_of_integers(parameter)])

    def forward(self) -> Tensor:
        return half_squared_distance({parameter: name for name, parameter in parameters_by_name(self.model).items()})


class SPRegularization(_ModelRegularization):
    """Sum of ½‖w − w₀‖² over the target's parameters, matched by name with the source's values now (L2-SP).

    Names are compared as if nothing were around the models or their parts: no DataParallel, DistributedDataParallel,
    ``torch.compile``, ``checkpoint_wrapper`` or PEFT, which the target may also get or lose later. The original of a
    parametrised tensor has that tensor's name. A tensor with several names counts once, by the first of them that the
    source has.

    The starting point w₀ is a copy, so training the source model, or giving the same model twice, does no harm. It
    moves with this module, and to the parameters' device when they are elsewhere, but is in no state dict, and no
    buffer, which DistributedDataParallel would send at every step.

    Complex parameters count by their squared modulus, float8 ones in float32; frozen ones of integers, as quantized
    layers have them, are left out. Parameters may lie on several devices. Those that
    ``torch.distributed.fsdp.fully_shard`` has sharded, before or after this was made, are summed over all ranks, each
    of which has to call this, keeps its shard of w₀ and gets the gradient of its own shards.

    Args:
        source_model: the pretrained model.
        target_model: looked at, not owned: not a submodule.
        unmatched: what becomes of target parameters that the source has none for, as those of a new head: ``warn``
            leaves them out and lists them once, as it does those of integers, ``ignore`` leaves them out silently,
            ``penalize`` draws them to zero, ``error`` raises.

    Returns:
        A 0-dim tensor on the first parameter's device, in float32 at least; every rank gets the same.

    Raises:
        TypeError, ValueError: an argument is not as above, no parameter matches, two of one name differ in shape, or
            one is sparse, a partial sum or a flattened shard of FullyShardedDataParallel.
    """

    target_model: nn.Module
    _watched = "target_model"

    def __init__(self, source_model: nn.Module, target_model: nn.Module, unmatched: str = "warn") -> None:
        super().__init__()
        if unmatched not in ("warn", "ignore", "penalize", "error"):
            raise ValueError(f"expected unmatched to be warn, ignore, penalize or error, got {unmatched!r}")
        check_module(source_model, "source_model")
        self.target_model = target_model
        self._index: dict[str, int] = {}  # by the target's names, which of the tensors kept is the start
        self._gathered: dict[int, Tensor] = {}  # as a whole, starts of which shards are kept
        source, target = parameters_by_name(source_model), parameters_by_name(target_model)
        plain_source, plain_target = by_plain_name(source), by_plain_name(target)
        starts: dict[Tensor, int] = {}
        missing: dict[Tensor, dict[str, str]] = {}  # what is shown of its names
        integers = []
        for name, parameter in target.items():
            shown = plain_name(name) if plain_name(name) in plain_target else name
            start = source.get(name, plain_source.get(shown) if shown in plain_target else None)
            if is_of_integers(parameter):
                integers.append(shown)
            elif start is None:
                missing.setdefault(parameter, {})[name] = shown
            else:
                if start.shape != parameter.shape and (is_flattened(source_model) or is_flattened(target_model)):
                    raise TypeError(f"expected parameter {shown!r} in the model's own shape, {FLATTENED}")
                check_parameter(parameter, shown)
                check_start(start, parameter, shown)
                self._index[name] = starts.setdefault(start, len(starts))
        for name in self._index:
            missing.pop(target[name], None)
        self._kept = [_own_copy(start) for start in starts]
        listed = [next(iter(names.values())) for names in missing.values()]
        if missing and unmatched == "error":
            raise ValueError(f"the source model has no parameters for {listed}")
        if missing and not self._index:
            raise ValueError(
                f"no parameter of the target has its name in the source: {listed[:5]} against {list(source)[:5]}"
            )
        if missing and unmatched == "warn":
            warnings.warn(f"not regularised, because the source model has no such parameters: {listed}", stacklevel=2)
        if unmatched == "warn":
            _warn_of_integers(integers)
        if unmatched == "penalize":
            for parameter, names in missing.items():
                check_parameter(parameter, next(iter(names.values())))
                self._index.update(dict.fromkeys(names, len(self._kept)))
                self._kept.append(_own_copy(torch.zeros_like(parameter)))

    @property
    def source_weight(self) -> dict[str, Tensor]:
        """The starting points by the target's names."""
        return {name: self._kept[j] for name, j in self._index.items()}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SPRegularization":
        super()._apply(fn, recurse)
        self._gathered = {}  # to be gathered anew
        return self

    def _start(self, j: int, name: str, parameter: Tensor) -> Tensor:
        """The start that is kept as number ``j``, where and as ``parameter`` lies."""
        start = self._kept[j]
        if start.shape != parameter.shape and not is_of_integers(parameter):
            raise ValueError(
                f"expected parameter {name!r} of shape {list(start.shape)}, its own when the regulariser was made, got "
                f"{list(parameter.shape)}: its model has changed, or FullyShardedDataParallel has flattened it, for "
                "which take torch.distributed.fsdp.fully_shard"
            )
        if is_dtensor(parameter) or is_dtensor(start):
            with torch.inference_mode(False), torch.no_grad():
                return self._in_shards(j, parameter) if is_dtensor(parameter) else self._as_a_whole(j, parameter.device)
        return self._on(parameter.device, j)

    def _in_shards(self, j: int, parameter: Any) -> Tensor:
        start: Any = self._kept[j]
        layout = parameter.device_mesh, parameter.placements
        if not is_dtensor(start) or (start.device_mesh, start.placements) != layout:
            from torch.distributed.tensor import distribute_tensor  # which takes long to import

            whole = start.full_tensor() if is_dtensor(start) else start  # every rank has all of it
            start = distribute_tensor(whole, *layout, src_data_rank=None).clone()  # else shards are views of the whole
        if start.device != parameter.device:
            start = start.to(parameter.device)
        if start is not self._kept[j]:
            self._keep(j, start)
        return start

    def _as_a_whole(self, j: int, device: torch.device) -> Tensor:
        """For the parameters that fully_shard keeps whole from a forward pass to its backward pass."""
        start: Any = self._kept[j]
        if j not in self._gathered or self._gathered[j].device != device:
            self._gathered[j] = start.full_tensor().to(device)
        return self._gathered[j]

    def forward(self) -> Tensor:
        named = parameters_by_name(self.target_model)
        plain: dict[str, Tensor] | None = None
        parameters: dict[Tensor, str] = {}
        starts = []
        for name, j in self._index.items():
            parameter = named.get(name)
            if parameter is None:
                if plain is None:
                    plain = by_plain_name({new: p for new, p in named.items() if new not in self._index})
                parameter = plain.get(plain_name(name))
            if parameter is None:
                raise RuntimeError(f"the target model has lost its parameter {name!r} since the regulariser was made")
            if parameter not in parameters:
                parameters[parameter] = name
                starts.append(self._start(j, name, parameter))
        return half_squared_distance(parameters, starts)


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


class AttentionBehavioralRegularization(KeptTensors):
    """Sum over layers of ½·C·a_c/P·‖t_bc − s_bc‖², with P positions per channel (H·W of an image): DELTA.

    Args:
        channel_attention: one vector ``[C]``, or ``[1, C]``, of floats or integers per layer, by name or in the order
            of the outputs; see :func:`channel_attention`. They move with this module, and to the maps' device when
            these are elsewhere, but are in no state dict. The attribute of this name may be assigned to.
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
        self.channel_attention = channel_attention

    @property
    def channel_attention(self) -> list[Tensor]:
        """The attention vectors ``[C]``, one per layer."""
        return list(self._kept)

    @channel_attention.setter
    def channel_attention(self, channel_attention: Mapping[str, Tensor] | Sequence[Tensor]) -> None:
        values = list(channel_attention.values() if isinstance(channel_attention, Mapping) else channel_attention)
        for j, attention in enumerate(values):
            if not isinstance(attention, Tensor):
                got: Any = type(attention).__name__
            elif attention.is_complex() or attention.dim() < 1 or attention.numel() != attention.size(-1):
                got = f"{attention.dtype} of shape {list(attention.shape)}"
            else:
                continue
            raise TypeError(f"expected channel attention {j} to be a vector [C] of floats or integers, got {got}")
        self._names = list(channel_attention) if isinstance(channel_attention, Mapping) else None
        with torch.inference_mode(False), torch.no_grad():
            vectors = (attention.detach().flatten() for attention in values)
            self._kept = [v if v.is_floating_point() else v.to(torch.get_default_dtype()) for v in vectors]

    def extra_repr(self) -> str:
        return f"layers={self._names or len(self._kept)}, channel_dim={self.channel_dim}"

    def forward(self, layer_outputs_source: LayerOutputs, layer_outputs_target: LayerOutputs) -> Tensor:
        names, sources, targets = _paired(layer_outputs_source, layer_outputs_target)
        if self._names is not None and set(self._names) != set(names):
            raise ValueError(f"expected outputs of the layers {self._names} that attention is there for, got {names}")
        if len(names) != len(self._kept):
            raise ValueError(
                f"expected outputs of {len(self._kept)} layers, as many as attentions, got {len(names)}: {names}"
            )
        weights = []
        for j, (name, target) in enumerate(zip(names, targets, strict=True)):
            index = j if self._names is None else self._names.index(name)
            attention = self._on(target.device, index)
            if not -target.dim() < self.channel_dim < target.dim():
                raise ValueError(
                    f"layer {name!r} has no batch and channel dimension {self.channel_dim}: {list(target.shape)}"
                )
            channels = target.size(self.channel_dim)
            if attention.size(0) != channels:
                raise ValueError(f"expected {attention.size(0)} channels in layer {name!r}, got {list(target.shape)}")
            positions = max(target.numel() // max(target.size(0) * channels, 1), 1)
            weights.append(attention * (channels / positions))
        return squared_distance(targets, sources, weights, self.channel_dim)[0]
