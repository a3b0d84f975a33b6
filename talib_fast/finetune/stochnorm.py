"""Stochastic Normalization, NeurIPS 2020 (https://proceedings.neurips.cc/paper/2020/hash/bc573864331a9e42e4511de6f678aa83-Abstract.html)."""

import warnings
import weakref
from collections import deque
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from ..checks import check_module, check_number
from ..ops.library import accumulation_dtype
from ..ops.stoch_norm import Statistics, check_count, draw, move, stoch_norm_unchecked

__all__ = ["StochNorm1d", "StochNorm2d", "StochNorm3d", "SyncStochNorm", "convert_model", "convert_sync"]

# What each layer's latest checkpointed forward passes drew and normalised with, newest first: (draw, mean, invstd).
_history: "weakref.WeakKeyDictionary[nn.Module, deque[tuple[Tensor, Tensor, Tensor]]]" = weakref.WeakKeyDictionary()
_HISTORY_LENGTH = 16


def _recomputing() -> bool:
    """Whether this forward pass runs inside a backward pass, as activation checkpointing runs it a second time."""
    return not _traced() and torch._C._current_graph_task_id() != -1


def _checkpointed() -> bool:
    """Whether this forward pass may be repeated: activation checkpointing runs it without a graph, or with hooks.

    Other passes are not remembered: it takes time, and small tensors that outlive their step break up a CPU's heap.
    """
    return not torch.is_grad_enabled() or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _traced() -> bool:
    """Whether tensors stand for others, in torch.compile or a transform of torch.func."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def _remember(layer: nn.Module, drawn: Tensor, statistics: Statistics) -> None:
    if _traced() or not _checkpointed():
        return
    history = _history.get(layer)
    if history is None or (history[0][1].dtype, history[0][1].device) != (statistics[0].dtype, drawn.device):
        history = _history[layer] = deque(maxlen=_HISTORY_LENGTH)
    history.appendleft((drawn, *statistics))


def _recall(layer: nn.Module, drawn: Tensor) -> Statistics | None:
    """The statistics of the checkpointed forward pass that drew ``drawn``; None if the layer has had none.

    The running statistics have moved on since the forward pass that is repeated, so they can't be read again. Several
    passes may lie between when a layer is called more than once a step; the draw, which the restored generator
    repeats, tells them apart, on the device, without a sync.

    Raises:
        RuntimeError: there is no such pass. On other devices than the CPU, which would have to be waited for, the
            statistics are NaN instead.
    """
    history = _history.get(layer)
    if not history:
        return None
    draws, means, invstds = (torch.stack(column) for column in zip(*history, strict=True))
    matches = (draws == drawn).all(1)
    if drawn.device.type == "cpu" and not matches.any():
        raise RuntimeError(
            f"{type(layer).__name__} runs inside a backward pass, but repeats none of its last {len(history)} forward "
            f"passes: activation checkpointing needs preserve_rng_state=True, and at most {_HISTORY_LENGTH} passes of "
            "a layer between a forward pass and its backward pass"
        )
    found = matches.to(torch.uint8).argmax(0, keepdim=True)
    mean, invstd = (
        torch.where(matches.any(), column.index_select(0, found)[0], torch.nan) for column in (means, invstds)
    )
    return mean, invstd


class _StochNorm(_NormBase):
    p: float
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        p: float = 0.5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_number(p, "p", 1)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self.p = float(p)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, p={self.p}"

    def _check_input_dim(self, input: Tensor) -> None:
        raise NotImplementedError

    def _check_input(self, input: Tensor) -> None:
        if not isinstance(input, Tensor) or not input.is_floating_point():
            got = input.dtype if isinstance(input, Tensor) else type(input).__name__
            raise TypeError(f"{type(self).__name__} expected a floating-point tensor, got {got}")
        self._check_input_dim(input)
        if input.size(1) != self.num_features:
            raise ValueError(
                f"{type(self).__name__} expected {self.num_features} channels at dimension 1, "
                f"got input of shape {list(input.shape)}"
            )

    def _draw(self, input: Tensor) -> Tensor:
        """A number in [0, 1) for each channel, which takes the batch's statistics where it is below p."""
        return draw(input, self.num_features)

    def _statistics_to_update(self, input: Tensor) -> tuple[Tensor, Tensor, float, Tensor | None]:
        """The running mean and variance that the operation moves, its momentum, and the counter of batches."""
        buffers: Any = self._buffers  # an attribute takes a module longer than all else here
        mean, variance, counter = buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
        if not self.track_running_stats:  # switched off after construction: they are used, and stay
            return mean.clone(), variance.clone(), 0.0, None
        if self.momentum is None:  # it moves copies all the way to the batch's; _average averages on the device
            dtype = accumulation_dtype(input)
            return mean.to(dtype, copy=True), variance.to(dtype, copy=True), 1.0, counter
        return mean, variance, self.momentum, counter

    def _average(self, mean: Tensor, variance: Tensor) -> None:
        """Take a batch into the running statistics of a layer without momentum."""
        share = self.num_batches_tracked.reciprocal().to(mean.dtype)
        for running, batch in ((self.running_mean, mean), (self.running_var, variance)):
            running.copy_(running.to(batch.dtype).lerp(batch, share))

    def forward(self, input: Tensor) -> Tensor:
        self._check_input(input)
        if not self.training or self._buffers["running_mean"] is None:
            use_batch = self.running_mean is None
            return F.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, use_batch, 0.0, self.eps
            )
        return self._forward_training(input)

    def _forward_training(self, input: Tensor) -> Tensor:
        check_count(input)
        drawn, weight, bias, eps, p = self._draw(input), self.weight, self.bias, self.eps, self.p
        recalled = _recall(self, drawn) if _recomputing() else None
        if recalled is not None:
            running = (self.running_mean, self.running_var)
            return stoch_norm_unchecked(input, *running, drawn, weight, bias, 0.0, eps, p, statistics=recalled)[0]
        mean, variance, momentum, counter = self._statistics_to_update(input)
        if counter is not None and counter.dtype != torch.int64:  # the module's type() casts all buffers
            counter.add_(1 if input.numel() else 0)
            counter = None
        output, statistics = stoch_norm_unchecked(input, mean, variance, drawn, weight, bias, momentum, eps, p, counter)
        if self.momentum is None and self.track_running_stats and input.numel():
            self._average(mean, variance)
        _remember(self, drawn, statistics)
        return output


