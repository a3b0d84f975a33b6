"""Find the device that a name means, and check that it can be used."""

import torch

from .errors import UsageError, first_line


def named_device(name: str | torch.device) -> torch.device:
    """The device of that name. ``auto`` is the first GPU, or the CPU without one.

    Raises:
        UsageError: there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise unusable(name, error) from error


def usable_device(name: str | torch.device) -> torch.device:
    """The device of that name, after a test that it can be used.

    Raises:
        UsageError: it can't be used.
    """
    device = named_device(name)
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # which one depends on how torch was built
        raise unusable(device, error) from error
    return device


def unusable(name: str | torch.device, error: Exception) -> UsageError:
    """The error for a device that can't be used."""
    return UsageError(f"the device {name} cannot be used ({first_line(error)}): choose another, e.g. cpu")
