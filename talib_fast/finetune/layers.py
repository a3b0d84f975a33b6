"""Find a model's layers by name, and check what they return."""

import difflib
import functools
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
import torch.nn as nn
from torch import Tensor

from ..checks import check_module, is_integer
from .kept import KeptModule
from .names import WRAPPED, plain_name

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, KeptModule)
_WHY = "TorchScript runs no hooks, which are needed to see a layer's output"


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DataParallel, DistributedDataParallel, torch.compile and a frozen network."""
    while True:
        if isinstance(model, _WRAPPERS):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = cast(nn.Module, model._orig_mod)
        else:
            return model


def get_attribute(obj: Any, attr: str, *args: Any) -> Any:
    """Follow a dotted path of attributes, as nested calls of ``getattr`` do.

    Args:
        obj: where the path starts.
        attr: the path, such as ``"layer1.0.conv2"``.
        args: the default for an attribute that is missing; none by default.

    Raises:
        AttributeError: an attribute is missing and there is no default.

    Example:

        >>> from torch import nn
        >>> from talib_fast.finetune.delta import get_attribute
        >>> get_attribute(nn.Sequential(nn.Linear(2, 3)), "0.weight").shape
        torch.Size([3, 2])
    """
    return functools.reduce(lambda value, name: getattr(value, name, *args), attr.split("."), obj)


def layer_names(model: nn.Module, return_layers: Iterable[str] | Mapping[str, str]) -> dict[str, str]:
    """Map the name of each layer to the name of its output: the alias that a mapping gives, else the layer's own name.

    Raises:
        AttributeError: the model has no layer of that name.
        TypeError: ``model`` is no module, it or a layer is scripted, or ``return_layers`` are no names.
        ValueError: an alias occurs twice.
    """
    check_module(model, "model")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"expected model to be an ordinary module, got a scripted one, {type(model).__name__}: {_WHY}")
    if isinstance(return_layers, str):
        raise TypeError(f"expected return_layers to be a list of names, got the string {return_layers!r}")
    pairs = return_layers.items() if isinstance(return_layers, Mapping) else [(name, name) for name in return_layers]
    aliases: dict[str, str] = {}
    for name, alias in pairs:
        if not isinstance(name, str):
            raise TypeError(f"expected return_layers to be names, got {type(name).__name__}")
        if not isinstance(alias, str):
            raise TypeError(f"expected the alias of layer {name!r} to be a name, got {type(alias).__name__}")
        if alias in aliases.values() and name not in aliases:
            raise ValueError(f"expected different aliases in return_layers, got {alias!r} twice")
        find_layer(model, name)
        aliases[name] = alias
    return aliases


def find_layer(model: nn.Module, name: str) -> nn.Module:
    """The module called ``name`` in ``model``. Both may have parts that wrappers add, such as ``module``."""
    layer = next((module for module in _called(model, name) if isinstance(module, nn.Module)), None)
    if layer is None:
        names = [full_name for full_name, _ in unwrap(model).named_modules() if full_name]
        close = difflib.get_close_matches(name, names, n=3) or names[:3]
        raise AttributeError(
            f"Module {name} not found in {type(unwrap(model)).__name__}; did you mean {', '.join(close)}?"
        )
    if isinstance(layer, torch.jit.ScriptModule):
        raise TypeError(f"expected layer {name!r} to be an ordinary module, got a scripted one: {_WHY}")
    return layer


def _called(model: nn.Module, name: str) -> Iterator[Any]:
    """What may be meant by ``name``, the exact match first."""
    yield get_attribute(model, name, None)
    yield get_attribute(unwrap(model), name, None)
    plain = _without_wrappers(name)
    for full_name, module in model.named_modules(remove_duplicate=False):
        if plain and _without_wrappers(full_name) == plain:  # the outermost wrapper comes first
            yield module


def _without_wrappers(name: str) -> str:
    """``name`` without the parts that wrappers add."""
    return plain_name(".".join(part for part in name.split(".") if part not in WRAPPED))


def check_channel_dim(channel_dim: int) -> None:
    """Raise ValueError unless ``channel_dim`` is an integer other than 0, the batch dimension."""
    if not is_integer(channel_dim) or channel_dim == 0:
        raise ValueError(f"expected channel_dim to be an integer other than 0, the batch's, got {channel_dim!r}")


def check_output(name: str, output: Any, channel_dim: int = 1) -> Tensor:
    """Return the layer's output if it is a tensor with a batch and that channel dimension, else raise ValueError."""
    if isinstance(output, Tensor) and output.dim() >= 2:
        if -output.dim() < channel_dim < output.dim():
            return output
        raise ValueError(f"layer {name!r} has no batch and channel dimension {channel_dim}: {list(output.shape)}")
    got = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
    raise ValueError(f"expected layer {name!r} to return a tensor with a batch and a channel dimension, got {got}")


def check_runs(name: str, runs: int) -> None:
    """Raise ValueError unless the layer ``name`` ran exactly once in a forward pass."""
    if runs != 1:
        raise ValueError(f"expected layer {name!r} to run once per forward pass, but it ran {runs} times")


def without_gradients(name: str) -> RuntimeError:
    """The error for a layer that ran with gradients disabled."""
    return RuntimeError(
        f"layer {name!r} ran with gradients disabled, although they are enabled around this call: no gradient would "
        "come back from its output. Causes are a reentrant activation checkpoint (use use_reentrant=False), and "
        "torch.no_grad or torch.inference_mode inside the model. If you want no gradient, freeze the model's "
        "parameters or make this call under torch.no_grad"
    )


class _Stance:
    """Sets the compiler's stance for the process, and restores it when the last thread that needs it leaves."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._changed: AbstractContextManager = nullcontext()

    @contextmanager
    def force_eager(self) -> Iterator[None]:
        with self._lock:
            if self._inside == 0:
                self._changed = torch.compiler.set_stance("force_eager")
                self._changed.__enter__()
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if self._inside == 0:
                    self._changed.__exit__(None, None, None)


_stance = _Stance()


def uncompiled() -> AbstractContextManager:
    """A context in which compiled models run as ordinary code, because code compiled without hooks calls none later."""
    if torch.compiler.is_compiling() or "torch._dynamo" not in sys.modules:  # without it nothing is compiled
        return nullcontext()
    return _stance.force_eager()
