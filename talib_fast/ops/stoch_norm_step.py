"""What a StochNorm layer does in training: draw a mask, normalise, and update its running statistics.

A layer passes on all it has in one call and gets its output.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ..checks import is_ordinary
from ..torch_private import assign, only_autograd_looks_on
from .activation import FIRST_SMOOTH, NO_ACTIVATION, Activation
from .draw import draw
from .library import is_empty, needs_pytorch_formula, node_function
from .stoch_norm import check_count, check_training
from .stoch_norm_formula import followed, stoch_norm_by_formula, updated
from .stoch_norm_operators import apply_in_place, functional_stoch_norm, stoch_norm_in_place

Vectors = Mapping[str, Any]  # a layer's parameters or buffers, by name


def _quick_step(
    input: Tensor,
    parameters: Vectors,
    buffers: Vectors,
    momentum: float | None,
    eps: float,
    p: float,
    tracks: bool,
    activation: int,
    negative_slope: float,
    residual: Callable[[], Tensor] | None,
) -> Tensor | tuple[Tensor, Tensor] | None:
    """``stoch_norm_step`` for ordinary training, in as few calls as possible.

    Returns:
        The output. If the operation can't add the residual, the output without it and the residual. None if this is not
        ordinary training; nothing has happened then.
    """
    if not tracks or type(momentum) is not float or not eps > 0 or not only_autograd_looks_on():
        return None
    mean, counter = buffers["running_mean"], buffers["num_batches_tracked"]
    if not (input.numel() > mean.numel() == input.size(1) and input.is_floating_point()):
        return None
    if counter is not None and counter.dtype is not torch.int64:
        return None
    weight, bias = parameters["weight"], parameters["bias"]
    state = mean, buffers["running_var"], torch.rand_like(mean, dtype=torch.float32), momentum, eps, p, counter
    added = None if residual is None else residual()
    if added is None or _takes_along(added, input, activation):
        return apply_in_place(input, weight, bias, added, state, (activation, negative_slope))
    return apply_in_place(input, weight, bias, None, state, (0, 0.0)), added


# the library of autograd nodes does the same in less time
_ordinary_step = node_function("stoch_norm_step") or _quick_step


def stoch_norm_step(
    input: Tensor,
    parameters: Vectors,
    buffers: Vectors,
    momentum: float | None,
    eps: float,
    p: float,
    tracks: bool,
    activation: Activation = NO_ACTIVATION,
    residual: Callable[[], Tensor] | None = None,
) -> Tensor:
    """Compute a layer's output in training, act(norm(input) + residual()), and update its running statistics.

    Args:
        input: ``[N, C, *]``, float16, bfloat16, float32 or float64.
        parameters: ``weight`` and ``bias``, ``[C]`` or None.
        buffers: ``running_mean`` and ``running_var``, ``[C]``, and ``num_batches_tracked``, a number or None.
        momentum: share of the batch in the new running statistics. None averages over all batches.
        eps: added to the variance, above 0.
        p: probability of the batch's statistics.
        tracks: whether the running statistics are updated.
        activation: applied last.
        residual: called after the mask is drawn. It may return a tensor that the operation can't add.

    Returns:
        The output, of the input's shape and dtype.

    Raises:
        TypeError: the input is not floating point.
        ValueError: the number of channels does not fit, a channel has only one value, or eps is not positive.
        RuntimeError: as ``draw`` raises it.
    """
    if not torch.compiler.is_compiling():
        place, slope = activation.arguments()
        outcome: Any = _ordinary_step(input, parameters, buffers, momentum, eps, p, tracks, place, slope, residual)
        if outcome is not None:
            return followed(outcome[0], activation, outcome[1]) if type(outcome) is tuple else outcome
    mean, var = buffers["running_mean"], buffers["running_var"]
    check_training(input, mean.size(0), eps)
    check_count(input)
    drawn, running, repeats = draw(input, mean, var)
    operands, counter = (drawn, parameters["weight"], parameters["bias"]), buffers["num_batches_tracked"]
    added = None if residual is None else residual()
    along: tuple[Activation, Tensor | None] = activation, added
    if added is not None and not _takes_along(added, input, activation.arguments()[0]):
        along = NO_ACTIVATION, None
    countable = counter is None or counter.dtype == torch.int64  # nn.Module.type() may have cast it
    formula = needs_pytorch_formula()
    if isinstance(running, Tensor) or not (formula or (tracks and momentum is not None and countable)):
        joined = running if isinstance(running, Tensor) else torch.stack(running)
        output, _, batch = functional_stoch_norm(input, joined, *operands, eps, p, *along)
        if tracks and input.numel():
            move(running, batch, repeats, buffers, momentum)
    elif formula:
        share = _count_and_share(counter, momentum) if tracks and not repeats and not is_empty(input) else 0.0
        output, _ = stoch_norm_by_formula(input, *running, *operands, share, eps, p, *along)
    else:
        counted = None if repeats else counter  # a repetition updates the copies that it read, which are dropped
        output = stoch_norm_in_place(input, *running, *operands, cast("float", momentum), eps, p, counted, *along)
    return output if along[1] is added else followed(output, activation, added)


def _takes_along(residual: Tensor, input: Tensor, activation: int) -> bool:
    """Whether the operation itself can add that residual."""
    return (
        activation < FIRST_SMOOTH
        and is_ordinary(residual)
        and residual.shape == input.shape
        and residual.dtype == input.dtype
        and residual.device == input.device
    )


def _count_and_share(counter: Tensor | None, momentum: float | None) -> float:
    """Count a batch. Returns its share in the running statistics, as a number on the host."""
    if counter is not None:
        assign([counter], [counter + 1])
    if momentum is not None:
        return momentum
    return 0.0 if counter is None else 1 / float(counter)


def move(
    read: Tensor | Sequence[Tensor],
    batch: Tensor | Sequence[Tensor],
    repeats: bool | Tensor,
    buffers: Vectors,
    momentum: float | None,
    counted: Tensor | None = None,
) -> None:
    """Count a batch and update the running mean and variance towards its own, unless the pass repeats another one.

    Args:
        read: the running mean and variance that the pass read.
        batch: the batch's mean and unbiased variance.
        repeats: whether the pass repeats another one, as ``draw`` returned it.
        buffers: the layer's buffers, which are updated.
        momentum: share of the batch in the new running statistics. None averages over all batches.
        counted: whether the batch counts, a 0-dim bool tensor. None: it counts.
    """
    # A repetition calls the same operators on the copies that it read: selective checkpointing counts the calls.
    targets = list(read) if repeats is True else [buffers["running_mean"], buffers["running_var"]]
    counter, share = buffers["num_batches_tracked"], cast("float | Tensor | None", momentum)
    if counter is not None:
        counts = repeats[0].logical_not() if isinstance(repeats, Tensor) else int(not repeats)
        assign([counter], [counter + (counts if counted is None else counts * counted)])
    if share is None:
        if counter is None:
            return  # without a counter there is no average; batch norms keep their statistics, too
        share = counter.clamp_min(1).reciprocal()
    values = [updated(old, new, share) for old, new in zip(read, batch, strict=True)]
    if isinstance(repeats, Tensor):
        values = [torch.where(repeats, *pair) for pair in zip(targets, values, strict=True)]
    assign(targets, values)
