"""The activations that a stochastic norm can fuse: what they compute, and what their backward pass needs."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# torch.nn.functional's names, in the order of Activation in csrc/types.h: piecewise linear ones, then smooth ones
NAMES = ("none", "relu", "relu6", "leaky_relu", "silu", "hardswish", "gelu")
_PLACES = {name: place for place, name in enumerate(NAMES)}  # the numbers that kernels use
FIRST_SMOOTH = _PLACES["silu"]
_BITS = 32


class Activation(NamedTuple):
    """An activation. Those before "silu" are piecewise linear: their derivative is 1 or the slope.

    It has methods instead of properties, because torch.compile of torch 2.10 can't follow properties of a named tuple.

    Attributes:
        name: one of ``NAMES``. Not a number, because torch.compile would treat that as a variable.
        negative_slope: the slope of "leaky_relu" below 0.
    """

    name: str = "none"
    negative_slope: float = 0.0

    def arguments(self) -> tuple[int, float]:
        """The two arguments that operators take for it."""
        return _PLACES[self.name], self.negative_slope if self.name == "leaky_relu" else 0.0

    def slope(self) -> float:
        """The derivative of a piecewise linear activation where it is not 1."""
        return {"none": 1.0, "leaky_relu": self.negative_slope}.get(self.name, 0.0)

    def takes_residual(self) -> bool:
        """Whether kernels can add a residual before it: for piecewise linear ones, which need one bit per element."""
        return _PLACES[self.name] < FIRST_SMOOTH

    def forward(self, z: Tensor) -> Tensor:
        """Apply it by PyTorch's own operator."""
        if self.name == "none":
            return z
        if self.name == "leaky_relu":
            return F.leaky_relu(z, self.negative_slope)
        return getattr(F, self.name)(z)

    def passes(self, z: Tensor) -> Tensor:
        """Where the derivative of a piecewise linear activation is 1, as bool."""
        passes = (z <= 0).logical_not_()
        return passes.logical_and_((z >= 6).logical_not_()) if self.name == "relu6" else passes

    def gradient(self, grad: Tensor, passes: Tensor) -> Tensor:
        """The gradient for the input of a piecewise linear activation. By selection: 0 times infinity gives 0."""
        slope = self.slope()
        return torch.where(passes, grad, grad * slope if slope else 0)

    def backward(self, grad: Tensor, z: Tensor) -> Tensor:
        """The gradient of ``z``, in operators that can be differentiated any number of times."""
        if self.takes_residual():
            return self.gradient(grad, self.passes(z))
        if self.name == "silu":
            s = z.sigmoid()
            return grad * (s * (1 + z * (1 - s)))
        if self.name == "hardswish":
            return torch.where(z <= -3, 0, torch.where(z < 3, grad * (z / 3 + 0.5), grad))
        if self.name == "gelu":
            cumulative = 0.5 * (1 + torch.erf(z / math.sqrt(2)))
            density = torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
            return grad * (cumulative + z * density)
        raise NotImplementedError(f"the derivative of {self.name}")


def activation_by_arguments(place: int, negative_slope: float) -> Activation:
    """The activation for the arguments of an operator, as ``Activation.arguments`` returns them."""
    return Activation(NAMES[place], negative_slope)


NO_ACTIVATION = Activation()


def _in_memory_order(dense: Tensor) -> Tensor:
    """A dense tensor's elements as one row in the order of memory. It is a view."""
    order = sorted(range(dense.dim()), key=lambda dim: (dense.stride(dim), dense.size(dim)), reverse=True)
    return dense.permute(order).reshape(-1)


def signs_length(tensor: Tensor) -> int:
    """The number of words that hold one bit for each element of ``tensor``."""
    return (tensor.numel() + _BITS - 1) // _BITS


def pack_signs(flags: Tensor) -> Tensor:
    """Pack a dense bool tensor into int32 words. Element i, in the order of memory, is bit i % 32 of word i // 32."""
    row = _in_memory_order(flags)
    words = F.pad(row, (0, -len(row) % _BITS)).view(-1, _BITS).to(torch.int32)
    return (words << torch.arange(_BITS, dtype=torch.int32, device=flags.device)).sum(1, dtype=torch.int32)


def unpack_signs(signs: Tensor, like: Tensor) -> Tensor:
    """Undo ``pack_signs``, for a tensor with the shape of ``like`` and, except for gaps, its strides."""
    bits = (signs[:, None] >> torch.arange(_BITS, dtype=torch.int32, device=signs.device)) & 1
    flags = torch.empty_like(like, dtype=torch.bool)
    _in_memory_order(flags).copy_(bits.flatten()[: flags.numel()])
    return flags
