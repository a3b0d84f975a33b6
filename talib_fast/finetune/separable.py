"""Represent a network's tensors, with any one channel of a layer zeroed, by a pair of tensors as long as that works."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .structures import map_tensors


class Inseparable(Exception):
    """The model does something to a ``Separable`` that a pair of tensors can't represent."""


def exchanged(tensor: Tensor, other: Tensor, channel: Tensor, channel_dim: int) -> Tensor:
    """``tensor`` with one channel taken from ``other``."""
    kept = torch.arange(tensor.size(channel_dim), device=tensor.device) != channel
    sizes = [1] * tensor.dim()
    sizes[channel_dim] = -1
    return torch.where(kept.view(sizes), tensor, other)


class Separable(Tensor):
    """A network's tensor with one channel of a layer zeroed, for every choice of that channel, as a pair of tensors.

    A layer returns ``[b, C, *]``. Activations, batch norms in evaluation mode and poolings after it do not mix
    channels. So a pair is enough: in ``whole`` every channel keeps its values, and in ``zeroed`` all of them are
    zeroed. If only ``channel`` is zeroed, that channel is taken from ``zeroed`` and all others from ``whole``. A tensor
    that does not depend on the layer is both at once.

    A convolution or a linear layer mixes the channels. Its output for ``whole`` then changes by the contribution of the
    one channel's difference, which needs only that channel's weights. Any other function gets the ordinary tensor.

    The pair has no memory of its own. Code that bypasses ``__torch_function__`` raises ``Inseparable``.
    """

    whole: Tensor
    zeroed: Tensor
    channel: Tensor
    parameters: frozenset[int]

    @staticmethod
    def __new__(cls, whole: Tensor, zeroed: Tensor, channel: Tensor, parameters: frozenset[int]) -> "Separable":
        """``channel`` is a 0-dim index, which vmap may map over. ``parameters`` are the ids of the model's tensors."""
        self = torch.Tensor._make_wrapper_subclass(
            cls, whole.size(), strides=whole.stride(), dtype=whole.dtype, device=whole.device
        )
        self.whole, self.zeroed, self.channel, self.parameters = whole, zeroed, channel, parameters
        return self

    @property
    def constant(self) -> bool:
        """Whether the tensor does not depend on the channel."""
        return self.zeroed is self.whole

    def ordinary(self) -> Tensor:
        """The tensor that the network would hold."""
        return self.whole if self.constant else exchanged(self.whole, self.zeroed, self.channel, 1)

    def difference(self) -> Tensor:
        """What zeroing the one channel adds to it, ``[b, 1, *]``."""
        channel = self.channel.view(1)
        return self.zeroed.index_select(1, channel) - self.whole.index_select(1, channel)

    def _like(self, whole: Tensor, zeroed: Tensor) -> "Separable":
        """A pair of these tensors for the same channel."""
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
    """A call of a function with at least one ``Separable`` among its arguments."""

    def __init__(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.func, self.args, self.kwargs = func, args, kwargs
        self.operands: list[Separable] = []
        plain: list[Tensor] = []

        def sort(tensor: Tensor) -> Tensor:
            if isinstance(tensor, Separable):
                self.operands.append(tensor)
            else:
                plain.append(tensor)
            return tensor

        map_tensors(sort, [*args, *kwargs.values()])
        # any tensor but the model's own may depend on the channel
        self.only_parameters = all(id(tensor) in self.operands[0].parameters for tensor in plain)
        name = getattr(func, "__name__", "")
        self.in_place = (
            (name.endswith("_") and not name.endswith("__"))
            or func in _IN_PLACE
            or "out" in kwargs
            or bool(kwargs.get("inplace"))
        )

    def with_tensors(self, of: Callable[[Separable], Tensor]) -> Any:
        """Call the function with an ordinary tensor in place of each ``Separable``."""

        def choose(tensor: Tensor) -> Tensor:
            return of(tensor) if isinstance(tensor, Separable) else tensor

        return self.func(*map_tensors(choose, list(self.args)), **map_tensors(choose, self.kwargs))


def functions(names: str) -> frozenset[Callable[..., Any]]:
    """All functions and methods of PyTorch with one of these names. Spaces separate the names."""
    owners = (torch, Tensor, F)
    return frozenset(getattr(owner, name) for name in names.split() for owner in owners if hasattr(owner, name))


def _spellings(names: str) -> str:
    """Each name, also in place, and as an operator from either side and in place."""
    return " ".join(f"{name} {name}_ __{name}__ __r{name}__ __i{name}__" for name in names.split())


_OPERATORS = "add sub mul div truediv pow neg abs"
_IN_PLACE = functions("__setitem__ " + " ".join(f"__i{name}__" for name in _OPERATORS.split()))
_METADATA = functions("size dim numel stride is_contiguous is_floating_point element_size __len__") | {
    getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "requires_grad")
}
# the result at [:, c] depends only on the operands at [:, c], if it has the operands' [b, C, ...]
_ELEMENTWISE = functions(
    _spellings(_OPERATORS)
    + " "
    + _spellings(
        "relu relu6 leaky_relu elu selu celu gelu silu mish sigmoid logsigmoid hardsigmoid hardswish hardtanh tanh "
        "softplus softsign tanhshrink hardshrink softshrink threshold prelu clamp exp expm1 log log1p sqrt rsqrt "
        "square reciprocal erf sign maximum minimum where"
    )
    + " clone contiguous detach to float double half bfloat16 batch_norm instance_norm"
)
_RESHAPING = functions("flatten reshape view squeeze unsqueeze unflatten")
_REDUCING = functions("mean sum amax amin")
_POOLING = {
    function: dimensions
    for dimensions in (1, 2, 3)
    for function in functions(
        f"max_pool{dimensions}d avg_pool{dimensions}d adaptive_avg_pool{dimensions}d adaptive_max_pool{dimensions}d"
    )
}
_DROPOUT = functions("dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout")
_CONVOLUTION = functions("conv1d conv2d conv3d")
_LINEAR = functions("linear")


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


