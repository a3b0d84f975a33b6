"""Runs what follows one layer of a network again with a channel of that layer zeroed."""

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from .layers import check_output, check_runs, find_layer
from .structures import clone, map_tensors, tensors_in


class Inseparable(Exception):
    """The model does something to a :class:`Separable` that a pair of tensors can't stand for."""


def _exchanged(tensor: Tensor, other: Tensor, channel: Tensor, channel_dim: int) -> Tensor:
    """``tensor``, with one channel from ``other``."""
    kept = torch.arange(tensor.size(channel_dim), device=tensor.device) != channel
    sizes = [1] * tensor.dim()
    sizes[channel_dim] = -1
    return torch.where(kept.view(sizes), tensor, other)


class Separable(Tensor):
    """What a network holds with one channel zeroed, for every choice of that channel, as long as channels don't mix.

    Behind a layer that returns ``[b, C, *]``, an activation, a batch norm in evaluation mode or a pooling keeps to
    itself what becomes of a channel. So a pair says it all: ``whole``, with every channel in place, and ``zeroed``,
    with all of them zero; if ``channel`` alone is zero, that one is ``zeroed``'s and the others are ``whole``'s. What
    does not depend on the layer has one tensor for both. A convolution or a linear layer mixes the channels; its
    output for all of them in place changes by what the one channel's difference contributes, which takes that
    channel's weights only. Any other function gets the ordinary tensor.

    It has no memory of its own: code that goes round ``__torch_function__`` raises :class:`Inseparable`.
    """

    whole: Tensor
    zeroed: Tensor
    channel: Tensor
    parameters: frozenset[int]

    @staticmethod
    def __new__(cls, whole: Tensor, zeroed: Tensor, channel: Tensor, parameters: frozenset[int]) -> "Separable":
        """``channel`` is a 0-dim index, which may be mapped over; ``parameters``: the ids of the model's tensors."""
        self = torch.Tensor._make_wrapper_subclass(
            cls, whole.size(), strides=whole.stride(), dtype=whole.dtype, device=whole.device
        )
        self.whole, self.zeroed, self.channel, self.parameters = whole, zeroed, channel, parameters
        return self

    @property
    def constant(self) -> bool:
        return self.zeroed is self.whole

    def ordinary(self) -> Tensor:
        """The tensor that the network would hold."""
        return self.whole if self.constant else _exchanged(self.whole, self.zeroed, self.channel, 1)

    def difference(self) -> Tensor:
        """What zeroing the one channel adds to it, ``[b, 1, *]``."""
        channel = self.channel.view(1)
        return self.zeroed.index_select(1, channel) - self.whole.index_select(1, channel)

    def _like(self, whole: Tensor, zeroed: Tensor) -> "Separable":
        return Separable(whole, zeroed, self.channel, self.parameters)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        call = _Call(func, args, kwargs or {})
        for rule in (_metadata, _of_constants, _separately, _through_weights):
            result = rule(call)
            if result is not NotImplemented:
                return result
        if call.in_place:
            raise Inseparable(f"{call.func} in place")
        return call.with_tensors(Separable.ordinary)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise Inseparable(f"{func} outside of __torch_function__")


