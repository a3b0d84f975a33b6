"""Stochastic normalisation: per channel either the batch's statistics or the running ones.

With mask s, batch mean and biased variance (μ, v) and running statistics (m, q) as they were before this step::

    r = 1/√(s·v + (1−s)·q + eps)        x̂ = (x − (s·μ + (1−s)·m))·r        y = γ·x̂ + β

    dβ = Σ dy        dγ = Σ dy·x̂        dx = γ·r·(dy − s·(dβ + x̂·dγ)/n)

A channel with s = 0 differentiates through no statistic: its dx needs no reduction.
"""

import sys
from typing import Any

import torch
from torch import Tensor

from ..checks import check_floats, check_number
from .library import Function, accumulation_dtype, define

Statistics = tuple[Tensor, Tensor]


def _reduced_dims(input: Tensor) -> list[int]:
    return [0, *range(2, input.dim())]


def _per_channel(vector: Tensor, input: Tensor) -> Tensor:
    return vector.view(-1, *[1] * (input.dim() - 2))


def _batch_statistics(input: Tensor) -> Statistics:
    """Mean and biased variance per channel."""
    variance, mean = torch.var_mean(input.to(accumulation_dtype(input)), _reduced_dims(input), correction=0)
    return mean, variance


def _normalize(input: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    scale = invstd if weight is None else invstd * weight
    output = (input - _per_channel(mean, input)).mul_(_per_channel(scale, input))
    if bias is not None:
        output.add_(_per_channel(bias, input))
    return output.to(input.dtype)


def _gradients(
    grad_output: Tensor, input: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, dims = mean.dtype, _reduced_dims(input)
    dy = grad_output.to(dtype)
    normalized = (input.to(dtype) - _per_channel(mean, input)) * _per_channel(invstd, input)
    dbias = dy.sum(dims)
    dweight = (dy * normalized).sum(dims)
    n = max(input.numel() // max(input.size(1), 1), 1)
    through_statistics = (_per_channel(dbias, input) + normalized * _per_channel(dweight, input)) / n
    through_statistics = torch.where(_per_channel(mask, input), through_statistics, 0)
    scale = invstd if weight is None else invstd * weight
    return (dy - through_statistics) * _per_channel(scale, input), dweight, dbias


def move(running: Tensor, batch: Tensor, share: float) -> None:
    """Move a running statistic by that share towards the batch's, in place."""
    if running.dtype == batch.dtype:
        running.lerp_(batch, share)
        return
    # the batch's may be too large for the running statistic's dtype, but not that share of it
    wide = torch.promote_types(running.dtype, batch.dtype)
    running.copy_(running.to(wide).lerp(batch.to(wide), share))


def _chosen(mask: Tensor, p: float) -> Tensor:
    """The mask as flags: it may be numbers, of which those below ``p`` stand for True."""
    return mask if mask.dtype == torch.bool else mask < p


def _forward(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    mask: Tensor,
    momentum: float,
    eps: float,
    p: float = 1.0,
    num_batches_tracked: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    mask = _chosen(mask, p)
    mean, variance = running_mean.to(accumulation_dtype(input)), running_var.to(accumulation_dtype(input))
    if input.numel() == 0:
        return torch.empty_like(input), mean.clone(), (variance + eps).rsqrt()
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    batch_mean, batch_variance = _batch_statistics(input)
    mean = torch.where(mask, batch_mean, mean)
    invstd = (torch.where(mask, batch_variance, variance) + eps).rsqrt()
    n = input.numel() // input.size(1)
    move(running_mean, batch_mean, momentum)
    move(running_var, batch_variance * (n / max(n - 1, 1)), momentum)
    return _normalize(input, mean, invstd, weight, bias), mean, invstd


def _backward(
    grad_output: Tensor,
    input: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    mask: Tensor,
    p: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dweight, dbias = _gradients(grad_output, input, mean, invstd, weight, _chosen(mask, p))
    return torch.empty_like(input).copy_(dx), dweight, dbias


def _forward_fake(input, weight, bias, running_mean, running_var, mask, momentum, eps, p=1.0, num_batches_tracked=None):
    mean = input.new_empty(input.size(1), dtype=accumulation_dtype(input))
    return torch.empty_like(input), mean, torch.empty_like(mean)


def _backward_fake(grad_output, input, mean, invstd, weight, mask, p=1.0):
    return torch.empty_like(input), torch.empty_like(mean), torch.empty_like(mean)


_forward_op = define(
    "stoch_norm_forward(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!) running_mean, Tensor(b!) running_var, "
    "Tensor mask, float momentum, float eps, float p=1.0, Tensor(c!)? num_batches_tracked=None) "
    "-> (Tensor output, Tensor mean, Tensor invstd)",
    _forward,
    _forward_fake,
)
_backward_op = define(
    "stoch_norm_backward(Tensor grad_output, Tensor input, Tensor mean, Tensor invstd, Tensor? weight, Tensor mask, "
    "float p=1.0) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
    _backward,
    _backward_fake,
)


def _draw(input: Tensor, channels: int) -> Tensor:
    return torch.rand(channels, dtype=torch.float32, device=input.device)


def _draw_fake(input: Tensor, channels: int) -> Tensor:
    return input.new_empty(channels, dtype=torch.float32)


# inductor draws by a generator of its own, and other numbers than eager, but not for what it can't look into
_draw_op = define(
    "stoch_norm_draw(Tensor input, int channels) -> Tensor", _draw, _draw_fake, torch.Tag.nondeterministic_seeded
)


def draw(input: Tensor, channels: int) -> Tensor:
    """A number in [0, 1) for each channel by torch's generator on the input's device, compiled or not: ``[C]``."""
    return (_draw_op if torch.compiler.is_compiling() else _draw)(input, channels)


def _in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)  # even a call that changes nothing takes microseconds


class _StochNorm(Function):
    @staticmethod
    def forward(
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor,
        running_var: Tensor,
        mask: Tensor,
        momentum: float,
        eps: float,
        p: float,
        num_batches_tracked: Tensor | None,
        mean: Tensor | None,
        invstd: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if mean is None or invstd is None:
            return _forward_op(
                input, weight, bias, running_mean, running_var, mask, momentum, eps, p, num_batches_tracked
            )
        return _normalize(input, mean, invstd, weight, bias), mean.clone(), invstd.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        input, weight, bias, _, _, mask, _, eps, p, *_ = inputs
        _, mean, invstd = output
        ctx.save_for_backward(input, weight, mean, invstd, mask)
        ctx.eps, ctx.p = eps, p
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.mark_non_differentiable(mean, invstd)
        ctx.set_materialize_grads(False)  # of the statistics, which have none

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return (None,) * 12
        input, weight, mean, invstd, mask = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: the statistics have to be seen as functions of the input
            batch_mean, batch_variance = _batch_statistics(input)
            mask = _chosen(mask, ctx.p)
            mean = torch.where(mask, batch_mean, mean)
            invstd = torch.where(mask, (batch_variance + ctx.eps).rsqrt(), invstd)
            dx, dweight, dbias = _gradients(grad_output, input, mean, invstd, weight, mask)
            dx = dx.to(input.dtype)
        else:
            dx, dweight, dbias = _backward_op(grad_output, input, mean, invstd, weight, mask, ctx.p)
        of_input, of_weight, of_bias, *_ = ctx.needs_input_grad
        return (
            dx if of_input else None,
            _in_dtype(dweight, weight.dtype) if of_weight else None,
            _in_dtype(dbias, ctx.bias_dtype) if of_bias else None,
            *[None] * 9,
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """Members of a mapped dimension are so many more channels."""
        if in_dims[3] is None or in_dims[4] is None:
            raise ValueError("expected running statistics for every member, but they are not mapped over")

        def members_first(tensor: Tensor, dim: int | None) -> Tensor:
            return tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)

        *operands, num_batches_tracked, mean, invstd = args
        if num_batches_tracked is not None and args[0].numel():  # here, or a counter for all members would not do
            num_batches_tracked.add_(1)
        args = (*operands, None, mean, invstd)
        input = members_first(args[0], in_dims[0]).movedim(0, 1).flatten(1, 2)
        others = [
            members_first(value, dim).flatten() if isinstance(value, Tensor) else value
            for value, dim in zip(args[1:], in_dims[1:], strict=True)
        ]
        results = _StochNorm.apply(input, *others)
        for j in (3, 4):  # the running statistics, which flatten may have copied
            args[j].movedim(in_dims[j], 0).copy_(others[j - 1].view(info.batch_size, -1))
        output, mean, invstd = results
        members = (info.batch_size, -1)
        return (output.unflatten(1, members), mean.unflatten(0, members), invstd.unflatten(0, members)), (1, 0, 0)


def check_count(input: Tensor) -> None:
    """Raise ValueError if a channel has only one value, which has no variance."""
    if input.numel() == input.size(1) != 0:
        raise ValueError(
            f"expected more than 1 value per channel when training, got input of shape {list(input.shape)}"
        )


def stoch_norm(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    mask: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
    statistics: Statistics | None = None,
) -> tuple[Tensor, Statistics]:
    """Normalise each channel with the batch's statistics where ``mask`` holds, else with the running statistics.

    The running statistics are read as they are before the call and then moved, for every channel, by ``momentum``
    towards the batch's mean and unbiased variance, in place. An input without elements leaves them alone. Statistics
    are taken in float32 (float64 for float64 input). Differentiable, also twice, in ``input``, ``weight`` and ``bias``.
    Under :func:`torch.vmap` every member needs running statistics of its own.

    Stochastic Normalization, NeurIPS 2020 (https://proceedings.neurips.cc/paper/2020/hash/bc573864331a9e42e4511de6f678aa83-Abstract.html).

    Args:
        input: ``[N, C, *]``, float16, bfloat16, float32 or float64.
        running_mean, running_var: ``[C]``, updated in place.
        mask: ``[C]``, bool; True takes the batch's statistics.
        weight, bias: ``[C]`` or None.
        momentum: share of the batch in the new running statistics, in [0, 1].
        eps: added to the variance, finite and at least 0.
        statistics: ``(mean, invstd)`` as an earlier call returned them: normalise with these instead, and leave the
            running statistics alone. It is how a recomputation repeats what the forward pass did.

    Returns:
        The output, of the input's shape and dtype, and the ``(mean, invstd)`` it was normalised with, each ``[C]``.

    Raises:
        TypeError: an operand is not a dense tensor of floats, ``mask`` is not bool, ``momentum`` or ``eps`` is no
            number, or ``statistics`` have another dtype than a call on this input returns.
        ValueError: a shape or device does not fit, ``momentum`` or ``eps`` is out of range, a channel has only one
            value, channels share their running statistics' memory, or running statistics are not mapped over where
            other operands are.
    """
    check_floats(input, "input")
    if input.dim() < 2:
        raise ValueError(f"expected input of shape [N, C, *], got {list(input.shape)}")
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"expected a bool mask, got {mask.dtype if isinstance(mask, Tensor) else type(mask).__name__}")
    check_number(momentum, "momentum", 1)
    check_number(eps, "eps", sys.float_info.max)
    mean, invstd = (None, None) if statistics is None else statistics
    shape, device = (input.size(1),), input.device
    for name, vector in (
        ("mask", mask),
        ("running_mean", running_mean),
        ("running_var", running_var),
        ("weight", weight),
        ("bias", bias),
        ("mean", mean),
        ("invstd", invstd),
    ):
        if vector is None:
            continue
        if vector is not mask:
            check_floats(vector, name)
        if vector.shape != shape:
            raise ValueError(
                f"expected {name} of shape {list(shape)} for input of shape {list(input.shape)}, "
                f"got {list(vector.shape)}"
            )
        if vector.device != device:
            raise ValueError(f"expected {name} on the input's device {device}, got {vector.device}")
    for name, running in (("running_mean", running_mean), ("running_var", running_var)):
        if running.size(0) > 1 and running.stride(0) == 0:
            raise ValueError(f"expected memory of its own for every channel of {name}, got a stride of 0")
        if running.is_neg():  # which PyTorch can't hand to an operator that writes
            raise ValueError(f"expected {name} as it is in memory, got the view of a negation: resolve_neg() it")
    for name, statistic in (("mean", mean), ("invstd", invstd)):
        if statistic is not None and statistic.dtype != accumulation_dtype(input):
            raise TypeError(f"expected {name} in {accumulation_dtype(input)}, got {statistic.dtype}")
    check_count(input)
    return stoch_norm_unchecked(
        input, running_mean, running_var, mask, weight, bias, momentum, eps, statistics=statistics
    )


def stoch_norm_unchecked(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    mask: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
    p: float = 1.0,
    num_batches_tracked: Tensor | None = None,
    statistics: Statistics | None = None,
) -> tuple[Tensor, Statistics]:
    """:func:`stoch_norm` for a layer, whose time on small maps is that of Python and of launches.

    A layer knows its vectors, so nothing is checked. ``mask`` may be the float32 numbers that it drew, of which those
    below ``p`` stand for True, and ``num_batches_tracked``, one int64, is counted up unless the input is empty.
    """
    recalled = (None, None) if statistics is None else statistics
    output, mean, invstd = _StochNorm.apply(
        input, weight, bias, running_mean, running_var, mask, momentum, eps, p, num_batches_tracked, *recalled
    )
    return output, (mean, invstd)
