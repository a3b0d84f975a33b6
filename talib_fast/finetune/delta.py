"""L2, L2-SP and DELTA: distances to the pretrained network, in its parameters and in its feature maps.

L2-SP: Explicit Inductive Bias for Transfer Learning with Convolutional Networks, ICML 2018
(https://arxiv.org/abs/1802.01483). DELTA: DEep Learning Transfer using Feature Map with Attention, ICLR 2019
(https://openreview.net/forum?id=rkgbwsAcYm).
"""

import difflib
import functools
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..ops import squared_distance
from ..progress import progress as progress_bar
from .prediction import evaluating, inputs_of, labels_of

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

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def _unwrap(model: nn.Module) -> nn.Module:
    """The module inside DataParallel, DistributedDataParallel and torch.compile."""
    while True:
        if isinstance(model, _WRAPPERS):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = cast(nn.Module, model._orig_mod)
        else:
            return model


class _ModelRegularization(nn.Module):
    """Looks at a model's parameters without owning them: they are in nobody's state dict twice."""

    model: nn.Module
    target_model: nn.Module

    def _watch(self, name: str, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"expected {name} to be a torch.nn.Module, got {type(model).__name__}")
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
        if not isinstance(source_model, nn.Module):
            raise TypeError(f"expected source_model to be a torch.nn.Module, got {type(source_model).__name__}")
        self._watch("target_model", target_model)
        self._names: list[str] = []
        start = dict(_unwrap(source_model).named_parameters())
        missing = []
        for name, parameter in _unwrap(target_model).named_parameters():
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
        parameters = dict(_unwrap(self.target_model).named_parameters())
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
        channel_dim: dimension of the channels: 1 for images, -1 for tokens ``[b, t, C]``.

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
            if target.dim() < 2 or not -target.dim() <= self.channel_dim < target.dim():
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


def get_attribute(obj: Any, attr: str, *args: Any) -> Any:
    """``getattr`` along a dotted path: ``get_attribute(model, "layer1.0.conv2")``, with an optional default."""
    return functools.reduce(lambda value, name: getattr(value, name, *args), attr.split("."), obj)


def _find_layer(model: nn.Module, name: str) -> nn.Module:
    """The module called ``name`` in ``model`` or in what ``model`` wraps."""
    for root in (model, _unwrap(model)):
        layer = get_attribute(root, name, None)
        if isinstance(layer, nn.Module):
            return layer
    known = [known for known, _ in _unwrap(model).named_modules() if known]
    close = difflib.get_close_matches(name, known, n=3) or known[:3]
    raise AttributeError(
        f"Module {name} not found in {type(_unwrap(model)).__name__}; did you mean {', '.join(close)}?"
    )


def _clone(output: Any) -> Any:
    """The same structure with every tensor copied."""
    if isinstance(output, Tensor):
        return output.clone()
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return type(output)(*map(_clone, output))
    if isinstance(output, (list, tuple)):
        return type(output)(map(_clone, output))
    if isinstance(output, dict):
        return {key: _clone(value) for key, value in output.items()}
    return output


