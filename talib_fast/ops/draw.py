"""Draw the mask of a stochastic norm's forward pass, and draw it again where that pass is repeated.

Activation checkpointing runs a forward pass a second time, inside the backward pass. By then the running statistics
have been updated, so the repetition needs those from before. If a layer is called several times per step, other passes
lie between. The restored random generator draws the same numbers again, and these numbers identify the pass.
"""

from collections import deque
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ..torch_private import (
    function_transforms,
    in_backward_pass,
    is_mapped,
    keep_in_compiled_checkpoints,
    keep_in_order,
    refuses_random_numbers,
    saves_by_hooks,
)
from .library import define

_PASSES = 16
# By the memory of a running mean: the passes that may be repeated, newest first. Each has its drawn numbers and the
# running statistics that it read. A weak reference keeps the key from being used for another tensor's memory.
_history: dict[tuple[int, Any], tuple[StorageWeakRef, deque[tuple[Tensor, Tensor]]]] = {}


def _memory(running_mean: Tensor) -> tuple[int, Any]:
    """A key for the memory of a running mean."""
    return running_mean.untyped_storage()._cdata, running_mean.storage_offset()


def is_recorded(running_mean: Tensor) -> bool:
    """Whether passes with this running mean are recorded, so that one of them may be repeated now."""
    return _memory(running_mean) in _history


def _record(drawn: Tensor, running_mean: Tensor, running: Tensor) -> None:
    """Record a pass: what it drew, and the running statistics that it read."""
    memory = _memory(running_mean)
    entry = _history.get(memory)
    if entry is None:
        for key in [key for key, (reference, _) in list(_history.items()) if reference.expired()]:
            _history.pop(key, None)
        entry = _history[memory] = (StorageWeakRef(running_mean.untyped_storage()), deque(maxlen=_PASSES))
    entry[1].appendleft((drawn.clone(), running.clone()))


def _recorded(drawn: Tensor, running_mean: Tensor) -> Tensor:
    """The running statistics ``[2, C]`` that were read by the pass that drew ``drawn``.

    Raises:
        RuntimeError: there is no such pass. On devices other than the CPU the statistics are NaN instead, because the
            check would wait for the device.
    """
    _, passes = _history.get(_memory(running_mean), (None, ()))
    if not passes:
        raise RuntimeError(
            "a compiled StochNorm runs inside a backward pass and repeats no recorded forward pass: set an "
            "activation_memory_budget above 0, put the checkpoint around the compiled code, or leave the layer "
            "uncompiled"
        )
    draws, statistics = (torch.stack(column) for column in zip(*passes, strict=True))
    matches = (draws == drawn).all(1)
    if drawn.device.type == "cpu" and not matches.any():
        raise RuntimeError(
            f"StochNorm runs inside a backward pass, but repeats none of its last {len(passes)} forward passes: "
            f"activation checkpointing needs preserve_rng_state=True, and at most {_PASSES} passes of a layer between "
            "a forward pass and its backward pass"
        )
    found = matches.to(torch.uint8).argmax(0, keepdim=True)
    return torch.where(matches.any(), statistics.index_select(0, found)[0], torch.nan)


def _capturing(device: torch.device) -> bool:
    """Whether a CUDA graph captures the current stream."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _numbers(running_mean: Tensor) -> Tensor:
    """A random number in [0, 1) for each channel."""
    return torch.rand(running_mean.size(0), dtype=torch.float32, device=running_mean.device)


def _draw(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    may_be_repeated: bool,
    repeats: bool | None = None,
    after: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The implementation of the operator ``stoch_norm_draw``."""
    repeats = in_backward_pass() if repeats is None else repeats
    hooks = saves_by_hooks()
    if (repeats or hooks) and _capturing(running_mean.device):
        raise RuntimeError(
            "a CUDA graph can't capture activation checkpointing of StochNorm, because a repeated pass looks for what "
            "the first pass drew: capture the step without checkpointing"
        )
    drawn = _numbers(running_mean)
    if repeats:
        return -drawn, _recorded(drawn, running_mean)
    running = torch.stack((running_mean, running_var))
    if (may_be_repeated or hooks) and not _capturing(running_mean.device):
        _record(drawn, running_mean, running)
    return drawn, running


