"""Co-Tuning: train the source head as well, with the source classes that correspond to each target class.

Paper: You, Kou, Long and Wang, `Co-Tuning for Transfer Learning (NeurIPS 2020)
<https://proceedings.neurips.cc/paper/2020/hash/c8067ad1937f728f51288b3eb986afaa-Abstract.html>`__.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .calibration import calibrate_temperature
from .classifier import ParameterGroup, Part
from .logits import at_least_float32, check_logits, with_masked_classes
from .lwf import Classifier as ClassifierBase
from .relationship import Relationship

__all__ = ["Classifier", "CoTuningLoss", "Relationship", "calibrate_temperature"]


class CoTuningLoss(nn.Module):
    """Cross entropy with soft labels: the mean over the batch of −Σ target·log_softmax(input).

    A class with a logit of −inf and a target of 0 adds nothing.

    Paper: You, Kou, Long and Wang, `Co-Tuning for Transfer Learning (NeurIPS 2020)
    <https://proceedings.neurips.cc/paper/2020/hash/c8067ad1937f728f51288b3eb986afaa-Abstract.html>`__.

    Inputs:
        input: logits of the source head, ``[b, N_p]``. Logits at several positions, ``[b, *, N_p]``, give the mean over
            the positions.
        target: probabilities p(y_s | y_t) of each sample's class, of the same shape. It may also have a shape that
            broadcasts with it and no more dimensions.

    Returns:
        A 0-dim tensor, float32 (float64 if one of the inputs is).

    Raises:
        TypeError: an input is no floating-point tensor.
        ValueError: the shapes do not fit.

    Example:

        >>> import torch
        >>> from talib_fast.finetune.co_tuning import CoTuningLoss
        >>> logits = torch.zeros(2, 4, requires_grad=True)
        >>> target = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
        >>> round(CoTuningLoss()(logits, target).item(), 4)  # log 4
        1.3863
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        check_logits(input, "input")
        check_logits(target, "target")
        fits = input.dim() >= 2 and target.dim() <= input.dim()
        if fits and input.shape != target.shape:
            sizes = zip(reversed(input.shape), reversed(target.shape), strict=False)
            fits = all(size == its or 1 in (size, its) for size, its in sizes)
        if not fits:
            raise ValueError(
                f"expected input and target of one shape [b, N_p], got {list(input.shape)} and {list(target.shape)}"
            )
        log_probabilities = F.log_softmax(at_least_float32(input), dim=-1)
        if log_probabilities.dtype != target.dtype:
            dtype = torch.promote_types(log_probabilities.dtype, target.dtype)
            log_probabilities, target = log_probabilities.to(dtype), target.to(dtype)
        if input.shape != target.shape:
            log_probabilities, target = torch.broadcast_tensors(log_probabilities, target)
        if not torch.compiler.is_compiling() and target.is_inference() and not torch.is_inference_mode_enabled():
            target = target.clone()  # autograd may save the copy, but not an inference tensor
        rows = math.prod(log_probabilities.shape[:-1])
        return with_masked_classes(_dot, log_probabilities, target) / -rows


def _dot(input: Tensor, target: Tensor) -> Tensor:
    """Σ input·target as one product of vectors, which is a little faster than ``cross_entropy``."""
    return torch.dot(input.flatten(), target.flatten())


class Classifier(ClassifierBase):
    """A backbone with two heads that are both trained: the pretrained source head and the target head.

    Arguments, inputs and outputs are those of :class:`~talib_fast.finetune.lwf.Classifier`. Only the parameter groups
    differ: here the source head has one.
    """

    def __init__(self, backbone: nn.Module, num_classes: int, head_source: Part, **kwargs: Any) -> None:
        super().__init__(backbone, num_classes, head_source, **kwargs)

    def get_parameters(self, base_lr: float = 1.0) -> list[ParameterGroup]:
        """Parameter groups for an optimizer, in the order backbone, head_source, bottleneck, head_target.

        Args:
            base_lr: the learning rate. With ``finetune``, backbone and head_source get a tenth of it.
        """
        return self._groups(
            base_lr,
            [(self.backbone, True), (self.head_source, True), (self.bottleneck, False), (self.head_target, False)],
        )
