"""Convolutions with their weights in oneDNN's own order, for evaluation on a CPU.

PyTorch brings weights into this order at every call. That takes a large part of the time where maps are small and
weights are large, as in the later layers of a network.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..torch_private import convolve_packed, may_be_in_function_transform, pack_convolution_weight


def _is_channels_last(tensor: Tensor) -> bool:
    """Whether a tensor is in channels_last and in no other layout. A convolution then returns channels_last maps."""
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


class PackedConv2d(nn.Conv2d):
    """``nn.Conv2d`` for evaluation only, with its weight also in oneDNN's order.

    It serves maps in channels_last, which oneDNN returns. Anything but an ordinary call on a CPU, such as a compiler or
    a transform, gets the ordinary convolution.
    """

    _packed: tuple[Any, Tensor | None]

    def forward(self, input: Tensor) -> Tensor:
        packed = self._packed_weight(input) if self._is_plain_call(input) else None
        if packed is None:
            return super().forward(input)
        input = input.contiguous(memory_format=torch.channels_last)  # as nn.Conv2d does for a channels_last weight
        return convolve_packed(input, packed, self.bias, self.padding, self.stride, self.dilation, self.groups)

    def _is_plain_call(self, input: Tensor) -> bool:
        """Whether this is an ordinary call on a CPU with maps or weight in channels_last."""
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
        """The weight in oneDNN's order, packed again if it has changed. None where oneDNN has no such order."""
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
    """Let the ordinary convolutions in ``model`` compute with packed weights. The model must only be evaluated.

    The convolutions stay the same objects. A weight is packed at its next call and takes the same memory once more.

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
