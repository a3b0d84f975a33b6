"""A pretrained network that is only evaluated, at a lower cost."""

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
    """The network that :func:`~talib_fast.finetune.frozen.frozen` returns.

    It moves with the module that contains it, but its weights do not belong to that module. They are in no state dict
    and no optimizer, and :class:`~torch.nn.parallel.DistributedDataParallel` does not send them. A state dict contains
    a fingerprint of the network instead, so that a state dict of another network is refused. The network stays in
    evaluation mode.

    Attributes:
        module: the copy of the network.
        layers: the names of the requested layers.
        dtype: the dtype of the computation. None is the network's own.

    Inputs:
        *args, **kwargs: what the network takes.

    Returns:
        An OrderedDict of the layers' outputs, by name or alias, in the requested order, without gradients. A layer that
        runs several times has a list of outputs. If no layers were requested, the network's output.

    Raises:
        RuntimeError: the first call is compiled with ``fullgraph=True``, captured in a CUDA graph or inside a transform
            of ``torch.func``. Also if a hook looks at a layer that was not requested and whose output has changed by
            folding, or if a state dict of another network is loaded.
    """

    def __init__(self, module: nn.Module, layers: Iterable[str] | Mapping[str, str], dtype: torch.dtype | None) -> None:
        super().__init__(module)
        self._getter = IntermediateLayerGetter(module, layers, keep_output=False)
        self.layers, self.dtype = self._getter.return_layers, dtype
        self._runs: dict[str, int] | None = None  # how often each layer runs; None before the first call
        self._folded: dict[str, nn.Module] = {}  # the layers that a batch norm is folded into
        self._fingerprint = _fingerprint(module)
        self._replicas: dict[torch.device, Frozen] = {}  # DataParallel's replicas and this module, by device
        self.eval()

    def extra_repr(self) -> str:
        state = f"{len(self._folded)} batch norms folded" if self._runs is not None else "not called yet"
        return f"{type(self.module).__name__}, layers={self.layers}, dtype={self.dtype}, {state}"

    def train(self, mode: bool = True) -> "Frozen":
        """Does nothing: the network stays in evaluation mode."""
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Frozen":
        super()._apply(fn, recurse)
        self._replicas = {}
        if self._runs is not None:
            self._cast_module()
        return self

    def get_extra_state(self) -> Tensor:
        """The network's fingerprint as bytes, for state dicts."""
        return torch.tensor(list(bytes.fromhex(self._fingerprint)), dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: Any) -> None:
        """Raise RuntimeError unless the state dict was saved with the same network."""
        if not self.get_extra_state().equal(torch.as_tensor(state, device="cpu")):
            raise RuntimeError(
                "the state dict was saved with another frozen network, and it contains no weights of it: make "
                "frozen(model) from the same pretrained weights before you load it"
            )

    def _device(self) -> torch.device:
        """The device of the network's parameters."""
        return next((parameter.device for parameter in self.module.parameters()), torch.device("cpu"))

    def _replicate_for_data_parallel(self) -> "Frozen":
        self._replicas.setdefault(self._device(), self)
        return super()._replicate_for_data_parallel()  # replicas share everything but parameters, buffers, submodules

    def _on_device_of(self, inputs: Any) -> "Frozen":
        """The copy of this network on the device of the inputs, made at the first call there."""
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

    @runs_uncompiled  # which shows the docstring where a compiler wants a single graph
    def _learn(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The first call of a frozen network shows what to fold: make one before it's compiled as one graph."""
        capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        if capturing or may_be_in_function_transform():
            raise RuntimeError(
                "expected the first call of a frozen network, which shows what to fold, to be an ordinary one, not "
                "inside a CUDA graph's capture or a transform of torch.func"
            )
        with _learning, torch.inference_mode(False), torch.no_grad():
            if self._runs is not None:  # another thread has done it
                return
            if self.dtype is not None:
                own = next((p.dtype for p in self.module.parameters() if p.is_floating_point()), self.dtype)
                args, kwargs = _cast(args, own), _cast(kwargs, own)
            args, kwargs = clone((args, kwargs))  # the network may change its inputs in place
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
        """A context without autocast, which would compute in a dtype of its own."""
        if self.dtype is None:
            return nullcontext()
        device = self._device().type
        return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()

    def _cast_module(self) -> None:
        """Cast the network to ``dtype``, where one is given."""
        if self.dtype is None:
            return
        for module in self.module.modules():
            # a batch norm takes half-precision inputs with float32 statistics, and so loses no precision
            least = torch.float32 if isinstance(module, _BatchNorm) else self.dtype
            dtype = torch.promote_types(self.dtype, least)
            module._apply(lambda tensor, dtype=dtype: _cast(tensor, dtype), recurse=False)

    def _check_hooks(self) -> None:
        """Raise RuntimeError if a hook looks at a layer that a batch norm is folded into."""
        for name, layer in self._folded.items():
            if layer._forward_hooks:
                raise RuntimeError(
                    f"the output of {name!r} is not the network's, since the batch norm after it is folded into it: "
                    "if a hook looks at a layer, request the layer by frozen(model, layers)"
                )


def _fingerprint(module: nn.Module) -> str:
    """A hash of the network's state."""
    tensors = {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    try:
        return fingerprint(tensors)
    except Unknown:  # a tensor of a class whose content can't be known
        return fingerprint(list(tensors))


def _cast(value: Any, dtype: torch.dtype | None) -> Any:
    """The same structure with floating-point tensors in ``dtype``, if one is given."""
    if dtype is None:
        return value
    return map_tensors(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, value)


def frozen(
    model: nn.Module, layers: Iterable[str] | Mapping[str, str] = (), dtype: torch.dtype | None = None
) -> Frozen:
    """A copy of a network for evaluation without gradients that computes no more than the requested outputs need.

    Every batch norm is folded into the convolution or linear layer before it, if nothing else uses that layer's output
    and the layer is not requested. This includes StochNorm, timm's norms with an activation, and frozen norms. The
    first call runs the network unchanged and shows which layer feeds which norm. These stay unchanged: norms that
    follow something else or use the statistics of the batch, and layers that run several times, have hooks, or have
    weights that are parametrised, shared or used elsewhere.

    Layers after the last requested one do not run. On a CPU, convolutions in channels_last also keep their weights in
    oneDNN's own order, which takes the same memory once more.

    The requested layers return what they returned before, up to rounding (in ``dtype``, if it is given). Their names
    are the network's, so an :class:`~talib_fast.finetune.delta.IntermediateLayerGetter` with the same names accepts the
    result.

    Make one ordinary call before the network is compiled as one graph, exported or captured in a CUDA graph. The order
    in which layers run, and how often, must not depend on the input: the first call decides it.

    Args:
        model: the network. It is copied and stays as it is. Wrappers such as DistributedDataParallel are left out.
        layers: names of layers, or a mapping from names to aliases, as
            :class:`~talib_fast.finetune.delta.IntermediateLayerGetter` takes them. Without any, the network's output is
            returned.
        dtype: dtype of the computation. ``torch.bfloat16``, or ``torch.float16`` on a GPU, take a fraction of the time
            where the device has instructions for them. Floating-point inputs are cast to it, norms that are not folded
            keep their statistics, and autocast has no effect. By default the network's own dtype.

    Returns:
        A :class:`~talib_fast.finetune.frozen.Frozen` network. It returns an OrderedDict of the layers' outputs, or the
        network's output if no layers were requested.

    Raises:
        AttributeError: the model has no layer of that name.
        TypeError: ``model`` is no module, it or a layer is scripted, ``model`` is frozen already, ``layers`` are no
            names, or ``dtype`` is no floating-point dtype.
        ValueError: an alias occurs twice.

    Example:

        >>> import torch
        >>> from torch import nn
        >>> from talib_fast.finetune.frozen import frozen
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5))
        >>> source = frozen(model, ["2"])  # the linear layer will not run
        >>> outputs = source(torch.randn(2, 3, 8, 8))
        >>> outputs["2"].shape, outputs["2"].requires_grad
        (torch.Size([2, 8, 6, 6]), False)
    """
    check_module(model, "model")
    if dtype is not None and dtype not in FLOATS:
        raise TypeError(f"expected dtype to be float16, bfloat16, float32, float64 or None, got {dtype!r}")
    network = unwrap(model)
    if isinstance(model, Frozen) or isinstance(network, torch.jit.ScriptModule):
        got = "a frozen one" if isinstance(model, Frozen) else f"a scripted one, {type(network).__name__}"
        raise TypeError(f"expected model to be an ordinary network, got {got}")
    network = copy.deepcopy(network).eval().requires_grad_(False)
    separate(network)
    return Frozen(network, layers, dtype)
