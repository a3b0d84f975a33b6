"""A model's layers by name, and what they return."""

import difflib
import functools
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ..checks import check_module

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DataParallel, DistributedDataParallel and torch.compile."""
    while True:
        if isinstance(model, _WRAPPERS):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = cast(nn.Module, model._orig_mod)
        else:
            return model


def get_attribute(obj: Any, attr: str, *args: Any) -> Any:
    """``getattr`` along a dotted path: ``get_attribute(model, "layer1.0.conv2")``, with an optional default."""
    return functools.reduce(lambda value, name: getattr(value, name, *args), attr.split("."), obj)


def layer_names(model: nn.Module, return_layers: Iterable[str]) -> list[str]:
    """``return_layers`` as a list, after a check of it and of ``model``.

    Raises:
        AttributeError: the model has no layer of that name.
        TypeError: ``model`` is no module, or ``return_layers`` are no names.
        ValueError: a name is there twice.
    """
    check_module(model, "model")
    if isinstance(return_layers, str):
        raise TypeError(f"expected return_layers to be a list of names, got the string {return_layers!r}")
    names = list(return_layers)
    for j, name in enumerate(names):
        if not isinstance(name, str):
            raise TypeError(f"expected return_layers to be names, got {type(name).__name__}")
        if name in names[:j]:
            raise ValueError(f"expected every layer once in return_layers, got {name!r} twice")
        find_layer(model, name)
    return names


def find_layer(model: nn.Module, name: str) -> nn.Module:
    """The module called ``name`` in ``model`` or in what ``model`` wraps."""
    for root in (model, unwrap(model)):
        layer = get_attribute(root, name, None)
        if isinstance(layer, nn.Module):
            return layer
    known = [known for known, _ in unwrap(model).named_modules() if known]
    close = difflib.get_close_matches(name, known, n=3) or known[:3]
    raise AttributeError(f"Module {name} not found in {type(unwrap(model)).__name__}; did you mean {', '.join(close)}?")


def check_output(name: str, output: Any) -> Tensor:
    """``output`` of the layer ``name`` if it is a tensor ``[b, C, *]``, else a ValueError."""
    if isinstance(output, Tensor) and output.dim() >= 2:
        return output
    got = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
    raise ValueError(f"expected layer {name!r} to return a tensor with a batch and a channel dimension, got {got}")


def check_runs(name: str, runs: int) -> None:
    """Raise ValueError unless the layer ``name`` ran once in a forward pass."""
    if runs != 1:
        raise ValueError(f"expected layer {name!r} to run once per forward pass, but it ran {runs} times")


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The same structure with ``function`` applied to every tensor."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(function, part) for part in value))
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(function, part) for part in value)
    if isinstance(value, dict):
        return {key: map_tensors(function, part) for key, part in value.items()}
    return value


def clone(output: Any) -> Any:
    """The same structure with every tensor copied."""
    return map_tensors(Tensor.clone, output)


def uncompiled() -> AbstractContextManager:
    """Within it what is compiled runs as it was written: code compiled without hooks does not look for any."""
    if torch.compiler.is_compiling() or "torch._dynamo" not in sys.modules:  # nothing is compiled without it
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


class IntermediateLayerGetter:
    """Calls a model and collects what some of its layers return.

    What a layer returned is what you get, also where a later in-place operation, such as the ReLU behind a
    convolution, overwrites it. Outputs are copied for that, until a first call in the same mode has shown that a
    layer's output survives the forward pass; from then on it is handed out as it is.

    Args:
        model: also inside DistributedDataParallel, DataParallel with one device, or torch.compile. A compiled model
            runs uncompiled here, where its layers are seen; for speed compile the function that calls the getter.
        return_layers: names of the layers, as in ``model.named_modules()``, each once.
        keep_output: also return the model's output.

    Calling it with the model's arguments returns ``(outputs, model_output)``: an OrderedDict by layer name, in the
    order of ``return_layers``, and the model's output or None. The output of a layer that runs several times is a list.

    Raises:
        AttributeError: the model has no layer of that name.
        TypeError, ValueError: an argument is not as above.
        RuntimeError: a forward pass leaves out a layer, or overwrites an output that had survived before.
    """

    def __init__(self, model: nn.Module, return_layers: Iterable[str], keep_output: bool = True) -> None:
        self.return_layers = layer_names(model, return_layers)
        if isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
            raise ValueError(
                f"expected DataParallel with one device, whose layers run once, got {len(model.device_ids)}: "
                "use DistributedDataParallel"
            )
        self._model = model
        self.keep_output = keep_output
        self._survivors: set[tuple[str, bool, bool]] = set()

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[OrderedDict[str, Any], Any]:
        collected: dict[str, list[Any]] = {}
        versions: dict[str, list[tuple[Tensor, int]]] = {name: [] for name in self.return_layers}
        handles: list[RemovableHandle] = []
        replaced: list[tuple[nn.Module, dict[Any, Any]]] = []

        def mode(name: str) -> tuple[str, bool, bool]:
            return name, self._model.training, torch.is_grad_enabled()

        def hook(_module: nn.Module, _input: Any, output: Any, *, name: str) -> None:
            watched = not torch.compiler.is_compiling() and isinstance(output, Tensor) and not output.is_inference()
            if watched:
                versions[name].append((output, output._version))
            kept = output if watched and mode(name) in self._survivors else clone(output)
            collected.setdefault(name, []).append(kept)

        try:
            for name in self.return_layers:
                layer, keep = find_layer(self._model, name), functools.partial(hook, name=name)
                if torch.compiler.is_compiling():  # torch.compile follows a module's attributes, but no handles
                    replaced.append((layer, layer._forward_hooks))
                    layer._forward_hooks = OrderedDict([*layer._forward_hooks.items(), (name, keep)])  # type: ignore[list-item]
                else:
                    handles.append(layer.register_forward_hook(keep))
            with uncompiled():
                output = self._model(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
            for layer, hooks in reversed(replaced):
                layer._forward_hooks = hooks
        outputs: OrderedDict[str, Any] = OrderedDict()
        for name in self.return_layers:
            if name not in collected:
                raise RuntimeError(f"layer {name!r} did not run in this forward pass")
            survived = all(output._version == version for output, version in versions[name])
            if mode(name) in self._survivors and not survived:
                raise RuntimeError(
                    f"the output of layer {name!r} was overwritten in place, although it had survived earlier forward "
                    "passes: make a new IntermediateLayerGetter where the model changes"
                )
            if versions[name] and survived:
                self._survivors.add(mode(name))
            outputs[name] = collected[name][0] if len(collected[name]) == 1 else collected[name]
        return outputs, output if self.keep_output else None
