"""Stochastic normalisation: per channel either the batch's statistics or the running ones.

With mask s, batch mean and biased variance (μ, v) and running statistics (m, q) as they were before this step, and if
wanted a residual u and an activation φ behind the norm::

    r = 1/√(s·v + (1−s)·q + eps)        x̂ = (x − (s·μ + (1−s)·m))·r        z = γ·x̂ + β + u        y = φ(z)

    dz = dy·φ'(z) = du        dβ = Σ dz        dγ = Σ dz·x̂        dx = γ·r·(dz − s·(dβ + x̂·dγ)/n)

A channel with s = 0 differentiates through no statistic: its dx needs no reduction. The backward pass is left x, from
which it computes z once more; with a residual, which it is not left, a bit for each element says where φ' is 1.
"""

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_floats, check_number
from ..torch_private import assign, directly, keep_in_compiled_checkpoints, may_be_in_function_transform
from .activation import (
    NAMES,
    NO_ACTIVATION,
    Activation,
    activation_by_arguments,
    pack_signs,
    signs_length,
    unpack_signs,
)
from .draw import chosen, draw_op
from .library import Function, accumulation_dtype, argument_names, define, is_empty, needs_pytorch_formula

Statistics = tuple[Tensor, Tensor]


def _reduced_dims(input: Tensor) -> list[int]:
    return [0, *range(2, input.dim())]


def _per_channel(vector: Tensor, input: Tensor) -> Tensor:
    return vector.view(-1, *[1] * (input.dim() - 2))


def _batch_statistics(input: Tensor) -> Statistics:
    """Mean and biased variance per channel."""
    variance, mean = torch.var_mean(input.to(accumulation_dtype(input)), _reduced_dims(input), correction=0)
    return mean, variance


