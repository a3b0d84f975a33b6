"""Load state dicts from files into a network; the file's head may have other classes or be missing."""

import argparse
import collections
import pathlib
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import UsageError, UserError, count, first_line, listing

NEW_HEAD = "talib_fast_head"  # name of the new head in the state dict of a network without a head
REMEDY = "give another --weights file"
# the names of state dicts in training scripts' checkpoints; averaged weights come first, as in timm
STATES = ("state_dict_ema", "model_ema", "ema_state_dict", "state_dict", "model_state_dict", "model_state", "model")
SHOWN = 3  # the most names in an error
# types that checkpoints hold beside the weights: arguments, paths, and NumPy numbers and arrays (the best accuracy)
HARMLESS: list[Any] = [argparse.Namespace, pathlib.PosixPath, collections.defaultdict, list, dict, np.dtype, np.ndarray]
HARMLESS += {type(np.dtype(name)) for name in ("bool", "int32", "int64", "float16", "float32", "float64")}
for core in ("core", "_core"):  # in NumPy 1 and 2
    HARMLESS.append((np.float64().__reduce__()[0], f"numpy.{core}.multiarray.scalar"))
    HARMLESS.append((np.zeros(0).__reduce__()[0], f"numpy.{core}.multiarray._reconstruct"))


def load_weights(
    model: nn.Module, path: Path, head_name: str | None = None, remedy: str = REMEDY
) -> tuple[nn.Linear | None, tuple[str, ...]]:
    """Load a file's state dict into a model; all parameters except the head's must fit exactly.

    Args:
        model: gets the weights; its head is replaced if the file's head has another number of classes.
        path: a file of safetensors, or of ``torch.save``, which is loaded without running code from it.
        head_name: the head's name in the model; None if it has no head.
        remedy: the end of the errors' sentences.

    Returns:
        The model's head with the file's weights (None if the file has no head), and sentences for the user.

    Raises:
        UsageError: there is no such file.
        UserError: the file cannot be read, or does not fit.
    """
    state = plain_names(read_state(path, remedy), model)
    head, notes = None, []
    if head_name is not None:
        head = cast(nn.Linear, model.get_submodule(head_name))
        weight = state.get(f"{head_name}.weight")
        if weight is None:
            own = {f"{head_name}.{name}": value for name, value in head.state_dict().items()}
            state, head = {**own, **state}, None
            notes.append(f"{path} has no weights for the head {head_name}, so the network has no pretrained classes.")
        elif tuple(weight.shape) != tuple(head.weight.shape) and weight.shape[1:] == head.weight.shape[1:]:
            bias = f"{head_name}.bias" in state
            notes.append(f"{path} has a head of {count(len(weight), 'class')} instead of {head.out_features:,}.")
            head = nn.Linear(head.in_features, len(weight), bias)
            model.set_submodule(head_name, head)
    load_exactly(model, state, str(path), remedy)
    return head, tuple(notes)


def read_state(path: Path, remedy: str = REMEDY) -> dict[str, Tensor]:
    """The state dict in a file, at the top level or as an entry of a checkpoint."""
    if not path.is_file():
        raise UsageError(f"there is no file of weights {path}: {remedy}")
    try:
        if path.suffix == ".safetensors":
            found: Any = load_file(path)
        else:
            with torch.serialization.safe_globals(HARMLESS):
                found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle, torch and safetensors raise different errors for a broken file
        raise UserError(f"{path} cannot be read as a state dict ({reason(path, error)}): {remedy}") from error
    if isinstance(found, Mapping):
        found = next((found[name] for name in STATES if isinstance(found.get(name), Mapping)), found)
    if not isinstance(found, Mapping):
        raise UserError(f"{path} holds a {type(found).__name__} instead of a state dict: {remedy}")
    return dict(found)


def reason(path: Path, error: Exception) -> str:
    """Why a file cannot be read; torch's own message would advise to load it unsafely."""
    if not isinstance(error, pickle.UnpicklingError):
        return first_line(error)
    try:
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except Exception:  # the file is no archive of torch.save
        unsafe = []
    if not unsafe:
        return "it is damaged, or was not written by torch.save"
    return f"it holds {listing(sorted(unsafe), SHOWN)}, which could run code; save only the state_dict()"


def plain_names(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The state dict with the model's own names.

    Entries of wrappers, of other modules, and of submodules that are None in the model are removed. So are prefixes.
    """
    around = prefix(state, model.state_dict())
    state = {name.removeprefix(around): value for name, value in state.items() if name.startswith(around)}
    state.pop("n_averaged", None)  # an entry of torch.optim.swa_utils.AveragedModel
    state = {name: value for name, value in state.items() if not name.startswith(f"{NEW_HEAD}.")}
    return {name: value for name, value in state.items() if getattr(model, name.partition(".")[0], model) is not None}


def prefix(names: Iterable[str], own: Iterable[str]) -> str:
    """The prefix in ``names`` before the model's ``own`` names, from torch.compile, DistributedDataParallel and others.

    Other names, for example of Lightning's losses and metrics, do not have the prefix. Raises UserError if the names
    are those of several models.
    """
    names, own = set(names), list(own)
    if not own or names & set(own):
        return ""
    before = {name.removesuffix(own[0]) for name in names if name.endswith(f".{own[0]}")}
    fitting = sorted(start for start in before if sum(start + name in names for name in own) > len(own) / 2)
    if len(fitting) > 1:
        raise UserError(
            f"the weights are of several networks ({listing([start + own[0] for start in fitting], SHOWN)}): save the "
            "state_dict() of one of them"
        )
    return fitting[0] if fitting else ""


def load_exactly(model: nn.Module, state: Mapping[str, Any], source: str, remedy: str) -> None:
    """Load a state dict; raises UserError with the names that differ if it is not the model's."""
    wrong = []
    for name, own in model.state_dict().items():
        value = state.get(name, own)
        if not isinstance(value, Tensor):
            wrong.append(f"{name} is a {type(value).__name__}")
        elif value.shape != own.shape:
            wrong.append(f"{name} is {list(value.shape)} instead of {list(own.shape)}")
    if wrong:
        raise UserError(f"{source} does not fit the network ({listing(wrong, SHOWN)}): {remedy}")
    lacking, unknown = model.load_state_dict(state, strict=False)
    if lacking or unknown:
        parts = [f"it lacks {listing(lacking, SHOWN)}"] * bool(lacking)
        parts += [f"it has unknown entries {listing(unknown, SHOWN)}"] * bool(unknown)
        raise UserError(f"{source} does not fit the network ({' and '.join(parts)}): {remedy}")