class StochNorm1d(_StochNorm):
    r"""Stochastic normalisation of ``[N, C]`` or ``[N, C, L]`` inputs, in :class:`torch.nn.BatchNorm1d`'s place.

    In training each channel draws s ~ Bernoulli(p): s = 1 normalises with the batch's mean and variance, s = 0 with
    the running ones as they were before this step. Both kinds move the running statistics. The mask comes from
    torch's generator of the input's device. Evaluation uses the running statistics. From `Stochastic Normalization
    (NeurIPS 2020)
    <https://proceedings.neurips.cc/paper/2020/hash/bc573864331a9e42e4511de6f678aa83-Abstract.html>`_.

    Activation checkpointing repeats what the forward pass did and moves the running statistics once, as long as a
    layer is called at most sixteen times between its forward pass and its backward pass.

    Args:
        num_features: number of channels C.
        eps: added to the variance.
        momentum: share of the batch in the new running statistics; None averages over all batches.
        affine: learn a weight and a bias per channel.
        track_running_stats: False keeps no running statistics: every channel takes the batch's, always.
        p: probability of the batch's statistics, in [0, 1].

    Raises:
        ValueError: p is out of range; the input's rank or channel count does not fit; in training a channel has
            only one value.
        TypeError: the input is not floating point.
        RuntimeError: a forward pass inside a backward pass repeats none of the last sixteen. On a GPU, which is not
            waited for, the output is NaN instead.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() not in (2, 3):
            raise ValueError(f"expected 2D or 3D input (got {input.dim()}D input)")


class StochNorm2d(_StochNorm):
    """Stochastic normalisation of ``[N, C, H, W]`` inputs; otherwise as :class:`StochNorm1d`."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() != 4:
            raise ValueError(f"expected 4D input (got {input.dim()}D input)")


