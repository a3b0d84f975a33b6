"""A pretrained network that never changes, at a fraction of what evaluating it costs."""

import copy
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..checks import FLOATS, check_module
from ..torch_private import may_be_in_function_transform, runs_uncompiled
from .fingerprint import Unknown, fingerprint
from .folding import fold, watch
from .fusion import separate
from .kept import KeptModule
from .layer_outputs import IntermediateLayerGetter, unseen
from .layers import find_layer, uncompiled, unwrap
from .packing import pack
from .structures import clone, map_tensors, tensors_in

__all__ = ["Frozen", "frozen"]

_learning = threading.Lock()


class Frozen(KeptModule):
    """What :func:`frozen` makes of a network.

    It moves with the module that has it, but none of its weights are that module's: they are in no state dict and no
    optimizer, and :class:`~torch.nn.parallel.DistributedDataParallel` does not send them. A state dict keeps a
    fingerprint of the network instead, so that one of another network is not loaded. It stays in evaluation mode.

    Attributes:
        module: the copy of the network.
        layers: the names of the layers asked for.
        dtype: what it computes in; None: as the network did.

    Inputs:
        *args, **kwargs: what the network takes.

    Returns:
        An OrderedDict of the layers' outputs, by name or alias and in the order asked for; that of a layer that runs
        several times is a list. If no layers were asked for, the network's output. Without gradients.

    Raises:
        RuntimeError: the first call is compiled with ``fullgraph=True``, captured in a CUDA graph or inside a transform
            of ``torch.func``; a layer that wasn't asked for is looked at by a hook although its output has changed; or
            a state dict is loaded that was saved with another network.
    """

    def __init__(self, module: nn.Module, layers: Iterable[str] | Mapping[str, str], dtype: torch.dtype | None) -> None:
        super().__init__(module)
        self._getter = IntermediateLayerGetter(module, layers, keep_output=False)
        self.layers, self.dtype = self._getter.return_layers, dtype
        self._runs: dict[str, int] | None = None  # how often each layer runs; None before the first call
        self._folded: dict[str, nn.Module] = {}  # into which a batch norm is folded
        self._fingerprint = _fingerprint(module)
        self._replicas: dict[torch.device, Frozen] = {}  # DataParallel's, by their device, this one among them
        self.eval()

    def extra_repr(self) -> str:
        state = f"{len(self._folded)} batch norms folded" if self._runs is not None else "not called yet"
        return f"{type(self.module).__name__}, layers={self.layers}, dtype={self.dtype}, {state}"

    def train(self, mode: bool = True) -> "Frozen":
        """Stays in evaluation mode."""
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Frozen":
        super()._apply(fn, recurse)
        self._replicas = {}
        if self._runs is not None:
            self._cast_module()
        return self

    def get_extra_state(self) -> Tensor:
        """What the network was made from, as bytes; what state dicts keep of it."""
        return torch.tensor(list(bytes.fromhex(self._fingerprint)), dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: Any) -> None:
        """Raise RuntimeError unless the state dict was saved with the same network."""
        if not self.get_extra_state().equal(torch.as_tensor(state, device="cpu")):
            raise RuntimeError(
                "the state dict was saved with another frozen network, of which it keeps no weights: make "
                "frozen(model) of the same pretrained weights before it is loaded"
            )

    def _device(self) -> torch.device:
        return next((parameter.device for parameter in self.module.parameters()), torch.device("cpu"))

    def _replicate_for_data_parallel(self) -> "Frozen":
        self._replicas.setdefault(self._device(), self)
        return super()._replicate_for_data_parallel()  # which shares all that is no parameter, buffer or submodule

    def _on_device_of(self, inputs: Any) -> "Frozen":
        device = next((tensor.device for tensor in tensors_in(inputs)), self._device())
        with _learning:
            if device not in self._replicas:
                module = copy.deepcopy(self.module).to(device)
                self._replicas[device] = Frozen(module, self._getter.aliases, self.dtype)
        return self._replicas[device]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if "_is_replica" in vars(self):
            return self._on_device_of((args, kwargs)).forward(*args, **kwargs)
        with torch.no_grad(), self._without_autocast():
            if self._runs is None:
                self._learn(args, kwargs)
            if not torch.compiler.is_compiling():
                self._check_hooks()
            if self.dtype is not None:
                args, kwargs = _cast(args, self.dtype), _cast(kwargs, self.dtype)
            if not self.layers:
                return self.module(*args, **kwargs)
            return self._getter.collect(args, kwargs, self._runs)[0]

    @runs_uncompiled
    def _learn(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A frozen network learns from its first call what follows what: make one before it's compiled as one graph."""
        capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        if capturing or may_be_in_function_transform():
            raise RuntimeError(
                "expected the first call of a frozen network, from which it learns what follows what, to be an "
                "ordinary one, not inside a CUDA graph's capture or a transform of torch.func"
            )
        with _learning, torch.inference_mode(False), torch.no_grad():
            if self._runs is not None:  # another thread was first
                return
            if self.dtype is not None:
                own = next((p.dtype for p in self.module.parameters() if p.is_floating_point()), self.dtype)
                args, kwargs = _cast(args, own), _cast(kwargs, own)
            args, kwargs = clone((args, kwargs))  # which the network may change
            asked = {name: find_layer(self.module, name) for name in self.layers}
            with unseen(), uncompiled():
                _, pairs, runs = watch(self.module, args, kwargs, asked.values())
            names = {module: name for name, module in self.module.named_modules()}
            for pair in pairs:
                fold(pair)
            self._folded = {names[layer]: layer for layer, _ in pairs}
            self._cast_module()
            pack(self.module)
            self._runs = {name: runs[layer] for name, layer in asked.items()}

    def _without_autocast(self) -> AbstractContextManager:
        """Autocast has a dtype of its own, in which it would compute."""
        if self.dtype is None:
            return nullcontext()
        device = self._device().type
        return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()

    def _cast_module(self) -> None:
        if self.dtype is None:
            return
        for module in self.module.modules():
            # a batch norm takes half precision with statistics that are not, and loses nothing then
            least = torch.float32 if isinstance(module, _BatchNorm) else self.dtype
            dtype = torch.promote_types(self.dtype, least)
            module._apply(lambda tensor, dtype=dtype: _cast(tensor, dtype), recurse=False)

    def _check_hooks(self) -> None:
        for name, layer in self._folded.items():
            if layer._forward_hooks:
                raise RuntimeError(
                    f"the output of {name!r} is not the network's, since the batch norm behind it was folded into it: "
                    "name a layer that is looked at among the layers of frozen(model, layers)"
                )


def _fingerprint(module: nn.Module) -> str:
    tensors = {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    try:
        return fingerprint(tensors)
    except Unknown:  # of a tensor of a class that does not say what it holds
        return fingerprint(list(tensors))


def _cast(value: Any, dtype: torch.dtype | None) -> Any:
    """The same structure with floating-point tensors in that dtype, if there is one."""
    if dtype is None:
        return value
    return map_tensors(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, value)


def frozen(
    model: nn.Module, layers: Iterable[str] | Mapping[str, str] = (), dtype: torch.dtype | None = None
) -> Frozen:
    """A copy of a network for evaluation alone, without gradients, that computes no more than what is asked of it.

    Every batch norm (StochNorm, timm's with an activation and frozen ones too) is folded into the convolution or linear
    layer before it, if that layer's output goes nowhere else and isn't asked for. Which layer that is, the first call
    shows, by what really follows what, for which it runs the network as it was, too. What can't be folded without a
    change is left alone: norms that follow something else or take the batch's statistics, layers that run several
    times, that have hooks or whose weights are parametrised, shared or used elsewhere. What follows the last of the
    layers asked for doesn't run. On a CPU convolutions in channels_last have their weights in the order besides that
    oneDNN computes with, which takes as much memory again.

    The layers asked for give what they gave before, to rounding; in another dtype, to that dtype's. Their names are the
    network's, so that an :class:`~talib_fast.finetune.delta.IntermediateLayerGetter` with the same names takes it, too.

    One call has to come before the network is compiled as one graph, exported or captured in a CUDA graph. The flow of
    the network may not depend on its input: what follows what, and how often a layer runs, is the first call's.

    Args:
        model: the network. It is copied, and stays what it is; wrappers such as DistributedDataParallel stay outside.
        layers: names of layers, or a mapping from them to aliases, as
            :class:`~talib_fast.finetune.delta.IntermediateLayerGetter` takes them; none stand for the network's output.
        dtype: what to compute in: ``torch.bfloat16``, or ``torch.float16`` on a GPU, which take a fraction of the time
            where there are instructions for them. Floating-point inputs are cast to it, norms that are not folded keep
            their statistics as they are, and autocast has no part in it. By default the network's own.

    Returns:
        A :class:`Frozen` network. It maps what ``model`` takes to an OrderedDict of the layers' outputs, or to the
        network's output if no layers were asked for.

    Raises:
        AttributeError: the model has no layer of that name.
        TypeError, ValueError: an argument is not as above, the model or a layer is scripted, or the model is frozen
            already.
    """
    check_module(model, "model")
    if dtype is not None and dtype not in FLOATS:
        raise TypeError(f"expected dtype to be float16, bfloat16, float32, float64 or None, got {dtype!r}")
    network = unwrap(model)
    if isinstance(model, Frozen) or isinstance(network, torch.jit.ScriptModule):
        got = "a frozen one" if isinstance(model, Frozen) else f"a scripted one, {type(network).__name__}"
        raise TypeError(f"expected model to be a network of Python's, got {got}")
    network = copy.deepcopy(network).eval().requires_grad_(False)
    separate(network)
    return Frozen(network, layers, dtype)
