"""How a source classifier sees the target classes: the category relationship of Co-Tuning.

https://proceedings.neurips.cc/paper/2020/hash/c8067ad1937f728f51288b3eb986afaa-Abstract.html
"""

import math
import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_module, check_positive_integer
from ..storage import write_atomically
from .fingerprint import fingerprint
from .labels import check_range, integer_labels
from .logits import at_least_float32, check_logits, check_temperature
from .prediction import OnHost, labels_of, predictions


def calibrate_temperature(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> float:
    """The temperature T > 0 that minimises the cross entropy of softmax(logits / T).

    On Calibration of Modern Neural Networks, ICML 2017 (https://arxiv.org/abs/1706.04599).

    Args:
        logits: ``[N, N_p]`` of the source classifier on held-out source data.
        labels: ``[N]``, their source classes.
        label_smoothing: the share of each label that is spread over all classes, in [0, 1), as in
            :func:`torch.nn.functional.cross_entropy`; any at all keeps T away from 0 where every label is predicted.

    Raises:
        TypeError: the logits are no floating-point tensor, or the labels no integers.
        ValueError: the shapes do not fit, a label is out of range, or ``label_smoothing`` is.
    """
    check_logits(logits, "logits")
    labels = integer_labels(labels).cpu()
    if logits.dim() != 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise ValueError(f"expected logits [N, N_p] and labels [N], got {list(logits.shape)} and {list(labels.shape)}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"expected a label_smoothing in [0, 1), got {label_smoothing}")
    logits = logits.detach().cpu().double()
    check_range(labels, logits.size(1))
    own = (1 - label_smoothing) * logits.gather(1, labels[:, None]).mean() + label_smoothing * logits.mean()
    # the loss is convex in 1/T, and its slope has the sign of the mean of z_y - E[z]: bisect log T for its change
    low, high = -7.0, 7.0
    for _ in range(60):
        middle = (low + high) / 2
        expected = (F.softmax(logits / np.exp(middle), dim=1) * logits).sum(1).mean()
        low, high = (low, middle) if own > expected else (middle, high)
    return float(np.exp((low + high) / 2))


class Relationship:
    """p(y_s | y_t): how the source classifier sees each target class.

    ``direct`` averages the source probabilities over the samples of a class. ``reverse`` is the paper's: it fits
    p(y_t | y_s), a logistic regression from source probabilities to target classes, calibrates it by a temperature, and
    turns it round by Bayes' rule with the mean source probabilities as p(y_s). Strength of regularisation and
    temperature are those that predict best, by cross entropy, what up to five folds of the samples hold out in turn;
    the labels are smoothed by one sample in all that are held out and two more, so that few samples, all predicted,
    don't make it certain. Where fewer than two classes have two samples, nothing can be held out: the first C is
    taken, uncalibrated. It needs scikit-learn.

    A cache saves the pass over the data. It is stored as ``.npz`` (in place of ``.npy``, after any other name), written
    in one step, and used only if its fingerprint fits the classifier's weights, the options and what can be seen of
    the data set without loading its samples: its length and what :mod:`pickle` would save of it, such as labels, file
    names, tensors and transforms. Otherwise it is computed again, with a warning.

    Args:
        data_loader: batches ``(x, labels, ...)`` of the target data.
        classifier: gives source logits ``[b, N_p]`` in evaluation mode; its modes are restored afterwards.
        device: where the classifier is.
        cache: file to keep the relationship in.
        num_classes: number of target classes N_t; by default the largest label + 1.
        absent: what a target class without a sample gets: ``error`` raises, ``mean`` gives it the mean over all
            samples, ``uniform`` 1/N_p.
        method: ``direct`` or ``reverse``.
        temperature: divides the logits, see :func:`calibrate_temperature`.
        C: inverse regularisation strength of the logistic regression, for ``reverse``, or several to choose from.
        progress: show a progress bar.

    Attributes:
        relationship: float32 array ``[N_t, N_p]``, rows sum to 1. Another one may be assigned.

    Raises:
        TypeError, ValueError: batches, labels or options are not as above, a class is absent, or logits of one are not
            finite.
        ImportError: ``reverse`` without scikit-learn.
    """

    def __init__(
        self,
        data_loader: Iterable,
        classifier: nn.Module,
        device: torch.device | str,
        cache: str | os.PathLike | None = None,
        *,
        num_classes: int | None = None,
        absent: str = "error",
        method: str = "direct",
        temperature: float = 1.0,
        C: float | Sequence[float] | np.ndarray = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0, 10000.0),
        progress: bool = True,
    ) -> None:
        check_module(classifier, "classifier")
        if absent not in ("error", "mean", "uniform"):
            raise ValueError(f"expected absent to be error, mean or uniform, got {absent!r}")
        if method not in ("direct", "reverse"):
            raise ValueError(f"expected method to be direct or reverse, got {method!r}")
        check_temperature(temperature)
        if num_classes is not None:
            check_positive_integer(num_classes, "num_classes")
        strengths = np.ravel(np.asarray(C)).tolist()
        if not strengths or not all(isinstance(strength, (int, float)) and strength > 0 for strength in strengths):
            raise ValueError(f"expected C > 0, or several of them, got {C}")
        if method == "reverse":
            try:
                import sklearn.linear_model  # noqa: F401  before the data is gone through
            except ImportError as error:
                raise ImportError(
                    "Relationship(method='reverse') needs scikit-learn: pip install scikit-learn"
                ) from error
        self.data_loader = data_loader
        self.classifier = classifier
        self.device = torch.device(device)
        self.num_classes = num_classes
        self.absent = absent
        self.method = method
        self.temperature = float(temperature)
        self.C = tuple(map(float, strengths))
        if cache is None:
            self.relationship = self._learn(progress)
            return
        path = Path(cache)
        if path.suffix != ".npz":
            path = path.with_name(f"{path.name.removesuffix('.npy')}.npz")
        fingerprint = self._fingerprint()
        cached = _read_cache(path, fingerprint, num_classes)
        if cached is None:
            cached = self._learn(progress)
            write_atomically(path, lambda file: np.savez(file, relationship=cached, fingerprint=fingerprint))
        self.relationship = cached

    @property
    def relationship(self) -> np.ndarray:
        return self._relationship

    @relationship.setter
    def relationship(self, relationship: np.ndarray) -> None:
        self._relationship = np.asarray(relationship, dtype=np.float32)
        self._on_device: dict[torch.device, Tensor] = {}  # copies of it

    def __getitem__(self, category: Any) -> np.ndarray:
        """Row or rows of the relationship as a numpy array.

        Args:
            category: what NumPy takes for an index, or a tensor of labels.

        Raises:
            TypeError, ValueError: a tensor's labels are no integers, or out of range.
        """
        if isinstance(category, Tensor):
            category = integer_labels(category).cpu()
            check_range(category, len(self.relationship))
            category = category.numpy()
        return self.relationship[category]

    def lookup(self, labels: Tensor) -> Tensor:
        """The rows for ``labels`` ``[b]`` as a float32 tensor ``[b, N_p]`` on the labels' device, without a sync.

        Raises:
            TypeError: the labels are no integers.
            ValueError: a label on the CPU is out of range; on an accelerator it ends in a kernel's own bounds check.
        """
        labels = integer_labels(labels)
        table = self._on_device.get(labels.device)
        if table is None:
            table = self._on_device[labels.device] = torch.from_numpy(self.relationship).to(labels.device)
        if labels.device.type == "cpu" and not torch.compiler.is_compiling():
            check_range(labels, len(table))
        # unlike indexing, a gather takes no negative label, and it is faster
        rows = labels.reshape(-1, 1).expand(-1, table.size(1))
        return table.gather(0, rows).view(*labels.shape, table.size(1))

    def _learn(self, progress: bool) -> np.ndarray:
        # the regression needs the samples, the mean only their sums
        keep = self.method == "reverse"
        sums, counts = torch.zeros(0), torch.zeros(0, dtype=torch.long)
        kept, kept_labels = OnHost(), []
        accumulated = torch.float32 if self.device.type == "mps" else torch.float64  # MPS has no float64
        for batch, logits in predictions(self.data_loader, self.classifier, self.device, "Collecting labels", progress):
            labels = labels_of(batch).cpu()
            if not len(labels):
                continue
            limit = self.num_classes if self.num_classes is not None else int(labels.max()) + 1
            check_range(labels, limit)
            probabilities = F.softmax(at_least_float32(logits) / self.temperature, dim=1).to(accumulated)
            if not sums.numel():
                sums = probabilities.new_zeros(limit, probabilities.size(1))
            if limit > len(counts):
                sums = F.pad(sums, (0, 0, 0, limit - len(sums)))
                counts = F.pad(counts, (0, limit - len(counts)))
            sums.index_add_(0, labels.to(sums.device), probabilities)
            counts += torch.bincount(labels, minlength=len(counts))
            if keep:
                kept.append(probabilities)
                kept_labels.append(labels)
        if not len(counts):
            raise ValueError("expected a data loader with at least one batch, got an empty one")
        totals = sums.cpu().double()
        spoilt = (~totals.isfinite().all(1)).nonzero().flatten().tolist()
        if spoilt:
            raise ValueError(f"expected finite logits, got others for samples of the target classes {spoilt[:20]}")
        missing = (counts == 0).nonzero().flatten()
        if len(missing) and self.absent == "error":
            raise ValueError(
                f"expected samples of every target class, but {len(missing)} of {len(counts)} have none: "
                f"{missing[:20].tolist()}; pass absent='mean' or absent='uniform' to give them a row all the same"
            )
        mean = totals.sum(0) / counts.sum()
        if keep:
            rows = self._reverse(kept.joined().double(), torch.cat(kept_labels), len(counts))
        else:
            rows = totals / counts.clamp_min(1)[:, None]
        rows[missing] = mean if self.absent == "mean" else 1 / rows.size(1)
        return rows.float().numpy()

    def _reverse(self, probabilities: Tensor, labels: Tensor, num_classes: int) -> Tensor:
        present, labels = labels.unique(return_inverse=True)
        logits = _target_logits(probabilities.numpy(), labels.numpy(), self.C)
        # p(y_t | y_s) p(y_s) over its sum over y_s; in logarithms, as all of a row may be too small for a number
        log_joint = F.log_softmax(logits, dim=1).T + probabilities.mean(0).log()
        rows = torch.zeros(num_classes, probabilities.size(1), dtype=torch.float64)
        rows[present] = F.softmax(log_joint, dim=1)
        return rows

    def _fingerprint(self) -> str:
        options = (self.num_classes, self.absent, self.method, self.temperature, self.C)
        data = getattr(self.data_loader, "dataset", self.data_loader)
        return fingerprint(repr(options), dict(self.classifier.state_dict()), data)


def _target_logits(probabilities: np.ndarray, labels: np.ndarray, strengths: Sequence[float]) -> Tensor:
    """Calibrated logits ``[N_p, N_t]`` of the target classes, all of which are in ``labels``, for each source class.

    From a logistic regression on source ``probabilities [N, N_p]``, whose inverse regularisation strength is the one
    of ``strengths`` that predicts held out labels best.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold

    def fitted_logits(C: float, features: np.ndarray, classes: np.ndarray, at: np.ndarray) -> np.ndarray:
        """Without an intercept, which probabilities make superfluous as they sum to 1."""
        scores = (
            LogisticRegression(C=C, fit_intercept=False, max_iter=1000).fit(features, classes).decision_function(at)
        )
        return np.stack([-scores / 2, scores / 2], axis=1) if scores.ndim == 1 else scores  # of two classes: one column

    source_classes = np.eye(probabilities.shape[1])
    counts = np.bincount(labels)
    if len(counts) == 1:
        return torch.zeros(len(source_classes), 1, dtype=torch.float64)
    best, temperature = strengths[0], 1.0
    held_out = counts[labels] > 1  # a class's only sample can't be predicted from its others
    features, (classes, held_out_labels) = probabilities[held_out], np.unique(labels[held_out], return_inverse=True)
    if len(classes) > 1:
        folds = StratifiedKFold(min(5, counts[classes].min()), shuffle=True, random_state=0)
        smoothing, least = 1 / (len(features) + 2), math.inf
        for C in strengths:
            logits = torch.empty(len(features), len(classes), dtype=torch.float64)
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


def _read_cache(path: Path, fingerprint: str, num_classes: int | None) -> np.ndarray | None:
    if not path.exists():
        return None
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            table = stored["relationship"]
            if str(stored["fingerprint"]) != fingerprint:
                reason = "it was made from another classifier, data set or options"
            elif table.ndim != 2 or (num_classes is not None and len(table) != num_classes):
                reason = f"it holds a table of shape {list(table.shape)}"
            else:
                return table
    except Exception as error:  # zip, its codecs and numpy each have their own errors for a damaged file
        reason = f"it can't be read ({error})"
    warnings.warn(f"the cached relationship {path} is computed again: {reason}", stacklevel=3)
    return None
