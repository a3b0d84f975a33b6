"""The mathematics of stochastic normalisation, in PyTorch's operators alone.

s is the mask. (μ, v) are the batch's mean and biased variance. (m, q) are the running mean and variance from before
this step. u is a residual and φ an activation, if there are any::

    r = 1/√(s·v + (1−s)·q + eps)        x̂ = (x − (s·μ + (1−s)·m))·r        z = γ·x̂ + β + u        y = φ(z)

    dz = dy·φ'(z) = du        dβ = Σ dz        dγ = Σ dz·x̂        dx = γ·r·(dz − s·(dβ + x̂·dγ)/n)

A channel with s = 0 does not differentiate through statistics, and its dx needs no reduction. The backward pass has x
and computes z again. It does not have a residual: in that case one bit per element says where φ' is 1.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..torch_private import assign
from .activation import NO_ACTIVATION, Activation, activation_by_arguments, unpack_signs
from .draw import chosen
from .library import accumulation_dtype, is_empty

Statistics = tuple[Tensor, Tensor]


def _reduced_dims(input: Tensor) -> list[int]:
    """All dimensions but the channels'."""
    return [0, *range(2, input.dim())]


def _per_channel(vector: Tensor, input: Tensor) -> Tensor:
    """The vector ``[C]`` in a shape that broadcasts to the input."""
    return vector.view(-1, *[1] * (input.dim() - 2))


def _batch_statistics(input: Tensor) -> Statistics:
    """Mean and biased variance per channel."""
    variance, mean = torch.var_mean(input.to(accumulation_dtype(input)), _reduced_dims(input), correction=0)
    return mean, variance


def _affine(input: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """The normalised input times the weight, plus the bias, in the statistics' dtype."""
    scale = rstd if weight is None else rstd * weight
    output = (input - _per_channel(mean, input)).mul_(_per_channel(scale, input))
    if bias is not None:
        output.add_(_per_channel(bias, input))
    return output


def followed(output: Tensor, activation: Activation, residual: Tensor | None) -> Tensor:
    """Add a residual to a norm's output, in place, and apply an activation, by PyTorch's operators."""
    return activation.forward(output if residual is None else output.add_(residual))


def gradients(
    grad_output: Tensor,
    input: Tensor,
    statistics: Statistics,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor,
    signs: Tensor | None,
    activation: Activation,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of input, weight, bias and residual, by the formulas above."""
    mean, rstd = statistics
    dtype, dims = mean.dtype, _reduced_dims(input)
    dz = grad_output.to(dtype)
    if signs is not None:
        dz = activation.gradient(dz, unpack_signs(signs, input))
    elif activation.name != "none":
        dz = activation.backward(dz, _affine(input, mean, rstd, weight, bias))
    x_hat = (input.to(dtype) - _per_channel(mean, input)) * _per_channel(rstd, input)
    dbias = dz.sum(dims)
    dweight = (dz * x_hat).sum(dims)
    n = max(input.numel() // max(input.size(1), 1), 1)
    through_statistics = (_per_channel(dbias, input) + x_hat * _per_channel(dweight, input)) / n
    through_statistics = torch.where(_per_channel(mask, input), through_statistics, 0)
    scale = rstd if weight is None else rstd * weight
    return (dz - through_statistics) * _per_channel(scale, input), dweight, dbias, dz


def updated(running: Tensor, batch: Tensor, share: float | Tensor) -> Tensor:
    """A running statistic after an update by ``share`` towards the batch's. A share of 1 makes it the batch's."""
    if not isinstance(share, Tensor) and share == 1:
        return batch.to(running.dtype)
    # the batch's statistic may overflow the running statistic's dtype, although its share does not
    wide = torch.promote_types(running.dtype, batch.dtype)
    old, new = running.to(wide), batch.to(wide)
    if isinstance(share, Tensor):
        return torch.where(share == 1, new, old.lerp(new, share.to(wide))).to(running.dtype)
    return old.lerp(new, share).to(running.dtype)


def normalized(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running: Sequence[Tensor],
    mask: Tensor,
    eps: float,
    p: float,
    activation: Activation,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor, Statistics, Statistics]:
    """Normalise in PyTorch's operators alone, so that any transform can differentiate it.

    Returns:
        The output, the activation's input, the mean and rstd that the input was normalised with, and the batch's mean
        and biased variance.
    """
    mask = chosen(mask, p)
    mean, variance = (statistic.to(accumulation_dtype(input)) for statistic in running)
    if is_empty(input):
        output = torch.empty_like(input)
        return output, output, (mean.clone(), (variance + eps).rsqrt()), (mean.clone(), variance.clone())
    batch_mean, batch_variance = _batch_statistics(input)
    mean = torch.where(mask, batch_mean, mean)
    rstd = (torch.where(mask, batch_variance, variance) + eps).rsqrt()
    z = _affine(input, mean, rstd, weight, bias)
    if residual is not None:
        z = z + residual
    return activation.forward(z).to(input.dtype), z, (mean, rstd), (batch_mean, batch_variance)


def with_batch(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running: Tensor,
    mask: Tensor,
    eps: float,
    p: float,
    activation: Activation,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``normalized`` with all statistics as ``[2, C]``, and the batch's variance unbiased."""
    output, z, statistics, (batch_mean, batch_var) = normalized(
        input, weight, bias, running.unbind(), mask, eps, p, activation, residual
    )
    n = input.numel() // max(input.size(1), 1)
    unbiased = batch_var * (n / max(n - 1, 1)) if n else batch_var
    return output, z, torch.stack(statistics), torch.stack((batch_mean, unbiased)).detach()


def differentiable_gradients(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    mask: Tensor,
    statistics: Tensor,
    bias: Tensor | None,
    signs: Tensor | None,
    p: float,
    eps: float,
    activation: int,
    negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients for ``create_graph``: here the statistics are functions of the input."""
    batch_mean, batch_variance = _batch_statistics(input)
    mask = chosen(mask, p)
    mean = torch.where(mask, batch_mean, statistics[0])
    rstd = torch.where(mask, (batch_variance + eps).rsqrt(), statistics[1])
    function = activation_by_arguments(activation, negative_slope)
    return gradients(grad_output, input, (mean, rstd), weight, bias, mask, signs, function)


def stoch_norm_by_formula(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    mask: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
    p: float = 1.0,
    activation: Activation = NO_ACTIVATION,
    residual: Tensor | None = None,
) -> tuple[Tensor, Statistics]:
    """Normalise and update the running statistics by PyTorch's operators, where an autograd function can't serve."""
    running = running_mean, running_var
    output, _, (mean, rstd), (batch_mean, _) = normalized(
        input, weight, bias, running, mask, eps, p, activation, residual
    )
    values = input.detach()
    if momentum and torch.jit.is_tracing():  # a trace would drop a batch norm whose output is not used
        unbiased = values.to(mean.dtype).var(_reduced_dims(input))
        batch = batch_mean.detach(), unbiased
        assign([*running], [updated(old, new, momentum) for old, new in zip(running, batch, strict=True)])
    elif momentum and input.numel():
        # Every transform lets a batch norm update its running statistics. Where these are no argument of the
        # transformed function, it is the only operator that may.
        F.batch_norm(values.to(running_mean.dtype), running_mean, running_var, None, None, True, momentum)
    return output, (mean.detach(), rstd.detach())