class _Call:
    """A function that was called with at least one :class:`Separable`."""

    def __init__(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.func, self.args, self.kwargs = func, args, kwargs
        self.operands: list[Separable] = []
        others: list[Tensor] = []

        def sort(tensor: Tensor) -> Tensor:
            if isinstance(tensor, Separable):
                self.operands.append(tensor)
            else:
                others.append(tensor)
            return tensor

        map_tensors(sort, [*args, *kwargs.values()])
        # of any other tensor than the model's own nobody knows whether it depends on the channel
        self.known = all(id(tensor) in self.operands[0].parameters for tensor in others)
        name = getattr(func, "__name__", "")
        self.in_place = (
            (name.endswith("_") and not name.endswith("__"))
            or func in _IN_PLACE
            or "out" in kwargs
            or bool(kwargs.get("inplace"))
        )

    def with_tensors(self, of: Callable[[Separable], Tensor]) -> Any:
        def choose(tensor: Tensor) -> Tensor:
            return of(tensor) if isinstance(tensor, Separable) else tensor

        return self.func(*map_tensors(choose, list(self.args)), **map_tensors(choose, self.kwargs))


def _functions(names: str) -> frozenset[Callable[..., Any]]:
    """All of PyTorch's functions and methods that are called so."""
    owners = (torch, Tensor, F)
    return frozenset(getattr(owner, name) for name in names.split() for owner in owners if hasattr(owner, name))


def _spellings(names: str) -> str:
    """Each name, in place too, and as an operator, from either side and in place."""
    return " ".join(f"{name} {name}_ __{name}__ __r{name}__ __i{name}__" for name in names.split())


_OPERATORS = "add sub mul div truediv pow neg abs"
_IN_PLACE = _functions("__setitem__ " + " ".join(f"__i{name}__" for name in _OPERATORS.split()))
_METADATA = _functions("size dim numel stride is_contiguous is_floating_point element_size __len__") | {
    getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "requires_grad")
}
# their result's element at [:, c] comes from the operands' elements at [:, c], if it has the operands' [b, C, ...]
_ELEMENTWISE = _functions(
    _spellings(_OPERATORS)
    + " "
    + _spellings(
        "relu relu6 leaky_relu elu selu celu gelu silu mish sigmoid logsigmoid hardsigmoid hardswish hardtanh tanh "
        "softplus softsign tanhshrink hardshrink softshrink threshold prelu clamp exp expm1 log log1p sqrt rsqrt "
        "square reciprocal erf sign maximum minimum where"
    )
    + " clone contiguous detach to float double half bfloat16 batch_norm instance_norm"
)
_RESHAPING = _functions("flatten reshape view squeeze unsqueeze unflatten")
_REDUCING = _functions("mean sum amax amin")
_POOLING = {
    function: dimensions
    for dimensions in (1, 2, 3)
    for function in _functions(
        f"max_pool{dimensions}d avg_pool{dimensions}d adaptive_avg_pool{dimensions}d adaptive_max_pool{dimensions}d"
    )
}
_GLOBAL_POOLING = {
    function: dimensions for dimensions in (1, 2, 3) for function in _functions(f"adaptive_avg_pool{dimensions}d")
}
_DROPOUT = _functions("dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout")
_CONVOLUTION = _functions("conv1d conv2d conv3d")
_LINEAR = _functions("linear")


class _Convolution(NamedTuple):
    input: Tensor
    weight: Tensor
    bias: Tensor | None = None
    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    groups: int = 1


class _Linear(NamedTuple):
    input: Tensor
    weight: Tensor
    bias: Tensor | None = None


class _Pooling(NamedTuple):
    input: Tensor
    output_size: Any


