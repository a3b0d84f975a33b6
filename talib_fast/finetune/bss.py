"""BSS: Batch Spectral Shrinkage, which penalises the smallest singular values of a batch of features.

Paper: Chen, Wang, Fu, Long and Wang, `Catastrophic Forgetting Meets Negative Transfer: Batch Spectral Shrinkage for
Safe Transfer Learning (NeurIPS 2019)
<https://proceedings.neurips.cc/paper/2019/hash/c6bff625bdb0393992c9d4db0c6bbe45-Abstract.html>`__.
"""

import operator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..ops import spectral_tail

__all__ = ["BatchSpectralShrinkage"]


def _as_integer(k: Any) -> int:
    """``k`` as a Python integer. Integers of NumPy and PyTorch, such as a 0-dim tensor, are accepted."""
    is_bool = isinstance(k, bool) or getattr(k, "dtype", None) == torch.bool
    try:
        if not is_bool:
            return operator.index(k)
    except TypeError:
        pass
    raise TypeError(f"expected k to be an integer, got {k!r}")


class _JoinedOverRanks(torch.autograd.Function):
    """Joins the features of all ranks in rank order. Its gradient is the sum of all ranks' for this rank's features."""

    @staticmethod
    def forward(ctx: Any, feature: Tensor, process_group: Any) -> Tensor:
        world = dist.get_world_size(process_group)
        shape = torch.tensor(feature.shape, device=feature.device)
        gathered = [torch.empty_like(shape) for _ in range(world)]
        dist.all_gather(gathered, shape, process_group)
        shapes = torch.stack(gathered).tolist()
        rows = [b for b, _ in shapes]
        if any(f != feature.size(1) for _, f in shapes):
            raise ValueError(f"expected features of one width on all ranks, got the shapes {shapes}")
        padded = feature.new_zeros(max(rows), feature.size(1))
        padded[: len(feature)] = feature
        parts = [torch.empty_like(padded) for _ in range(world)]
        dist.all_gather(parts, padded, process_group)
        ctx.process_group, ctx.rows = process_group, rows
        return torch.cat([part[:b] for part, b in zip(parts, rows, strict=True)])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.process_group)
        return grad.split(ctx.rows)[dist.get_rank(ctx.process_group)].clone(), None


class BatchSpectralShrinkage(nn.Module):
    """The sum of the k smallest squared singular values of a batch of features, Σ σ².

    The penalty suppresses the features' weakest directions, which carries negative transfer.

    Paper: Chen, Wang, Fu, Long and Wang, `Catastrophic Forgetting Meets Negative Transfer: Batch Spectral Shrinkage for
    Safe Transfer Learning (NeurIPS 2019)
    <https://proceedings.neurips.cc/paper/2019/hash/c6bff625bdb0393992c9d4db0c6bbe45-Abstract.html>`__.

    Args:
        k: how many of the smallest singular values to penalise. An integer, or a 0-dim tensor of one.
        all_ranks: under ``torch.distributed``, join the features of all ranks. Data-parallel training then penalises
            what one process with the whole batch would. The ranks' batches may differ in size. All ranks return the
            same loss. If gradients are averaged over the ranks, as DistributedDataParallel does, they equal those of
            one process. It costs two collectives and one wait for the device in the forward pass, and one collective in
            the backward pass. Features that were joined have no second derivative: to ask for one raises RuntimeError.
        process_group: the ranks to join. None is the default group.

    Inputs:
        feature: ``[b, f]``, of any floating-point dtype. It is computed in float64.

    Returns:
        A 0-dim tensor, float32 (float64 for float64 features). It is not finite if a feature is not. It is
        differentiable twice, except where σ_k = σ_(k+1). The second derivative is NaN there, without an error, or huge
        if rounding has separated the two values.

    Raises:
        TypeError: ``k`` is not an integer, or ``feature`` is no floating-point tensor.
        ValueError: ``k`` is negative or larger than min(b, f), ``feature`` is not a matrix, or the ranks' features
            differ in width.

    Example:

        >>> import torch
        >>> from talib_fast.finetune.bss import BatchSpectralShrinkage
        >>> feature = torch.diag(torch.tensor([3.0, 2.0, 1.0]))  # its singular values are 3, 2 and 1
        >>> round(BatchSpectralShrinkage(k=2)(feature).item(), 4)
        5.0
    """

    def __init__(self, k: int = 1, all_ranks: bool = False, process_group: Any = None) -> None:
        super().__init__()
        self.k = _as_integer(k)
        if self.k < 0:
            raise ValueError(f"expected k >= 0, got {k}")
        self.all_ranks, self.process_group = all_ranks, process_group

    def extra_repr(self) -> str:
        return f"k={self.k}" + (", all_ranks=True" if self.all_ranks else "")

    def forward(self, feature: Tensor) -> Tensor:
        if not isinstance(feature, Tensor):
            raise TypeError(f"expected features as a tensor, got {type(feature).__name__}")
        if feature.dim() != 2:
            raise ValueError(f"expected features of shape [b, f], got {list(feature.shape)}")
        distributed = self.all_ranks and dist.is_available() and dist.is_initialized()
        if distributed and dist.get_world_size(self.process_group) > 1:
            feature = _JoinedOverRanks.apply(feature, self.process_group)
        return spectral_tail(feature, self.k)
