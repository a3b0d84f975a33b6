"""Fold batch norms into the convolutions and linear layers before them, for evaluation.

A batch norm with fixed statistics multiplies each channel by a number and adds another one. The weight and the bias of
the layer before it can do the same. One forward pass of the network shows which layer stands before which norm.
"""

import sys
import threading
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ..checks import is_ordinary
from ..torch_private import may_be_in_function_transform, watching_operators
from .norm_act import TIMMS_NORMS, StochNormAct2d, SyncStochNormAct
from .norms import StochNorm1d, StochNorm2d, StochNorm3d, SyncStochNorm
from .packing import pack
from .structures import tensors_in

_TRANSPOSED: tuple[Any, ...] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS: tuple[Any, ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_STOCHASTIC = (StochNorm1d, StochNorm2d, StochNorm3d, SyncStochNorm)
_WITH_ACTIVATION = (StochNormAct2d, SyncStochNormAct)


class Pair(NamedTuple):
    """A layer, and the batch norm that can be folded into it."""

    layer: Any
    norm: Any


def _of(module: str, *names: str) -> tuple[Any, ...]:
    """Classes of a library that is imported. Before that no network uses them."""
    found = sys.modules.get(module)
    return tuple(getattr(found, name) for name in names if hasattr(found, name))


def _without_norm() -> dict[type, type]:
    """Map each class of batch norm to its class after folding: nothing, or what it calls after the norm."""
    plain = (*_NORMS, *_STOCHASTIC, *_of("torchvision.ops.misc", "FrozenBatchNorm2d"))
    timms = _of(TIMMS_NORMS, "BatchNormAct2d", "SyncBatchNormAct", "FrozenBatchNormAct2d")
    return {**dict.fromkeys(plain, nn.Identity), **dict.fromkeys((*_WITH_ACTIVATION, *timms), nn.Sequential)}


def _takes_a_norm(module: Any) -> bool:
    """Whether ``module`` is linear in its weight and bias, and both are its own dense floating-point tensors."""
    kind: Any = type(module)
    layers = (*_LAYERS, *_of("timm.layers.conv2d_same", "Conv2dSame"))
    is_linear = any(
        isinstance(module, layer)
        and kind.forward is layer.forward
        and getattr(kind, "_conv_forward", None) is getattr(layer, "_conv_forward", None)
        for layer in layers
    )
    if not is_linear or "forward" in vars(module) or (isinstance(module, _TRANSPOSED) and module.groups > 1):
        return False
    weight, bias = (module._parameters.get(name) for name in ("weight", "bias"))
    return is_ordinary(weight) and (is_ordinary(bias) or ("bias" in module._parameters and bias is None))


def _is_hooked(module: nn.Module) -> bool:
    """Whether ``module`` has a forward hook or a forward pre-hook."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


class _Watch:
    """Observes a network while it runs, and finds the batch norms that are the only users of a layer's output.

    Layers and norms are recognised by class. A network that uses an output elsewhere runs an operator on it outside the
    norm. A network that uses a weight elsewhere runs an operator on it outside the layer.
    """

    def __init__(self, model: nn.Module, looked_at: Iterable[nn.Module]) -> None:
        """``looked_at``: modules whose output must stay as it is."""
        self.runs: Counter[nn.Module] = Counter()
        self._modules = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
        self._layers = {module for module in self._modules if _takes_a_norm(module)}
        kinds = _without_norm()
        self._norms = {module for module in self._modules if type(module) in kinds and "forward" not in vars(module)}
        self._hooked = {module for module in self._modules if _is_hooked(module)}
        self._looked_at = {*looked_at, *self._hooked}
        self._left_alone = {*self._hooked}
        self._owners: dict[int, nn.Module] = {}  # the module of each weight and statistic, by the tensor's id
        for module in (*self._layers, *self._norms):
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None and self._owners.setdefault(id(tensor), module) is not module:
                    self._left_alone |= {module, self._owners[id(tensor)]}
        self._thread = threading.get_ident()
        self._open: list[nn.Module] = []  # the modules that are running, innermost last
        self._outputs: dict[int, tuple[weakref.ref, nn.Module]] = {}  # what layers returned, by the tensor's id
        self._followers: dict[nn.Module, nn.Module] = {}
        self._users: defaultdict[nn.Module, set[nn.Module | None]] = defaultdict(set)

    def run(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the model, observe it, and return its output."""
        watching = watching_operators(self._look_at_arguments)
        with ExitStack() as stack:
            for module in self._modules:
                for handle in (
                    module.register_forward_pre_hook(self._enter, with_kwargs=True),
                    module.register_forward_hook(self._leave, with_kwargs=True, always_call=True),
                ):
                    stack.callback(handle.remove)
            if watching is not None:
                stack.enter_context(watching)
            output = model(*args, **kwargs)
        self._leave_alone_if_in(output)
        return output

    def pairs(self) -> list[Pair]:
        """The pairs that can be folded: the norm alone uses the layer's output, and both run once."""
        return [
            Pair(layer, norm)
            for layer, norm in self._followers.items()
            if self._users[layer] == {norm}
            and self.runs[layer] == self.runs[norm] == 1
            and not self._left_alone & {layer, norm}
        ]

    def _layer_of(self, tensor: Any) -> nn.Module | None:
        """The layer that returned ``tensor``, or None."""
        reference, layer = self._outputs.get(id(tensor), (None, None))
        return layer if reference is not None and reference() is tensor else None

    def _leave_alone_if_in(self, value: Any) -> None:
        """Exclude from folding every layer whose output is in ``value``."""
        self._left_alone.update(layer for layer in map(self._layer_of, tensors_in(value)) if layer is not None)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() != self._thread:
            return
        self._open.append(module)
        self.runs[module] += 1
        if module in self._hooked:
            self._leave_alone_if_in((args, kwargs))
        layer = self._layer_of(args[0] if args else kwargs.get("input"))
        if layer is not None and module in self._norms and _normalizes_by_given_statistics(module):
            self._followers[layer] = module

    def _leave(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if threading.get_ident() != self._thread:
            return
        self._open.pop()
        # a linear layer's output for tokens has its channels last, where no norm after it scales them
        if module in self._layers and isinstance(output, Tensor) and output.dim() == module.weight.dim():
            self._outputs[id(output)] = weakref.ref(output), module
        if module in self._looked_at:
            self._leave_alone_if_in(output)

    def _look_at_arguments(self, arguments: Any) -> None:
        """Note where an operator uses a layer's output, and exclude modules whose tensors are used outside them."""
        running = self._open[-1] if self._open else None
        for tensor in tensors_in(arguments):
            layer, owner = self._layer_of(tensor), self._owners.get(id(tensor))
            if layer is not None:
                self._users[layer].add(running)
            if owner is not None and owner is not running:
                self._left_alone.add(owner)


def _normalizes_by_given_statistics(norm: Any) -> bool:
    """Whether ``norm`` uses its running statistics now, and all its tensors are ordinary."""
    # torchvision's and timm's frozen norms hold buffers only, and their mode does not matter
    frozen = "weight" in norm._buffers
    tensors = [getattr(norm, name) for name in ("running_mean", "running_var", "weight", "bias")]
    given = all(tensor is not None for tensor in tensors[:2]) and (frozen or not norm.training)
    return given and all(tensor is None or is_ordinary(tensor) for tensor in tensors)


def watch(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], looked_at: Iterable[nn.Module]
) -> tuple[Any, list[Pair], Counter[nn.Module]]:
    """Run a network in evaluation mode once and find what can be folded. Call it without gradients.

    Args:
        model: the network.
        args: its positional arguments.
        kwargs: its keyword arguments.
        looked_at: modules whose output must stay as it is when batch norms are folded.

    Returns:
        The network's output, the pairs that may be folded, and how often each module ran.
    """
    watching = _Watch(model, looked_at)
    output = watching.run(model, args, kwargs)
    return output, watching.pairs(), watching.runs


def fold(pair: Pair) -> Callable[[], None]:
    """Fold the norm into the layer. The layer then computes both, and the norm only what it calls after normalising.

    Both stay the same objects, with their hooks and submodules.

    Returns:
        A function that undoes it.
    """
    layer, norm = pair
    own, rest = layer._parameters, norm.__class__
    given = norm._parameters, norm._buffers
    statistics = norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    with torch.no_grad():
        # also for linear layers, because torch's function for them requires a norm with a weight
        transposed = isinstance(layer, _TRANSPOSED)
        weight, bias = fuse_conv_bn_weights(layer.weight, layer.bias, *statistics, transpose=transposed)
    layer._parameters = {**own, "weight": weight.requires_grad_(False), "bias": bias.requires_grad_(False)}
    norm.__class__ = _without_norm()[rest]
    norm._parameters, norm._buffers = {}, {}

    def undo() -> None:
        layer._parameters = own
        norm.__class__ = rest
        norm._parameters, norm._buffers = given

    return undo


def _can_be_watched(model: nn.Module) -> bool:
    """Whether hooks see the modules of ``model``, and no code is compiled for them as they are."""
    compiled = any(hasattr(module, "_orig_mod") or module._compiled_call_impl for module in model.modules())
    in_other_hands = torch.compiler.is_compiling() or may_be_in_function_transform()
    return not (compiled or in_other_hands or isinstance(model, torch.jit.ScriptModule))


@contextmanager
def folded(model: nn.Module, looked_at: Iterable[nn.Module] = ()) -> Iterator[Callable[..., Any]]:
    """A context in which a model in evaluation mode has folded batch norms and packed weights from its second call on.

    Args:
        model: the model.
        looked_at: modules whose output must stay as it is.

    Yields:
        A function that calls the model; call it without gradients. Its first call runs the model unchanged, and shows
        what can be folded.
    """
    undone: list[Callable[[], None]] = []
    first = _can_be_watched(model)

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal first
        if not first:
            return model(*args, **kwargs)
        first = False
        try:
            output, pairs, _ = watch(model, args, kwargs, looked_at)
        except Exception:  # an error of the model's own is raised again by this call
            return model(*args, **kwargs)
        undone.extend(map(fold, pairs))
        undone.append(pack(model))
        return output

    try:
        yield call
    finally:
        for undo in reversed(undone):
            undo()
