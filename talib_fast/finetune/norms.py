"""The layers of stochastic normalisation."""

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
    """The activation that ``module``'s class computes, if a stochastic norm takes it along; None of any other."""
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
    """Whether a call of each of ``modules`` is its class's ``forward`` and nothing else, which no hook waits for."""
    return not have_global_hooks() and not any(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
        for module in modules
    )


def _warn_of_a_lost_method(parent: nn.Module, name: str, module: nn.Module | None) -> None:
    replaced = parent._modules.get(name)
    if isinstance(module, nn.SyncBatchNorm) and isinstance(replaced, _StochNorm):
        warnings.warn(
            f"a SyncBatchNorm takes the place of a {type(replaced).__name__} and draws nothing: call convert_sync, not "
            "SyncBatchNorm.convert_sync_batchnorm, or before that restore_batch_norm",
            stacklevel=2,
        )


@functools.cache
def watch_for_lost_methods() -> None:
    """Have torch's convert_sync_batchnorm, to which stochastic norms are batch norms, say what it does to them.

    It asks the layers nothing, but registers what it makes in their places. Processes without a stochastic norm are
    spared the question.
    """
    register_module_module_registration_hook(_warn_of_a_lost_method)


class _StochNorm(_BatchNorm):
    """What stochastic norms of all ranks have in common. They are batch norms, from which they inherit all else."""

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
        # and not what a subclass is besides: timm's batch norm has an activation
        _BatchNorm.__init__(self, num_features, eps, momentum, affine, track_running_stats, **options)
        self.p = float(p)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, p={self.p}"

    def __prepare_scriptable__(self) -> nn.Module:  # torch.jit.script asks every module what to compile in its place
        raise RuntimeError(
            f"torch.jit.script can't compile {type(self).__name__}: for evaluation script "
            "restore_batch_norm(copy.deepcopy(model)).eval(), which computes the same, or take torch.export"
        )

    def _forward_symbolic(self, input: Any) -> Any:
        """What stands for the layer's output in a graph of torch.fx: the layer as a whole, as of batch norms."""
        if not isinstance(input, Proxy):
            raise TypeError(f"expected input to be a floating-point tensor, got {type(input).__name__}")
        tracer: Any = input.tracer
        path, symbol = tracer.path_of_module(self), cast("Tensor", input)
        if path:
            return tracer.create_proxy("call_module", path, (input,), {})
        use_batch = self.running_mean is None
        if self.training and not use_batch:
            raise RuntimeError(
                f"torch.fx can't trace a {type(self).__name__} in training by itself: trace a module that holds it"
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
        """The norm, with what follows it.

        Args:
            residual: gives what is added before the activation. It is called after what the norm does to random
                numbers, since in a network's own order it comes after the norm, and may draw as well.
        """
        if not isinstance(input, Tensor):
            return followed(self._forward_symbolic(input), activation, residual() if residual else None)
        self._check_input_dim(input)
        if self.training:
            return self._forward_training(input, activation, residual)
        check_channels(input, self.num_features)
        return followed(_BatchNorm.forward(self, input), activation, residual() if residual else None)

    def _forward_training(self, input: Tensor, activation: Activation, residual: Callable[[], Tensor] | None) -> Tensor:
        if self._buffers["running_mean"] is None:
            check_training(input, self.num_features, self.eps)
            return followed(_BatchNorm.forward(self, input), activation, residual() if residual else None)
        parameters: Vectors = self._parameters
        if "weight" not in parameters or "bias" not in parameters:  # parametrised
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
    r"""Stochastic normalisation of ``[N, C]`` or ``[N, C, L]`` inputs, in :class:`torch.nn.BatchNorm1d`'s place.

    In training each channel draws s ~ Bernoulli(p): s = 1 normalises with the batch's mean and variance, s = 0 with
    the running ones as they were before this step. Both kinds move the running statistics. The mask comes from
    torch's generator of the input's device. Evaluation uses the running statistics. From `Stochastic Normalization
    (NeurIPS 2020)
    <https://proceedings.neurips.cc/paper/2020/hash/bc573864331a9e42e4511de6f678aa83-Abstract.html>`_.

    Activation checkpointing, also inside and around compiled code, repeats what the forward pass did and moves the
    running statistics once, as long as a layer is called at most sixteen times between its forward pass and its
    backward pass. Differentiable twice, and in forward mode.

    Args:
        num_features: number of channels C.
        eps: added to the variance.
        momentum: share of the batch in the new running statistics; None averages over all batches.
        affine: learn a weight and a bias per channel.
        track_running_stats: False keeps no running statistics: every channel takes the batch's, always.
        p: probability of the batch's statistics, in [0, 1].
        options: what else :class:`torch.nn.BatchNorm1d` takes.

    Raises:
        ValueError: p is out of range; the input's rank or channel count does not fit; in training a channel has
            only one value, or eps is not positive.
        TypeError: the input is not floating point.
        RuntimeError: a forward pass inside a backward pass repeats none of the last sixteen. On a GPU, which is not
            waited for, the output is NaN instead. Or a CUDA graph captures activation checkpointing.
    """


class StochNorm2d(_StochNorm, nn.BatchNorm2d):
    """Stochastic normalisation of ``[N, C, H, W]`` inputs; otherwise as :class:`StochNorm1d`."""


class StochNorm3d(_StochNorm, nn.BatchNorm3d):
    """Stochastic normalisation of ``[N, C, D, H, W]`` inputs; otherwise as :class:`StochNorm1d`."""


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
        """Mean and biased variance per channel of the joined batch, its values per channel, and the first rank's mask.

        All in one collective: a sum over the ranks of tables in which each rank has filled its own row.
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
                some = count > 0  # a joined batch without values moves nothing, which only the device knows
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