def _draw_fake(input, running_mean, running_var, may_be_repeated, repeats=None, after=None):
    drawn = running_mean.new_empty(running_mean.size(0), dtype=torch.float32)
    return drawn, running_mean.new_empty((2, running_mean.size(0)))


# An operator, because Inductor would draw by a generator of its own, and so draw other numbers. Two arguments are not
# read and only keep the order of random numbers: `input` comes after what was drawn for it, as by a dropout, and
# `after` after the stochastic norm before.
draw_op = define(
    "stoch_norm_draw(Tensor input, Tensor running_mean, Tensor running_var, bool may_be_repeated, bool? repeats=None, "
    "Tensor? after=None) -> (Tensor drawn, Tensor running)",
    _draw,
    _draw_fake,
    torch.Tag.nondeterministic_seeded,
)
keep_in_order("stoch_norm_draw")


def chosen(mask: Tensor, p: float) -> Tensor:
    """The mask as flags. It may be numbers instead: absolute values below ``p`` stand for True."""
    return mask if mask.dtype == torch.bool else mask.abs() < p


# an operator, so that compiled code can tag what was drawn, where no other operator takes it
_chosen_op = define(
    "stoch_norm_mask(Tensor drawn, float p) -> Tensor",
    chosen,
    lambda drawn, p: drawn.new_empty(drawn.shape, dtype=torch.bool),
)
keep_in_compiled_checkpoints(draw_op, "stoch_norm_mask", 0)


def drawn_mask(drawn: Tensor, p: float) -> Tensor:
    """Which channels use the batch's statistics, bool ``[C]``, for a layer that uses PyTorch's operators."""
    return (_chosen_op if torch.compiler.is_compiling() else chosen)(drawn, p)


Draw = tuple[Tensor, Tensor | tuple[Tensor, Tensor], bool | Tensor]


def draw(input: Tensor, running_mean: Tensor, running_var: Tensor) -> Draw:
    """Draw for a forward pass of a stochastic norm, and find the running statistics that it reads.

    Args:
        input: the layer's input.
        running_mean: the layer's running mean, ``[C]``.
        running_var: the layer's running variance, ``[C]``.

    Returns:
        Three values. First a number in [0, 1) for each channel, float32 ``[C]``, by torch's generator on the input's
        device, compiled or not; its sign does not count. Then the running mean and variance to read: the layer's own,
        or copies for a pass that repeats another one; in compiled code always copies, in one tensor ``[2, C]``. Last
        whether the pass repeats another one and must not update the running statistics; in compiled code, which knows
        it only when it runs, a bool tensor ``[C]``.

    Raises:
        RuntimeError: the pass repeats none that is recorded, or a CUDA graph captures activation checkpointing.
    """
    if function_transforms():
        one_for_all = not torch.compiler.is_compiling() and refuses_random_numbers()
        if one_for_all and not is_mapped(input) and not is_mapped(running_mean):
            drawn, _ = draw_op(input, running_mean, running_var, False, False)
        else:
            drawn = _numbers(running_mean)
        return drawn, (running_mean, running_var), False
    if torch.compiler.is_compiling():
        drawn, running = draw_op(input, running_mean, running_var, not torch.is_grad_enabled())
        return drawn, running, torch.signbit(drawn)
    repeats = in_backward_pass() and is_recorded(running_mean)
    # Other passes are not recorded: that takes time, and small tensors that outlive their step fragment a CPU's heap.
    may_be_repeated = not torch.is_grad_enabled() or saves_by_hooks()
    if not (repeats or may_be_repeated) or torch.jit.is_tracing():
        return _numbers(running_mean), (running_mean, running_var), False
    # by the same operator in both passes, which selective checkpointing requires
    drawn, running = draw_op(input, running_mean, running_var, True, repeats)
    mean, variance = running.unbind()
    return drawn, ((mean, variance) if repeats else (running_mean, running_var)), repeats
