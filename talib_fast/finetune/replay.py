"""Run the part of a network after one layer again, with a channel of that layer zeroed."""

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from .layers import check_output, check_runs, find_layer
from .separable import Separable, exchanged, functions
from .structures import clone, map_tensors, tensors_in

_GLOBAL_POOLING = {
    function: dimensions for dimensions in (1, 2, 3) for function in functions(f"adaptive_avg_pool{dimensions}d")
}


class _Pooling(NamedTuple):
    input: Tensor
    output_size: Any


class _BatchNorm(NamedTuple):
    input: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    training: bool = False
    momentum: float = 0.1
    eps: float = 1e-5

    def as_scaling(self) -> Tensor:
        """The norm as one multiplication and one addition per channel."""
        assert self.running_mean is not None and self.running_var is not None
        precise = torch.promote_types(self.running_var.dtype, torch.float32)
        scale = (self.running_var.to(precise) + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight
        shift = -self.running_mean * scale
        if self.bias is not None:
            shift = shift + self.bias
        trailing = [-1] + [1] * (self.input.dim() - 2)
        return torch.addcmul(shift.view(trailing), self.input, scale.view(trailing)).to(self.input.dtype)


class _ForMapping(TorchFunctionMode):
    """Replaces functions by a form that vmap maps over without copies.

    A batch norm with running statistics becomes one multiplication and addition, a global average pooling a mean.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.batch_norm:
            norm = _BatchNorm(*args, **(kwargs or {}))
            if not norm.training and norm.running_mean is not None and not isinstance(norm.input, Separable):
                return norm.as_scaling()
        if func in _GLOBAL_POOLING:
            pooling = _Pooling(*args, **(kwargs or {}))
            dimensions, sizes = _GLOBAL_POOLING[func], pooling.output_size
            if not isinstance(pooling.input, Separable) and all(
                size == 1 for size in (sizes if isinstance(sizes, (list, tuple)) else [sizes])
            ):
                return pooling.input.mean(list(range(-dimensions, 0)), keepdim=True)
        return func(*args, **(kwargs or {}))


class Replay:
    """Runs the part of a network after one layer again, for other outputs of that layer.

    A first pass records what the modules return that finish before the layer. Only the outermost of them are recorded,
    because a module that does not run calls none of its own. Later passes return the recorded outputs.
    """

    def __init__(self, model: nn.Module, name: str, x: Any, channel_dim: int = 1) -> None:
        """``name`` is the layer's, ``channel_dim`` the dimension of its channels."""
        self.model, self.name, self.x, self.channel_dim = model, name, x, channel_dim
        self.layer = find_layer(model, name)
        self.original: Tensor | None = None
        self._recorded: list[tuple[nn.Module, Any]] = []
        self._parameters = frozenset(map(id, (*model.parameters(), *model.buffers())))
        self.output = self._record()
        self._ways = [self._separately, self._together]
        assert self.original is not None
        if channel_dim % self.original.dim() != 1:  # a norm or an attention soon mixes the channels of tokens
            self._ways.remove(self._separately)

    def _record(self) -> Any:
        """Run the model once and record what finishes before the layer. Returns the model's output."""
        open_calls: list[int] = []
        calls = 0

        def enter(_module: nn.Module, _args: Any) -> None:
            open_calls.append(len(self._recorded))

        def leave(module: nn.Module, _args: Any, output: Any) -> None:
            nonlocal calls
            start = open_calls.pop()
            if module is self.layer:
                calls += 1
                # contiguous, so that vmap maps over it without copies
                found = check_output(self.name, output, self.channel_dim)
                self.original = found.clone(memory_format=torch.contiguous_format)
            if self.original is None:
                del self._recorded[start:]
                self._recorded.append((module, clone(output)))

        handles = []
        try:
            for module in self.model.modules():
                if isinstance(module, torch.jit.ScriptModule):  # it takes no hooks, and runs again in every pass
                    continue
                handles.append(module.register_forward_pre_hook(enter))
                handles.append(module.register_forward_hook(leave))
            output = self.model(self.x)
        finally:
            for handle in handles:
                handle.remove()
        check_runs(self.name, calls)
        return output

    @contextmanager
    def _standing_in(self, layer_output: Tensor, constant: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """A context in which recorded modules return what was recorded, and the layer returns ``layer_output``."""
        answers: dict[nn.Module, list[Any]] = {self.layer: [layer_output]}
        for module, output in self._recorded:
            answers.setdefault(module, []).append(output)
        own_forward = {module: module.__dict__["forward"] for module in answers if "forward" in module.__dict__}
        # the recorded output has been through the module's hooks: they get a copy now, and their result is replaced
        final: dict[nn.Module, Any] = {}
        hooked = {
            module: module.register_forward_hook(lambda module, *_: final.pop(module, None))
            for module in answers
            if module._forward_hooks
        }

        def stand_in(module: nn.Module, remaining: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
            for output in remaining:
                answer = output if module is self.layer else map_tensors(constant, clone(output))
                if module not in hooked:
                    return answer
                final[module] = answer
                return clone(answer)
            if module in own_forward:
                return own_forward[module](*args, **kwargs)
            return type(module).forward(module, *args, **kwargs)

        # attributes that the forward pass sets are restored: they would hold tensors that are useless outside of it
        kept = [
            (held, dict(held))
            for module in self.model.modules()
            if not isinstance(module, torch.jit.ScriptModule)
            for held in (module.__dict__, module._buffers)
        ]
        try:
            for module, outputs in answers.items():
                module.__dict__["forward"] = functools.partial(stand_in, module, iter(outputs))
            yield
        finally:
            for handle in hooked.values():
                handle.remove()
            for held, before in kept:
                for key in held.keys() - before.keys():
                    del held[key]
                held.update(before)

    def without_channels(self, channels: Tensor) -> Iterable[Any]:
        """The model's outputs with each of several channels of the layer zeroed, in one pass where that works."""
        while self._ways:
            try:
                return self._ways[0](channels)
            except Exception:  # out of memory, or not possible in this way; an error of the model is raised again below
                del self._ways[0]
        return (self._without_channel(channel) for channel in channels)

    def _separately(self, channels: Tensor) -> Iterable[Any]:
        """All channels in one pass, with pairs of tensors."""
        return self._mapped(functools.partial(self._without_channel, separable=True), channels)

    def _together(self, channels: Tensor) -> Iterable[Any]:
        """All channels in one pass, with ordinary tensors."""
        return self._mapped(self._without_channel, channels)

    @staticmethod
    def _mapped(without_channel: Callable[[Tensor], Any], channels: Tensor) -> Iterable[Any]:
        """``without_channel`` of each channel, mapped by vmap."""
        output: Any = None

        def tensors_without_channel(channel: Tensor) -> tuple[Tensor, ...]:
            nonlocal output
            output = without_channel(channel)
            return tuple(tensors_in(output))

        # vmap can't map over fused attention: it would run it channel by channel
        with _ForMapping(), sdpa_kernel(SDPBackend.MATH):
            mapped = torch.func.vmap(tensors_without_channel)(channels)
        if isinstance(output, Tensor):
            return mapped[0].unbind()
        by_channel = {id(tensor): values.unbind() for tensor, values in zip(tensors_in(output), mapped, strict=True)}

        def of(index: int) -> Any:
            return map_tensors(lambda tensor: by_channel[id(tensor)][index], output)

        return [of(index) for index in range(len(channels))]

    def _without_channel(self, channel: Tensor, separable: bool = False) -> Any:
        """The model's output with one channel of the layer zeroed. ``channel`` is a 0-dim index."""
        assert self.original is not None
        original = self.original.clone()
        zeros = torch.zeros_like(original)
        layer_output = (
            Separable(original, zeros, channel, self._parameters)
            if separable
            else exchanged(original, zeros, channel, self.channel_dim)
        )

        def constant(tensor: Tensor) -> Tensor:
            return Separable(tensor, tensor, channel, self._parameters) if separable else tensor

        with self._standing_in(layer_output, constant):
            output = self.model(map_tensors(constant, self.x))
        return map_tensors(lambda tensor: tensor.ordinary() if isinstance(tensor, Separable) else tensor, output)
