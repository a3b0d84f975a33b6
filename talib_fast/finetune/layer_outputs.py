"""Collect the outputs of some of a model's layers in a forward pass."""

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

_registering = threading.Lock()  # if two threads register hooks at once, PyTorch may give them the same handle
_thread = threading.local()  # .passes: the forward passes that run in this thread


@contextmanager
def unseen() -> Iterator[None]:
    """A context in which no getter records what this thread runs."""
    around = getattr(_thread, "passes", ())
    _thread.passes = ()
    try:
        yield
    finally:
        _thread.passes = around


class _Complete(BaseException):
    """Ends a forward pass when all requested layers have run. It is no Exception, so that models do not catch it."""


class _Pass:
    """One forward pass of a model, with the outputs of some layers.

    Hooks are called by every thread. Calls that do not belong to this pass are ignored.
    """

    def __init__(self, model: nn.Module, survives: dict[tuple, bool], missing: Counter[str] | None) -> None:
        """Prepare the pass.

        Args:
            model: the model.
            survives: whether the output of a layer in a mode stays unchanged until the pass ends. The pass adds to it.
            missing: how many outputs of each layer are still expected. The pass ends with the last of them. None runs
                the whole model.
        """
        self.outputs: dict[str, list[Any]] = {}
        self._model, self._survives, self._missing = model, survives, missing
        self._gradients = torch.is_grad_enabled()
        self._mode = (self._gradients, _modes(model))
        self._handles: list[RemovableHandle] = []
        # the layers' outputs with their versions; inference tensors and mapped tensors have none
        self._watched: dict[str, list[tuple[Tensor, int]]] = {}
        self._handed_out: set[str] = set()  # layers whose outputs were not copied
        self._without_gradients: str | None = None
        self._later: set[nn.Module] = set()  # modules with trainable parameters that run after that layer

    def run(self, layers: dict[str, nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the model, collect the layers' outputs, and return the model's output."""
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
        """Whether this thread runs this pass now."""
        return self in getattr(_thread, "passes", ())

    def _register(self, register: Callable[[Any], RemovableHandle], hook: Callable) -> None:
        with _registering:
            self._handles.append(register(hook))

    def _keep(self, module: nn.Module, inputs: tuple[Any, ...], output: Any, *, name: str) -> None:
        """The hook that collects an output."""
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
        """Note which outputs were overwritten. Raise if one of them was handed out without a copy."""
        overwritten = None
        for name, outputs in self._watched.items():
            survived = all(output._version == version for output, version in outputs)
            key = name, *self._mode
            self._survives[key] = survived and self._survives.get(key, True)
            if not survived and name in self._handed_out:
                overwritten = name
        if overwritten is not None:
            raise RuntimeError(
                f"the output of layer {overwritten!r} was overwritten in place, which no earlier forward pass did: its "
                "value is lost this time, and will be copied from the next call on"
            )

    def _watch_later_ones(self, name: str) -> None:
        """Note from now on which trainable modules run after the layer ``name``."""
        if self._without_gradients is None:
            for module in _learning_modules(self._model):
                self._register(module.register_forward_pre_hook, self._enter)
        self._without_gradients = name
        self._later.clear()

    def _enter(self, module: nn.Module, _inputs: tuple[Any, ...]) -> None:
        if self._under_way():
            self._later.update(_using_own_weights(module))


def _learning_modules(model: nn.Module) -> list[nn.Module]:
    """The modules with trainable parameters of their own."""
    return [
        module
        for module in model.modules()
        if any(parameter.requires_grad for parameter in module.parameters(recurse=False))
    ]


def _using_own_weights(module: nn.Module) -> Iterable[nn.Module]:
    """The modules whose weights a call of ``module`` uses. An attention uses its projection's without calling it."""
    return module.modules() if isinstance(module, nn.MultiheadAttention) else (module,)


def _learns_before(model: nn.Module, later: set[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether something trainable does not run after a layer: a parameter, or an input."""
    return any(tensor.requires_grad for tensor in tensors_in((args, kwargs))) or not later.issuperset(
        _learning_modules(model)
    )


def _detaches(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> bool:
    """Whether a layer with trainable parameters disables gradients itself, so that its output has no graph."""
    if isinstance(output, Tensor) and output.requires_grad:  # the usual case, quickly
        return False
    computed = [tensor for tensor in tensors_in(output) if tensor.is_floating_point() or tensor.is_complex()]
    return (
        len(computed) > 0  # torch.compile of torch 2.10 can't follow bool() of a list
        and not any(tensor.requires_grad for tensor in computed)
        and not any(tensor is given for tensor in computed for given in tensors_in(inputs))  # a layer may be skipped
        and any(parameter.requires_grad for parameter in module.parameters())
        and not may_be_in_function_transform()  # there, requires_grad of the inner tensor is not visible
    )


def _modes(model: nn.Module) -> int:
    """A number for the model's modules, their classes, and whether they are in training mode and work in place."""
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
    """The outputs of the layers and the model, by means that torch.compile can follow: it sets attributes."""
    outputs: dict[str, list[Any]] = {}
    lost: list[str] = []
    later: set[nn.Module] = set()  # as in _Pass
    gradients = torch.is_grad_enabled()
    replaced: list[tuple[nn.Module, str, dict[Any, Any]]] = []

    def register(module: nn.Module, kind: str, key: str, hook: Callable) -> None:
        own = module.__dict__[kind]  # not the attribute: an empty one would come back as another dict
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
            # torch.compile of torch 2.10 would return an empty one as a plain dict, which can't hold hooks
            setattr(module, kind, own or OrderedDict())
    if lost and _learns_before(model, later, args, kwargs):
        raise without_gradients(lost[-1])
    return outputs, output


class IntermediateLayerGetter:
    """Calls a model and collects the outputs of some of its layers.

    The outputs are those that the layers returned, even if a later operation in place overwrites them, such as the ReLU
    after a convolution. For this, outputs are copied at first. After a call has shown that a layer's output stays
    unchanged, later calls in the same mode return the tensor without a copy. The mode is the set of modules, with the
    training mode of each. If such a tensor is overwritten in a later call after all, that call raises, and outputs of
    the layer are copied again from then on. Tuples, dataclasses, Hugging Face's outputs and the like keep their class
    and are always copied.

    Threads may share a getter, and a model. Each call returns what the layers returned in its own thread.

    Call the getter with the model's arguments. It returns ``(outputs, model_output)``: an OrderedDict by layer name or
    alias, in the order of ``return_layers``, and the model's output, or None. A layer that runs several times has a
    list of outputs.

    Upstream's getter orders the outputs by execution, leaves its hooks on the model after an error, and returns values
    that later operations have overwritten.

    Args:
        model: the model. It may be wrapped in DistributedDataParallel, DataParallel with one device, or torch.compile.
            A compiled model runs uncompiled here, because its layers are not visible otherwise. For speed, compile the
            function that calls the getter.
        return_layers: names of layers, as in ``model.named_modules()``, or a mapping from names to aliases. Parts that
            wrappers add to names (``module``, ``_orig_mod`` and the like) can be left out.
        keep_output: also return the model's output.

    Raises:
        AttributeError: the model has no layer of that name.
        TypeError: ``model`` is no module, it or a layer is scripted, or ``return_layers`` are no names.
        ValueError: an alias occurs twice, or DataParallel has several devices.
        RuntimeError: in a call, a layer does not run, or an output is overwritten that stayed unchanged before. Also if
            a layer runs with gradients disabled while they are enabled around the call, and a parameter or an input
            before it needs gradients: its output would give none.

    Example:

        >>> import torch
        >>> from torch import nn
        >>> from talib_fast.finetune.delta import IntermediateLayerGetter
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(288, 5))
        >>> getter = IntermediateLayerGetter(model, {"0": "conv"})
        >>> outputs, logits = getter(torch.randn(2, 3, 8, 8))
        >>> outputs["conv"].shape, logits.shape
        (torch.Size([2, 8, 6, 6]), torch.Size([2, 5]))
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
        """Call the model with these arguments, as calling the getter does.

        Args:
            args: the model's positional arguments.
            kwargs: the model's keyword arguments.
            runs: how often each layer runs, if known. The model then stops after the last of these runs and has no
                output. Compiled code ignores it, because it leaves out unused computations anyway.

        Returns:
            ``(outputs, model_output)``.
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
