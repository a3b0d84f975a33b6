"""Checks and helpers for logits, and for losses of their softmax at a temperature."""

import math
import numbers
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def check_logits(logits: Any, name: str) -> None:
    """Raise TypeError, with that name, unless ``logits`` is a floating-point tensor."""
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        got = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"expected {name} to be a floating-point tensor, got {got}")


def check_temperature(temperature: Any, name: str = "temperature") -> None:
    """Raise TypeError unless ``temperature`` is a number or a tensor of one, and ValueError unless it is > 0."""
    is_number = isinstance(temperature, numbers.Real) or (isinstance(temperature, Tensor) and temperature.numel() == 1)
    if not is_number:
        raise TypeError(f"expected {name} to be a number, got {temperature!r}")
    if not temperature > 0:
        raise ValueError(f"expected a {name} > 0, got {temperature}")


def at_least_float32(logits: Tensor) -> Tensor:
    """float16 and bfloat16 logits as float32, in which sums of exponentials neither overflow nor lose small terms.

    float32 and float64 stay as they are.
    """
    return logits.float() if logits.itemsize < 4 else logits


def with_masked_classes(
    loss: Callable[[Tensor, Tensor], Tensor], log_probabilities: Tensor, probabilities: Tensor
) -> Tensor:
    """``loss(log_probabilities, probabilities)``, a sum of their products, in which 0·(−inf) counts as 0.

    A class with a logit of −inf adds nothing where its probability is 0. To find such classes costs a pass over all
    values. On a CPU the loss is therefore computed first, and the classes are masked only if it is NaN.
    """
    if log_probabilities.is_cpu and not (torch.compiler.is_compiling() or torch.jit.is_tracing()):
        value = loss(log_probabilities, probabilities)
        if not _may_be_nan(value):
            return value
    masked = (log_probabilities == -math.inf) & (probabilities == 0)
    return loss(log_probabilities.masked_fill(masked, 0), probabilities)


def _may_be_nan(value: Tensor) -> bool:
    """Whether ``value`` contains a NaN, or may contain one because a tracer or torch.vmap hides its value."""
    if type(value) is not Tensor:
        return True
    try:
        return math.isnan((value if value.dim() == 0 else value.detach().sum()).item())
    except RuntimeError:
        return True
