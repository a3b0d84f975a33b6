"""The sum of the k smallest squared singular values, for Batch Spectral Shrinkage.

F has the shape [b, f], with b ≤ f here. U is an orthonormal basis of the left singular subspace of the k smallest
singular values. The value is ‖UᵀF‖² and its gradient is 2·U·Uᵀ·F (for b > f: F·U·Uᵀ with the right subspace). If the
other singular directions V are fewer, they are used instead: U·Uᵀ = I - V·Vᵀ.

A Gram matrix squares the condition number, which needs spare digits. So the Gram matrix of a float32 F is formed and
solved in float64, and a float64 F is reduced by a QR factorisation instead.

The compiled kernels compute only the needed eigenvectors of the Gram matrix: Householder's tridiagonal form, bisection,
inverse iteration. They compute the value from F itself, which recovers the digits that squaring lost.

The operators take lists of matrices ``[b, f]`` or of batches of matrices ``[count, b, f]``.
"""

from collections.abc import Callable, Sequence
from typing import Any, overload

import torch
from torch import Tensor
from torch.autograd import Function

from ..checks import check_floats, check_integer
from .library import accumulation_dtype, apply, compiles_without_gradient, define, needs_pytorch_formula


def _short_side_first(input: Tensor) -> Tensor:
    """The matrices with their shorter side first."""
    return input if input.size(-2) <= input.size(-1) else input.mT


def _in_float64(input: Tensor) -> Tensor:
    """The same in float64, on the CPU where the device has no float64."""
    # MPS has neither float64 nor these decompositions
    return input.cpu().double() if input.device.type == "mps" else input.double()


