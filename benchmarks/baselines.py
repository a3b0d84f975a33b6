"""What stochastic normalisation is measured against, besides ``nn.BatchNorm2d`` and a plain copy."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from talib_fast.finetune.stochnorm import StochNorm2d
from talib_fast.ops.stoch_norm import _backward as operation_backward
from talib_fast.ops.stoch_norm import _forward as operation_forward


class UpstreamComposition(nn.BatchNorm2d):
    """Stochastic normalisation in training as the Transfer-Learning-Library composes it, written from the formulas.

    In its order: batch norm with the running statistics; batch norm with the batch's, which moves the running ones;
    a mask of ones (probability p) and zeros, drawn by numpy on the host and moved to the device; the blend of both
    outputs. Both batch norms carry weight and bias. The running branch's backward pass reads the running statistics
    after they moved, and half precision comes out as float32, as it does there.
    """

    def __init__(self, num_features: int, p: float = 0.5, **options: Any) -> None:
        super().__init__(num_features, **options)
        self.p = p

    def forward(self, input: Tensor) -> Tensor:
        with_running, with_batch = (
            F.batch_norm(
                input,
                self.running_mean,
                self.running_var,
                self.weight,
                self.bias,
                batch,
                self.momentum or 0.0,
                self.eps,
            )
            for batch in (False, True)
        )
        drawn = np.random.binomial(n=1, p=self.p, size=self.num_features).reshape(1, -1, 1, 1)
        mask = torch.from_numpy(drawn).float().to(input.device)
        return (1 - mask) * with_running + mask * with_batch


class _InPyTorch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        mask: Tensor,
        momentum: float,
        eps: float,
    ) -> Tensor:
        output, mean, invstd = operation_forward(input, weight, bias, running_mean, running_var, mask, momentum, eps)
        ctx.save_for_backward(input, mean, invstd, weight, mask)
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return *operation_backward(*grad_outputs, *ctx.saved_tensors), *[None] * 5


class PyTorchStochNorm2d(StochNorm2d):
    """The layer on the operation's PyTorch implementation, also where a compiled kernel serves the operation."""

    def _forward_training(self, input: Tensor) -> Tensor:
        mask = self._draw_mask(input)
        mean, variance, momentum = self._statistics_to_update()
        output = _InPyTorch.apply(input, self.weight, self.bias, mean, variance, mask, momentum, self.eps)
        self._finish_update(mean, variance)
        return output


class RecordingStochNorm2d(StochNorm2d):
    """The layer itself, which remembers its masks: the memory floor depends on them."""

    def __init__(self, num_features: int, p: float = 0.5, **options: Any) -> None:
        super().__init__(num_features, p=p, **options)
        self.masks: list[Tensor] = []

    def _draw_mask(self, input: Tensor) -> Tensor:
        mask = super()._draw_mask(input)
        self.masks.append(mask)
        return mask

    def batch_share(self) -> float:
        """The share of channels that took the batch's statistics since the last call."""
        share = torch.stack(self.masks).float().mean().item()
        self.masks.clear()
        return share
