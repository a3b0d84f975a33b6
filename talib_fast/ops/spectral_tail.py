"""The sum of the k smallest squared singular values, as Batch Spectral Shrinkage needs it.

With F of shape [b, f] and U the orthonormal basis of the singular subspace that the k smallest singular values
span on the smaller side, the value is ‖UᵀF‖² and its gradient 2·U·Uᵀ·F (b ≤ f; F·U·Uᵀ otherwise). Squaring the
condition number is harmless only with digits to spare: the Gram matrix of a float32 F is formed and solved in
float64, and a float64 F is reduced by a QR factorisation instead.

The compiled kernel looks for no other eigenvectors of the Gram matrix than U: Householder's tridiagonal form,
bisection, inverse iteration. It takes the value from F itself, which gives back the digits that squaring lost.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .library import accumulation_dtype, define


def _short_side_first(input: Tensor) -> Tensor:
    return input if input.size(-2) <= input.size(-1) else input.mT


def _in_float64(input: Tensor) -> Tensor:
    # MPS has neither float64 nor the decompositions
    return input.cpu().double() if input.device.type == "mps" else input.double()


def _by_gram(matrix: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(matrix @ matrix.mT)
    return values.clamp_min(0), vectors


def _by_qr(matrix: Tensor) -> tuple[Tensor, Tensor]:
    triangle = torch.linalg.qr(matrix.mT, mode="r").R
    _, singular_values, vectors_h = torch.linalg.svd(triangle, full_matrices=False)
    return singular_values.square().flip(-1), vectors_h.mT.flip(-1)


def _tail(input: Tensor, k: int, spectrum: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """``spectrum`` gives squared singular values, ascending, and the singular vectors of the shorter side."""
    matrix = _short_side_first(_in_float64(input))
    finite = torch.isfinite(matrix).all(-1, keepdim=True).all(-2, keepdim=True)
    values, vectors = spectrum(torch.where(finite, matrix, 0))
    values = torch.where(finite[..., 0], values, torch.nan)[..., :k]
    vectors = torch.where(finite, vectors, torch.nan)[..., :k]
    return values.sum(-1).to(device=input.device, dtype=accumulation_dtype(input)), vectors.contiguous()


def _apply_projector(vectors: Tensor, input: Tensor) -> Tensor:
    if vectors.size(-2) == input.size(-2):
        return vectors @ (vectors.mT @ input)
    return (input @ vectors) @ vectors.mT


def _forward(input: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return _tail(input, k, _by_gram)


def _forward_by_qr(input: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return _tail(input, k, _by_qr)


def _backward(grad: Tensor, input: Tensor, vectors: Tensor) -> Tensor:
    projection = _apply_projector(vectors, _in_float64(input))
    return torch.empty_like(input).copy_(projection * (2 * grad.to(projection)[..., None, None]))


def _forward_fake(input, k):
    device = torch.device("cpu") if input.device.type == "mps" else input.device
    short_side = min(input.size(-2), input.size(-1))
    value = input.new_empty(input.shape[:-2], dtype=accumulation_dtype(input))
    return value, input.new_empty((*input.shape[:-2], short_side, k), dtype=torch.float64, device=device)


def _backward_fake(grad, input, vectors):
    return torch.empty_like(input)


_forward_op = define(
    "spectral_tail_forward(Tensor input, int k) -> (Tensor value, Tensor vectors)", _forward, _forward_fake
)
# LAPACK's work on every device; no kernel of our own would be faster
_forward_by_qr_op = define(
    "spectral_tail_qr_forward(Tensor input, int k) -> (Tensor value, Tensor vectors)", _forward_by_qr, _forward_fake
)
_backward_op = define(
    "spectral_tail_backward(Tensor grad, Tensor input, Tensor vectors) -> Tensor", _backward, _backward_fake
)


class _TailProjector(torch.autograd.Function):
    """The projector on the eigenvectors of the k smallest eigenvalues of a symmetric matrix.

    Its derivative needs only the gaps between the chosen eigenvalues and the others, so that ties among the chosen
    ones do no harm, as they would in the derivative of the eigenvectors themselves.
    """

    @staticmethod
    def forward(ctx: Any, gram: Tensor, k: int) -> Tensor:
        values, vectors = torch.linalg.eigh(gram)
        ctx.save_for_backward(values, vectors)
        ctx.k = k
        return vectors[..., :k] @ vectors[..., :k].mT

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        values, vectors = ctx.saved_tensors
        chosen, others = vectors[..., : ctx.k], vectors[..., ctx.k :]
        gaps = values[..., : ctx.k, None] - values[..., None, ctx.k :]
        coupling = chosen @ ((chosen.mT @ (grad + grad.mT) @ others) / gaps) @ others.mT
        return 0.5 * (coupling + coupling.mT), None


class _SpectralTail(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, k: int) -> Tensor:
        forward = _forward_by_qr_op if input.dtype == torch.float64 else _forward_op
        value, vectors = forward(input, k)
        ctx.save_for_backward(input, vectors)
        ctx.k = k
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        input, vectors = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return _backward_op(grad, input, vectors), None
        matrix = _short_side_first(_in_float64(input))
        projection = _TailProjector.apply(matrix @ matrix.mT, ctx.k) @ matrix
        if input.size(-2) > input.size(-1):
            projection = projection.mT
        return (projection * (2 * grad.to(projection)[..., None, None])).to(input), None


def spectral_tail(input: Tensor, k: int) -> Tensor:
    """The sum of the ``k`` smallest squared singular values of each matrix.

    Computed in float64, so half precision and autocast are safe. A matrix with a non-finite entry gives NaN and a
    non-finite gradient. Differentiable twice; where σ_k = σ_(k+1) the gradient is one of several subgradients.

    Args:
        input: ``[..., b, f]``, float16, bfloat16, float32 or float64.
        k: how many singular values, 0 ≤ k ≤ min(b, f).

    Returns:
        ``[...]``, float32 (float64 for float64 input).

    Raises:
        TypeError: ``input`` is not floating point, or ``k`` is not an integer.
        ValueError: ``input`` has fewer than two dimensions, or ``k`` is out of range.
    """
    accumulation_dtype(input)
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)):
        raise TypeError(f"expected an integer k, got {k!r}")
    if input.dim() < 2:
        raise ValueError(f"expected input of shape [..., b, f], got {list(input.shape)}")
    if not 0 <= k <= min(input.size(-2), input.size(-1)):
        raise ValueError(
            f"expected 0 <= k <= min(b, f) = {min(input.size(-2), input.size(-1))} "
            f"for input of shape {list(input.shape)}, got k = {k}"
        )
    return _SpectralTail.apply(input, int(k))
