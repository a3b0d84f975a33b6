"""Logits: floating-point tensors whose softmax is taken, at some temperature."""

import numbers
from typing import Any

from torch import Tensor


def check_logits(logits: Any, name: str) -> None:
    """Raise TypeError, with that name, unless ``logits`` is a floating-point tensor."""
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        got = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"expected {name} to be a floating-point tensor, got {got}")


def check_temperature(temperature: Any, name: str = "temperature") -> None:
    """Raise TypeError unless ``temperature`` is a number, ValueError unless it is > 0."""
    if not isinstance(temperature, (numbers.Real, Tensor)):
        raise TypeError(f"expected {name} to be a number, got {temperature!r}")
    if not temperature > 0:  # type: ignore[operator]
        raise ValueError(f"expected a {name} > 0, got {temperature}")


def at_least_float32(logits: Tensor) -> Tensor:
    """float16 and bfloat16 as float32, in which sums of exponentials neither overflow nor lose their small terms.

    float32 and float64 stay as they are.
    """
    return logits.float() if logits.itemsize < 4 else logits