class IntermediateLayerGetter:
    """Calls a model and collects what some of its layers return.

    What a layer returned is what you get, also where a later in-place operation, such as the ReLU behind a
    convolution, overwrites it. Outputs are copied for that, until a first call in the same mode has shown that a
    layer's output survives the forward pass; from then on it is handed out as it is.

    Args:
        model: also inside DataParallel, DistributedDataParallel or torch.compile.
        return_layers: names of the layers, as in ``model.named_modules()``.
        keep_output: also return the model's output.

    Calling it with the model's arguments returns ``(outputs, model_output)``: an OrderedDict by layer name, in the
    order of ``return_layers``, and the model's output or None. The output of a layer that runs several times is a list.

    Raises:
        AttributeError: the model has no layer of that name.
        RuntimeError: a forward pass leaves out a layer, or overwrites an output that had survived before.
    """

    def __init__(self, model: nn.Module, return_layers: Iterable[str], keep_output: bool = True) -> None:
        if isinstance(return_layers, str):
            raise TypeError(f"expected return_layers to be a list of names, got the string {return_layers!r}")
        self._model = model
        self.return_layers = list(return_layers)
        self.keep_output = keep_output
        self._survivors: set[tuple[str, bool, bool]] = set()
        for name in self.return_layers:
            _find_layer(model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[OrderedDict[str, Any], Any]:
        collected: dict[str, list[Any]] = {}
        versions: dict[str, list[tuple[Tensor, int]]] = {name: [] for name in self.return_layers}
        handles = []

        def mode(name: str) -> tuple[str, bool, bool]:
            return name, self._model.training, torch.is_grad_enabled()

        def hook(_module: nn.Module, _input: Any, output: Any, *, name: str) -> None:
            watched = not torch.compiler.is_compiling() and isinstance(output, Tensor) and not output.is_inference()
            if watched:
                versions[name].append((output, output._version))
            kept = output if watched and mode(name) in self._survivors else _clone(output)
            collected.setdefault(name, []).append(kept)

        try:
            for name in self.return_layers:
                layer = _find_layer(self._model, name)
                handles.append(layer.register_forward_hook(functools.partial(hook, name=name)))
            output = self._model(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        outputs: OrderedDict[str, Any] = OrderedDict()
        for name in self.return_layers:
            if name not in collected:
                raise RuntimeError(f"layer {name!r} did not run in this forward pass")
            survived = all(output._version == version for output, version in versions[name])
            if mode(name) in self._survivors and not survived:
                raise RuntimeError(
                    f"the output of layer {name!r} was overwritten in place, although it had survived earlier forward "
                    "passes: make a new IntermediateLayerGetter where the model changes"
                )
            if versions[name] and survived:
                self._survivors.add(mode(name))
            outputs[name] = collected[name][0] if len(collected[name]) == 1 else collected[name]
        return outputs, output if self.keep_output else None


class _Replay:
    """Runs what follows one layer again, for other outputs of that layer, with everything before it remembered.

    A first pass records what the modules that finish before the layer return; only the outermost count, since a
    module that is not entered calls none of its own. Later passes hand out what was recorded.
    """

    def __init__(self, model: nn.Module, layer: nn.Module, x: Tensor) -> None:
        self.model, self.layer, self.x = model, layer, x
        self.original: Tensor | None = None
        self._recorded: list[tuple[nn.Module, Any]] = []
        self.output = self._record()

    def _record(self) -> Any:
        open_calls: list[int] = []
        calls = 0

        def enter(_module: nn.Module, _args: Any) -> None:
            open_calls.append(len(self._recorded))

        def leave(module: nn.Module, _args: Any, output: Any) -> None:
            nonlocal calls
            start = open_calls.pop()
            if module is self.layer:
                calls += 1
                if not isinstance(output, Tensor) or output.dim() < 2:
                    raise ValueError("expected a layer that returns a tensor with a batch and a channel dimension")
                self.original = output.clone(memory_format=torch.contiguous_format)  # mapped over without copies
            if self.original is None:
                del self._recorded[start:]
                self._recorded.append((module, _clone(output)))

        handles = []
        try:
            for module in self.model.modules():
                handles.append(module.register_forward_pre_hook(enter))
                handles.append(module.register_forward_hook(leave))
            output = self.model(self.x)
        finally:
            for handle in handles:
                handle.remove()
        if calls != 1:
            raise ValueError(f"expected a layer that runs once per forward pass, but it ran {calls} times")
        return output

    @contextmanager
    def _standing_in(self, layer_output: Tensor) -> Iterator[None]:
        answers: dict[nn.Module, list[Any]] = {self.layer: [layer_output]}
        for module, output in self._recorded:
            answers.setdefault(module, []).append(output)
        own_forward = {module: module.__dict__["forward"] for module in answers if "forward" in module.__dict__}

        def stand_in(module: nn.Module, remaining: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
            for output in remaining:
                return _clone(output)
            return type(module).forward(module, *args, **kwargs)

        try:
            for module, outputs in answers.items():
                module.__dict__["forward"] = functools.partial(stand_in, module, iter(outputs))
            yield
        finally:
            for module in answers:
                del module.__dict__["forward"]
                if module in own_forward:
                    module.__dict__["forward"] = own_forward[module]

    def without_channel(self, channel: Tensor) -> Any:
        """The model's output with one channel of the layer zeroed; ``channel`` is a 0-dim index."""
        original = self.original
        assert original is not None
        kept = torch.arange(original.size(1), device=original.device) != channel
        with self._standing_in(torch.where(kept.view(-1, *[1] * (original.dim() - 2)), original, 0)):
            return self.model(self.x)

    def without_channels(self, channels: Tensor) -> Iterable[Any]:
        """The outputs for each of several channels, in one batched pass where the model can be mapped over."""
        try:
            return torch.func.vmap(self.without_channel)(channels).unbind()
        except RuntimeError:
            return (self.without_channel(channel) for channel in channels)


@torch.no_grad()
def channel_attention(
    model: nn.Module,
    data_loader: Iterable,
    return_layers: Iterable[str],
    criterion: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    max_batches: int | None = 10,
    temperature: float = 5.0,
    device: torch.device | str | None = None,
    progress: bool = True,
    channels_per_pass: int = 16,
) -> OrderedDict[str, Tensor]:
    """DELTA's attention: how much the loss of the source network depends on each channel of each layer.

    For every channel the loss increase when that output channel is zero, averaged over batches, standardised over the
    layer's channels (population deviation; equal increases give equal attention) and put through
    softmax(z / temperature). The numbers are those of a full forward pass per channel, but what precedes the layer is
    not computed again and ``channels_per_pass`` channels share a pass. The model is left as it was, also when
    something raises.

    Args:
        model: returns logits in evaluation mode: a source backbone with a head for the target's classes.
        data_loader: batches ``(x, labels, ...)``.
        return_layers: names of layers that run once per pass and return ``[b, C, *]``.
        criterion: ``(logits, labels)`` → 0-dim loss.
        max_batches: how many batches to look at; None for all.
        temperature: of the softmax.
        device: where to work; the model's device by default, and the model must be there.
        progress: show a progress bar.
        channels_per_pass: more is faster and takes more memory.

    Returns:
        float32 vectors ``[C]``, each of sum 1, by layer name in the order of ``return_layers``.

    Raises:
        AttributeError: the model has no layer of that name.
        TypeError, ValueError: an argument or a batch is not as above, or the loader is empty.
    """
    names = [return_layers] if isinstance(return_layers, str) else list(return_layers)
    if not temperature > 0:
        raise ValueError(f"expected a temperature > 0, got {temperature}")
    for name, number in (("max_batches", max_batches), ("channels_per_pass", channels_per_pass)):
        if number is not None and number < 1:
            raise ValueError(f"expected {name} >= 1, got {number}")
    layers = {name: _find_layer(model, name) for name in names}
    if device is None:
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    increases: dict[str, Tensor] = {}
    batches = 0
    with evaluating(model):
        for batch in data_loader:
            if max_batches is not None and batches == max_batches:
                break
            batches += 1
            x, labels = inputs_of(batch).to(device), labels_of(batch).to(device)
            for name, layer in layers.items():
                increase = _loss_increases(model, layer, x, labels, criterion, channels_per_pass, name, progress)
                increases[name] = increases[name] + increase if name in increases else increase
    if not batches:
        raise ValueError("expected a data loader with at least one batch, got an empty one")
    attention = OrderedDict()
    for name in names:
        increase = increases[name] / batches
        centred = increase - increase.mean()
        deviation = centred.square().mean().sqrt()
        standardized = torch.where(deviation > 0, centred / deviation, 0)
        attention[name] = F.softmax(standardized / temperature, dim=0).float().to(device)
    return attention


def _loss_increases(
    model: nn.Module,
    layer: nn.Module,
    x: Tensor,
    labels: Tensor,
    criterion: Callable[[Tensor, Tensor], Tensor],
    channels_per_pass: int,
    name: str,
    show: bool,
) -> Tensor:
    """By how much the batch's loss rises when a channel is zeroed: float64 ``[C]`` on the CPU."""
    replay = _Replay(model, layer, x)
    assert replay.original is not None
    chunks = torch.arange(replay.original.size(1), device=x.device).split(channels_per_pass)
    losses = [
        criterion(output, labels)
        for chunk in progress_bar(chunks, f"Channel attention of {name}", len(chunks), show)
        for output in replay.without_channels(chunk)
    ]
    return torch.stack(losses).cpu().double() - criterion(replay.output, labels).cpu().double()
