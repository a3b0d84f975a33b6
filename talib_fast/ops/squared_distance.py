"""Half squared distances over lists of tensors, for DELTA, L2 and L2-SP: Σ_j ½ Σ_c w_jc ‖t_jc − s_jc‖².

The gradient w·(t − s) goes to t alone. Sources and weights are constants.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..checks import check_floats, check_integer, is_dtensor, is_ordinary
from .library import accumulation_dtype, apply, compiles_without_gradient, define, needs_pytorch_formula


def _result_dtype(targets: Sequence[Tensor]) -> torch.dtype:
    """float64 if a target is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in targets) else torch.float32


def _difference(target: Tensor, source: Tensor | None) -> Tensor:
    """Target minus source, in the dtype of sums."""
    target = target.to(accumulation_dtype(target))
    return target if source is None else target - source.to(target.dtype)


def _per_channel(weight: Tensor, target: Tensor, channel_dim: int) -> Tensor:
    """The weight with the number of dimensions of the target."""
    shape = [1] * target.dim()
    shape[channel_dim] = -1
    return weight.view(shape)


def _forward(
    targets: list[Tensor], sources: list[Tensor], weights: list[Tensor], channel_dim: int
) -> tuple[Tensor, Tensor]:
    """The implementation of the forward operator: the total, and the term of each target."""
    dtype = _result_dtype(targets)
    terms = []
    for j, target in enumerate(targets):
        squares = _difference(target, sources[j] if sources else None).square()
        if weights:
            squares = squares * _per_channel(weights[j].to(squares.dtype), target, channel_dim)
        terms.append(squares.sum(dtype=dtype))
    stacked = 0.5 * torch.stack(terms)  # not 0.5 * each term: the tangent of a 0-dim tensor would become float64
    return stacked.sum(), stacked


def _by_formula(
    targets: list[Tensor], sources: list[Tensor], weights: list[Tensor], channel_dim: int
) -> tuple[Tensor, Tensor]:
    """The result of the autograd function in operators that any transform can differentiate."""
    total, terms = _forward(targets, sources, weights, channel_dim)
    return total, terms.detach()


def _gradients(
    grad: Tensor, targets: Sequence[Tensor], sources: Sequence[Tensor], weights: Sequence[Tensor], channel_dim: int
) -> list[Tensor]:
    """The targets' gradients in operators that can be differentiated again."""
    gradients = []
    for j, target in enumerate(targets):
        difference = _difference(target, sources[j] if sources else None)
        gradient = difference * grad.to(difference.dtype)
        if weights:
            gradient = gradient * _per_channel(weights[j].to(gradient.dtype), target, channel_dim)
        gradients.append(gradient.to(target.dtype))
    return gradients


def _backward(
    grad: Tensor, targets: list[Tensor], sources: list[Tensor], weights: list[Tensor], channel_dim: int
) -> list[Tensor]:
    """The implementation of the backward operator. Gradients have the targets' strides."""
    gradients = _gradients(grad, targets, sources, weights, channel_dim)
    return [torch.empty_like(target).copy_(gradient) for target, gradient in zip(targets, gradients, strict=True)]


def _forward_fake(targets, sources, weights, channel_dim):
    dtype = _result_dtype(targets)
    return targets[0].new_empty((), dtype=dtype), targets[0].new_empty(len(targets), dtype=dtype)


def _backward_fake(grad, targets, sources, weights, channel_dim):
    return [torch.empty_like(target) for target in targets]


_forward_op = define(
    "squared_distance_forward(Tensor[] targets, Tensor[] sources, Tensor[] weights, int channel_dim) "
    "-> (Tensor total, Tensor terms)",
    _forward,
    _forward_fake,
)
_backward_op = define(
    "squared_distance_backward(Tensor grad, Tensor[] targets, Tensor[] sources, Tensor[] weights, int channel_dim) "
    "-> Tensor[]",
    _backward,
    _backward_fake,
)


