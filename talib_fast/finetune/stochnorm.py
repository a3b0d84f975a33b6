"""StochNorm: batch normalisation with statistics that are chosen at random in training.

Paper: Kou, You, Long and Wang, `Stochastic Normalization (NeurIPS 2020)
<https://proceedings.neurips.cc/paper/2020/hash/bc573864331a9e42e4511de6f678aa83-Abstract.html>`__.
"""

from .conversion import convert_model, convert_sync, restore_batch_norm
from .fusion import fuse_activations
from .norm_act import StochNormAct2d, SyncStochNormAct
from .norms import StochNorm1d, StochNorm2d, StochNorm3d, SyncStochNorm

__all__ = [
    "StochNorm1d",
    "StochNorm2d",
    "StochNorm3d",
    "StochNormAct2d",
    "SyncStochNorm",
    "SyncStochNormAct",
    "convert_model",
    "convert_sync",
    "fuse_activations",
    "restore_batch_norm",
]
