"""The operators of stochastic normalisation and their autograd functions.

stoch_norm_formula.py has the mathematics. Compiled libraries register kernels over the implementations here.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..torch_private import directly, keep_in_compiled_checkpoints, may_be_in_function_transform
from .activation import NO_ACTIVATION, Activation, activation_by_arguments, pack_signs, signs_length
from .draw import chosen, draw_op
from .library import accumulation_dtype, apply, argument_names, define, needs_pytorch_formula
from .stoch_norm_formula import differentiable_gradients, gradients, updated, with_batch


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
    """The implementation of ``stoch_norm_functional``, which changes none of its arguments."""
    function = activation_by_arguments(activation, negative_slope)
    output, z, statistics, batch = with_batch(input, weight, bias, running, mask, eps, p, function, residual)
    signs = input.new_empty(0, dtype=torch.int32)
    if residual is not None:  # a residual with other strides decides the strides of the sum
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
    """The implementation of ``stoch_norm_forward``, which updates the running statistics in place."""
    running = torch.stack((running_mean, running_var))
    *results, batch = _functional(input, weight, bias, running, mask, eps, p, residual, activation, negative_slope)
    if input.numel():
        for target, statistic in zip((running_mean, running_var), batch, strict=True):
            target.copy_(updated(target, statistic, momentum))
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
    """The implementation of ``stoch_norm_backward``."""
    mean, rstd = statistics.unbind()
    function = activation_by_arguments(activation, negative_slope)
    results = gradients(grad_output, input, (mean, rstd), weight, bias, chosen(mask, p), signs, function)
    dx, dweight, dbias, dz = results
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
# for compiled code: it changes no argument, so that a backward pass may call it again
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
    """Save what the backward pass needs. ``constants`` are p, eps and the activation's two arguments."""
    ctx.constants = constants
    if not constants[2]:
        ctx.save_for_backward(input, weight, mask, results[1])
    elif residual is None:
        ctx.save_for_backward(input, weight, mask, results[1], bias, None)
    else:
        ctx.save_for_backward(input, weight, mask, results[1], None, results[2])
        ctx.strides = results[0].stride()


def _differentiate(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of input, weight, bias and residual. Autograd casts them to the right dtypes."""
    constants, bias, signs = ctx.constants, None, None
    if constants[2]:
        input, weight, mask, statistics, bias, signs = ctx.saved_tensors
    else:
        input, weight, mask, statistics = ctx.saved_tensors
    if signs is not None and input.stride() != ctx.strides:
        # the bits are in the output's order in memory; hooks of saved tensors may have changed the input's
        input = torch.empty_strided(input.shape, ctx.strides, dtype=input.dtype, device=input.device).copy_(input)
    if torch.is_grad_enabled():
        gradients = differentiable_gradients(grad_output, input, weight, mask, statistics, bias, signs, *constants)
    else:
        backward = _backward_op if torch.compiler.is_compiling() else _backward_now
        p, _, activation, slope = constants
        if activation:
            gradients = backward(grad_output, input, statistics, weight, mask, p, bias, signs, activation, slope)
        else:  # every argument that is left out saves time
            gradients = backward(grad_output, input, statistics, weight, mask, p)
    dx, dweight, dbias, dresidual = gradients
    of_input, of_weight, of_bias, of_residual, *_ = ctx.needs_input_grad
    return (
        dx if of_input else None,
        dweight if of_weight else None,
        dbias if of_bias else None,
        (grad_output if signs is None else dresidual) if of_residual else None,
    )


class _InPlace(Function):
    """The operator in place, outside of transforms of torch.func. It has few arguments and one result, to save time."""

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
        return _differentiate(ctx, grad_output) + (None, None)  # noqa: RUF005  unpacking is slower


# not through Function.apply, which looks for transforms on every call
apply_in_place = super(Function, _InPlace).apply


class _StochNormFunction(Function):
    """The operator in place, or with ``running`` the functional operator, with all results."""

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
        ctx.set_materialize_grads(False)  # the statistics have no gradients

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        constants = len(_Arguments._fields) - 4
        return *((None,) * 4 if grad_output is None else _differentiate(ctx, grad_output)), *[None] * constants

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        """Treat the members of a mapped dimension as additional channels."""
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
        output, statistics_used, signs, *batch = apply(_StochNormFunction, *operands)
        if args.running is None:
            for name in ("running_mean", "running_var"):  # flatten may have copied them
                updated_ones = getattr(operands, name).view(members, -1)
                statistics[name].movedim(getattr(dims, name), 0).copy_(updated_ones)
            if counter is not None and args.input.numel():  # here, because all members share one counter
                counter.add_(1)
        mapped = (output, statistics_used, *batch)
        output, statistics_used, *batch = (result.unflatten(1, (members, -1)) for result in mapped)
        return (output, statistics_used, signs, *batch), (1, 1, None, *[1] * len(batch))


_Arguments = argument_names(_StochNormFunction)


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
    """The output of :func:`~talib_fast.ops.stoch_norm` for a layer, whose vectors fit. Nothing is checked.

    ``mask`` may be the float32 numbers that ``draw`` returned: absolute values below ``p`` stand for True.
    ``num_batches_tracked``, an int64 tensor, is increased by one unless the input is empty.
    """
    if may_be_in_function_transform():
        buffers = running_mean, running_var, momentum, num_batches_tracked
        return with_statistics(input, weight, bias, mask, eps, p, activation, residual, None, *buffers)[0]
    state = running_mean, running_var, mask, momentum, eps, p, num_batches_tracked
    return apply_in_place(input, weight, bias, residual, state, activation.arguments())


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
    """``stoch_norm_in_place`` for compiled code. It changes no argument, so that a backward pass may repeat it.

    Args:
        input: ``[N, C, *]``.
        running: the running mean and variance, ``[2, C]``.
        mask: bool, or the numbers that ``draw`` returned, ``[C]``.
        weight: ``[C]`` or None.
        bias: ``[C]`` or None.
        eps: added to the variance.
        p: the numbers in ``mask`` below it stand for True.
        activation: applied last.
        residual: added before the activation, or None.

    Returns:
        The output, the mean and rstd that it was normalised with, and the batch's mean and unbiased variance, the last
        two as ``[2, C]`` each.
    """
    if needs_pytorch_formula():
        operands = input, weight, bias, running, mask, eps, p, activation, residual
        output, _, statistics, batch = with_batch(*operands)
        return output, statistics.detach(), batch
    state = running, None, None, None, None
    output, statistics, batch = with_statistics(input, weight, bias, mask, eps, p, activation, residual, *state)
    return output, statistics, batch


def with_statistics(
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
    """Call the autograd function. ``state`` are its arguments from ``running`` to ``num_batches_tracked``.

    Returns:
        The output, the statistics that it was normalised with, and of the functional operator also the batch's
        statistics.
    """
    follows = activation.name != "none" or residual is not None
    if follows and not torch.compiler.is_compiling() and may_be_in_function_transform():
        # the bits of a mapped input have no order in memory that its members share
        output, *statistics = with_statistics(input, weight, bias, mask, eps, p, NO_ACTIVATION, None, *state)
        return activation.forward(output if residual is None else output + residual), *statistics
    output, statistics, _, *batch = apply(
        _StochNormFunction, input, weight, bias, residual, mask, p, eps, *activation.arguments(), *state
    )
    return output, statistics, *batch
