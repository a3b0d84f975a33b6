"""Stochastic Normalization, NeurIPS 2020 (https://proceedings.neurips.cc/paper/2020/hash/bc573864331a9e42e4511de6f678aa83-Abstract.html)."""

import functools
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import register_module_module_registration_hook

from ..checks import check_module, check_number
from ..ops.draw import Draw, draw, drawn_mask
from ..ops.library import accumulation_dtype, is_empty, needs_pytorch_formula
from ..ops.stoch_norm import (
    check_count,
    functional_stoch_norm,
    moved,
    stoch_norm_by_formula,
    stoch_norm_in_place,
)
from ..torch_private import assign

__all__ = [
    "StochNorm1d",
    "StochNorm2d",
    "StochNorm3d",
    "SyncStochNorm",
    "convert_model",
    "convert_sync",
    "restore_batch_norm",
]


def _warn_of_a_lost_method(parent: nn.Module, name: str, module: nn.Module | None) -> None:
    replaced = parent._modules.get(name)
    if isinstance(module, nn.SyncBatchNorm) and isinstance(replaced, _StochNorm):
        warnings.warn(
            f"a SyncBatchNorm takes the place of a {type(replaced).__name__} and draws nothing: call convert_sync, not "
            "SyncBatchNorm.convert_sync_batchnorm, or before that restore_batch_norm",
            stacklevel=2,
        )


