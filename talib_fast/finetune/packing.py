"""Convolutions whose weights lie in the order that oneDNN computes with on a CPU.

PyTorch brings them into it at every call, which counts where maps are small and weights are large, as in a network's
later layers.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..torch_private import convolve_packed, may_be_in_function_transform, pack_convolution_weight


def _is_channels_last(tensor: Tensor) -> bool:
    """Whether it lies in that layout and in no other, so that a convolution with it returns maps that do."""
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


class PackedConv2d(nn.Conv2d):
    """A convolution that is evaluated only: ``nn.Conv2d`` with its weight in oneDNN's order beside it.

    That serves maps in channels_last, which oneDNN returns. Whatever looks closer than a call on a CPU, as compilers
    and transforms do, meets the plain convolution.
    """

    _packed: tuple[Any, Tensor | None]

    def forward(self, input: Tensor) -> Tensor:
        packed = self._packed_weight(input) if self._is_plain_call(input) else None
        if packed is None:
            return super().forward(input)
        input = input.contiguous(memory_format=torch.channels_last)  # as the plain one does where its weight lies so
        return convolve_packed(input, packed, self.bias, self.padding, self.stride, self.dilation, self.groups)

    def _is_plain_call(self, input: Tensor) -> bool:
        return not (
            torch.compiler.is_compiling()
            or torch.jit.is_tracing()
            or type(input) is not Tensor
            or input.dim() != 4
            or input.device.type != "cpu"
            or input.dtype != self.weight.dtype
            or input.numel() == 0
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled("cpu")
            or may_be_in_function_transform()
        ) and (_is_channels_last(input) or _is_channels_last(self.weight))

    def _packed_weight(self, input: Tensor) -> Tensor | None:
        weight = self.weight
        made_from = id(weight), weight.data_ptr(), None if weight.is_inference() else weight._version
        if self.__dict__.get("_packed", (None,))[0] != made_from:
            self._packed = (
                made_from,
                pack_convolution_weight(
                    weight, self.padding, self.stride, self.dilation, self.groups, list(input.shape)
                ),
            )
        return self._packed[1]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedConv2d":
        self.__dict__.pop("_packed", None)
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "_packed"}


def pack(model: nn.Module) -> Callable[[], None]:
    """Let the plain convolutions in ``model``, which is evaluated only, compute with packed weights.

    They stay the objects they are. A weight is packed at the next call; on the CPU it takes as much memory again.

    Returns:
        A function that undoes it.
    """
    found = [
        module
        for module in model.modules()
        if type(module) is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    ]
    for module in found:
        module.__class__ = PackedConv2d

    def undo() -> None:
        for module in found:
            module.__dict__.pop("_packed", None)
            module.__class__ = nn.Conv2d

    return undo