def _affine(input: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """The normalised input times the weight, plus the bias, in the statistics' dtype."""
    scale = invstd if weight is None else invstd * weight
    output = (input - _per_channel(mean, input)).mul_(_per_channel(scale, input))
    if bias is not None:
        output.add_(_per_channel(bias, input))
    return output


def followed(output: Tensor, activation: Activation, residual: Tensor | None) -> Tensor:
    """What a residual and an activation make of a norm's output, which is overwritten, by PyTorch's operators."""
    return activation(output if residual is None else output.add_(residual))


def _gradients(
    grad_output: Tensor,
    input: Tensor,
    statistics: Statistics,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor,
    signs: Tensor | None,
    activation: Activation,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean, invstd = statistics
    dtype, dims = mean.dtype, _reduced_dims(input)
    dz = grad_output.to(dtype)
    if signs is not None:
        dz = activation.gradient(dz, unpack_signs(signs, input))
    elif activation.name != "none":
        dz = activation.backward(dz, _affine(input, mean, invstd, weight, bias))
    normalized = (input.to(dtype) - _per_channel(mean, input)) * _per_channel(invstd, input)
    dbias = dz.sum(dims)
    dweight = (dz * normalized).sum(dims)
    n = max(input.numel() // max(input.size(1), 1), 1)
    through_statistics = (_per_channel(dbias, input) + normalized * _per_channel(dweight, input)) / n
    through_statistics = torch.where(_per_channel(mask, input), through_statistics, 0)
    scale = invstd if weight is None else invstd * weight
    return (dz - through_statistics) * _per_channel(scale, input), dweight, dbias, dz


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
    running: Sequence[Tensor],
    mask: Tensor,
    eps: float,
    p: float,
    activation: Activation,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor, Statistics, Statistics]:
    """In PyTorch's operators alone, so that anything can differentiate it.

    Returns:
        The output, what the activation was given, the mean and invstd that it was normalised with, and the batch's mean
        and biased variance.
    """
    mask = chosen(mask, p)
    mean, variance = (statistic.to(accumulation_dtype(input)) for statistic in running)
    if is_empty(input):
        output = torch.empty_like(input)
        return output, output, (mean.clone(), (variance + eps).rsqrt()), (mean.clone(), variance.clone())
    batch_mean, batch_variance = _batch_statistics(input)
    mean = torch.where(mask, batch_mean, mean)
    invstd = (torch.where(mask, batch_variance, variance) + eps).rsqrt()
    z = _affine(input, mean, invstd, weight, bias)
    if residual is not None:
        z = z + residual
    return activation(z).to(input.dtype), z, (mean, invstd), (batch_mean, batch_variance)


def _with_batch(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running: Tensor,
    *others: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As :func:`_normalized`, but the running statistics come and the others go as ``[2, C]``, the batch's unbiased."""
    output, z, statistics, (batch_mean, batch_var) = _normalized(input, weight, bias, running.unbind(), *others)
    n = input.numel() // max(input.size(1), 1)
    unbiased = batch_var * (n / max(n - 1, 1)) if n else batch_var
    return output, z, torch.stack(statistics), torch.stack((batch_mean, unbiased)).detach()


def _functional(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running: Tensor,
    mask: Tensor,
    eps: float,
    p: float = 1.0,
    residual: Tensor | None = None,
    activation: int = 0,
    negative_slope: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    function = activation_by_arguments(activation, negative_slope)
    output, z, statistics, batch = _with_batch(input, weight, bias, running, mask, eps, p, function, residual)
    signs = input.new_empty(0, dtype=torch.int32)
    if residual is not None:  # of other strides, it decides those of a sum
        output = torch.empty_like(input).copy_(output)
        if activation:
            signs = pack_signs(torch.empty_like(input, dtype=torch.bool).copy_(function.passes(z)))
    return output, statistics, signs, batch


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
    residual: Tensor | None = None,
    activation: int = 0,
    negative_slope: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    running = torch.stack((running_mean, running_var))
    *results, batch = _functional(input, weight, bias, running, mask, eps, p, residual, activation, negative_slope)
    if input.numel():
        for target, statistic in zip((running_mean, running_var), batch, strict=True):
            target.copy_(moved(target, statistic, momentum))
        if num_batches_tracked is not None:
            num_batches_tracked.add_(1)
    return tuple(results)  # type: ignore[return-value]


def _backward(
    grad_output: Tensor,
    input: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    mask: Tensor,
    p: float = 1.0,
    bias: Tensor | None = None,
    signs: Tensor | None = None,
    activation: int = 0,
    negative_slope: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean, invstd = statistics.unbind()
    function = activation_by_arguments(activation, negative_slope)
    gradients = _gradients(grad_output, input, (mean, invstd), weight, bias, chosen(mask, p), signs, function)
    dx, dweight, dbias, dz = gradients
    dx = torch.empty_like(input).copy_(dx)
    return dx, dweight, dbias, input.new_empty(0) if signs is None else torch.empty_like(dx).copy_(dz)


def _forward_fake(
    input, weight, bias, running_mean, running_var, mask, momentum, eps, p=1.0, num_batches_tracked=None,
    residual=None, activation=0, negative_slope=0.0,
):  # fmt: skip
    statistics = input.new_empty((2, input.size(1)), dtype=accumulation_dtype(input))
    words = 0 if residual is None or not activation else signs_length(input)
    return torch.empty_like(input), statistics, input.new_empty(words, dtype=torch.int32)


def _functional_fake(input, weight, bias, running, mask, eps, p=1.0, residual=None, activation=0, negative_slope=0.0):
    results = _forward_fake(input, weight, bias, None, None, mask, 0.0, eps, p, None, residual, activation)
    return *results, torch.empty_like(results[1])


def _backward_fake(
    grad_output, input, statistics, weight, mask, p=1.0, bias=None, signs=None, activation=0, negative_slope=0.0
):
    dx, vector = torch.empty_like(input), statistics.new_empty(input.size(1))
    return dx, vector, torch.empty_like(vector), input.new_empty(0) if signs is None else torch.empty_like(dx)


_forward_op = define(
    "stoch_norm_forward(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!) running_mean, Tensor(b!) running_var, "
    "Tensor mask, float momentum, float eps, float p=1.0, Tensor(c!)? num_batches_tracked=None, Tensor? residual=None, "
    "int activation=0, float negative_slope=0.0) -> (Tensor output, Tensor statistics, Tensor signs)",
    _forward,
    _forward_fake,
)
# for compiled code: it changes nothing, so that a backward pass may call it again
_functional_op = define(
    "stoch_norm_functional(Tensor input, Tensor? weight, Tensor? bias, Tensor running, Tensor mask, float eps, "
    "float p=1.0, Tensor? residual=None, int activation=0, float negative_slope=0.0) "
    "-> (Tensor output, Tensor statistics, Tensor signs, Tensor batch)",
    _functional,
    _functional_fake,
)
_backward_op = define(
    "stoch_norm_backward(Tensor grad_output, Tensor input, Tensor statistics, Tensor? weight, Tensor mask, "
    "float p=1.0, Tensor? bias=None, Tensor? signs=None, int activation=0, float negative_slope=0.0) "
    "-> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias, Tensor grad_residual)",
    _backward,
    _backward_fake,
)
keep_in_compiled_checkpoints(draw_op, "stoch_norm_functional", 4)
_forward_now, _backward_now = directly(_forward_op), directly(_backward_op)


def _keep(
    ctx: Any,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor,
    constants: tuple[float, float, int, float],
    results: Sequence[Tensor],
) -> None:
    """What the backward pass needs; ``constants`` are p, eps, and the activation as operators take it."""
    ctx.constants = constants
    if not constants[2]:
        ctx.save_for_backward(input, weight, mask, results[1])
    elif residual is None:
        ctx.save_for_backward(input, weight, mask, results[1], bias, None)
    else:
        ctx.save_for_backward(input, weight, mask, results[1], None, results[2])
        ctx.strides = results[0].stride()


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
    """What the backward operator computes, for ``create_graph``: the statistics are seen as functions of the input."""
    batch_mean, batch_variance = _batch_statistics(input)
    mask = chosen(mask, p)
    mean = torch.where(mask, batch_mean, statistics[0])
    invstd = torch.where(mask, (batch_variance + eps).rsqrt(), statistics[1])
    function = activation_by_arguments(activation, negative_slope)
    return _gradients(grad_output, input, (mean, invstd), weight, bias, mask, signs, function)


def _differentiate(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of input, weight, bias and residual, which autograd brings into their dtypes."""
    constants, bias, signs = ctx.constants, None, None
    if constants[2]:
        input, weight, mask, statistics, bias, signs = ctx.saved_tensors
    else:
        input, weight, mask, statistics = ctx.saved_tensors
    if signs is not None and input.stride() != ctx.strides:
        # they are in the output's order, and hooks of what autograd saves may have changed that of the input
        input = torch.empty_strided(input.shape, ctx.strides, dtype=input.dtype, device=input.device).copy_(input)
    if torch.is_grad_enabled():
        gradients = differentiable_gradients(grad_output, input, weight, mask, statistics, bias, signs, *constants)
    else:
        backward = _backward_op if torch.compiler.is_compiling() else _backward_now
        p, _, activation, slope = constants
        if activation:
            gradients = backward(grad_output, input, statistics, weight, mask, p, bias, signs, activation, slope)
        else:  # what is left out takes no time
            gradients = backward(grad_output, input, statistics, weight, mask, p)
    dx, dweight, dbias, dresidual = gradients
    of_input, of_weight, of_bias, of_residual, *_ = ctx.needs_input_grad
    return (
        dx if of_input else None,
        dweight if of_weight else None,
        dbias if of_bias else None,
        (grad_output if signs is None else dresidual) if of_residual else None,
    )


class _InPlace(torch.autograd.Function):
    """The operator in place, outside of transforms of torch.func: every argument and result takes its time."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        state: tuple[Any, ...],
        activation: tuple[int, float],
    ) -> Tensor:
        """``state`` are the operator's arguments from ``running_mean`` to ``num_batches_tracked``."""
        if activation[0] or residual is not None:
            results = _forward_now(input, weight, bias, *state, residual, *activation)
        else:
            results = _forward_now(input, weight, bias, *state)
        _keep(ctx, input, weight, bias, residual, state[2], (state[5], state[4], *activation), results)
        return results[0]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return _differentiate(ctx, grad_output) + (None, None)  # noqa: RUF005, which is slower


# past Function's own apply, which asks for functions that are transformed
apply_in_place = super(torch.autograd.Function, _InPlace).apply


class _StochNorm(Function):
    """The operator in place, or with ``running`` the functional one, with all of their results."""

    @staticmethod
    def forward(
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mask: Tensor,
        p: float,
        eps: float,
        activation: int,
        negative_slope: float,
        running: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float | None,
        num_batches_tracked: Tensor | None,
    ) -> tuple[Tensor, ...]:
        epilogue = residual, activation, negative_slope
        if running is not None:
            return _functional_op(input, weight, bias, running, mask, eps, p, *epilogue)
        state = running_mean, running_var, mask, momentum, eps, p, num_batches_tracked
        return _forward_op(input, weight, bias, *state, *epilogue)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        args = _Arguments(*inputs)
        constants = args.p, args.eps, args.activation, args.negative_slope
        _keep(ctx, args.input, args.weight, args.bias, args.residual, args.mask, constants, output)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # of the statistics, which have none

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        others = len(_Arguments._fields) - 4
        return *((None,) * 4 if grad_output is None else _differentiate(ctx, grad_output)), *[None] * others

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        """Members of a mapped dimension are so many more channels."""
        args, dims, members = _Arguments(*inputs), _Arguments(*in_dims), info.batch_size
        statistics = {name: getattr(args, name) for name in ("running", "running_mean", "running_var")}
        if any(value is not None and getattr(dims, name) is None for name, value in statistics.items()):
            raise ValueError("expected running statistics for every member, but they are not mapped over")

        def joined(value: Any, dim: int | None) -> Any:
            if not isinstance(value, Tensor):
                return value
            value = value.expand(members, *value.shape) if dim is None else value.movedim(dim, 0)
            return value.flatten() if value.dim() == 2 else value.movedim(0, 1).flatten(1, 2)

        counter = args.num_batches_tracked
        operands = _Arguments(*map(joined, args._replace(num_batches_tracked=None), dims))
        output, statistics_used, signs, *batch = _StochNorm.apply(*operands)
        if args.running is None:
            for name in ("running_mean", "running_var"):  # which flatten may have copied
                moved_ones = getattr(operands, name).view(members, -1)
                statistics[name].movedim(getattr(dims, name), 0).copy_(moved_ones)
            if counter is not None and args.input.numel():  # here, or a counter for all members would not do
                counter.add_(1)
        mapped = (output, statistics_used, *batch)
        output, statistics_used, *batch = (result.unflatten(1, (members, -1)) for result in mapped)
        return (output, statistics_used, signs, *batch), (1, 1, None, *[1] * len(batch))


_Arguments = argument_names(_StochNorm)


def check_channels(input: Tensor, channels: int) -> None:
    """Raise TypeError unless ``input`` is of floating-point numbers, ValueError unless it has so many channels."""
    if not input.is_floating_point():
        raise TypeError(f"expected input to be a floating-point tensor, got {input.dtype}")
    if not torch.jit.is_tracing() and input.size(1) != channels:  # sizes are tensors while it traces
        raise ValueError(f"expected {channels} channels at dimension 1, got input of shape {list(input.shape)}")


def check_training(input: Tensor, channels: int, eps: float) -> None:
    """As :func:`check_channels`, and raise ValueError unless ``eps`` is positive."""
    check_channels(input, channels)
    if eps <= 0:
        raise ValueError(f"expected eps to be positive during training, got {eps}")


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
    activation: str = "none",
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
) -> tuple[Tensor, Statistics]:
    """Normalise each channel with the batch's statistics where ``mask`` holds, else with the running statistics.

    Then a residual is added and an activation applied, act(norm(input) + residual), where they are asked for. Beside
    the input nothing of its size is kept for the backward pass, but with both of them one bit an element.

    The running statistics are read as they are before the call and then moved, for every channel, by ``momentum``
    towards the batch's mean and unbiased variance, in place. An input without elements leaves them alone. Statistics
    are taken in float32 (float64 for float64 input). Differentiable, also twice, in ``input``, ``weight``, ``bias`` and
    ``residual``. Under :func:`torch.vmap` every member needs running statistics of its own.

    Stochastic Normalization, NeurIPS 2020 (https://proceedings.neurips.cc/paper/2020/hash/bc573864331a9e42e4511de6f678aa83-Abstract.html).

    Args:
        input: ``[N, C, *]``, float16, bfloat16, float32 or float64.
        running_mean, running_var: ``[C]``, updated in place.
        mask: ``[C]``, bool; True takes the batch's statistics.
        weight, bias: ``[C]`` or None.
        momentum: share of the batch in the new running statistics, in [0, 1]; of 1 they are the batch's, whatever they
            were.
        eps: added to the variance, finite and at least 0.
        activation: "none", "relu", "relu6", "leaky_relu", "silu", "hardswish" or "gelu" (the exact one, by erf).
        negative_slope: of "leaky_relu", finite.
        residual: of the input's shape, dtype and device, or None; not with "silu", "hardswish" or "gelu".

    Returns:
        The output, of the input's shape and dtype, and the ``(mean, invstd)`` it was normalised with, each ``[C]``.

    Raises:
        TypeError: an operand is not a dense tensor of floats, ``mask`` is not bool, the residual has another dtype than
            the input, ``activation`` is no string, or ``momentum``, ``eps`` or ``negative_slope`` is no number.
        ValueError: a shape or device does not fit, ``momentum``, ``eps`` or ``negative_slope`` is out of range, the
            activation is unknown or takes no residual, a channel has only one value, channels share their running
            statistics' memory, or running statistics are not mapped over where other operands are.
    """
    check_floats(input, "input")
    if input.dim() < 2:
        raise ValueError(f"expected input of shape [N, C, *], got {list(input.shape)}")
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"expected a bool mask, got {mask.dtype if isinstance(mask, Tensor) else type(mask).__name__}")
    check_number(momentum, "momentum", 1)
    check_number(eps, "eps", sys.float_info.max)
    function = _checked_activation(activation, negative_slope)
    if residual is not None:
        _check_residual(residual, input, activation, function)
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
        # which PyTorch can't hand to an operator that writes, and compiled code not even ask for
        if not torch.compiler.is_compiling() and running.is_neg():
            raise ValueError(f"expected {name} as it is in memory, got the view of a negation: resolve_neg() it")
    check_count(input)
    operands = weight, bias
    if needs_pytorch_formula():
        state = running_mean, running_var, mask, *operands
        return stoch_norm_by_formula(input, *state, momentum, eps, 1.0, function, residual)
    if torch.compiler.is_compiling():
        joined = torch.stack((running_mean, running_var))
        results = functional_stoch_norm(input, joined, mask, *operands, eps, 1.0, function, residual)
        output, (mean, invstd), batch = results
        if input.numel():
            for target, statistic in zip((running_mean, running_var), batch, strict=True):
                target.copy_(moved(target, statistic, momentum))
        return output, (mean, invstd)
    output, (mean, invstd) = _with_statistics(
        input, *operands, mask, eps, 1.0, function, residual, None, running_mean, running_var, momentum, None
    )
    return output, (mean, invstd)


def _checked_activation(name: Any, negative_slope: Any) -> Activation:
    if not isinstance(name, str):
        raise TypeError(f"expected activation to be a string, got {type(name).__name__}")
    if name not in NAMES:
        raise ValueError(f"expected activation to be one of {', '.join(NAMES)}, got {name!r}")
    if isinstance(negative_slope, bool) or not isinstance(negative_slope, (int, float)):
        raise TypeError(f"expected negative_slope to be a number, got {negative_slope!r}")
    if not math.isfinite(negative_slope):
        raise ValueError(f"expected negative_slope to be finite, got {negative_slope}")
    return Activation(name, float(negative_slope))


def _check_residual(residual: Any, input: Tensor, name: str, activation: Activation) -> None:
    check_floats(residual, "residual")
    if not activation.takes_residual():
        raise ValueError(f"expected no residual with {name}: only none, relu, relu6 and leaky_relu take one")
    if residual.shape != input.shape:
        raise ValueError(f"expected residual of the input's shape {list(input.shape)}, got {list(residual.shape)}")
    if residual.dtype != input.dtype:
        raise TypeError(f"expected residual of the input's dtype {input.dtype}, got {residual.dtype}")
    if residual.device != input.device:
        raise ValueError(f"expected residual on the input's device {input.device}, got {residual.device}")


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
    activation: Activation = NO_ACTIVATION,
    residual: Tensor | None = None,
) -> Tensor:
    """The output of :func:`stoch_norm` for a layer, which knows its vectors, so that nothing is checked.

    ``mask`` may be the float32 numbers that it drew, of which those below ``p`` stand for True, whatever their sign,
    and ``num_batches_tracked``, one int64, is counted up unless the input is empty.
    """
    if may_be_in_function_transform():
        others = running_mean, running_var, momentum, num_batches_tracked
        return _with_statistics(input, weight, bias, mask, eps, p, activation, residual, None, *others)[0]
    state = running_mean, running_var, mask, momentum, eps, p, num_batches_tracked
    return apply_in_place(input, weight, bias, residual, state, activation.arguments)


def functional_stoch_norm(
    input: Tensor,
    running: Tensor,
    mask: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    p: float = 1.0,
    activation: Activation = NO_ACTIVATION,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`stoch_norm_in_place` for compiled code: it changes nothing, so that a backward pass may repeat it.

    Args:
        running: the running mean and variance, ``[2, C]``.

    Returns:
        The output, the mean and invstd it was normalised with, and the batch's mean and unbiased variance, ``[2, C]``.
    """
    if needs_pytorch_formula():
        operands = input, weight, bias, running, mask, eps, p, activation, residual
        output, _, statistics, batch = _with_batch(*operands)
        return output, statistics.detach(), batch
    state = running, None, None, None, None
    output, statistics, batch = _with_statistics(input, weight, bias, mask, eps, p, activation, residual, *state)
    return output, statistics, batch


def _with_statistics(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor,
    eps: float,
    p: float,
    activation: Activation,
    residual: Tensor | None,
    *state: Any,
) -> tuple[Tensor, ...]:
    follows = activation.name != "none" or residual is not None
    if follows and not torch.compiler.is_compiling() and may_be_in_function_transform():
        # a mapped input's signs have no order in memory that its members could share
        output, *others = _with_statistics(input, weight, bias, mask, eps, p, NO_ACTIVATION, None, *state)
        return activation(output if residual is None else output + residual), *others
    output, statistics, _, *batch = _StochNorm.apply(
        input, weight, bias, residual, mask, p, eps, *activation.arguments, *state
    )
    return output, statistics, *batch


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
    """:func:`stoch_norm_in_place` by PyTorch's operators, where nothing else can be differentiated."""
    running = running_mean, running_var
    output, _, (mean, invstd), (batch_mean, _) = _normalized(
        input, weight, bias, running, mask, eps, p, activation, residual
    )
    values = input.detach()
    if momentum and torch.jit.is_tracing():  # which drops a batch norm of which nothing but the statistics is used
        unbiased = values.to(mean.dtype).var(_reduced_dims(input))
        batch = batch_mean.detach(), unbiased
        assign([*running], [moved(old, new, momentum) for old, new in zip(running, batch, strict=True)])
    elif momentum and input.numel():
        # Every transform lets a batch norm move its running statistics, and only that where they are not an argument.
        F.batch_norm(values.to(running_mean.dtype), running_mean, running_var, None, None, True, momentum)
    return output, (mean.detach(), invstd.detach())
