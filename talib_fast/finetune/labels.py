"""Class labels: integers in [0, number of classes)."""

from typing import Any

import torch
from torch import Tensor


def integer_labels(labels: Any) -> Tensor:
    """``labels``, a tensor or anything that becomes an array, as an int64 tensor. What is no tensor is put on the CPU.

    Raises:
        TypeError: they are no integers.
    """
    if not isinstance(labels, Tensor):
        labels = torch.as_tensor(labels, device="cpu")  # the default device may be another one
    if labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"expected integer labels, got {labels.dtype}")
    return labels.long()


def check_range(labels: Tensor, num_classes: int) -> None:
    """Raise ValueError unless all labels are in [0, num_classes). It waits for the labels' device."""
    values = labels.flatten().tolist()
    if values and (min(values) < 0 or max(values) >= num_classes):
        raise ValueError(f"expected labels in [0, {num_classes}), got labels from {min(values)} to {max(values)}")
