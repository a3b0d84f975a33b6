"""Co-Tuning for Transfer Learning, NeurIPS 2020 (https://proceedings.neurips.cc/paper/2020/hash/c8067ad1937f728f51288b3eb986afaa-Abstract.html)."""

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
    """Mean over the batch of −Σ target·log_softmax(input): cross entropy with soft labels.

    A class with a logit of −inf and a target of 0 adds nothing.

    Inputs:
        input: logits of the source head, ``[b, N_p]``, or ``[b, *, N_p]`` for logits at several positions, whose mean
            is taken.
        target: probabilities p(y_s | y_t) of each sample's class, of the same shape, or of one that broadcasts with it
            and has no more dimensions.

    Returns:
        A 0-dim tensor, in float32 at least (float64 if one of them is).

    Raises:
        TypeError: one of them is no floating-point tensor.
        ValueError: the shapes do not fit.
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
            target = target.clone()  # which autograd may keep
        rows = math.prod(log_probabilities.shape[:-1])
        return with_masked_classes(_dot, log_probabilities, target) / -rows


def _dot(input: Tensor, target: Tensor) -> Tensor:
    # what cross_entropy computes, a little faster by one product of vectors for its sums
    return torch.dot(input.flatten(), target.flatten())


class Classifier(ClassifierBase):
    """A backbone with two heads, both trained; arguments and returns as :class:`talib_fast.finetune.lwf.Classifier`."""

    def __init__(self, backbone: nn.Module, num_classes: int, head_source: Part, **kwargs: Any) -> None:
        super().__init__(backbone, num_classes, head_source, **kwargs)

    def get_parameters(self, base_lr: float = 1.0) -> list[ParameterGroup]:
        """Parameter groups in the order backbone, head_source, bottleneck, head_target."""
        return self._groups(
            base_lr,
            [(self.backbone, True), (self.head_source, True), (self.bottleneck, False), (self.head_target, False)],
        )
