"""Co-Tuning for Transfer Learning, NeurIPS 2020 (https://proceedings.neurips.cc/paper/2020/hash/c8067ad1937f728f51288b3eb986afaa-Abstract.html)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .classifier import ParameterGroup
from .logits import at_least_float32, check_logits
from .lwf import Classifier as ClassifierBase
from .relationship import Relationship, calibrate_temperature

__all__ = ["Classifier", "CoTuningLoss", "Relationship", "calibrate_temperature"]


class CoTuningLoss(nn.Module):
    """Mean over the batch of −Σ target·log_softmax(input): cross entropy with soft labels.

    Inputs:
        input: logits of the source head, ``[b, N_p]``.
        target: probabilities p(y_s | y_t) of each sample's class, ``[b, N_p]``.

    Returns:
        A 0-dim tensor, in float32 at least.

    Raises:
        TypeError: one of them is no floating-point tensor.
        ValueError: the shapes are not one ``[b, N_p]``.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        check_logits(input, "input")
        check_logits(target, "target")
        if input.dim() != 2 or input.shape != target.shape:
            raise ValueError(
                f"expected input and target of one shape [b, N_p], got {list(input.shape)} and {list(target.shape)}"
            )
        input = at_least_float32(input)
        # what cross_entropy computes, a little faster by one product of vectors for its sums
        similarity = torch.dot(F.log_softmax(input, dim=1).flatten(), target.to(input.dtype).flatten())
        return similarity / -len(input)


class Classifier(ClassifierBase):
    """A backbone with two heads, both trained; arguments and returns as :class:`talib_fast.finetune.lwf.Classifier`."""

    def __init__(self, backbone: nn.Module, num_classes: int, head_source: nn.Module, **kwargs: Any) -> None:
        super().__init__(backbone, num_classes, head_source, **kwargs)

    def get_parameters(self, base_lr: float = 1.0) -> list[ParameterGroup]:
        """Parameter groups in the order backbone, head_source, bottleneck, head_target."""
        return self._groups(
            base_lr,
            [(self.backbone, True), (self.head_source, True), (self.bottleneck, False), (self.head_target, False)],
        )
