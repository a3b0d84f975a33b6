"""The stochastic norm layers: StochNorm1d, StochNorm2d, StochNorm3d and SyncStochNorm."""

import functools
import math
import sys
import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import register_module_module_registration_hook

from ..checks import check_number
from ..ops.activation import NO_ACTIVATION, Activation
from ..ops.draw import draw, drawn_mask
from ..ops.library import accumulation_dtype
from ..ops.stoch_norm import check_channels, check_training
from ..ops.stoch_norm_formula import followed
from ..ops.stoch_norm_step import Vectors, move, stoch_norm_step
from ..torch_private import have_global_hooks

_ACTIVATIONS: dict[type, Activation] = {
    nn.Identity: NO_ACTIVATION,
    nn.ReLU: Activation("relu"),
    nn.SiLU: Activation("silu"),
    nn.Hardswish: Activation("hardswish"),
}


def activation_of(module: nn.Module) -> Activation | None:
    """The activation that ``module`` computes, if a stochastic norm can fuse it. None for any other module."""
    kind: Any = type(module)
    if kind in _ACTIVATIONS:
        return _ACTIVATIONS[kind]
    settings: Any = module
    if kind is nn.ReLU6 and (settings.min_val, settings.max_val) == (0, 6):
        return Activation("relu6")
    if kind is nn.LeakyReLU and abs(settings.negative_slope) < math.inf:
        return Activation("leaky_relu", float(settings.negative_slope))
    timms_gelu = getattr(sys.modules.get("timm.layers.activations"), "GELU", None)
    if kind is timms_gelu or (kind is nn.GELU and settings.approximate == "none"):
        return Activation("gelu")
    return None


def runs_its_forward_alone(*modules: nn.Module) -> bool:
    """Whether calling each module runs only its class's ``forward``: no hook, and no ``forward`` of the instance."""
    return not have_global_hooks() and not any(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
        for module in modules
    )


def _warn_of_a_lost_method(parent: nn.Module, name: str, module: nn.Module | None) -> None:
    """Warn when a SyncBatchNorm replaces a stochastic norm."""
    replaced = parent._modules.get(name)
    if isinstance(module, nn.SyncBatchNorm) and isinstance(replaced, _StochNorm):
        warnings.warn(
            f"a SyncBatchNorm replaces a {type(replaced).__name__}, which ends stochastic normalisation there: call "
            "convert_sync instead of SyncBatchNorm.convert_sync_batchnorm, or call restore_batch_norm first",
            stacklevel=2,
        )


@functools.cache
def watch_for_lost_methods() -> None:
    """Warn from now on when torch's ``convert_sync_batchnorm`` replaces a stochastic norm.

    That function takes stochastic norms for batch norms and gives them no say. It registers the new module under the
    old one's name, where a registration hook sees it. Processes without a stochastic norm do not install the hook.
    """
    register_module_module_registration_hook(_warn_of_a_lost_method)


