"""Class labels: integers in [0, number of classes)."""

from typing import Any

import torch
from torch import Tensor


def integer_labels(labels: Any) -> Tensor:
    """``labels``, a tensor or what NumPy takes for an array, as int64; what is no tensor comes to lie on the CPU.

    Raises:
        TypeError: they are no integers.
    """
    if not isinstance(labels, Tensor):
        labels = torch.as_tensor(labels, device="cpu")  # not on the default device
    if labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"expected integer labels, got {labels.dtype}")
    return labels.long()


def check_range(labels: Tensor, num_classes: int) -> None:
    """Wait for the labels' values and look at them.

    Raises:
        ValueError: a label is not in [0, num_classes).
    """
    values = labels.flatten().tolist()
    if values and (min(values) < 0 or max(values) >= num_classes):
        raise ValueError(f"expected labels in [0, {num_classes}), got labels from {min(values)} to {max(values)}")
