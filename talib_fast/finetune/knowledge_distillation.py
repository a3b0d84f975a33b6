"""Knowledge distillation: a student learns the predictions of a teacher.

Paper: Hinton, Vinyals and Dean, `Distilling the Knowledge in a Neural Network (2015)
<https://arxiv.org/abs/1503.02531>`__.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .logits import at_least_float32, check_logits, check_temperature, with_masked_classes

# upstream's scripts get nn and F by `import *`
__all__ = ["F", "KnowledgeDistillationLoss", "nn"]

_REDUCTIONS = ("none", "sum", "mean", "batchmean")


class KnowledgeDistillationLoss(nn.Module):
    """KL(softmax(teacher / T) ‖ softmax(student / T)), without the factor T² of the paper.

    A class with a logit of −inf in both adds nothing. If only the student has −inf there, the divergence is infinite.

    Paper: Hinton, Vinyals and Dean, `Distilling the Knowledge in a Neural Network (2015)
    <https://arxiv.org/abs/1503.02531>`__.

    Args:
        T: temperature, > 0.
        reduction: ``"batchmean"``, ``"sum"``, ``"mean"`` or ``"none"``, as in :func:`torch.nn.functional.kl_div`.
            ``"batchmean"`` divides the sum by b, also if a sample has logits at several positions.

    Inputs:
        y_student: logits ``[b, *, N]``.
        y_teacher: logits of the same shape, or of a shape that broadcasts to it with the same N. They get no gradient.

    Returns:
        A 0-dim tensor, or ``[b, *, N]`` for ``"none"``, in float32 (float64 for float64 students).

    Raises:
        TypeError: T is no number, or logits are no floating-point tensor.
        ValueError: T ≤ 0, an unknown reduction, or shapes that do not fit.

    Attributes:
        kl: the :class:`torch.nn.KLDivLoss` of the student's log-probabilities and the teacher's probabilities.

    Example:

        >>> import torch
        >>> from talib_fast.finetune.knowledge_distillation import KnowledgeDistillationLoss
        >>> loss = KnowledgeDistillationLoss(T=3.0)
        >>> student, teacher = torch.zeros(2, 4, requires_grad=True), torch.zeros(2, 4)
        >>> loss(student, teacher).item()
        0.0
    """

    def __init__(self, T: float = 1.0, reduction: str = "batchmean") -> None:
        super().__init__()
        check_temperature(T, "temperature T")
        if reduction not in _REDUCTIONS:
            raise ValueError(f"expected reduction to be one of {', '.join(_REDUCTIONS)}, got {reduction!r}")
        self.T = T
        self.kl = nn.KLDivLoss(reduction=reduction)

    @property
    def reduction(self) -> str:
        return self.kl.reduction

    @reduction.setter
    def reduction(self, reduction: str) -> None:
        self.kl.reduction = reduction

    def __repr__(self) -> str:
        return f"{self._get_name()}(T={self.T}, reduction={self.reduction!r})"

    def forward(self, y_student: Tensor, y_teacher: Tensor) -> Tensor:
        check_logits(y_student, "y_student")
        check_logits(y_teacher, "y_teacher")
        if y_student.shape != y_teacher.shape and not _broadcasts(y_teacher.shape, y_student.shape):
            raise ValueError(
                "expected student and teacher logits of one shape, "
                f"got {list(y_student.shape)} and {list(y_teacher.shape)}"
            )
        student = F.log_softmax(at_least_float32(y_student) / self.T, dim=-1)
        teacher = F.softmax(at_least_float32(y_teacher.detach()) / self.T, dim=-1)
        return with_masked_classes(self.kl, student, teacher.to(student.dtype))


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    """Whether a shape broadcasts to another one with the same last dimension."""
    if not 0 < len(shape) <= len(to) or shape[-1] != to[-1]:
        return False
    return all(size in (1, wanted) for size, wanted in zip(reversed(shape), reversed(to), strict=False))