class _StochNorm(_BatchNorm):
    """The common base of the stochastic norm layers. They are batch norms and inherit everything else."""

    p: float
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor | None

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
        **options: Any,
    ) -> None:
        check_number(p, "p", 1)
        watch_for_lost_methods()
        options = {"device": device, "dtype": dtype, **options}
        # not super(): in StochNormAct2d that may be timm's BatchNormAct2d, which would make an activation
        _BatchNorm.__init__(self, num_features, eps, momentum, affine, track_running_stats, **options)
        self.p = float(p)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, p={self.p}"

    def __prepare_scriptable__(self) -> nn.Module:  # torch.jit.script calls it on every module
        raise RuntimeError(
            f"torch.jit.script can't compile {type(self).__name__}: for evaluation, script "
            "restore_batch_norm(copy.deepcopy(model)).eval(), which computes the same, or use torch.export"
        )

    def _forward_symbolic(self, input: Any) -> Any:
        """The layer's output in a graph of torch.fx: one node for the whole layer, as for batch norms."""
        if not isinstance(input, Proxy):
            raise TypeError(f"expected input to be a floating-point tensor, got {type(input).__name__}")
        tracer: Any = input.tracer
        path, symbol = tracer.path_of_module(self), cast("Tensor", input)
        if path:
            return tracer.create_proxy("call_module", path, (input,), {})
        use_batch = self.running_mean is None
        if self.training and not use_batch:
            raise RuntimeError(
                f"torch.fx can't trace a {type(self).__name__} alone in training mode: trace a module that contains it"
            )
        return F.batch_norm(
            symbol, self.running_mean, self.running_var, self.weight, self.bias, use_batch, 0.0, self.eps
        )

    def forward(self, input: Tensor) -> Tensor:
        return self.followed_by(input)

    def followed_by(
        self,
        input: Tensor,
        activation: Activation = NO_ACTIVATION,
        residual: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """Compute ``activation(norm(input) + residual())``.

        Args:
            input: ``[N, C, *]``.
            activation: applied last; none by default.
            residual: returns the tensor to add, or None. It is called after the norm has drawn its mask, because a
                network computes its residual after the norm and may draw random numbers for it.
        """
        if not isinstance(input, Tensor):
            return followed(self._forward_symbolic(input), activation, residual() if residual else None)
        self._check_input_dim(input)
        if self.training:
            return self._forward_training(input, activation, residual)
        check_channels(input, self.num_features)
        return followed(_BatchNorm.forward(self, input), activation, residual() if residual else None)

    def _forward_training(self, input: Tensor, activation: Activation, residual: Callable[[], Tensor] | None) -> Tensor:
        """``followed_by`` in training mode, on this process alone."""
        if self._buffers["running_mean"] is None:
            check_training(input, self.num_features, self.eps)
            return followed(_BatchNorm.forward(self, input), activation, residual() if residual else None)
        parameters: Vectors = self._parameters
        if "weight" not in parameters or "bias" not in parameters:  # torch.nn.utils.parametrize computes them
            parameters = {"weight": self.weight, "bias": self.bias}
        return stoch_norm_step(
            input,
            parameters,
            self._buffers,
            self.momentum,
            self.eps,
            self.p,
            self.track_running_stats,
            activation,
            residual,
        )


class StochNorm1d(_StochNorm, nn.BatchNorm1d):
    """Stochastic normalisation of ``[N, C]`` or ``[N, C, L]`` inputs, in place of :class:`torch.nn.BatchNorm1d`.

    In training each channel draws s ~ Bernoulli(p). With s = 1 it is normalised with the mean and variance of the
    batch. With s = 0 it is normalised with the running mean and variance from before this step::

        y = γ·(x − μ)/√(v + eps) + β        (μ, v) of the batch if s = 1, else the running ones

    Every training step updates the running statistics of all channels, as in batch normalisation. Evaluation uses the
    running statistics. The mask comes from torch's random generator of the input's device.

    Activation checkpointing works, also inside and around compiled code: the repeated forward pass uses the same mask
    and statistics, and the running statistics are updated once. For that, a layer may run at most sixteen times between
    a forward pass and its backward pass. The layer is differentiable twice, and in forward mode.

    Paper: Kou, You, Long and Wang, `Stochastic Normalization (NeurIPS 2020)
    <https://proceedings.neurips.cc/paper/2020/hash/bc573864331a9e42e4511de6f678aa83-Abstract.html>`__.

    Args:
        num_features: number of channels C.
        eps: added to the variance; positive.
        momentum: share of the batch in the new running statistics. None averages over all batches.
        affine: learn a weight γ and a bias β per channel.
        track_running_stats: False keeps no running statistics. Every channel then uses those of the batch, also in
            evaluation.
        p: probability that a channel uses the statistics of the batch, in [0, 1].
        options: further options of :class:`torch.nn.BatchNorm1d`, such as ``device`` and ``dtype``.

    Raises:
        ValueError: ``p`` is out of range, or the input has the wrong rank or number of channels. In training also: a
            channel has only one value, or ``eps`` is not positive.
        TypeError: the input is not floating point.
        RuntimeError: a forward pass runs inside a backward pass and repeats none of the layer's last sixteen. On a GPU
            the output is NaN instead, because the check would wait for the device. Also raised where a CUDA graph
            captures activation checkpointing.

    Example:

        >>> import torch
        >>> from talib_fast.finetune.stochnorm import StochNorm1d
        >>> norm = StochNorm1d(4, p=0.5)
        >>> norm(torch.randn(8, 4)).shape
        torch.Size([8, 4])
        >>> norm.num_batches_tracked
        tensor(1)
    """


class StochNorm2d(_StochNorm, nn.BatchNorm2d):
    """Stochastic normalisation of ``[N, C, H, W]`` inputs, in place of :class:`torch.nn.BatchNorm2d`.

    Everything else is as in :class:`~talib_fast.finetune.stochnorm.StochNorm1d`.

    Example:

        >>> import torch
        >>> from talib_fast.finetune.stochnorm import StochNorm2d
        >>> norm = StochNorm2d(16, p=0.5)
        >>> norm(torch.randn(8, 16, 5, 5)).shape
        torch.Size([8, 16, 5, 5])
    """


class StochNorm3d(_StochNorm, nn.BatchNorm3d):
    """Stochastic normalisation of ``[N, C, D, H, W]`` inputs, in place of :class:`torch.nn.BatchNorm3d`.

    Everything else is as in :class:`~talib_fast.finetune.stochnorm.StochNorm1d`.

    Example:

        >>> import torch
        >>> from talib_fast.finetune.stochnorm import StochNorm3d
        >>> norm = StochNorm3d(4, p=0.5)
        >>> norm(torch.randn(2, 4, 3, 5, 5)).shape
        torch.Size([2, 4, 3, 5, 5])
    """


class _AllReduce(torch.autograd.Function):
    """Sums a tensor over the ranks of a process group. Its gradient is summed in the same way."""

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

    The group's first rank draws the mask, and all ranks use it. Together, W ranks compute what one process would
    compute on the joined batch. A rank's share of the batch may have any size, or be empty. The layer works alone in
    evaluation, in a group of one, and where no process group is initialised. It costs one collective in the forward
    pass and one in the backward pass. Everything else is as in :class:`~talib_fast.finetune.stochnorm.StochNorm1d`.

    Args:
        num_features: number of channels C.
        eps: added to the variance; positive.
        momentum: share of the batch in the new running statistics. None averages over all batches.
        affine: learn a weight and a bias per channel.
        track_running_stats: False keeps no running statistics.
        p: probability that a channel uses the statistics of the batch, in [0, 1].
        process_group: the group to synchronise in. None is the default group.
        options: further options of a batch norm, such as ``device`` and ``dtype``.

    Example:

        >>> import torch
        >>> from talib_fast.finetune.stochnorm import SyncStochNorm
        >>> norm = SyncStochNorm(16, p=0.5)  # without a process group it works alone
        >>> norm(torch.randn(8, 16, 5, 5)).shape
        torch.Size([8, 16, 5, 5])
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
        **options: Any,
    ) -> None:
        options = {"p": p, "device": device, "dtype": dtype, **options}
        super().__init__(num_features, eps, momentum, affine, track_running_stats, **options)
        self.process_group = process_group

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")

    def _forward_training(self, input: Tensor, activation: Activation, residual: Callable[[], Tensor] | None) -> Tensor:
        distributed = dist.is_available() and dist.is_initialized()
        if distributed and dist.get_world_size(self.process_group) > 1:
            output = self._forward_synchronized(input)
            return followed(output, activation, residual() if residual else None)
        return super()._forward_training(input, activation, residual)

    def _joined(self, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The joined batch's mean and biased variance per channel, its values per channel, and the first rank's mask.

        It takes one collective: every rank fills its own row of a table, and the ranks sum their tables.
        """
        dims, shape = [0, *range(2, values.dim())], [-1] + [1] * (values.dim() - 2)
        count = values.numel() // self.num_features
        mean = values.sum(dims) / max(count, 1)
        squares = (values - mean.view(shape)).square().sum(dims)
        row = torch.cat([mean, squares, mask.to(values.dtype), values.new_full((1,), count)])
        rank, world_size = dist.get_rank(self.process_group), dist.get_world_size(self.process_group)
        table = _AllReduce.apply(F.pad(row[None], (0, 0, rank, world_size - 1 - rank)), self.process_group)
        means, squares, masks, counts = table.split([self.num_features, self.num_features, len(mask), 1], dim=1)
        counts = counts.detach()
        total = counts.sum()
        divisor = total.clamp_min(1)
        mean = (counts * means).sum(0) / divisor
        variance = (squares + counts * (means - mean).square()).sum(0) / divisor
        return mean, variance, total, masks[0].detach() > 0

    def _forward_synchronized(self, input: Tensor) -> Tensor:
        """The layer's output in training, with the statistics of all ranks."""
        check_training(input, self.num_features, self.eps)
        values = input.to(accumulation_dtype(input))
        if self.running_mean is None:
            mean, variance, *_ = self._joined(values, torch.empty(0, dtype=torch.bool, device=values.device))
        else:
            drawn, running, repeats = draw(input, self.running_mean, self.running_var)
            mean, variance, count, mask = self._joined(values, drawn_mask(drawn, self.p))
            used = [statistic.to(mean.dtype, copy=True) for statistic in running]
            if self.track_running_stats:
                unbiased = variance.detach() * (count / (count - 1).clamp_min(1))
                some = count > 0  # an empty joined batch updates nothing; only the device knows whether it is empty
                batch = [torch.where(some, *pair) for pair in zip((mean.detach(), unbiased), running, strict=True)]
                move(running, batch, repeats, self._buffers, self.momentum, some)
            mean, variance = torch.where(mask, mean, used[0]), torch.where(mask, variance, used[1])
        rstd = (variance + self.eps).rsqrt()
        shape = [-1] + [1] * (input.dim() - 2)
        scale = rstd if self.weight is None else rstd * self.weight
        output = (values - mean.view(shape)) * scale.view(shape)
        if self.bias is not None:
            output = output + self.bias.view(shape)
        return output.to(input.dtype)
