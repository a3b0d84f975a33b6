"""Tells whether what a cache was made from is still the same."""

import hashlib
import os
from collections.abc import Sized
from typing import Any

import numpy as np
import torch
from torch import Tensor

_SHOWN_BY_DATA_SETS = ["classes", "targets", "labels", "samples", "imgs", "tensors", "indices", "dataset", "datasets"]


def _digest(digest: Any, value: Any) -> None:
    """Feed ``value`` to ``digest``: data by content, a data set by what it shows of itself without loading samples."""
    digest.update(type(value).__qualname__.encode())
    if isinstance(value, Tensor):
        digest.update(repr((value.dtype, value.shape)).encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, np.ndarray) and value.dtype != object:
        digest.update(repr((value.dtype, value.shape)).encode() + value.tobytes())
    elif isinstance(value, (list, tuple, np.ndarray)):
        digest.update(str(len(value)).encode())
        for part in value:
            _digest(digest, part)
    elif isinstance(value, dict):
        _digest(digest, list(value.items()))
    elif isinstance(value, (str, bytes, int, float, range, np.generic, os.PathLike, type(None))):
        digest.update(repr(value).encode())
    else:
        if isinstance(value, Sized):
            digest.update(str(len(value)).encode())
        for attribute in _SHOWN_BY_DATA_SETS:
            _digest(digest, getattr(value, attribute, None))


def fingerprint(*values: Any) -> str:
    """The same for equal ``values``: data by content, a data set by what it shows without loading its samples."""
    digest = hashlib.sha256()
    for value in values:
        _digest(digest, value)
    return digest.hexdigest()
