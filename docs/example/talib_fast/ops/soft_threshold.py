"""Soft thresholding, the proximal operator of the L1 norm: every value moves towards 0 by the threshold, or is 0::

    y = sign(x)·max(|x| − t, 0) = x − clamp(x, −t, t)        dx = dy where |x| > t, else 0

An example of an operation: docs/contributing.md goes through its files. This one comes first. It states the
mathematics, in the docstring and in PyTorch, and what is stated here decides what every kernel has to compute.
"""

import sys
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..checks import check_floats, check_number
from .library import accumulation_dtype, apply, define, needs_pytorch_formula

# ---- The PyTorch implementation: it serves every device that has no kernel, and a kernel has to agree with it. It may
# be slow. Half precision is calculated with in float32 and rounded once, as the kernels do it.


def _shrunk(input: Tensor, threshold: float) -> Tensor:
    wide = input.to(accumulation_dtype(input))
    return wide - wide.clamp(-threshold, threshold)


def _gradient(grad_output: Tensor, input: Tensor, threshold: float) -> Tensor:
    """Of PyTorch's operators alone, so that it can be differentiated: the double backward pass goes through it."""
    inside = input.to(accumulation_dtype(input)).abs() <= threshold
    return grad_output.masked_fill(inside, 0)


# An operator's outputs are new tensors, whose strides the fake promises: those of the input, where it is dense.
def _forward(input: Tensor, threshold: float) -> Tensor:
    return torch.empty_like(input).copy_(_shrunk(input, threshold))


def _backward(grad_output: Tensor, input: Tensor, threshold: float) -> Tensor:
    return torch.empty_like(input).copy_(_gradient(grad_output, input, threshold))


def _forward_fake(input, threshold):
    return torch.empty_like(input)


def _backward_fake(grad_output, input, threshold):
    return torch.empty_like(input)


# ---- The operators. The schema is the contract with the kernels: STABLE_TORCH_LIBRARY_IMPL registers them over the
# implementations given here, for one device each, under these names. Nothing here asks which device it is.

_forward_op = define("soft_threshold_forward(Tensor input, float threshold) -> Tensor", _forward, _forward_fake)
_backward_op = define(
    "soft_threshold_backward(Tensor grad_output, Tensor input, float threshold) -> Tensor", _backward, _backward_fake
)


class _SoftThreshold(Function):
    """Autograd, around operators that have none: thinner than ``register_autograd``, and it compiles into one graph."""

    @staticmethod
    def forward(input: Tensor, threshold: float) -> Tensor:
        return _forward_op(input, threshold)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        input, ctx.threshold = inputs
        ctx.save_for_backward(input)  # an input, no copy: the floor counts no byte for it

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        (input,) = ctx.saved_tensors
        # with create_graph this pass is differentiated in its turn, which a kernel can't be
        gradient = _gradient if torch.is_grad_enabled() else _backward_op
        return gradient(grad_output, input, ctx.threshold), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, None], input: Tensor, threshold: float) -> tuple[Tensor, int | None]:
        """Single elements do not care which dimension is mapped over."""
        return apply(_SoftThreshold, input, threshold), in_dims[0]


def soft_threshold(input: Tensor, threshold: float) -> Tensor:
    """Move every value towards 0 by ``threshold``, and to 0 what would cross it.

    Differentiable in ``input``, also twice and in forward mode; at ±threshold the derivative is 0. NaN stays NaN.

    Args:
        input: of any shape and layout, float16, bfloat16, float32 or float64.
        threshold: at least 0, and finite.

    Returns:
        A tensor of the input's shape and dtype.

    Raises:
        TypeError: ``input`` is not a dense tensor of floating-point numbers, or ``threshold`` is no number.
        ValueError: ``threshold`` is negative or not finite.
    """
    # All checks are here, before any kernel, so that they hold for every backend and a message can say what it got.
    check_floats(input, "input")
    check_number(threshold, "threshold", sys.float_info.max)
    if needs_pytorch_formula():  # forward mode and torch.func.functionalize take no autograd function like ours
        return _shrunk(input, threshold).to(input.dtype)
    return apply(_SoftThreshold, input, threshold)
