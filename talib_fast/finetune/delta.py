"""L2, L2-SP and DELTA: penalise the distance to the pretrained network, in parameters and in feature maps.

L2-SP: Li, Grandvalet and Davoine, `Explicit Inductive Bias for Transfer Learning with Convolutional Networks (ICML
2018) <https://arxiv.org/abs/1802.01483>`__. DELTA: Li et al., `DELTA: DEep Learning Transfer using Feature Map with
Attention for Convolutional Networks (ICLR 2019) <https://openreview.net/forum?id=rkgbwsAcYm>`__.
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
    "nn",  # upstream's scripts get nn, torch, functools and OrderedDict by `import *`
    "torch",
]


class _ModelRegularization(KeptTensors):
    """The base of penalties on a model's parameters. The model is no submodule: its state dict stays its own."""

    _watched: str

    def __setattr__(self, name: str, value: Any) -> None:
        if name == self._watched:
            check_module(value, name)
            object.__setattr__(self, name, value)  # not through nn.Module, which would register a submodule
        else:
            super().__setattr__(name, value)


def _own_copy(tensor: Tensor) -> Tensor:
    """A copy of ``tensor`` that training may use, without gradient."""
    with torch.inference_mode(False), torch.no_grad():
        return tensor.detach().clone()


def _warn_of_integers(names: list[str]) -> None:
    """Warn that these parameters are left out because they hold integers."""
    if names:
        warnings.warn(f"not regularised, because they hold no floating-point numbers: {names}", stacklevel=3)


class L2Regularization(_ModelRegularization):
    """Sum of ½‖w‖² over a model's parameters.

    Complex parameters count by their squared modulus. float8 parameters are summed in float32. Frozen parameters that
    hold integers, as in quantized layers, are left out, and a warning lists them once. Parameters may be on several
    devices. If ``torch.distributed.fsdp.fully_shard`` has sharded them, every rank has to call this: the sum is over
    all ranks, and each rank gets the gradient of its own shards.

    Args:
        model: the model. It does not become a submodule.

    Returns:
        A 0-dim tensor on the first parameter's device, float32 (float64 if a parameter is). All ranks get the same
        value.

    Raises:
        TypeError: ``model`` is no module, or a parameter is sparse, a partial sum, or a flattened shard of
            FullyShardedDataParallel.

    Example:

        >>> import torch
        >>> from torch import nn
        >>> from talib_fast.finetune.delta import L2Regularization
        >>> head = nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.constant_(head.weight, 2.0)
        >>> L2Regularization(head)().item()
        4.0
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
    """Sum of ½‖w − w₀‖² over the target model's parameters, where w₀ are the source model's values (L2-SP).

    Parameters are matched by name. The starting point w₀ is a copy of the source's parameters as they are now, so the
    source model may be trained later, or be the target model itself. It moves with this module. It is in no state dict,
    and DistributedDataParallel does not send it.

    Names are compared without the parts that wrappers add: DataParallel, DistributedDataParallel, ``torch.compile``,
    ``checkpoint_wrapper`` and PEFT. The target model may gain or lose such a wrapper later. The original of a
    parametrised tensor has that tensor's name. A tensor with several names counts once, by the first name that the
    source has.

    Complex parameters count by their squared modulus. float8 parameters are summed in float32. Frozen parameters that
    hold integers, as in quantized layers, are left out. Parameters may be on several devices. If
    ``torch.distributed.fsdp.fully_shard`` shards them, before or after this module is made, every rank has to call it:
    the sum is over all ranks, and each rank keeps its shard of w₀ and gets the gradient of its own shards.

    Paper: Li, Grandvalet and Davoine, `Explicit Inductive Bias for Transfer Learning with Convolutional Networks (ICML
    2018) <https://arxiv.org/abs/1802.01483>`__.

    Args:
        source_model: the pretrained model.
        target_model: the model that is trained. It does not become a submodule.
        unmatched: what happens to target parameters without a counterpart in the source, such as those of a new head.
            ``"warn"`` leaves them out and lists them once, with the parameters that hold integers. ``"ignore"`` leaves
            them out silently. ``"penalize"`` uses w₀ = 0 for them. ``"error"`` raises.

    Returns:
        A 0-dim tensor on the first parameter's device, float32 (float64 if a parameter is). All ranks get the same
        value.

    Raises:
        TypeError: an argument is no module, or a parameter is sparse, a partial sum, a flattened shard of
            FullyShardedDataParallel, or complex in one model only.
        ValueError: ``unmatched`` is unknown, no parameter matches, or two parameters of one name differ in shape.

    Example:

        >>> import copy, torch
        >>> from torch import nn
        >>> from talib_fast.finetune.delta import SPRegularization
        >>> source = nn.Linear(2, 1, bias=False)
        >>> target = copy.deepcopy(source)
        >>> penalty = SPRegularization(source, target)
        >>> penalty().item()
        0.0
        >>> with torch.no_grad():
        ...     _ = target.weight.copy_(source.weight + 1)
        >>> round(penalty().item(), 5)
        1.0
    """

    target_model: nn.Module
    _watched = "target_model"

    def __init__(self, source_model: nn.Module, target_model: nn.Module, unmatched: str = "warn") -> None:
        super().__init__()
        if unmatched not in ("warn", "ignore", "penalize", "error"):
            raise ValueError(f"expected unmatched to be warn, ignore, penalize or error, got {unmatched!r}")
        check_module(source_model, "source_model")
        self.target_model = target_model
        self._index: dict[str, int] = {}  # by the target's names, the number of the kept starting point
        self._gathered: dict[int, Tensor] = {}  # whole starting points, where shards are kept
        source, target = parameters_by_name(source_model), parameters_by_name(target_model)
        plain_source, plain_target = by_plain_name(source), by_plain_name(target)
        starts: dict[Tensor, int] = {}
        missing: dict[Tensor, dict[str, str]] = {}  # the names of each, with what messages show of them
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
        self._gathered = {}  # they are gathered again when needed
        return self

    def _start(self, j: int, name: str, parameter: Tensor) -> Tensor:
        """The starting point ``j`` on the device of ``parameter``, sharded in the same way."""
        start = self._kept[j]
        if start.shape != parameter.shape and not is_of_integers(parameter):
            raise ValueError(
                f"expected parameter {name!r} of shape {list(start.shape)}, its own when the regulariser was made, got "
                f"{list(parameter.shape)}: its model has changed, or FullyShardedDataParallel has flattened it (use "
                "torch.distributed.fsdp.fully_shard instead)"
            )
        if is_dtensor(parameter) or is_dtensor(start):
            with torch.inference_mode(False), torch.no_grad():
                return self._in_shards(j, parameter) if is_dtensor(parameter) else self._as_a_whole(j, parameter.device)
        return self._on(parameter.device, j)

    def _in_shards(self, j: int, parameter: Any) -> Tensor:
        """This rank's shard of the starting point ``j``, for a sharded parameter."""
        start: Any = self._kept[j]
        layout = parameter.device_mesh, parameter.placements
        if not is_dtensor(start) or (start.device_mesh, start.placements) != layout:
            from torch.distributed.tensor import distribute_tensor  # here, because its import takes long

            whole = start.full_tensor() if is_dtensor(start) else start  # every rank has the whole tensor
            start = distribute_tensor(whole, *layout, src_data_rank=None).clone()  # a view would keep the whole alive
        if start.device != parameter.device:
            start = start.to(parameter.device)
        if start is not self._kept[j]:
            self._keep(j, start)
        return start

    def _as_a_whole(self, j: int, device: torch.device) -> Tensor:
        """The whole starting point ``j``, for parameters that fully_shard has gathered for a training step."""
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
    """Layer names and the feature maps of both models, matched by name. Sequences are matched by position."""
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
    """Sum over layers of ½‖t − s‖², summed over the batch: DELTA without attention.

    t are the target model's feature maps and s those of the source model.

    Paper: Li et al., `DELTA: DEep Learning Transfer using Feature Map with Attention for Convolutional Networks (ICLR
    2019) <https://openreview.net/forum?id=rkgbwsAcYm>`__.

    Inputs:
        layer_outputs_source: feature maps s by layer name, or a sequence of them. They get no gradient.
        layer_outputs_target: feature maps t of the same names and shapes.

    Returns:
        A 0-dim tensor on the maps' device, float32 (float64 for float64 maps).

    Raises:
        TypeError: the outputs are neither a mapping nor a sequence, or a layer's output is no tensor.
        ValueError: a layer is missing in one model, or differs in shape.

    Example:

        >>> import torch
        >>> from talib_fast.finetune.delta import BehavioralRegularization
        >>> source = {"layer1": torch.zeros(2, 3, 4, 4)}
        >>> target = {"layer1": torch.ones(2, 3, 4, 4)}
        >>> BehavioralRegularization()(source, target)
        tensor(48.)
    """

    def forward(self, layer_outputs_source: LayerOutputs, layer_outputs_target: LayerOutputs) -> Tensor:
        _, sources, targets = _paired(layer_outputs_source, layer_outputs_target)
        return squared_distance(targets, sources)[0]