class _BatchNorm(NamedTuple):
    input: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    training: bool = False
    momentum: float = 0.1
    eps: float = 1e-5

    def as_scaling(self) -> Tensor:
        assert self.running_mean is not None and self.running_var is not None
        precise = torch.promote_types(self.running_var.dtype, torch.float32)
        scale = (self.running_var.to(precise) + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight
        shift = -self.running_mean * scale
        if self.bias is not None:
            shift = shift + self.bias
        trailing = [-1] + [1] * (self.input.dim() - 2)
        return torch.addcmul(shift.view(trailing), self.input, scale.view(trailing)).to(self.input.dtype)


def _metadata(call: _Call) -> Any:
    if call.func not in _METADATA:
        return NotImplemented
    return call.with_tensors(lambda operand: operand.whole)


def _of_constants(call: _Call) -> Any:
    """What comes of tensors that do not depend on the channel does not either."""
    if not (call.known and all(operand.constant for operand in call.operands)):
        return NotImplemented
    first = call.operands[0]
    result = call.with_tensors(lambda operand: operand.whole)
    if isinstance(result, Tensor):  # what is changed in place stays the object that it was
        for operand in call.operands:
            if result is operand.whole:
                return operand
    return map_tensors(lambda tensor: first._like(tensor, tensor), result)


def _separately(call: _Call) -> Any:
    """Functions that keep the channels apart are called for both tensors of the pair."""
    first = next((operand for operand in call.operands if not operand.constant), None)
    if first is None or not call.known or "out" in call.kwargs:
        return NotImplemented
    if call.func in _DROPOUT and not call.kwargs.get("training", True):
        return first
    if any(operand.whole.dim() != first.whole.dim() for operand in call.operands):
        return NotImplemented
    if any(operand.whole.size(1) != first.whole.size(1) for operand in call.operands):
        return NotImplemented
    if call.in_place and call.args[0] is not first:  # one tensor would have to become two
        return NotImplemented
    if not _keeps_channels_apart(call, first):
        return NotImplemented
    whole = call.with_tensors(lambda operand: operand.whole)
    zeroed = call.with_tensors(lambda operand: operand.zeroed)
    if whole is first.whole and zeroed is first.zeroed:
        return first
    if not isinstance(whole, Tensor) or whole.shape[:2] != first.whole.shape[:2]:
        return NotImplemented
    return first._like(whole, zeroed)


def _keeps_channels_apart(call: _Call, first: Separable) -> bool:
    dimensions = first.whole.dim()
    if call.func in _REDUCING:
        reduced = call.kwargs.get("dim", call.args[1] if len(call.args) > 1 else None)
        reduced = [reduced] if isinstance(reduced, int) else reduced
        return isinstance(reduced, (list, tuple)) and bool(reduced) and all(dim % dimensions > 1 for dim in reduced)
    if call.func in _POOLING:
        return dimensions == _POOLING[call.func] + 2
    if call.func in _CONVOLUTION:
        convolution = _Convolution(*call.args, **call.kwargs)
        depthwise = convolution.groups == convolution.weight.size(0) == first.whole.size(1)
        return depthwise and convolution.input is first and convolution.weight.dim() == dimensions
    if call.func in _LINEAR:
        return dimensions > 2 and _Linear(*call.args, **call.kwargs).input is first
    return call.func in _ELEMENTWISE or call.func in _RESHAPING


def _through_weights(call: _Call) -> Any:
    """A layer that mixes the channels, of the whole, and of the one channel's difference with its own weights."""
    layer: _Convolution | _Linear
    if call.func in _CONVOLUTION:
        layer = _Convolution(*call.args, **call.kwargs)
    elif call.func in _LINEAR:
        layer = _Linear(*call.args, **call.kwargs)
    else:
        return NotImplemented
    entering, weight = layer.input, layer.weight
    if not call.known or len(call.operands) != 1 or not isinstance(entering, Separable):
        return NotImplemented
    if weight.size(1) != entering.whole.size(1) or weight.dim() != entering.whole.dim():  # groups, or no batch
        return NotImplemented
    channel = weight.index_select(1, entering.channel.view(1))
    difference = layer._replace(input=entering.difference(), weight=channel, bias=None)
    return call.with_tensors(lambda operand: operand.whole) + call.func(*difference)


class _ForMapping(TorchFunctionMode):
    """Functions in a form that is mapped over without copies.

    A batch norm with running statistics is one multiplication and addition, a global average pooling a mean.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.batch_norm:
            norm = _BatchNorm(*args, **(kwargs or {}))
            if not norm.training and norm.running_mean is not None and not isinstance(norm.input, Separable):
                return norm.as_scaling()
        if func in _GLOBAL_POOLING:
            pooling = _Pooling(*args, **(kwargs or {}))
            dimensions, sizes = _GLOBAL_POOLING[func], pooling.output_size
            if not isinstance(pooling.input, Separable) and all(
                size == 1 for size in (sizes if isinstance(sizes, (list, tuple)) else [sizes])
            ):
                return pooling.input.mean(list(range(-dimensions, 0)), keepdim=True)
        return func(*args, **(kwargs or {}))


class Replay:
    """Runs what follows one layer again, for other outputs of that layer, with everything before it remembered.

    A first pass records what the modules that finish before the layer return; only the outermost count, since a
    module that is not entered calls none of its own. Later passes hand out what was recorded.
    """

    def __init__(self, model: nn.Module, name: str, x: Any, channel_dim: int = 1) -> None:
        """``name`` is the layer's, ``channel_dim`` the dimension of its channels."""
        self.model, self.name, self.x, self.channel_dim = model, name, x, channel_dim
        self.layer = find_layer(model, name)
        self.original: Tensor | None = None
        self._recorded: list[tuple[nn.Module, Any]] = []
        self._parameters = frozenset(map(id, (*model.parameters(), *model.buffers())))
        self.output = self._record()
        self._ways = [self._separately, self._together]
        assert self.original is not None
        if channel_dim % self.original.dim() != 1:  # of tokens, which a normalisation or an attention mixes soon
            self._ways.remove(self._separately)

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
                # mapped over without copies
                found = check_output(self.name, output, self.channel_dim)
                self.original = found.clone(memory_format=torch.contiguous_format)
            if self.original is None:
                del self._recorded[start:]
                self._recorded.append((module, clone(output)))

        handles = []
        try:
            for module in self.model.modules():
                if isinstance(module, torch.jit.ScriptModule):  # takes no hooks: it runs again in every pass
                    continue
                handles.append(module.register_forward_pre_hook(enter))
                handles.append(module.register_forward_hook(leave))
            output = self.model(self.x)
        finally:
            for handle in handles:
                handle.remove()
        check_runs(self.name, calls)
        return output

    @contextmanager
    def _standing_in(self, layer_output: Tensor, constant: Callable[[Tensor], Tensor]) -> Iterator[None]:
        answers: dict[nn.Module, list[Any]] = {self.layer: [layer_output]}
        for module, output in self._recorded:
            answers.setdefault(module, []).append(output)
        own_forward = {module: module.__dict__["forward"] for module in answers if "forward" in module.__dict__}
        # what was recorded came out of a module's own hooks: they get a copy, and what they make of it is put right
        final: dict[nn.Module, Any] = {}
        hooked = {
            module: module.register_forward_hook(lambda module, *_: final.pop(module, None))
            for module in answers
            if module._forward_hooks
        }

        def stand_in(module: nn.Module, remaining: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
            for output in remaining:
                answer = output if module is self.layer else map_tensors(constant, clone(output))
                if module not in hooked:
                    return answer
                final[module] = answer
                return clone(answer)
            if module in own_forward:
                return own_forward[module](*args, **kwargs)
            return type(module).forward(module, *args, **kwargs)

        # attributes that a forward pass sets would hold tensors that are of no use outside of the pass
        kept = [
            (held, dict(held))
            for module in self.model.modules()
            if not isinstance(module, torch.jit.ScriptModule)
            for held in (module.__dict__, module._buffers)
        ]
        try:
            for module, outputs in answers.items():
                module.__dict__["forward"] = functools.partial(stand_in, module, iter(outputs))
            yield
        finally:
            for handle in hooked.values():
                handle.remove()
            for held, before in kept:
                for key in held.keys() - before.keys():
                    del held[key]
                held.update(before)

    def without_channels(self, channels: Tensor) -> Iterable[Any]:
        """The model's outputs with each of several channels of the layer zeroed, in one pass where that works."""
        while self._ways:
            try:
                return self._ways[0](channels)
            except Exception:  # memory, or what neither pair nor vmap can do; an error of the model's own comes again
                del self._ways[0]
        return (self._without_channel(channel) for channel in channels)

    def _separately(self, channels: Tensor) -> Iterable[Any]:
        return self._mapped(functools.partial(self._without_channel, separable=True), channels)

    def _together(self, channels: Tensor) -> Iterable[Any]:
        return self._mapped(self._without_channel, channels)

    @staticmethod
    def _mapped(without_channel: Callable[[Tensor], Any], channels: Tensor) -> Iterable[Any]:
        output: Any = None

        def tensors_without_channel(channel: Tensor) -> tuple[Tensor, ...]:
            nonlocal output
            output = without_channel(channel)
            return tuple(tensors_in(output))

        # fused attention between tokens can't be mapped over: it would run for every channel by itself
        with _ForMapping(), sdpa_kernel(SDPBackend.MATH):
            mapped = torch.func.vmap(tensors_without_channel)(channels)
        if isinstance(output, Tensor):
            return mapped[0].unbind()
        by_channel = {id(tensor): values.unbind() for tensor, values in zip(tensors_in(output), mapped, strict=True)}

        def of(index: int) -> Any:
            return map_tensors(lambda tensor: by_channel[id(tensor)][index], output)

        return [of(index) for index in range(len(channels))]

    def _without_channel(self, channel: Tensor, separable: bool = False) -> Any:
        """``channel`` is a 0-dim index."""
        assert self.original is not None
        original = self.original.clone()
        zeros = torch.zeros_like(original)
        layer_output = (
            Separable(original, zeros, channel, self._parameters)
            if separable
            else _exchanged(original, zeros, channel, self.channel_dim)
        )

        def constant(tensor: Tensor) -> Tensor:
            return Separable(tensor, tensor, channel, self._parameters) if separable else tensor

        with self._standing_in(layer_output, constant):
            output = self.model(map_tensors(constant, self.x))
        return map_tensors(lambda tensor: tensor.ordinary() if isinstance(tensor, Separable) else tensor, output)
