"""Stochastic normalisation: every channel uses either the batch's statistics or the running statistics."""

import math
import sys
from typing import Any

import torch
from torch import Tensor

from ..checks import check_floats, check_number
from .activation import NAMES, Activation
from .library import needs_pytorch_formula
from .stoch_norm_formula import Statistics, stoch_norm_by_formula, updated
from .stoch_norm_operators import functional_stoch_norm, with_statistics


def check_channels(input: Tensor, channels: int) -> None:
    """Raise TypeError unless ``input`` is floating point, and ValueError unless it has ``channels`` channels."""
    if not input.is_floating_point():
        raise TypeError(f"expected input to be a floating-point tensor, got {input.dtype}")
    if not torch.jit.is_tracing() and input.size(1) != channels:  # a trace has tensors for sizes
        raise ValueError(f"expected {channels} channels at dimension 1, got input of shape {list(input.shape)}")


def check_training(input: Tensor, channels: int, eps: float) -> None:
    """Raise as ``check_channels`` does, and ValueError unless ``eps`` is positive."""
    check_channels(input, channels)
    if eps <= 0:
        raise ValueError(f"expected eps to be positive during training, got {eps}")


def check_count(input: Tensor) -> None:
    """Raise ValueError if a channel has only one value, and so no variance."""
    if not torch.jit.is_tracing() and input.numel() == input.size(1) != 0:  # a trace has tensors for sizes
        raise ValueError(
            f"expected more than 1 value per channel when training, got input of shape {list(input.shape)}"
        )


