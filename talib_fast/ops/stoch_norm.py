"""Stochastic normalisation: per channel either the batch's statistics or the running ones.

With mask s, batch mean and biased variance (μ, v) and running statistics (m, q) as they were before this step::

    r = 1/√(s·v + (1−s)·q + eps)        x̂ = (x − (s·μ + (1−s)·m))·r        y = γ·x̂ + β

    dβ = Σ dy        dγ = Σ dy·x̂        dx = γ·r·(dy − s·(dβ + x̂·dγ)/n)

A channel with s = 0 differentiates through no statistic: its dx needs no reduction.
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_floats, check_number
from ..torch_private import assign, keep_in_compiled_checkpoints
from .draw import chosen, draw_op
from .library import Function, accumulation_dtype, define, is_empty, needs_pytorch_formula

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


def moved(running: Tensor, batch: Tensor, share: float | Tensor) -> Tensor:
    """A running statistic, moved by that share towards the batch's; by 1 all the way, whatever it was."""
    if not isinstance(share, Tensor) and share == 1:
        return batch.to(running.dtype)
    # the batch's may be too large for the running statistic's dtype, but not that share of it
    wide = torch.promote_types(running.dtype, batch.dtype)
    old, new = running.to(wide), batch.to(wide)
    if isinstance(share, Tensor):
        return torch.where(share == 1, new, old.lerp(new, share.to(wide))).to(running.dtype)
    return old.lerp(new, share).to(running.dtype)