@functools.cache
def _watch_for_lost_methods() -> None:
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
        _watch_for_lost_methods()
        options = {"device": device, "dtype": dtype, **options}
        super().__init__(num_features, eps, momentum, affine, track_running_stats, **options)
        self.p = float(p)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, p={self.p}"

    def __prepare_scriptable__(self) -> nn.Module:  # torch.jit.script asks every module what to compile in its place
        raise RuntimeError(
            f"torch.jit.script can't compile {type(self).__name__}: for evaluation script "
            "restore_batch_norm(copy.deepcopy(model)).eval(), which computes the same, or take torch.export"
        )

    def _check_input(self, input: Tensor) -> None:
        if not input.is_floating_point():
            raise TypeError(f"{type(self).__name__} expected a floating-point tensor, got {input.dtype}")
        self._check_input_dim(input)
        if not torch.jit.is_tracing() and input.size(1) != self.num_features:  # sizes are tensors while it traces
            raise ValueError(
                f"{type(self).__name__} expected {self.num_features} channels at dimension 1, "
                f"got input of shape {list(input.shape)}"
            )

    def _forward_symbolic(self, input: Any) -> Any:
        """What stands for the layer's output in a graph of torch.fx: the layer as a whole, as of batch norms."""
        if not isinstance(input, Proxy):
            raise TypeError(f"{type(self).__name__} expected a floating-point tensor, got {type(input).__name__}")
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
        if not isinstance(input, Tensor):
            return self._forward_symbolic(input)
        self._check_input(input)
        if not self.training:
            return super().forward(input)
        if self.eps <= 0:
            raise ValueError(f"{type(self).__name__} expected eps to be positive during training, got {self.eps}")
        return self._forward_training(input)

    def _draw(self, input: Tensor) -> Draw:
        """See :func:`~talib_fast.ops.draw.draw`."""
        buffers: Any = self._buffers  # an attribute takes a module longer than all else here
        return draw(input, buffers["running_mean"], buffers["running_var"])

    def _forward_training(self, input: Tensor) -> Tensor:
        if self._buffers["running_mean"] is None:
            return super().forward(input)
        check_count(input)
        drawn, running, repeats = self._draw(input)
        operands = drawn, self.weight, self.bias
        counter, momentum = self._buffers["num_batches_tracked"], self.momentum
        countable = counter is None or counter.dtype == torch.int64  # the module's type() casts it, too
        if not isinstance(running, Tensor):
            if needs_pytorch_formula():
                share = 0.0 if repeats or is_empty(input) else self._count_and_share()
                return stoch_norm_by_formula(input, *running, *operands, share, self.eps, self.p)[0]
            if self.track_running_stats and momentum is not None and countable:
                # a repetition moves what it read, which nobody keeps
                counted = None if repeats else counter
                return stoch_norm_in_place(input, *running, *operands, momentum, self.eps, self.p, counted)[0]
        joined = running if isinstance(running, Tensor) else torch.stack(running)
        output, _, _, batch = functional_stoch_norm(input, joined, *operands, self.eps, self.p)
        if self.track_running_stats and input.numel():
            self._move(running, batch, repeats)
        return output

    def _count_and_share(self) -> float:
        """Count a batch, and the share that it has in the running statistics, on the host."""
        if not self.track_running_stats:
            return 0.0
        if self.num_batches_tracked is not None:
            assign([self.num_batches_tracked], [self.num_batches_tracked + 1])
        if self.momentum is not None:
            return self.momentum
        return 0.0 if self.num_batches_tracked is None else 1 / float(self.num_batches_tracked)

    def _move(
        self,
        read: Tensor | Sequence[Tensor],
        batch: Tensor | Sequence[Tensor],
        repeats: bool | Tensor,
        counted: Tensor | None = None,
    ) -> None:
        """Count a batch and move the running mean and variance towards the batch's, unless the pass repeats another.

        Args:
            read: the running mean and variance that the pass read.
            batch: the batch's mean and unbiased variance.
            repeats: as :func:`~talib_fast.ops.draw.draw` gave it.
            counted: whether the batch counts as one, a bool tensor without dimensions; None: it does.
        """
        # A repetition calls what the first pass called, on what it read: selective checkpointing counts the calls.
        targets = list(read) if repeats is True else [self.running_mean, self.running_var]
        counter, share = self.num_batches_tracked, cast("float | Tensor | None", self.momentum)
        if counter is not None:
            counts = repeats[0].logical_not() if isinstance(repeats, Tensor) else int(not repeats)
            assign([counter], [counter + (counts if counted is None else counts * counted)])
        if share is None:
            if counter is None:
                return  # there is nothing to average by; batch norms leave their statistics, too
            share = counter.clamp_min(1).reciprocal()
        values = [moved(old, new, share) for old, new in zip(read, batch, strict=True)]
        if isinstance(repeats, Tensor):
            values = [torch.where(repeats, *pair) for pair in zip(targets, values, strict=True)]
        assign(targets, values)


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
        super().__init__(num_features, eps, momentum, affine, track_running_stats, p, device, dtype, **options)
        self.process_group = process_group

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")

    def _forward_training(self, input: Tensor) -> Tensor:
        distributed = dist.is_available() and dist.is_initialized()
        if distributed and dist.get_world_size(self.process_group) > 1:
            return self._forward_synchronized(input)
        return super()._forward_training(input)

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
        values = input.to(accumulation_dtype(input))
        if self.running_mean is None:
            mean, variance, *_ = self._joined(values, torch.empty(0, dtype=torch.bool, device=values.device))
        else:
            drawn, running, repeats = self._draw(input)
            mean, variance, count, mask = self._joined(values, drawn_mask(drawn, self.p))
            used = [statistic.to(mean.dtype, copy=True) for statistic in running]
            if self.track_running_stats:
                unbiased = variance.detach() * (count / (count - 1).clamp_min(1))
                some = count > 0  # a joined batch without values moves nothing, which only the device knows
                batch = [torch.where(some, *pair) for pair in zip((mean.detach(), unbiased), running, strict=True)]
                self._move(running, batch, repeats, some)
            mean, variance = torch.where(mask, mean, used[0]), torch.where(mask, variance, used[1])
        invstd = (variance + self.eps).rsqrt()
        shape = [-1] + [1] * (input.dim() - 2)
        scale = invstd if self.weight is None else invstd * self.weight
        output = (values - mean.view(shape)) * scale.view(shape)
        if self.bias is not None:
            output = output + self.bias.view(shape)
        return output.to(input.dtype)


_STOCHASTIC: dict[type, type] = {
    nn.BatchNorm1d: StochNorm1d,
    nn.BatchNorm2d: StochNorm2d,
    nn.BatchNorm3d: StochNorm3d,
    nn.SyncBatchNorm: SyncStochNorm,
}
_PLAIN: dict[type, type] = {stochastic: plain for plain, stochastic in _STOCHASTIC.items()}
# Classes that torch derives, layer by layer, from the one it found: they add to it and go on being it.
_DERIVED_BY_TORCH = ("torch.nn.utils.parametrize", "torch.distributed.fsdp")
_derived: dict[tuple[type, type], type] = {}


