"""Collects what some of a model's layers return in a forward pass."""

import functools
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ..torch_private import may_be_in_function_transform
from .layers import find_layer, layer_names, uncompiled, without_gradients
from .structures import clone, tensors_in

_registering = threading.Lock()  # PyTorch may give two threads that register hooks at once the same handle
_thread = threading.local()  # its passes: the forward passes that are under way in this thread


@contextmanager
def unseen() -> Iterator[None]:
    """Within it no getter takes note of what this thread runs."""
    around = getattr(_thread, "passes", ())
    _thread.passes = ()
    try:
        yield
    finally:
        _thread.passes = around


class _Complete(BaseException):
    """Ends a forward pass that has run all layers that it was asked for; what runs is not to take it for an error."""


class _Pass:
    """One forward pass of a model, with what some of its layers return in it.

    A hook is called for what any thread runs; what is not part of this pass is left alone.
    """

    def __init__(self, model: nn.Module, survives: dict[tuple, bool], missing: Counter[str] | None) -> None:
        """``survives`` says of a layer in a mode whether its output is left as it is; what this pass sees is added.

        ``missing``: how many outputs are waited for, by layer. The pass ends with the last of them.
        """
        self.outputs: dict[str, list[Any]] = {}
        self._model, self._survives, self._missing = model, survives, missing
        self._gradients = torch.is_grad_enabled()
        self._mode = (self._gradients, _modes(model))
        self._handles: list[RemovableHandle] = []
        # the layers' outputs, with their versions; those of inference mode and of mapped tensors do not count changes
        self._watched: dict[str, list[tuple[Tensor, int]]] = {}
        self._handed_out: set[str] = set()  # layers whose outputs were not copied
        self._without_gradients: str | None = None
        self._later: set[nn.Module] = set()  # with parameters to learn that run after that layer

    def run(self, layers: dict[str, nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        around = getattr(_thread, "passes", ())
        _thread.passes = (*around, self)
        try:
            for name, layer in layers.items():
                self._register(layer.register_forward_hook, functools.partial(self._keep, name=name))
            with uncompiled():
                output = self._model(*args, **kwargs)
        except _Complete:
            output = None
        finally:
            _thread.passes = around
            for handle in self._handles:
                handle.remove()
        if self._without_gradients is not None and _learns_before(self._model, self._later, args, kwargs):
            raise without_gradients(self._without_gradients)
        self._look_at_versions()
        return output

    def _under_way(self) -> bool:
        return self in getattr(_thread, "passes", ())

    def _register(self, register: Callable[[Any], RemovableHandle], hook: Callable) -> None:
        with _registering:
            self._handles.append(register(hook))

    def _keep(self, module: nn.Module, inputs: tuple[Any, ...], output: Any, *, name: str) -> None:
        if not self._under_way():
            return
        if self._gradients and (not torch.is_grad_enabled() or _detaches(module, inputs, output)):
            self._watch_later_ones(name)
        kept = None
        if isinstance(output, Tensor) and not output.is_inference() and not may_be_in_function_transform():
            self._watched.setdefault(name, []).append((output, output._version))
            if self._survives.get((name, *self._mode)):
                self._handed_out.add(name)
                kept = output
        self.outputs.setdefault(name, []).append(clone(output) if kept is None else kept)
        if self._missing is not None:
            self._missing -= Counter((name,))
            if not self._missing:
                raise _Complete

    def _look_at_versions(self) -> None:
        overwritten = None
        for name, outputs in self._watched.items():
            survived = all(output._version == version for output, version in outputs)
            key = name, *self._mode
            self._survives[key] = survived and self._survives.get(key, True)
            if not survived and name in self._handed_out:
                overwritten = name
        if overwritten is not None:
            raise RuntimeError(
                f"the output of layer {overwritten!r} was overwritten in place, although it had survived earlier "
                "forward passes: its value is lost this time; from the next call on it is copied"
            )

    def _watch_later_ones(self, name: str) -> None:
        if self._without_gradients is None:
            for module in _learning_modules(self._model):
                self._register(module.register_forward_pre_hook, self._enter)
        self._without_gradients = name
        self._later.clear()

    def _enter(self, module: nn.Module, _inputs: tuple[Any, ...]) -> None:
        if self._under_way():
            self._later.update(_using_own_weights(module))


def _learning_modules(model: nn.Module) -> list[nn.Module]:
    """Those with parameters of their own to learn."""
    return [
        module
        for module in model.modules()
        if any(parameter.requires_grad for parameter in module.parameters(recurse=False))
    ]


def _using_own_weights(module: nn.Module) -> Iterable[nn.Module]:
    """The modules whose weights a call of ``module`` uses: an attention takes its projection's without a call of it."""
    return module.modules() if isinstance(module, nn.MultiheadAttention) else (module,)


def _learns_before(model: nn.Module, later: set[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether there is something to learn that does not run after a layer: an input, or a parameter."""
    return any(tensor.requires_grad for tensor in tensors_in((args, kwargs))) or not later.issuperset(
        _learning_modules(model)
    )


def _detaches(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> bool:
    """Whether a layer with parameters to learn returns what has no graph, as one that disables gradients itself."""
    if isinstance(output, Tensor) and output.requires_grad:  # as most do: it saves the rest
        return False
    computed = [tensor for tensor in tensors_in(output) if tensor.is_floating_point() or tensor.is_complex()]
    return (
        len(computed) > 0  # bool() of a list is nothing that torch.compile of torch 2.10 follows
        and not any(tensor.requires_grad for tensor in computed)
        and not any(tensor is given for tensor in computed for given in tensors_in(inputs))  # a layer may be skipped
        and any(parameter.requires_grad for parameter in module.parameters())
        and not may_be_in_function_transform()  # in which a tensor does not say what the one inside it requires
    )


def _modes(model: nn.Module) -> int:
    """Stands for the model's modules, what they are, and whether they are training and work in place."""
    modes = []
    pending = [model]
    while pending:
        module = pending.pop()
        modes.append((id(module), type(module), module.training, bool(module.__dict__.get("inplace"))))
        pending.extend(child for child in module._modules.values() if child is not None)
    return hash(tuple(modes))


def _traced(
    model: nn.Module, layers: dict[str, nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[dict[str, list[Any]], Any]:
    """The layers' and the model's outputs, by what torch.compile follows: a module's attributes, but no handles."""
    outputs: dict[str, list[Any]] = {}
    lost: list[str] = []
    later: set[nn.Module] = set()  # as in a pass that is not traced
    gradients = torch.is_grad_enabled()
    replaced: list[tuple[nn.Module, str, dict[Any, Any]]] = []

    def register(module: nn.Module, kind: str, key: str, hook: Callable) -> None:
        own = module.__dict__[kind]  # an attribute that is empty would come back as another dict
        replaced.append((module, kind, own))
        setattr(module, kind, OrderedDict([*own.items(), (key, hook)]))

    def enter(module: nn.Module, _inputs: Any) -> None:
        later.update(_using_own_weights(module))

    def keep(module: nn.Module, inputs: Any, output: Any, *, name: str) -> None:
        if gradients and (not torch.is_grad_enabled() or _detaches(module, inputs, output)):
            if not lost:
                for learning in _learning_modules(model):
                    register(learning, "_forward_pre_hooks", name, enter)
            lost.append(name)
            later.clear()
        outputs.setdefault(name, []).append(clone(output))

    try:
        for name, layer in layers.items():
            register(layer, "_forward_hooks", name, functools.partial(keep, name=name))
        output = model(*args, **kwargs)
    finally:
        for module, kind, own in reversed(replaced):
            # an empty one would come back as a plain dict from torch.compile of torch 2.10, which takes no hook
            setattr(module, kind, own or OrderedDict())
    if lost and _learns_before(model, later, args, kwargs):
        raise without_gradients(lost[-1])
    return outputs, output


class IntermediateLayerGetter:
    """Calls a model and collects what some of its layers return.

    What a layer returned is what you get, also where a later in-place operation, such as the ReLU behind a
    convolution, overwrites it. Outputs are copied for that, until a first call in the same mode has shown that a
    layer's output survives the forward pass; from then on a tensor is handed out as it is. The mode is that of all
    modules, and which they are. Where an output is overwritten in one call and not in another of the same mode, that
    may cost one call, which raises; from then on it is copied. Outputs of other classes, such as tuples, dataclasses
    and Hugging Face's, keep their class, and are always copied.

    Threads may share a getter, and a model: a call returns what the layers returned in its own thread.

    Args:
        model: also inside DistributedDataParallel, DataParallel with one device, or torch.compile. A compiled model
            runs uncompiled here, where its layers are seen; for speed compile the function that calls the getter.
        return_layers: names of the layers, as in ``model.named_modules()``, or a mapping from them to aliases. What
            wrappers add to the names of what they wrap (``module``, ``_orig_mod`` and the like) can be left out.
        keep_output: also return the model's output.

    Calling it with the model's arguments returns ``(outputs, model_output)``: an OrderedDict by layer name, or alias,
    in the order of ``return_layers``, and the model's output or None. The output of a layer that runs several times is
    a list.

    Raises:
        AttributeError: the model has no layer of that name.
        TypeError, ValueError: an argument is not as above; the model or a layer is scripted; an alias is there twice.
        RuntimeError: a forward pass leaves out a layer, overwrites an output that had survived before, or runs a layer
            with gradients disabled where they are enabled around the call and something that may come before the
            layer learns: a parameter of the model or an input. No gradient would come back from its output.
    """

    def __init__(
        self, model: nn.Module, return_layers: Iterable[str] | Mapping[str, str], keep_output: bool = True
    ) -> None:
        self.aliases = layer_names(model, return_layers)
        if isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
            raise ValueError(
                f"expected DataParallel with one device, whose layers run once, got {len(model.device_ids)}: "
                "use DistributedDataParallel"
            )
        self.return_layers = list(self.aliases)
        self.keep_output = keep_output
        self._model = model
        self._survives: dict[tuple, bool] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[OrderedDict[str, Any], Any]:
        return self.collect(args, kwargs)

    def collect(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], runs: Mapping[str, int] | None = None
    ) -> tuple[OrderedDict[str, Any], Any]:
        """What a call with these arguments returns.

        Args:
            runs: how often each layer runs. The model runs no further than the last of these times, and has no output.
                Compiled code leaves out what nothing is made of anyway.
        """
        layers = {name: find_layer(self._model, name) for name in self.aliases}
        if torch.compiler.is_compiling():
            collected, output = _traced(self._model, layers, args, kwargs)
        else:
            forward_pass = _Pass(self._model, self._survives, None if runs is None else Counter(runs))
            output = forward_pass.run(layers, args, kwargs)
            collected = forward_pass.outputs
        outputs: OrderedDict[str, Any] = OrderedDict()
        for name, alias in self.aliases.items():
            if name not in collected:
                raise RuntimeError(f"layer {name!r} did not run in this forward pass")
            outputs[alias] = collected[name][0] if len(collected[name]) == 1 else collected[name]
        return outputs, output if self.keep_output else None