def _metadata(call: _Call) -> Any:
    """Shapes, dtypes and the like, which are those of the whole."""
    if call.func not in _METADATA:
        return NotImplemented
    return call.with_tensors(lambda operand: operand.whole)


def _of_constants(call: _Call) -> Any:
    """A result of tensors that do not depend on the channel does not depend on it either."""
    if not (call.only_parameters and all(operand.constant for operand in call.operands)):
        return NotImplemented
    first = call.operands[0]
    result = call.with_tensors(lambda operand: operand.whole)
    if isinstance(result, Tensor):  # a function in place returns the same object
        for operand in call.operands:
            if result is operand.whole:
                return operand
    return map_tensors(lambda tensor: first._like(tensor, tensor), result)


def _separately(call: _Call) -> Any:
    """Call a function that does not mix channels once for each tensor of the pair."""
    first = next((operand for operand in call.operands if not operand.constant), None)
    if first is None or not call.only_parameters or "out" in call.kwargs:
        return NotImplemented
    if call.func in _DROPOUT and not call.kwargs.get("training", True):
        return first
    if any(operand.whole.dim() != first.whole.dim() for operand in call.operands):
        return NotImplemented
    if any(operand.whole.size(1) != first.whole.size(1) for operand in call.operands):
        return NotImplemented
    if call.in_place and call.args[0] is not first:  # one tensor would have to become a pair
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
    """Whether the function, with these arguments, does not mix channels."""
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
    """Apply a layer that mixes channels to the whole, and its weights for the one channel to the difference."""
    layer: _Convolution | _Linear
    if call.func in _CONVOLUTION:
        layer = _Convolution(*call.args, **call.kwargs)
    elif call.func in _LINEAR:
        layer = _Linear(*call.args, **call.kwargs)
    else:
        return NotImplemented
    entering, weight = layer.input, layer.weight
    if not call.only_parameters or len(call.operands) != 1 or not isinstance(entering, Separable):
        return NotImplemented
    if weight.size(1) != entering.whole.size(1) or weight.dim() != entering.whole.dim():  # groups, or no batch
        return NotImplemented
    channel = weight.index_select(1, entering.channel.view(1))
    difference = layer._replace(input=entering.difference(), weight=channel, bias=None)
    return call.with_tensors(lambda operand: operand.whole) + call.func(*difference)