def _split(
    tensors: Sequence[Tensor], num_targets: int, num_sources: int
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Targets, sources and weights from one list."""
    sources = num_targets + num_sources
    return list(tensors[:num_targets]), list(tensors[num_targets:sources]), list(tensors[sources:])


def _distinct(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same tensors, none of them twice, because torch.compile refuses an autograd function that gets one twice."""
    return [t.view_as(t) if any(t is other for other in tensors[:j]) else t for j, t in enumerate(tensors)]


class _SquaredDistance(Function):
    """The autograd function of the operation: the total, and the terms without gradient."""

    @staticmethod
    def forward(channel_dim: int, num_targets: int, num_sources: int, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        return _forward_op(*_split(tensors, num_targets, num_sources), channel_dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.channel_dim, ctx.num_targets, ctx.num_sources, *tensors = inputs
        ctx.of_inference = {}
        if not torch.compiler.is_compiling() and any(map(Tensor.is_inference, tensors)):
            # autograd refuses to save inference tensors, because it would not notice changes
            ctx.of_inference = {j: tensor for j, tensor in enumerate(tensors) if tensor.is_inference()}
            tensors = [None if j in ctx.of_inference else tensor for j, tensor in enumerate(tensors)]
        ctx.save_for_backward(*tensors)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        wanted = [j for j in range(ctx.num_targets) if ctx.needs_input_grad[3 + j]]
        saved = list(ctx.saved_tensors)
        for j, tensor in ctx.of_inference.items():
            saved[j] = tensor
        targets, sources, weights = (
            [tensors[j] for j in wanted] if tensors else []
            for tensors in _split(saved, ctx.num_targets, ctx.num_sources)
        )
        gradients = (_gradients if torch.is_grad_enabled() else _backward_op)(
            grad, targets, sources, weights, ctx.channel_dim
        )
        result: list[Tensor | None] = [None] * (3 + len(saved))
        for j, gradient in zip(wanted, gradients, strict=True):
            result[3 + j] = gradient
        return tuple(result)

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        channel_dim: int,
        num_targets: int,
        num_sources: int,
        *tensors: Tensor,
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        def in_pytorch(*tensors: Tensor) -> tuple[Tensor, Tensor]:
            return _by_formula(*_split(tensors, num_targets, num_sources), channel_dim)

        return torch.vmap(in_pytorch, in_dims[3:])(*tensors), (0, 0)


def squared_distance(
    targets: Sequence[Tensor],
    sources: Sequence[Tensor] | None = None,
    weights: Sequence[Tensor] | None = None,
    channel_dim: int = 1,
) -> tuple[Tensor, Tensor]:
    """The half squared distance Σ_j ½ Σ_c w_jc ‖t_jc − s_jc‖² between lists of tensors on one device.

    The tensors may have any shapes, dtypes and layouts. Sums are taken in float32 (float64 for float64 targets). The
    operation is differentiable in ``targets``, also twice, in forward mode and under :func:`torch.func.functionalize`.
    ``sources`` are detached and ``weights`` are constants. They may come from :func:`torch.inference_mode`; in compiled
    code clone such tensors first, as PyTorch's error says.

    The compiled kernels read every tensor once and store no difference. They copy a target that is not dense. They copy
    a source whose order in memory differs from its target's by more than the exchange of two neighbouring groups of
    dimensions (NCHW and NHWC differ by one exchange). They read a source in its own dtype if that is the target's, or
    if one of the two is float32 and the other float16 or bfloat16. Other sources are converted first. PyTorch's
    implementation serves under :func:`torch.vmap`, in forward mode and under ``functionalize``.

    Args:
        targets: J tensors.
        sources: J tensors of the targets' shapes and any floating-point dtype. None stands for zeros.
        weights: J vectors with one value per channel. None stands for ones.
        channel_dim: the dimension of the targets that ``weights`` belong to.

    Returns:
        The total, a 0-dim tensor, and the J terms that add up to it, ``[J]``. The terms carry no gradient or tangent
        and are meant for logging.

    Raises:
        TypeError: one tensor is given instead of a list, a tensor is not dense, not floating point or a DTensor, or
            ``channel_dim`` is not an integer.
        ValueError: lengths, shapes or devices do not fit, or a weight requires a gradient.

    Example:

        >>> import torch
        >>> from talib_fast.ops import squared_distance
        >>> targets, sources = [torch.ones(2, 3), torch.zeros(4)], [torch.zeros(2, 3), torch.zeros(4)]
        >>> total, terms = squared_distance(targets, sources)
        >>> total, terms
        (tensor(3.), tensor([3., 0.]))
    """
    check_integer(channel_dim, "channel_dim")
    for name, tensors in (("targets", targets), ("sources", sources), ("weights", weights)):
        if isinstance(tensors, Tensor):  # list() would split it into rows
            raise TypeError(f"expected {name} to be a list of tensors, got one tensor")
    targets = list(targets)
    sources, weights = (None if tensors is None else list(tensors) for tensors in (sources, weights))
    for name, tensors in (("sources", sources), ("weights", weights)):
        if tensors is not None and len(tensors) != len(targets):
            raise ValueError(f"expected {len(targets)} {name}, one per target, got {len(tensors)}")
    if not targets:
        return torch.zeros(()), torch.zeros(0)
    check_floats(targets[0], "target 0")
    device = targets[0].device
    for j, target in enumerate(targets):
        source = None if sources is None else sources[j]
        weight = None if weights is None else weights[j]
        for name, tensor in (("target", target), ("source", source), ("weight", weight)):
            if tensor is None:
                continue
            if not is_ordinary(tensor):
                check_floats(tensor, f"{name} {j}")
                if is_dtensor(tensor):
                    raise TypeError(f"expected {name} {j} to be an ordinary tensor, got a DTensor: use its to_local()")
            if tensor.device != device:
                raise ValueError(f"expected {name} {j} on {device}, the first target's device, got {tensor.device}")
        if source is not None and source.shape != target.shape:
            raise ValueError(
                f"expected source {j} of its target's shape {list(target.shape)}, got {list(source.shape)}"
            )
        if weight is not None:
            if not -target.dim() <= channel_dim < target.dim():
                raise ValueError(
                    f"channel_dim {channel_dim} is out of range: expected a dimension of target {j}, "
                    f"got one of shape {list(target.shape)}"
                )
            if weight.shape != (target.size(channel_dim),):
                raise ValueError(
                    f"expected weight {j} of shape [{target.size(channel_dim)}], one value per channel of target "
                    f"{list(target.shape)} along dimension {channel_dim}, got {list(weight.shape)}"
                )
            if weight.requires_grad:
                raise ValueError(
                    f"expected weight {j} detached, got one that requires a gradient: weights are constants"
                )
    sources = [source.detach() for source in sources or ()]
    weights = weights or []
    if not torch.compiler.is_compiling():
        weights = [weight.clone() if weight.is_inference() else weight for weight in weights]
    if needs_pytorch_formula():
        return _by_formula(targets, sources, [weight.detach() for weight in weights], int(channel_dim))
    if compiles_without_gradient(*targets):
        return _forward_op(targets, sources, weights, int(channel_dim))
    tensors = [*targets, *sources, *weights]
    if torch.compiler.is_compiling():
        tensors = _distinct(tensors)
    return apply(_SquaredDistance, int(channel_dim), len(targets), len(sources), *tensors)
