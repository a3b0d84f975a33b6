"""State dicts from files, fitted to a network whose head may be another one's or missing."""

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

NEW_HEAD = "talib_fast_head"  # what a head is called in the state dict of a network that has no place for one
REMEDY = "give another --weights file"
# under which names training scripts keep a state dict in their checkpoints, an averaged one first, as timm does
STATES = ("state_dict_ema", "model_ema", "ema_state_dict", "state_dict", "model_state_dict", "model_state", "model")
SHOWN = 3  # names in an error
# what training scripts keep beside: arguments, paths, and NumPy's numbers and arrays, such as the best accuracy
HARMLESS: list[Any] = [argparse.Namespace, pathlib.PosixPath, collections.defaultdict, list, dict, np.dtype, np.ndarray]
HARMLESS += {type(np.dtype(name)) for name in ("bool", "int32", "int64", "float16", "float32", "float64")}
for core in ("core", "_core"):  # of NumPy 1 and 2
    HARMLESS.append((np.float64().__reduce__()[0], f"numpy.{core}.multiarray.scalar"))
    HARMLESS.append((np.zeros(0).__reduce__()[0], f"numpy.{core}.multiarray._reconstruct"))


def load_weights(
    model: nn.Module, path: Path, head_name: str | None = None, remedy: str = REMEDY
) -> tuple[nn.Linear | None, tuple[str, ...]]:
    """Load a file's state dict into a model; all but the head must fit exactly.

    Args:
        model: gets the weights, and a head of the file's number of classes in the place of its own.
        path: a file of ``torch.save``, which is loaded without running code from it, or of safetensors.
        head_name: the head's place in the model; None: it has none.
        remedy: ends the errors' sentences.

    Returns:
        The model's head with the file's weights, None where the file has none, and sentences for the user.

    Raises:
        UsageError: there is no such file.
        UserError: it can't be read or does not fit.
    """
    state = plain_names(read_state(path, remedy), model)
    head, notes = None, []
    if head_name is not None:
        head = cast(nn.Linear, model.get_submodule(head_name))
        weight = state.get(f"{head_name}.weight")
        if weight is None:
            own = {f"{head_name}.{name}": value for name, value in head.state_dict().items()}
            state, head = {**own, **state}, None
            notes.append(f"{path} has no weights for the head {head_name}: the network has no pretrained classes.")
        elif tuple(weight.shape) != tuple(head.weight.shape) and weight.shape[1:] == head.weight.shape[1:]:
            bias = f"{head_name}.bias" in state
            notes.append(f"{path} has a head of {count(len(weight), 'class')} instead of {head.out_features:,}.")
            head = nn.Linear(head.in_features, len(weight), bias)
            model.set_submodule(head_name, head)
    load_exactly(model, state, str(path), remedy)
    return head, tuple(notes)


def read_state(path: Path, remedy: str = REMEDY) -> dict[str, Tensor]:
    """The state dict in a file, which may be an entry of a checkpoint."""
    if not path.is_file():
        raise UsageError(f"there is no file {path}, which should hold the weights: {remedy}")
    try:
        if path.suffix == ".safetensors":
            found: Any = load_file(path)
        else:
            with torch.serialization.safe_globals(HARMLESS):
                found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle, torch and safetensors each have their own errors for a broken file
        raise UserError(f"{path} cannot be read as a state dict ({reason(path, error)}): {remedy}") from error
    if isinstance(found, Mapping):
        found = next((found[name] for name in STATES if isinstance(found.get(name), Mapping)), found)
    if not isinstance(found, Mapping):
        raise UserError(f"{path} does not fit the network (it holds a {type(found).__name__}, no state dict): {remedy}")
    return dict(found)


def reason(path: Path, error: Exception) -> str:
    """Why a file can't be read; torch's own words would advise to load it unsafely."""
    if not isinstance(error, pickle.UnpicklingError):
        return first_line(error)
    try:
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except Exception:  # of a file that is no archive of torch's
        unsafe = []
    if not unsafe:
        return "it is damaged, or no file of torch.save"
    return f"it holds {listing(sorted(unsafe), SHOWN)}, which might run code: save the state_dict() alone"


def plain_names(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The state by the model's own names, without what was around it in training, or is switched off in it."""
    around = prefix(state, model.state_dict())
    state = {name.removeprefix(around): value for name, value in state.items() if name.startswith(around)}
    state.pop("n_averaged", None)  # of torch.optim.swa_utils.AveragedModel
    state = {name: value for name, value in state.items() if not name.startswith(f"{NEW_HEAD}.")}
    return {name: value for name, value in state.items() if getattr(model, name.partition(".")[0], model) is not None}


def prefix(names: Iterable[str], own: Iterable[str]) -> str:
    """What torch.compile, DistributedDataParallel, Lightning and others put before the model's own names in others.

    Names of other things, as of Lightning's losses and metrics, have not got it. Raises UserError where the names are
    those of several models.
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
    """Load a state dict; UserError, with the names of what differs, unless it is the model's."""
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
        parts += [f"it has {listing(unknown, SHOWN)} besides"] * bool(unknown)
        raise UserError(f"{source} does not fit the network ({' and '.join(parts)}): {remedy}")