def _by_gram(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Squared singular values, ascending, and left singular vectors, by the Gram matrix."""
    values, vectors = torch.linalg.eigh(matrix @ matrix.mT)
    return values.clamp_min(0), vectors


def _by_qr(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The same by a QR factorisation, which loses fewer digits."""
    scale = _magnitude(matrix)  # so that no product in LAPACK overflows
    triangle = torch.linalg.qr((matrix / scale).mT, mode="r").R
    _, singular_values, vectors_h = torch.linalg.svd(triangle, full_matrices=False)
    return (singular_values * scale[..., 0]).square().flip(-1), vectors_h.mT.flip(-1)


def _magnitude(matrix: Tensor) -> Tensor:
    """A power of two near each matrix's largest number, ``[..., 1, 1]``, or 1 for a matrix of zeros."""
    if 0 in matrix.shape:
        return matrix.new_ones(*matrix.shape[:-2], 1, 1)
    exponent = torch.frexp(matrix.abs().amax((-2, -1), keepdim=True)).exponent
    return torch.pow(2.0, exponent.clamp(-1000, 1000).to(matrix.dtype))


def _finite(matrix: Tensor) -> Tensor:
    """Whether all entries of each matrix are finite, ``[..., 1, 1]``."""
    return torch.isfinite(matrix).all(-1, keepdim=True).all(-2, keepdim=True)


def _uses_complement(short_side: int, k: int) -> bool:
    """Whether the vectors span the other singular directions, because those are fewer than the k smallest."""
    return 2 * k > short_side


def _tail(input: Tensor, k: int, spectrum: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The value, and the vectors that its gradient needs. ``spectrum`` is ``_by_gram`` or ``_by_qr``."""
    matrix = _short_side_first(_in_float64(input))
    finite = _finite(matrix)
    values, vectors = spectrum(torch.where(finite, matrix, 0))
    value = torch.where(finite[..., 0], values, torch.nan)[..., :k].sum(-1)
    vectors = torch.where(finite, vectors, torch.nan)
    vectors = vectors[..., k:] if _uses_complement(vectors.size(-1), k) else vectors[..., :k]
    value = value.to(device=input.device, dtype=accumulation_dtype(input))
    return value, vectors.clone(memory_format=torch.contiguous_format)


def _tail_part(input: Tensor, vectors: Tensor, k: int) -> Tensor:
    """The projection of ``input`` on the singular subspace of the k smallest singular values."""
    short_side = vectors.size(-2)
    wide = short_side == input.size(-2)
    part = vectors @ (vectors.mT @ input) if wide else (input @ vectors) @ vectors.mT
    return input - part if _uses_complement(short_side, k) else part


def _forward_by_gram(input: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return _tail(input, k, _by_gram)


def _forward_by_qr(input: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return _tail(input, k, _by_qr)


def _forward(inputs: list[Tensor], k: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    """Values and vectors of several inputs: the implementation of the forward operator."""
    tails = [_forward_by_gram(input, its) for input, its in zip(inputs, k, strict=True)]
    return [value for value, _ in tails], [vectors for _, vectors in tails]


def _gradient(grad: Tensor, input: Tensor, vectors: Tensor, k: int) -> Tensor:
    """The gradient of one input, with its strides."""
    part = _tail_part(_in_float64(input), vectors, k)
    return torch.empty_like(input).copy_(part * (2 * grad.to(part)[..., None, None]))


def _backward(grads: list[Tensor], inputs: list[Tensor], vectors: list[Tensor], k: list[int]) -> list[Tensor]:
    """The implementation of the backward operator."""
    return [_gradient(*arguments) for arguments in zip(grads, inputs, vectors, k, strict=True)]


def _tail_fake(input, k):
    device = torch.device("cpu") if input.device.type == "mps" else input.device
    short_side = min(input.size(-2), input.size(-1))
    value = input.new_empty(input.shape[:-2], dtype=accumulation_dtype(input))
    vectors = min(k, short_side - k)
    return value, input.new_empty((*input.shape[:-2], short_side, vectors), dtype=torch.float64, device=device)


def _forward_fake(inputs, k):
    tails = [_tail_fake(input, its) for input, its in zip(inputs, k, strict=True)]
    return [value for value, _ in tails], [vectors for _, vectors in tails]


def _backward_fake(grads, inputs, vectors, k):
    return [torch.empty_like(input) for input in inputs]


_forward_op = define(
    "spectral_tail_forward(Tensor[] inputs, int[] k) -> (Tensor[] values, Tensor[] vectors)", _forward, _forward_fake
)
_backward_op = define(
    "spectral_tail_backward(Tensor[] grads, Tensor[] inputs, Tensor[] vectors, int[] k) -> Tensor[]",
    _backward,
    _backward_fake,
)
# by torch.linalg on every device; no kernel of our own would be faster
_forward_by_qr_op = define(
    "spectral_tail_qr_forward(Tensor input, int k) -> (Tensor value, Tensor vectors)", _forward_by_qr, _tail_fake
)
# the CUDA kernels call these two for what they do not support
define(
    "spectral_tail_linalg_forward(Tensor input, int k) -> (Tensor value, Tensor vectors)", _forward_by_gram, _tail_fake
)
define(
    "spectral_tail_linalg_backward(Tensor grad, Tensor input, Tensor vectors, int k) -> Tensor",
    _gradient,
    lambda grad, input, vectors, k: torch.empty_like(input),
)


class _TailProjector(Function):
    """The projector on the left singular subspace of a matrix's k smallest singular values.

    Its derivative divides only by gaps between these singular values and the others. So ties among the k smallest do no
    harm, as they would in the derivative of the vectors themselves.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(matrix: Tensor, k: int, by_qr: bool) -> tuple[Tensor, Tensor, Tensor]:
        """The projector, and all squared singular values and vectors, which carry no gradient."""
        values, vectors = (_by_qr if by_qr else _by_gram)(matrix)
        return vectors[..., :k] @ vectors[..., :k].mT, values, vectors

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int, bool], output: tuple[Tensor, Tensor, Tensor]) -> None:
        matrix, ctx.k, _ = inputs
        _, values, vectors = output
        ctx.save_for_backward(matrix, values, vectors)
        ctx.mark_non_differentiable(values, vectors)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, None, None]:
        matrix, values, vectors = ctx.saved_tensors
        chosen, complement = vectors[..., : ctx.k], vectors[..., ctx.k :]
        gaps = values[..., : ctx.k, None] - values[..., None, ctx.k :]
        coupling = chosen @ ((chosen.mT @ (grad + grad.mT) @ complement) / gaps) @ complement.mT
        return (coupling + coupling.mT) @ matrix, None, None