def _normalized(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    mask: Tensor,
    eps: float,
    p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """In PyTorch's operators alone, so that anything can differentiate it.

    Returns:
        The output, the mean and invstd that it was normalised with, and the batch's mean and biased variance.
    """
    mask = chosen(mask, p)
    mean, variance = running_mean.to(accumulation_dtype(input)), running_var.to(accumulation_dtype(input))
    if is_empty(input):
        return torch.empty_like(input), mean.clone(), (variance + eps).rsqrt(), mean.clone(), variance.clone()
    batch_mean, batch_variance = _batch_statistics(input)
    mean = torch.where(mask, batch_mean, mean)
    invstd = (torch.where(mask, batch_variance, variance) + eps).rsqrt()
    return _normalize(input, mean, invstd, weight, bias), mean, invstd, batch_mean, batch_variance


def _functional(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running: Tensor,
    mask: Tensor,
    eps: float,
    p: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    running_mean, running_var = running.unbind()
    normalized = _normalized(input, weight, bias, running_mean, running_var, mask, eps, p)
    output, mean, invstd, batch_mean, batch_var = normalized
    n = input.numel() // max(input.size(1), 1)
    unbiased = batch_var * (n / max(n - 1, 1)) if n else batch_var
    return output, mean, invstd, torch.stack((batch_mean, unbiased)).detach()


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
    running = torch.stack((running_mean, running_var))
    output, mean, invstd, batch = _functional(input, weight, bias, running, mask, eps, p)
    if input.numel():
        for target, statistic in zip((running_mean, running_var), batch, strict=True):
            target.copy_(moved(target, statistic, momentum))
        if num_batches_tracked is not None:
            num_batches_tracked.add_(1)
    return output, mean, invstd


def _backward(
    grad_output: Tensor,
    input: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    mask: Tensor,
    p: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dweight, dbias = _gradients(grad_output, input, mean, invstd, weight, chosen(mask, p))
    return torch.empty_like(input).copy_(dx), dweight, dbias


def _forward_fake(input, weight, bias, running_mean, running_var, mask, momentum, eps, p=1.0, num_batches_tracked=None):
    mean = input.new_empty(input.size(1), dtype=accumulation_dtype(input))
    return torch.empty_like(input), mean, torch.empty_like(mean)


def _functional_fake(input, weight, bias, running, mask, eps, p=1.0):
    output, mean, invstd = _forward_fake(input, weight, bias, None, None, mask, 0.0, eps)
    return output, mean, invstd, mean.new_empty((2, mean.size(0)))


def _backward_fake(grad_output, input, mean, invstd, weight, mask, p=1.0):
    return torch.empty_like(input), torch.empty_like(mean), torch.empty_like(mean)


_forward_op = define(
    "stoch_norm_forward(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!) running_mean, Tensor(b!) running_var, "
    "Tensor mask, float momentum, float eps, float p=1.0, Tensor(c!)? num_batches_tracked=None) "
    "-> (Tensor output, Tensor mean, Tensor invstd)",
    _forward,
    _forward_fake,
)
# for compiled code: it changes nothing, so that a backward pass may call it again
_functional_op = define(
    "stoch_norm_functional(Tensor input, Tensor? weight, Tensor? bias, Tensor running, Tensor mask, float eps, "
    "float p=1.0) -> (Tensor output, Tensor mean, Tensor invstd, Tensor batch)",
    _functional,
    _functional_fake,
)
_backward_op = define(
    "stoch_norm_backward(Tensor grad_output, Tensor input, Tensor mean, Tensor invstd, Tensor? weight, Tensor mask, "
    "float p=1.0) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
    _backward,
    _backward_fake,
)
keep_in_compiled_checkpoints(draw_op, "stoch_norm_functional", 4)


def _in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)  # even a call that changes nothing takes microseconds


class _StochNorm(Function):
    """What the operator in place and the functional one have in common: all but the forward pass."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        input, weight, bias, mask, eps, p, *_ = inputs
        _, mean, invstd, *batch = output
        ctx.save_for_backward(input, weight, mean, invstd, mask)
        ctx.eps, ctx.p, ctx.operands = eps, p, len(inputs)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.mark_non_differentiable(mean, invstd, *batch)
        ctx.set_materialize_grads(False)  # of the statistics, which have none

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return (None,) * ctx.operands
        input, weight, mean, invstd, mask = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: the statistics have to be seen as functions of the input
            batch_mean, batch_variance = _batch_statistics(input)
            mask = chosen(mask, ctx.p)
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
            *[None] * (ctx.operands - 3),
        )


def _of_members(function: type[_StochNorm], members: int, in_dims: tuple[int | None, ...], args: Sequence[Any]) -> Any:
    """``function`` under vmap: members of a mapped dimension are so many more channels.

    Returns:
        The results, the dimensions that have the members in them, and the operands as ``function`` got them.
    """
    if any(dim is None for arg, dim in zip(args[6:], in_dims[6:], strict=True) if isinstance(arg, Tensor)):
        raise ValueError("expected running statistics for every member, but they are not mapped over")

    def joined(tensor: Tensor, dim: int | None) -> Tensor:
        tensor = tensor.expand(members, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        return tensor.flatten() if tensor.dim() == 2 else tensor.movedim(0, 1).flatten(1, 2)

    operands = [joined(a, d) if isinstance(a, Tensor) else a for a, d in zip(args, in_dims, strict=True)]
    results = function.apply(*operands)
    dims = tuple(0 if result.dim() == 1 else 1 for result in results)
    return tuple(r.unflatten(dim, (members, -1)) for r, dim in zip(results, dims, strict=True)), dims, operands


class _InPlace(_StochNorm):
    @staticmethod
    def forward(
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mask: Tensor,
        eps: float,
        p: float,
        running_mean: Tensor,
        running_var: Tensor,
        momentum: float,
        num_batches_tracked: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _forward_op(input, weight, bias, running_mean, running_var, mask, momentum, eps, p, num_batches_tracked)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        num_batches_tracked = args[-1]
        results, dims, operands = _of_members(_InPlace, info.batch_size, in_dims, (*args[:-1], None))
        for j in (6, 7):  # the running statistics, which flatten may have copied
            args[j].movedim(in_dims[j], 0).copy_(operands[j].view(info.batch_size, -1))
        if num_batches_tracked is not None and args[0].numel():  # here, or a counter for all members would not do
            num_batches_tracked.add_(1)
        return results, dims


class _Functional(_StochNorm):
    @staticmethod
    def forward(
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mask: Tensor,
        eps: float,
        p: float,
        running: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _functional_op(input, weight, bias, running, mask, eps, p)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        results, dims, _ = _of_members(_Functional, info.batch_size, in_dims, args)
        return results, dims


def check_count(input: Tensor) -> None:
    """Raise ValueError if a channel has only one value, which has no variance."""
    if not torch.jit.is_tracing() and input.numel() == input.size(1) != 0:  # sizes are tensors while it traces
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
        momentum: share of the batch in the new running statistics, in [0, 1]; of 1 they are the batch's, whatever they
            were.
        eps: added to the variance, finite and at least 0.

    Returns:
        The output, of the input's shape and dtype, and the ``(mean, invstd)`` it was normalised with, each ``[C]``.

    Raises:
        TypeError: an operand is not a dense tensor of floats, ``mask`` is not bool, or ``momentum`` or ``eps`` is no
            number.
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
    shape, device = (input.size(1),), input.device
    for name, vector in (
        ("mask", mask),
        ("running_mean", running_mean),
        ("running_var", running_var),
        ("weight", weight),
        ("bias", bias),
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
    check_count(input)
    if needs_pytorch_formula():
        return stoch_norm_by_formula(input, running_mean, running_var, mask, weight, bias, momentum, eps)
    if torch.compiler.is_compiling():
        joined = torch.stack((running_mean, running_var))
        output, mean, invstd, batch = functional_stoch_norm(input, joined, mask, weight, bias, eps)
        if input.numel():
            for target, statistic in zip((running_mean, running_var), batch, strict=True):
                target.copy_(moved(target, statistic, momentum))
        return output, (mean, invstd)
    return stoch_norm_in_place(input, running_mean, running_var, mask, weight, bias, momentum, eps)


def stoch_norm_in_place(
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
) -> tuple[Tensor, Statistics]:
    """:func:`stoch_norm` for a layer, whose time on small maps is that of Python and of launches.

    A layer knows its vectors, so nothing is checked. ``mask`` may be the float32 numbers that it drew, of which those
    below ``p`` stand for True, whatever their sign, and ``num_batches_tracked``, one int64, is counted up unless the
    input is empty.
    """
    output, mean, invstd = _InPlace.apply(
        input, weight, bias, mask, eps, p, running_mean, running_var, momentum, num_batches_tracked
    )
    return output, (mean, invstd)


def functional_stoch_norm(
    input: Tensor,
    running: Tensor,
    mask: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    p: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`stoch_norm_in_place` for compiled code: it changes nothing, so that a backward pass may repeat it.

    Args:
        running: the running mean and variance, ``[2, C]``.

    Returns:
        The output, the mean and invstd it was normalised with, and the batch's mean and unbiased variance, ``[2, C]``.
    """
    if needs_pytorch_formula():
        output, mean, invstd, batch = _functional(input, weight, bias, running, mask, eps, p)
        return output, mean.detach(), invstd.detach(), batch
    return _Functional.apply(input, weight, bias, mask, eps, p, running)


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
) -> tuple[Tensor, Statistics]:
    """:func:`stoch_norm_in_place` by PyTorch's operators, where nothing else can be differentiated."""
    output, mean, invstd, batch_mean, _ = _normalized(input, weight, bias, running_mean, running_var, mask, eps, p)
    values = input.detach()
    if momentum and torch.jit.is_tracing():  # which drops a batch norm of which nothing but the statistics is used
        unbiased = values.to(mean.dtype).var(_reduced_dims(input))
        running, batch = [running_mean, running_var], (batch_mean.detach(), unbiased)
        assign(running, [moved(old, new, momentum) for old, new in zip(running, batch, strict=True)])
    elif momentum and input.numel():
        # Every transform lets a batch norm move its running statistics, and only that where they are not an argument.
        F.batch_norm(values.to(running_mean.dtype), running_mean, running_var, None, None, True, momentum)
    return output, (mean.detach(), invstd.detach())
