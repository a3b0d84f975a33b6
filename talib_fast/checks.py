"""Checks of arguments, and the errors that they raise."""

import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def is_integer(number: Any) -> bool:
    """Whether ``number`` is an integer of Python or NumPy. True and False are not."""
    return isinstance(number, (int, np.integer)) and not isinstance(number, bool)


def check_integer(number: Any, name: str) -> None:
    """Raise TypeError, with that name, unless ``number`` is an integer of Python or NumPy."""
    if not is_integer(number):
        raise TypeError(f"expected {name} to be an integer, got {number!r}")


def check_positive_integer(number: Any, name: str) -> None:
    """Raise ValueError, with that name, unless ``number`` is an integer of Python or NumPy and at least 1."""
    if not is_integer(number) or number < 1:
        raise ValueError(f"expected {name} to be a positive integer, got {number!r}")


def check_number(number: Any, name: str, most: float) -> None:
    """Raise TypeError, with that name, unless ``number`` is a number, and ValueError unless it is in [0, most]."""
    if isinstance(number, bool) or not isinstance(number, (int, float, np.integer, np.floating)):
        raise TypeError(f"expected {name} to be a number, got {number!r}")
    if not 0 <= number <= most:
        raise ValueError(f"expected {name} in [0, {most:.3g}], got {number}")


def check_floats(tensor: Any, name: str) -> None:
    """Raise TypeError, with that name, unless ``tensor`` is a dense floating-point tensor that the operations take."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"expected {name} to be a tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise TypeError(f"expected {name} to be a dense tensor, got {tensor.layout}")
    if tensor.dtype not in FLOATS:
        raise TypeError(f"expected {name} to be a float16, bfloat16, float32 or float64 tensor, got {tensor.dtype}")


def is_ordinary(tensor: Any) -> bool:
    """Whether ``tensor`` is a dense floating-point tensor that the operations take, and of no subclass of Tensor."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.dtype in FLOATS and tensor.layout is torch.strided


def is_dtensor(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a ``torch.distributed.tensor.DTensor``. It does not import that class."""
    if type(tensor) in (Tensor, nn.Parameter):
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def check_module(part: Any, name: str) -> None:
    """Raise TypeError, with that name, unless ``part`` is a module."""
    if not isinstance(part, nn.Module):
        raise TypeError(f"expected {name} to be a torch.nn.Module, got {type(part).__name__}")