class _SpectralTail(Function):
    """The values of several tensors, and then their vectors, which carry no gradient."""

    @staticmethod
    def forward(k: list[int], *inputs: Tensor) -> tuple[Tensor, ...]:
        """Compute values and vectors. The inputs are either all of float64 or all of other dtypes."""
        if inputs[0].dtype == torch.float64:
            values, vectors = zip(*map(_forward_by_qr_op, inputs, k), strict=True)
        else:
            values, vectors = _forward_op(inputs, k)
        return (*values, *vectors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.k, *matrices = inputs
        vectors = output[len(matrices) :]
        ctx.save_for_backward(*matrices, *vectors)
        ctx.mark_non_differentiable(*vectors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        count = len(ctx.k)
        grads = grads[:count]  # the vectors' gradients are zeros
        inputs, vectors = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        if torch.is_grad_enabled():
            return (None, *map(_differentiable_gradient, grads, inputs, ctx.k))
        if all(ctx.needs_input_grad[1:]):
            return (None, *_backward_op(grads, inputs, vectors, ctx.k))
        gradients: list[Tensor | None] = [None] * (1 + count)
        wanted = [j for j in range(count) if ctx.needs_input_grad[1 + j]]
        chosen = ([tensors[j] for j in wanted] for tensors in (grads, inputs, vectors, ctx.k))
        for j, gradient in zip(wanted, _backward_op(*chosen), strict=True):
            gradients[1 + j] = gradient
        return tuple(gradients)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], k: list[int], *inputs: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
        """Treat a mapped dimension as one more batch dimension."""
        dims = in_dims[1:]
        batches = [input if dim is None else input.movedim(dim, 0) for input, dim in zip(inputs, dims, strict=True)]
        results = apply(_SpectralTail, k, *(batch.flatten(0, -3) if batch.dim() > 3 else batch for batch in batches))
        shapes = [batch.shape[:-2] for batch in batches]
        values = [value.view(shape) for value, shape in zip(results, shapes, strict=False)]
        vectors = results[len(batches) :]
        vectors = [vector.view(*shape, *vector.shape[-2:]) for vector, shape in zip(vectors, shapes, strict=True)]
        return (*values, *vectors), tuple(None if dim is None else 0 for dim in (*dims, *dims))


def _differentiable_gradient(grad: Tensor, input: Tensor, k: int) -> Tensor:
    """The gradient of one input, in a form that can be differentiated once more."""
    matrix = _short_side_first(_in_float64(input))
    finite = _finite(matrix)
    decomposed = torch.where(finite, matrix, 0)
    decomposed = decomposed / _magnitude(decomposed.detach())  # the same projector, and no square overflows
    projector = apply(_TailProjector, decomposed, k, input.dtype == torch.float64)[0]
    projection = torch.where(finite, projector, torch.nan) @ matrix
    if input.size(-2) > input.size(-1):
        projection = projection.mT
    return (projection * (2 * grad.to(projection)[..., None, None])).to(input)


def _without_derivative(order: int, tensor: Tensor) -> Tensor:
    """Maps 0 to 0, with derivatives of 0 below ``order``, and derivatives of NaN from ``order`` on."""
    return tensor.abs().pow(order - 0.5)


def _by_formula(input: Tensor, k: int) -> Tensor:
    """The value by PyTorch's operators, where ``needs_pytorch_formula`` asks for them.

    With the k chosen singular vectors U, the others V and the squared singular values λ as constants, the value is::

        ‖UᵀF‖² + Σ_ij δ_ij²/(λ_i − λ_j)        δ = Uᵀ·F·Fᵀ·V

    up to terms of third order in the change of F. δ is 0 for F itself, so the formula has the value's first and second
    derivatives. It divides only by gaps between chosen and other singular values. Derivatives that it does not have are
    made NaN: the third ones, and the second ones where a gap is 0.
    """
    matrix = _short_side_first(_in_float64(input))
    constant = matrix.detach()
    finite = _finite(constant)
    constant = torch.where(finite, constant, 0)
    scale = _magnitude(constant)  # so that no square overflows
    values, vectors = (_by_qr if input.dtype == torch.float64 else _by_gram)(constant / scale)
    vectors = torch.where(finite, vectors, torch.nan)
    chosen, complement = (part.mT @ matrix for part in (vectors[..., :k], vectors[..., k:]))
    coupling = chosen @ (complement / scale).mT
    coupling = coupling - coupling.detach()  # exactly 0, without rounding errors
    by_gap = 1 / (values[..., :k, None] - values[..., None, k:])
    tied = by_gap.isinf()
    at_second_order = coupling.square() * by_gap.masked_fill(tied, 0) + _without_derivative(3, coupling)
    at_ties = _without_derivative(2, torch.where(tied, coupling, 1)).masked_fill(~tied, 0)
    value = chosen.square().sum((-1, -2)) + (at_second_order + at_ties).sum((-1, -2))
    return value.to(device=input.device, dtype=accumulation_dtype(input))


def _checked(input: Tensor, k: Any, name: str) -> int:
    """Check an input and its ``k``, and return ``k`` as an int."""
    check_floats(input, name)
    check_integer(k, "k")
    if input.dim() < 2:
        raise ValueError(f"expected {name} of shape [..., b, f], got {list(input.shape)}")
    if not 0 <= k <= min(input.size(-2), input.size(-1)):
        raise ValueError(
            f"expected 0 <= k <= min(b, f) = {min(input.size(-2), input.size(-1))} "
            f"for {name} of shape {list(input.shape)}, got k = {k}"
        )
    return int(k)


@overload
def spectral_tail(input: Tensor, k: int) -> Tensor: ...
@overload
def spectral_tail(input: Sequence[Tensor], k: int | Sequence[int]) -> tuple[Tensor, ...]: ...
def spectral_tail(input: Tensor | Sequence[Tensor], k: int | Sequence[int]) -> Tensor | tuple[Tensor, ...]:
    """The sum of the ``k`` smallest squared singular values of each matrix.

    It is computed in float64, so half precision and autocast are safe. A matrix with a non-finite entry gives NaN, and
    a gradient that is not finite.

    It is differentiable twice, also in forward mode and under :func:`torch.func.functionalize`, which both make a third
    derivative NaN. If σ_k = σ_(k+1), the gradient is one of several subgradients and the second derivative does not
    exist: it is NaN, without an error, or huge if rounding has separated the two values. :func:`torch.vmap` treats a
    mapped dimension as one more batch dimension.

    On a GPU, most inputs are served without a synchronisation and can be captured in a CUDA graph. ``torch.linalg``,
    which waits for the device, serves float64 inputs, matrices with both sides longer than 256, and everything in
    forward mode and under ``functionalize``.

    Args:
        input: ``[..., b, f]``, float16, bfloat16, float32 or float64. Or several such tensors on one device, of any
            shapes and dtypes, which are served together.
        k: how many singular values, 0 ≤ k ≤ min(b, f). For several tensors one number, or one for each.

    Returns:
        ``[...]``, float32 (float64 for float64 input). For several tensors a tuple of them.

    Raises:
        TypeError: an input is not dense or not floating point, or ``k`` is not an integer.
        ValueError: an input has fewer than two dimensions, ``k`` is out of range, the number of ``k`` is not that of
            the inputs, or the inputs are on several devices.

    Example:

        >>> import torch
        >>> from talib_fast.ops import spectral_tail
        >>> matrix = torch.diag(torch.tensor([3.0, 2.0, 1.0]))  # its singular values are 3, 2 and 1
        >>> round(spectral_tail(matrix, 2).item(), 4)
        5.0
        >>> spectral_tail(torch.randn(7, 4, 6), 1).shape
        torch.Size([7])
    """
    if isinstance(input, Tensor):
        number = _checked(input, k, "input")
        if needs_pytorch_formula():
            return _by_formula(input, number)
        if input.dim() > 3:
            return spectral_tail(input.flatten(0, -3), number).view(input.shape[:-2])
        return apply(_SpectralTail, [number], input)[0]
    inputs = list(input)
    numbers = list(k) if isinstance(k, Sequence) and not isinstance(k, str) else [k] * len(inputs)
    if len(numbers) != len(inputs):
        raise ValueError(f"expected one k, or {len(inputs)}, one per input, got {len(numbers)}")
    for j, (tensor, number) in enumerate(zip(inputs, numbers, strict=True)):
        numbers[j] = _checked(tensor, number, f"input {j}")
        if tensor.device != inputs[0].device:
            raise ValueError(f"expected input {j} on {inputs[0].device}, the first one's device, got {tensor.device}")
    if needs_pytorch_formula():
        return tuple(map(_by_formula, inputs, numbers))
    values: dict[int, Tensor] = {}
    for doubles in (False, True):
        group = [j for j, tensor in enumerate(inputs) if (tensor.dtype == torch.float64) == doubles]
        if group:
            flat = [inputs[j].flatten(0, -3) if inputs[j].dim() > 3 else inputs[j] for j in group]
            ks = [numbers[j] for j in group]
            without = compiles_without_gradient(*flat)
            found = _SpectralTail.forward(ks, *flat) if without else apply(_SpectralTail, ks, *flat)
            values.update((j, value.view(inputs[j].shape[:-2])) for j, value in zip(group, found, strict=False))
    return tuple(values[j] for j in range(len(inputs)))
