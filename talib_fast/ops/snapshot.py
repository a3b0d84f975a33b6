"""A copy of a tensor that is about to be overwritten."""

import torch
from torch import Tensor

from .library import define

_snapshot_op = define("snapshot(Tensor input) -> Tensor", torch.clone, torch.empty_like)


def snapshot(input: Tensor) -> Tensor:
    """A copy of ``input`` for autograd to keep while ``input`` itself is overwritten in place.

    It is an operator of its own, which compilers do not look into. They may drop a plain ``clone`` as superfluous, or
    repeat it in the backward pass, where it reads the new values. Gradients would then be wrong without an error.

    Args:
        input: any tensor that takes no gradient.

    Returns:
        A tensor of the same shape, dtype and, if dense, strides.
    """
    return _snapshot_op(input) if torch.compiler.is_compiling() else input.clone()