def _counterpart(kind: type, counterparts: dict[type, type]) -> type | None:
    """What a layer of class ``kind`` becomes: its counterpart, or of a class that torch derived, one derived alike."""
    if kind in counterparts:
        return counterparts[kind]
    if not kind.__module__.startswith(_DERIVED_BY_TORCH):
        return None
    bases = [_counterpart(base, counterparts) for base in kind.__bases__]
    found = [base for base in bases if base is not None]
    if len(found) != 1:
        return None
    if found[0] in kind.__bases__:
        return kind
    if (kind, found[0]) not in _derived:
        (norm,) = (base for base, its in zip(kind.__bases__, bases, strict=True) if its is not None)
        contents = {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")}
        name = kind.__name__.replace(norm.__name__, found[0].__name__)
        rebased = (found[0] if base is norm else base for base in kind.__bases__)
        _derived[kind, found[0]] = type(name, tuple(rebased), contents)
        _derived[_derived[kind, found[0]], norm] = kind  # the way back
    return _derived[kind, found[0]]


def _listed(left: dict[str, type]) -> str:
    """How many layers of which classes, and the first three by name."""
    classes = Counter(f"{kind.__module__}.{kind.__qualname__}" for kind in left.values())
    counts = ", ".join(f"{count} of {kind}" for kind, count in classes.items())
    names = [name or "the module itself" for name in left]
    return f"{counts} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"


def convert_model(module: nn.Module, p: float) -> nn.Module:
    """Turn every batch norm in ``module`` into the stochastic norm of its rank, in place.

    The layers stay the objects they are and change their class, so everything about them stays too: parameters
    and buffers, ``training``, ``requires_grad``, hooks, parametrisations, that FSDP shards them and that a layer is
    shared. ``nn.SyncBatchNorm`` becomes :class:`SyncStochNorm`, and a stochastic norm gets ``p``. Other subclasses may
    do more than normalise: they are left alone, with a warning. :func:`restore_batch_norm` is the way back.

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
    _watch_for_lost_methods()
    converted, left = 0, {}
    for name, layer in module.named_modules():
        kind = _counterpart(type(layer), {**_STOCHASTIC, **{stochastic: stochastic for stochastic in _PLAIN}})
        if kind is not None:
            layer.__class__ = kind
            layer.p = float(p)
            converted += 1
        elif isinstance(layer, _BatchNorm):
            left[name] = type(layer)
    if left:
        warnings.warn(f"convert_model leaves batch norms that it does not know: {_listed(left)}", stacklevel=2)
    elif not converted:
        warnings.warn("convert_model found no batch norm to convert", stacklevel=2)
    return module


def restore_batch_norm(module: nn.Module) -> nn.Module:
    """Turn every stochastic norm in ``module`` back into the batch norm it came from, in place.

    The way back of :func:`convert_model`: in evaluation the model computes the same. The layers stay the objects they
    are, and all but ``p`` stays with them. :class:`SyncStochNorm` becomes ``nn.SyncBatchNorm``, which trains on GPUs
    only. Subclasses that do more are left alone, with a warning.

    Args:
        module: the model, or a single layer.

    Returns:
        ``module``.

    Raises:
        TypeError: ``module`` is no module.
    """
    check_module(module, "module")
    left = {}
    for name, layer in module.named_modules():
        kind = _counterpart(type(layer), _PLAIN)
        if kind is not None:
            layer.__class__ = kind
            del layer.p
            if isinstance(layer, nn.SyncBatchNorm):
                vars(layer).setdefault("process_group", None)
        elif isinstance(layer, _StochNorm):
            left[name] = type(layer)
    if left:
        warnings.warn(
            f"restore_batch_norm leaves stochastic norms that it does not know: {_listed(left)}", stacklevel=2
        )
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
        kind = _counterpart(type(layer), dict.fromkeys(_PLAIN, SyncStochNorm))
        if kind is not None:
            layer.__class__ = kind
            layer.process_group = process_group
            converted += 1
        elif isinstance(layer, _StochNorm):
            left[name] = type(layer)
    if left:
        warnings.warn(f"convert_sync leaves stochastic norms that it does not know: {_listed(left)}", stacklevel=2)
    elif not converted:
        warnings.warn("convert_sync found no stochastic norm: convert_model makes them", stacklevel=2)
    return module