class AttentionBehavioralRegularization(KeptTensors):
    """Sum over layers of ½·C·a_c/P·‖t_bc − s_bc‖², summed over batch and channels: DELTA with attention.

    t are the target model's feature maps and s those of the source model. Channel c of C has the attention a_c and P
    positions (H·W for images).

    Paper: Li et al., `DELTA: DEep Learning Transfer using Feature Map with Attention for Convolutional Networks (ICLR
    2019) <https://openreview.net/forum?id=rkgbwsAcYm>`__.

    Args:
        channel_attention: for each layer a vector ``[C]`` or ``[1, C]`` of floats or integers, by name or in the order
            of the outputs. :func:`~talib_fast.finetune.delta.channel_attention` computes them. They move with this
            module and are in no state dict. The attribute of this name can be assigned to.
        channel_dim: dimension of the channels. 1 for images, -1 for tokens ``[b, t, C]``. Not 0, the batch dimension.

    Inputs:
        layer_outputs_source: feature maps s of at least two dimensions by layer name, or a sequence of them. They get
            no gradient.
        layer_outputs_target: feature maps t of the same names and shapes.

    Returns:
        A 0-dim tensor on the maps' device, float32 (float64 for float64 maps).

    Raises:
        TypeError: the outputs are neither a mapping nor a sequence, a layer's output is no tensor, or an attention is
            no vector.
        ValueError: a layer or its attention is missing, or a shape does not fit.

    Example:

        >>> import torch
        >>> from talib_fast.finetune.delta import AttentionBehavioralRegularization
        >>> penalty = AttentionBehavioralRegularization({"layer1": torch.tensor([0.25, 0.75])})
        >>> source = {"layer1": torch.zeros(1, 2, 4, 4)}
        >>> target = {"layer1": torch.ones(1, 2, 4, 4)}
        >>> penalty(source, target)
        tensor(1.)
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
        """The attention vectors ``[C]``, one per layer."""
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
            raise ValueError(f"expected outputs of the layers {self._names}, which have attention, got {names}")
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
