"""Tells whether what a cache was made from is still the same."""

import contextlib
import hashlib
import os
import random
import types
from collections.abc import Sized
from typing import Any

import numpy as np
import torch
from torch import Tensor

# what data sets may show as properties, beside what they hold
_SHOWN_BY_DATA_SETS = ["classes", "targets", "labels", "samples", "imgs", "tensors", "indices", "dataset", "datasets"]
_PLAIN = (str, bytes, int, float, complex, range, np.generic, os.PathLike, type(None))
# what they hold is another thing after every draw, and in every process
_RANDOM = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState, np.random.BitGenerator)


def fingerprint(*values: Any) -> str:
    """The same for equal ``values``, in any process: data by content, functions by code, objects by what they hold.

    What an object holds is what :mod:`pickle` would save of it, so no sample is loaded for that. One that can't be
    pickled, such as an open file, and a generator of random numbers count by their type.
    """
    digest = hashlib.sha256()
    seen: dict[int, tuple[int, Any]] = {}  # keeps the objects alive, so that an id stays one object's
    pending = list(reversed(values))  # a stack, as objects may hold each other deeper than functions may call
    while pending:
        value = pending.pop()
        name = type(value).__qualname__
        if isinstance(value, _PLAIN):
            digest.update(f"{name} {value!r} ".encode())
            continue
        digest.update(f"{name} ".encode())
        if not isinstance(value, tuple):  # of which there are many, and which never hold themselves
            if id(value) in seen:
                digest.update(f"{seen[id(value)][0]} ".encode())
                continue
            seen[id(value)] = len(seen), value
        if isinstance(value, Tensor) and value.layout == torch.strided:
            digest.update(f"{value.dtype} {list(value.shape)} ".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
            digest.update(f"{value.dtype} {list(value.shape)} ".encode())
            digest.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
        else:
            parts = _parts(value)
            digest.update(f"{len(parts)} ".encode())
            pending.extend(reversed(parts))
    return digest.hexdigest()


def _parts(value: Any) -> list[Any]:
    """What, beside its type, makes ``value`` what it is."""
    if isinstance(value, (list, tuple)):
        return list(value)
    if isinstance(value, np.ndarray):
        return [value.shape, value.tolist()]
    if isinstance(value, dict):
        return [part for item in value.items() for part in item]
    if isinstance(value, (set, frozenset)):
        return sorted(fingerprint(part) for part in value)  # their order differs between processes
    if isinstance(value, (type, types.ModuleType)):
        return [value.__module__, value.__qualname__] if isinstance(value, type) else [value.__name__]
    if isinstance(value, types.FunctionType):
        cells = []
        for cell in value.__closure__ or ():
            with contextlib.suppress(ValueError):  # an empty cell
                cells.append(cell.cell_contents)
        return [value.__qualname__, value.__code__, value.__defaults__, value.__kwdefaults__, cells]
    if isinstance(value, types.CodeType):
        return [value.co_code, value.co_consts, value.co_names]
    if isinstance(value, _RANDOM):
        return []
    parts: list[Any] = []
    with contextlib.suppress(Exception):  # an object may refuse to say its length or to be pickled, with any error
        parts += [len(value)] if isinstance(value, Sized) else []
    with contextlib.suppress(Exception):
        saved = value.__reduce_ex__(4)
        if isinstance(saved, tuple):  # function, arguments, state, iterators over items
            saved = (*saved[:3], *(list(items) for items in saved[3:5] if items is not None))
        parts.append(saved)
    return parts + [getattr(value, attribute, None) for attribute in _SHOWN_BY_DATA_SETS]
