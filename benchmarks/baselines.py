"""What the operations are measured against, besides ``nn.BatchNorm2d`` and a plain copy."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from talib_fast.finetune.stochnorm import StochNorm2d
from talib_fast.ops.spectral_tail import _forward_by_gram as tail_forward
from talib_fast.ops.spectral_tail import _gradient as tail_backward
from talib_fast.ops.squared_distance import _backward as distance_backward
from talib_fast.ops.squared_distance import _forward as distance_forward
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


def upstream_behavioral(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """DELTA without attention as the Transfer-Learning-Library composes it, written from the formula."""
    total = torch.zeros((), device=targets[0].device)
    for source, target in zip(sources, targets, strict=True):
        total = total + 0.5 * torch.norm(target - source.detach()) ** 2
    return total


def upstream_attention(sources: Sequence[Tensor], targets: Sequence[Tensor], attention: Sequence[Tensor]) -> Tensor:
    """DELTA with channel attention, likewise."""
    total = torch.zeros((), device=targets[0].device)
    for source, target, weight in zip(sources, targets, attention, strict=True):
        batch, channels, height, width = target.shape
        target = target.reshape(batch, channels, height * width)
        source = source.reshape(batch, channels, height * width)
        distance = torch.norm(target - source.detach(), 2, 2)
        distance = channels * torch.mul(weight, distance**2) / (height * width)
        total = total + 0.5 * torch.sum(distance)
    return total


def upstream_l2(parameters: Sequence[Tensor], start: Sequence[Tensor] | None = None) -> Tensor:
    """L2, and with the starting point L2-SP, likewise."""
    total = torch.zeros((), device=parameters[0].device)
    for j, parameter in enumerate(parameters):
        total = total + 0.5 * torch.norm(parameter if start is None else parameter - start[j]) ** 2
    return total


class _DistanceInPyTorch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sources: list[Tensor], weights: list[Tensor], channel_dim: int, *targets: Tensor) -> Tensor:
        ctx.save_for_backward(*targets)
        ctx.constants = sources, weights, channel_dim
        return distance_forward(list(targets), sources, weights, channel_dim)[0]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, *distance_backward(grad_outputs[0], list(ctx.saved_tensors), *ctx.constants)


def distance_in_pytorch(
    targets: Sequence[Tensor], sources: Sequence[Tensor] = (), weights: Sequence[Tensor] = ()
) -> Tensor:
    """``squared_distance`` by its PyTorch implementation, also where a compiled kernel serves the operation."""
    return _DistanceInPyTorch.apply([source.detach() for source in sources], list(weights), 1, *targets)


@torch.no_grad()
def upstream_channel_attention(
    model: nn.Module, layer: str, x: Tensor, labels: Tensor, temperature: float = 5.0
) -> Tensor:
    """DELTA's channel attention as the Transfer-Learning-Library's script computes it, for one layer and batch.

    Each of the layer's filters is zeroed in turn and the whole network run; the layer has no bias.
    """
    weight = model.get_submodule(layer).get_parameter("weight")
    whole = F.cross_entropy(model(x), labels)
    losses = []
    for channel in range(len(weight)):
        kept = weight[channel].clone()
        weight[channel] = 0
        losses.append(F.cross_entropy(model(x), labels) - whole)
        weight[channel] = kept
    increases = torch.stack(losses)
    standardized = (increases - increases.mean()) / increases.std(correction=0)
    return F.softmax(standardized / temperature, 0)


def upstream_spectral_tail(features: Tensor, k: int) -> Tensor:
    """BSS as the Transfer-Learning-Library composes it, written from the formula; half precision as float32."""
    features = features if features.dtype == torch.float64 else features.float()
    _, singular_values, _ = torch.svd(features.t())
    total = torch.zeros((), device=features.device)
    for i in range(k):
        total = total + torch.pow(singular_values[len(singular_values) - 1 - i], 2)
    return total


def spectral_tail_by_eigvalsh(features: Tensor, k: int) -> Tensor:
    """The same from the eigenvalues of the Gram matrix, in float64 for their digits."""
    features = features.double()
    return torch.linalg.eigvalsh(features @ features.mT)[:k].sum().float()


class _TailInPyTorch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, k: int) -> Tensor:
        value, vectors = tail_forward(features, k)
        ctx.save_for_backward(features, vectors)
        ctx.k = k
        return value

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        features, vectors = ctx.saved_tensors
        return tail_backward(grad_outputs[0], features, vectors, ctx.k), None


def spectral_tail_in_pytorch(features: Tensor, k: int) -> Tensor:
    """``spectral_tail`` by its PyTorch implementation, also where a compiled kernel serves the operation."""
    return _TailInPyTorch.apply(features, k)
