"""Keep tensors or a module that move to other devices with a module, but do not belong to it.

They are in no state dict and no optimizer, and DistributedDataParallel does not send them at every step, as it does
buffers.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class KeptTensors(nn.Module):
    """A module that keeps tensors which move with it but are no buffers."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: list[Tensor] = []

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "KeptTensors":
        super()._apply(fn, recurse)
        with torch.inference_mode(False), torch.no_grad():  # tensors made in inference mode can't be used in training
            self._kept = [fn(tensor) for tensor in self._kept]
        return self

    def _on(self, device: torch.device, j: int) -> Tensor:
        """The kept tensor ``j`` on ``device``, where it stays."""
        if self._kept[j].device != device:
            with torch.inference_mode(False), torch.no_grad():
                self._keep(j, self._kept[j].to(device))
        return self._kept[j]

    def _keep(self, j: int, tensor: Tensor) -> None:
        """Keep ``tensor`` as number ``j``."""
        # a new list, because replicas of DataParallel share the old one
        self._kept = [*self._kept[:j], tensor, *self._kept[j + 1 :]]


class KeptModule(nn.Module):
    """A module that keeps another one which moves with it but is no submodule."""

    module: nn.Module

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "module", module)  # not through nn.Module, which would register a submodule

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "KeptModule":
        super()._apply(fn, recurse)
        with torch.inference_mode(False), torch.no_grad():
            self.module._apply(fn)
        return self