def stoch_norm(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    mask: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "none",
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
) -> tuple[Tensor, Statistics]:
    """Normalise each channel with the batch's statistics where ``mask`` is True, else with the running statistics.

    With a residual and an activation the output is act(norm(input) + residual). The backward pass keeps nothing of the
    input's size but the input, and with a residual before an activation one bit per element.

    The running statistics are read as they are before the call. Then those of all channels are updated in place, by
    ``momentum`` towards the batch's mean and unbiased variance. An input without elements leaves them unchanged.
    Statistics are computed in float32 (float64 for float64 input). The operation is differentiable in ``input``,
    ``weight``, ``bias`` and ``residual``, also twice. Under :func:`torch.vmap` every member needs running statistics of
    its own.

    Paper: Kou, You, Long and Wang, `Stochastic Normalization (NeurIPS 2020)
    <https://proceedings.neurips.cc/paper/2020/hash/bc573864331a9e42e4511de6f678aa83-Abstract.html>`__.

    Args:
        input: ``[N, C, *]``, float16, bfloat16, float32 or float64.
        running_mean: ``[C]``, updated in place.
        running_var: ``[C]``, updated in place.
        mask: ``[C]``, bool. True uses the batch's statistics.
        weight: ``[C]``, or None for ones.
        bias: ``[C]``, or None for zeros.
        momentum: share of the batch in the new running statistics, in [0, 1]. With 1 they become the batch's.
        eps: added to the variance, finite and at least 0.
        activation: ``"none"``, ``"relu"``, ``"relu6"``, ``"leaky_relu"`` (piecewise linear), ``"silu"``,
            ``"hardswish"`` or ``"gelu"`` (smooth; GELU is the exact one, by erf).
        negative_slope: slope of ``"leaky_relu"`` below 0, finite.
        residual: of the input's shape, dtype and device, or None. Not with a smooth activation.

    Returns:
        The output, of the input's shape and dtype, and the ``(mean, rstd)`` that it was normalised with, each ``[C]``;
        rstd is 1/√(variance + eps).

    Raises:
        TypeError: an operand is not a dense tensor of floats, ``mask`` is not bool, the residual has another dtype than
            the input, ``activation`` is no string, or ``momentum``, ``eps`` or ``negative_slope`` is no number.
        ValueError: a shape or device does not fit, ``momentum``, ``eps`` or ``negative_slope`` is out of range, the
            activation is unknown or takes no residual, a channel has only one value, channels share the memory of their
            running statistics, or running statistics are not mapped over where other operands are.

    Example:

        >>> import torch
        >>> from talib_fast.ops import stoch_norm
        >>> input = torch.tensor([[1.0, 10.0], [3.0, 30.0]])  # two samples, two channels
        >>> mean, variance = torch.zeros(2), torch.ones(2)
        >>> output, _ = stoch_norm(input, mean, variance, torch.tensor([True, False]), momentum=0.5, eps=0.0)
        >>> output  # the first channel by the batch's statistics, the second by the running ones
        tensor([[-1., 10.],
                [ 1., 30.]])
        >>> mean  # updated for both
        tensor([ 1., 10.])
    """
    check_floats(input, "input")
    if input.dim() < 2:
        raise ValueError(f"expected input of shape [N, C, *], got {list(input.shape)}")
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"expected a bool mask, got {mask.dtype if isinstance(mask, Tensor) else type(mask).__name__}")
    check_number(momentum, "momentum", 1)
    check_number(eps, "eps", sys.float_info.max)
    function = _checked_activation(activation, negative_slope)
    if residual is not None:
        _check_residual(residual, input, activation, function)
    shape, device = (input.size(1),), input.device
    for name, vector in (
        ("mask", mask),
        ("running_mean", running_mean),
        ("running_var", running_var),
        ("weight", weight),
        ("bias", bias),
    ):
        if vector is None:
            continue
        if vector is not mask:
            check_floats(vector, name)
        if vector.shape != shape:
            raise ValueError(
                f"expected {name} of shape {list(shape)} for input of shape {list(input.shape)}, "
                f"got {list(vector.shape)}"
            )
        if vector.device != device:
            raise ValueError(f"expected {name} on the input's device {device}, got {vector.device}")
    for name, running in (("running_mean", running_mean), ("running_var", running_var)):
        if running.size(0) > 1 and running.stride(0) == 0:
            raise ValueError(f"expected memory of its own for every channel of {name}, got a stride of 0")
        # PyTorch can't give such a view to an operator that writes, and compiled code can't ask whether it is one
        if not torch.compiler.is_compiling() and running.is_neg():
            raise ValueError(f"expected {name} as it is in memory, got a negated view: use its resolve_neg()")
    check_count(input)
    operands = weight, bias
    if needs_pytorch_formula():
        state = running_mean, running_var, mask, *operands
        return stoch_norm_by_formula(input, *state, momentum, eps, 1.0, function, residual)
    if torch.compiler.is_compiling():
        joined = torch.stack((running_mean, running_var))
        results = functional_stoch_norm(input, joined, mask, *operands, eps, 1.0, function, residual)
        output, (mean, rstd), batch = results
        if input.numel():
            for target, statistic in zip((running_mean, running_var), batch, strict=True):
                target.copy_(updated(target, statistic, momentum))
        return output, (mean, rstd)
    output, (mean, rstd) = with_statistics(
        input, *operands, mask, eps, 1.0, function, residual, None, running_mean, running_var, momentum, None
    )
    return output, (mean, rstd)


def _checked_activation(name: Any, negative_slope: Any) -> Activation:
    """Check name and slope, and return the activation."""
    if not isinstance(name, str):
        raise TypeError(f"expected activation to be a string, got {type(name).__name__}")
    if name not in NAMES:
        raise ValueError(f"expected activation to be one of {', '.join(NAMES)}, got {name!r}")
    if isinstance(negative_slope, bool) or not isinstance(negative_slope, (int, float)):
        raise TypeError(f"expected negative_slope to be a number, got {negative_slope!r}")
    if not math.isfinite(negative_slope):
        raise ValueError(f"expected negative_slope to be finite, got {negative_slope}")
    return Activation(name, float(negative_slope))


def _check_residual(residual: Any, input: Tensor, name: str, activation: Activation) -> None:
    """Raise TypeError or ValueError unless ``residual`` fits the input and the activation."""
    check_floats(residual, "residual")
    if not activation.takes_residual():
        raise ValueError(f"expected no residual with {name}: only none, relu, relu6 and leaky_relu take one")
    if residual.shape != input.shape:
        raise ValueError(f"expected residual of the input's shape {list(input.shape)}, got {list(residual.shape)}")
    if residual.dtype != input.dtype:
        raise TypeError(f"expected residual of the input's dtype {input.dtype}, got {residual.dtype}")
    if residual.device != input.device:
        raise ValueError(f"expected residual on the input's device {input.device}, got {residual.device}")
