"""What a module keeps and takes along to other devices, but not as its own: in no state dict, no optimizer.

Nor does DistributedDataParallel send it at every step, as it does buffers.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class KeptTensors(nn.Module):
    """Keeps tensors that move with the module, but are no buffers."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: list[Tensor] = []

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "KeptTensors":
        super()._apply(fn, recurse)
        with torch.inference_mode(False), torch.no_grad():  # what was made in inference mode could not be trained with
            self._kept = [fn(tensor) for tensor in self._kept]
        return self

    def _on(self, device: torch.device, j: int) -> Tensor:
        """The kept tensor ``j``, from now on on that device."""
        if self._kept[j].device != device:
            with torch.inference_mode(False), torch.no_grad():
                self._keep(j, self._kept[j].to(device))
        return self._kept[j]

    def _keep(self, j: int, tensor: Tensor) -> None:
        # in a list of its own: replicas of DataParallel share the old one
        self._kept = [*self._kept[:j], tensor, *self._kept[j + 1 :]]


class KeptModule(nn.Module):
    """Keeps a module that moves with this one, but is no submodule of it."""

    module: nn.Module

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "module", module)  # past nn.Module's registry of submodules

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "KeptModule":
        super()._apply(fn, recurse)
        with torch.inference_mode(False), torch.no_grad():
            self.module._apply(fn)
        return self
