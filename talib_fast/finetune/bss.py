"""Batch Spectral Shrinkage, NeurIPS 2019 (https://proceedings.neurips.cc/paper/2019/hash/c6bff625bdb0393992c9d4db0c6bbe45-Abstract.html)."""

import numpy as np
from torch import Tensor, nn

from ..ops import spectral_tail

__all__ = ["BatchSpectralShrinkage"]


class BatchSpectralShrinkage(nn.Module):
    r"""The sum of the k smallest squared singular values of a batch of features.

    Suppressing the features' weakest directions keeps negative transfer out of them. From `Catastrophic Forgetting
    Meets Negative Transfer: Batch Spectral Shrinkage for Safe Transfer Learning (NeurIPS 2019)
    <https://proceedings.neurips.cc/paper/2019/hash/c6bff625bdb0393992c9d4db0c6bbe45-Abstract.html>`_.

    Args:
        k: how many of the smallest singular values to penalise.

    Inputs:
        feature: ``[b, f]``; computed in float64 whatever its dtype.

    Returns:
        A 0-dim tensor, float32 (float64 for float64 features); not finite for features that are not.

    Raises:
        TypeError: ``k`` is not an integer, or ``feature`` is not floating point.
        ValueError: ``k`` is negative or larger than min(b, f), or ``feature`` is not a matrix.
    """

    def __init__(self, k: int = 1) -> None:
        super().__init__()
        if isinstance(k, bool) or not isinstance(k, (int, np.integer)):
            raise TypeError(f"expected an integer k, got {k!r}")
        if k < 0:
            raise ValueError(f"expected k >= 0, got {k}")
        self.k = int(k)

    def extra_repr(self) -> str:
        return f"k={self.k}"

    def forward(self, feature: Tensor) -> Tensor:
        if feature.dim() != 2:
            raise ValueError(f"expected features of shape [b, f], got {list(feature.shape)}")
        return spectral_tail(feature, self.k)
