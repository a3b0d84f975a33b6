"""Calibrated predictions: a temperature for logits, and logits from a logistic regression."""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .labels import check_range, integer_labels
from .logits import check_logits


def calibrate_temperature(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> float:
    """The temperature T > 0 that minimises the cross entropy of softmax(logits / T).

    Paper: Guo, Pleiss, Sun and Weinberger, `On Calibration of Modern Neural Networks (ICML 2017)
    <https://arxiv.org/abs/1706.04599>`__.

    Args:
        logits: ``[N, N_p]``, the source classifier's on held-out source data. A logit of −inf leaves a class out.
        labels: ``[N]``, their source classes.
        label_smoothing: share of each label that is spread over all classes, in [0, 1), as in
            :func:`torch.nn.functional.cross_entropy`. A value above 0 keeps T away from 0 where every label is
            predicted.

    Returns:
        T, between e⁻⁷ and e⁷.

    Raises:
        TypeError: the logits are no floating-point tensor, or the labels no integers.
        ValueError: the shapes do not fit, ``label_smoothing`` is out of range, a label is out of range or of a class
            that is left out, or a logit is NaN or +inf.

    Example:

        >>> import torch
        >>> from talib_fast.finetune.co_tuning import calibrate_temperature
        >>> logits = torch.tensor([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0], [2.0, 0.0]])
        >>> labels = torch.tensor([0, 0, 0, 1])  # 3 of 4 are class 0, as softmax(2 / T, 0) says for T = 2 / log 3
        >>> round(calibrate_temperature(logits, labels), 4)
        1.8205
    """
    check_logits(logits, "logits")
    labels = integer_labels(labels).cpu()
    if logits.dim() != 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise ValueError(f"expected logits [N, N_p] and labels [N], got {list(logits.shape)} and {list(labels.shape)}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"expected a label_smoothing in [0, 1), got {label_smoothing}")
    logits = logits.detach().cpu().double()
    check_range(labels, logits.size(1))
    masked = logits == -math.inf  # classes without probability, at any temperature
    if not torch.isfinite(logits.masked_fill(masked, 0)).all():
        raise ValueError("expected logits that are finite, or -inf for a class that is left out, got NaN or inf")
    if masked.gather(1, labels[:, None]).any() or (label_smoothing and masked.any()):
        raise ValueError("expected labels of classes that are not left out by a logit of -inf")
    own = (1 - label_smoothing) * logits.gather(1, labels[:, None]).mean()
    if label_smoothing:
        own += label_smoothing * logits.mean()
    # the loss is convex in 1/T, and its slope has the sign of the mean of z_y - E[z]: bisect log T for its change
    low, high = -7.0, 7.0
    for _ in range(60):
        middle = (low + high) / 2
        expected = (F.softmax(logits / np.exp(middle), dim=1) * logits.masked_fill(masked, 0)).sum(1).mean()
        low, high = (low, middle) if own > expected else (middle, high)
    return float(np.exp((low + high) / 2))


def target_logits(probabilities: np.ndarray, labels: np.ndarray, strengths: Sequence[float]) -> Tensor:
    """Calibrated logits ``[N_p, N_t]`` of the target classes for each source class, by logistic regression.

    Args:
        probabilities: source probabilities ``[N, N_p]``.
        labels: target classes ``[N]``. All classes occur.
        strengths: inverse regularisation strengths. The one that predicts held-out labels best is used.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold

    def fitted_logits(C: float, features: np.ndarray, classes: np.ndarray, at: np.ndarray) -> np.ndarray:
        """Fit and predict. Probabilities sum to 1, so the regression needs no intercept."""
        scores = (
            LogisticRegression(C=C, fit_intercept=False, max_iter=1000).fit(features, classes).decision_function(at)
        )
        return np.stack([-scores / 2, scores / 2], axis=1) if scores.ndim == 1 else scores  # two classes: one column

    source_classes = np.eye(probabilities.shape[1])
    counts = np.bincount(labels)
    if len(counts) == 1:
        return torch.zeros(len(source_classes), 1, dtype=torch.float64, device="cpu")
    best, temperature = strengths[0], 1.0
    held_out = counts[labels] > 1  # a class with one sample has no other to predict it from
    features, (classes, held_out_labels) = probabilities[held_out], np.unique(labels[held_out], return_inverse=True)
    if len(classes) > 1:
        folds = StratifiedKFold(min(5, counts[classes].min()), shuffle=True, random_state=0)
        smoothing, least = 1 / (len(features) + 2), math.inf
        for C in strengths:
            logits = torch.empty(len(features), len(classes), dtype=torch.float64, device="cpu")
            for rest, fold in folds.split(features, held_out_labels):
                found = fitted_logits(C, features[rest], held_out_labels[rest], features[fold])
                logits[fold] = torch.from_numpy(found)
            calibrated = calibrate_temperature(logits, torch.from_numpy(held_out_labels), smoothing)
            loss = F.cross_entropy(
                logits / calibrated, torch.from_numpy(held_out_labels), label_smoothing=smoothing
            ).item()
            if loss < least:
                best, temperature, least = C, calibrated, loss
    return torch.from_numpy(fitted_logits(best, probabilities, labels, source_classes)) / temperature