class StochNorm3d(_StochNorm):
    """Stochastic normalisation of ``[N, C, D, H, W]`` inputs; otherwise as :class:`StochNorm1d`."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() != 5:
            raise ValueError(f"expected 5D input (got {input.dim()}D input)")


class _AllReduce(torch.autograd.Function):
    """The sum over the ranks of a process group; so is its gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = value.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _AllReduce.apply(grad, ctx.group), None


class SyncStochNorm(_StochNorm):
    """Stochastic normalisation of ``[N, C, *]`` inputs with the statistics of all ranks of a process group.

    The ranks share one mask, drawn by the group's first rank. W ranks compute what one process would on the joined
    batch, of which a rank's share may be of any size, or empty. Without an initialised process group, or in a group
    of one, and in evaluation, it works alone. Costs one collective forward and one backward. Otherwise as
    :class:`StochNorm1d`.

    Args:
        process_group: the group to synchronise in; None is the default group.
    """

    process_group: Any = None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        p: float = 0.5,
        process_group: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, p, device=device, dtype=dtype)
        self.process_group = process_group

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")

    def forward(self, input: Tensor) -> Tensor:
        self._check_input(input)
        distributed = self.training and dist.is_available() and dist.is_initialized()
        if distributed and dist.get_world_size(self.process_group) > 1:
            return self._forward_synchronized(input)
        return super().forward(input)

    def _joined(self, values: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mean and biased variance per channel of the joined batch, its values per channel, and the first rank's draw.

        All in one collective: a sum over the ranks of tables in which each rank has filled its own row.
        """
        dims, shape = [0, *range(2, values.dim())], [-1] + [1] * (values.dim() - 2)
        count = values.numel() // self.num_features
        mean = values.sum(dims) / max(count, 1)
        squares = (values - mean.view(shape)).square().sum(dims)
        row = torch.cat([mean, squares, drawn.to(values.dtype), values.new_full((1,), count)])
        rank, world_size = dist.get_rank(self.process_group), dist.get_world_size(self.process_group)
        table = _AllReduce.apply(F.pad(row[None], (0, 0, rank, world_size - 1 - rank)), self.process_group)
        means, squares, draws, counts = table.split([self.num_features, self.num_features, len(drawn), 1], dim=1)
        counts = counts.detach()
        total = counts.sum().clamp_min(1)
        mean = (counts * means).sum(0) / total
        variance = (squares + counts * (means - mean).square()).sum(0) / total
        return mean, variance, total, draws[0].detach().to(drawn.dtype)

    def _forward_synchronized(self, input: Tensor) -> Tensor:
        values = input.to(accumulation_dtype(input))
        tracked = self.running_mean is not None
        mean, variance, count, drawn = self._joined(values, self._draw(input) if tracked else values.new_empty(0))
        invstd = (variance + self.eps).rsqrt()
        if tracked:
            mask = drawn < self.p
            recalled = _recall(self, drawn) if _recomputing() else None
            if recalled is not None:
                running_mean, running_invstd = recalled
            else:
                running_mean = self.running_mean.to(mean.dtype, copy=True)
                running_invstd = (self.running_var.to(mean.dtype) + self.eps).rsqrt()
                self._update(mean.detach(), variance.detach() * (count / (count - 1).clamp_min(1)))
            mean = torch.where(mask, mean, running_mean)
            invstd = torch.where(mask, invstd, running_invstd)
            if recalled is None:
                _remember(self, drawn, (mean.detach(), invstd.detach()))
        shape = [-1] + [1] * (input.dim() - 2)
        scale = invstd if self.weight is None else invstd * self.weight
        output = (values - mean.view(shape)) * scale.view(shape)
        if self.bias is not None:
            output = output + self.bias.view(shape)
        return output.to(input.dtype)

    @torch.no_grad()
    def _update(self, batch_mean: Tensor, batch_variance: Tensor) -> None:
        mean, variance, momentum, counter = self._statistics_to_update(batch_mean)
        move(mean, batch_mean, momentum)
        move(variance, batch_variance, momentum)
        if counter is not None:
            counter.add_(1)
            if self.momentum is None:
                self._average(mean, variance)


_COUNTERPARTS: dict[type, type[_StochNorm]] = {
    nn.BatchNorm1d: StochNorm1d,
    nn.BatchNorm2d: StochNorm2d,
    nn.BatchNorm3d: StochNorm3d,
    nn.SyncBatchNorm: SyncStochNorm,
}


def convert_model(module: nn.Module, p: float) -> nn.Module:
    """Turn every batch norm in ``module`` into the stochastic norm of its rank, in place.

    The layers stay the objects they are and change their class, so everything about them stays too: parameters
    and buffers, ``training``, ``requires_grad``, hooks, and that a layer is shared. ``nn.SyncBatchNorm`` becomes
    :class:`SyncStochNorm`, and a stochastic norm gets ``p``. Subclasses of a batch norm may do more than normalise:
    they are left alone, with a warning. A stochastic norm is no ``_BatchNorm`` to code that looks for those, as
    ``torch.optim.swa_utils.update_bn`` does.

    Args:
        module: the model, or a single layer. Convert a ``copy.deepcopy`` to keep the original.
        p: probability of the batch's statistics, in [0, 1].

    Returns:
        ``module``.

    Raises:
        TypeError, ValueError: ``module`` is no module, or ``p`` is not a number in [0, 1].
    """
    check_module(module, "module")
    check_number(p, "p", 1)
    converted, left = 0, {}
    for name, layer in module.named_modules():
        if type(layer) in (*_COUNTERPARTS, *_COUNTERPARTS.values()):
            layer.__class__ = _COUNTERPARTS.get(type(layer), type(layer))
            layer.p = float(p)
            converted += 1
        elif isinstance(layer, _BatchNorm):
            left[name] = f"{name or 'module'} ({type(layer).__module__}.{type(layer).__qualname__})"
    if left:
        warnings.warn(f"convert_model leaves unknown batch norms as they are: {', '.join(left.values())}", stacklevel=2)
    elif not converted:
        warnings.warn("convert_model found no batch norm to convert", stacklevel=2)
    return module


def convert_sync(module: nn.Module, process_group: Any = None) -> nn.Module:
    """Turn every stochastic norm in ``module`` into a :class:`SyncStochNorm`, in place.

    The layers stay the objects they are and change their class, as with :func:`convert_model`, which comes first.
    Layers that are synchronised already get the process group. Subclasses may do more than normalise: they are left
    alone, with a warning.

    Args:
        module: the model, or a single layer.
        process_group: the group to synchronise in; None is the default group.

    Returns:
        ``module``.

    Raises:
        TypeError: ``module`` is no module, or ``process_group`` no process group that this process is in.
    """
    check_module(module, "module")
    if process_group is not None and not (dist.is_available() and isinstance(process_group, dist.ProcessGroup)):
        got = type(process_group).__name__
        raise TypeError(f"expected a torch.distributed.ProcessGroup that this process is in, or None, got {got}")
    converted, left = 0, {}
    for name, layer in module.named_modules():
        if type(layer) in (StochNorm1d, StochNorm2d, StochNorm3d, SyncStochNorm):
            layer.__class__ = SyncStochNorm
            layer.process_group = process_group
            converted += 1
        elif isinstance(layer, _StochNorm):
            left[name] = f"{name or 'module'} ({type(layer).__module__}.{type(layer).__qualname__})"
    if left:
        warnings.warn(
            f"convert_sync leaves unknown stochastic norms as they are: {', '.join(left.values())}", stacklevel=2
        )
    elif not converted:
        warnings.warn("convert_sync found no stochastic norm: convert_model makes them", stacklevel=2)
    return module
