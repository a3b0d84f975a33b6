"""Co-Tuning for Transfer Learning, NeurIPS 2020 (https://proceedings.neurips.cc/paper/2020/hash/c8067ad1937f728f51288b3eb986afaa-Abstract.html)."""

import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..storage import write_atomically
from .classifier import ParameterGroup
from .fingerprint import fingerprint
from .knowledge_distillation import at_least_float32
from .lwf import Classifier as ClassifierBase
from .prediction import labels_of, predictions

__all__ = ["Classifier", "CoTuningLoss", "Relationship", "calibrate_temperature"]


class CoTuningLoss(nn.Module):
    """Mean over the batch of −Σ target·log_softmax(input): cross entropy with soft labels.

    Inputs:
        input: logits of the source head, ``[b, N_p]``.
        target: probabilities p(y_s | y_t) of each sample's class, ``[b, N_p]``.

    Returns:
        A 0-dim tensor, in float32 at least.

    Raises:
        TypeError: ``target`` is no floating-point tensor.
        ValueError: the shapes are not one ``[b, N_p]``.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        if not isinstance(target, Tensor) or not target.is_floating_point():
            got = target.dtype if isinstance(target, Tensor) else type(target).__name__
            raise TypeError(f"expected target to be a floating-point tensor of probabilities, got {got}")
        if input.dim() != 2 or input.shape != target.shape:
            raise ValueError(
                f"expected input and target of one shape [b, N_p], got {list(input.shape)} and {list(target.shape)}"
            )
        input = at_least_float32(input)
        return F.cross_entropy(input, target.to(input.dtype))


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


def calibrate_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature T > 0 that minimises the cross entropy of softmax(logits / T).

    On Calibration of Modern Neural Networks, ICML 2017 (https://arxiv.org/abs/1706.04599).

    Args:
        logits: ``[N, N_p]`` of the source classifier on held-out source data.
        labels: ``[N]``, their source classes.

    Raises:
        ValueError: the shapes do not fit.
    """
    if logits.dim() != 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise ValueError(f"expected logits [N, N_p] and labels [N], got {list(logits.shape)} and {list(labels.shape)}")
    logits, labels = logits.detach().cpu().double(), labels.cpu().long()
    own = logits.gather(1, labels[:, None]).mean()
    # the loss is convex in 1/T, and its slope has the sign of the mean of z_y - E[z]: bisect log T for its change
    low, high = -7.0, 7.0
    for _ in range(60):
        middle = (low + high) / 2
        expected = (F.softmax(logits / np.exp(middle), dim=1) * logits).sum(1).mean()
        low, high = (low, middle) if own > expected else (middle, high)
    return float(np.exp((low + high) / 2))


class Relationship:
    """p(y_s | y_t): how the source classifier sees each target class.

    ``direct`` averages the source probabilities over the samples of a class. ``reverse`` fits p(y_t | y_s), a logistic
    regression from source probabilities to target classes, and turns it round by Bayes' rule with the mean source
    probabilities as p(y_s); it needs scikit-learn.

    A cache saves the pass over the data. It is stored as ``.npz`` (in place of ``.npy``, after any other name), written
    in one step, and used only if its fingerprint fits the classifier's weights, the options and what can be seen of
    the data set without loading its samples: length, class names, labels, file names, what lists and a
    ``TensorDataset`` hold. Otherwise it is computed again, with a warning.

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
        C: inverse regularisation strength of the logistic regression, for ``reverse``.

    Attributes:
        relationship: float32 array ``[N_t, N_p]``, rows sum to 1.

    Raises:
        TypeError, ValueError: batches, labels or options are not as above, or a class is absent.
        ImportError: ``reverse`` without scikit-learn.
    """

    relationship: np.ndarray

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
        C: float = 1.0,
    ) -> None:
        if absent not in ("error", "mean", "uniform"):
            raise ValueError(f"expected absent to be error, mean or uniform, got {absent!r}")
        if method not in ("direct", "reverse"):
            raise ValueError(f"expected method to be direct or reverse, got {method!r}")
        if not temperature > 0:
            raise ValueError(f"expected a temperature > 0, got {temperature}")
        if num_classes is not None and num_classes < 1:
            raise ValueError(f"expected num_classes >= 1, got {num_classes}")
        self.data_loader = data_loader
        self.classifier = classifier
        self.device = torch.device(device)
        self.num_classes = num_classes
        self.absent = absent
        self.method = method
        self.temperature = float(temperature)
        self.C = float(C)
        self._on_device: dict[torch.device, Tensor] = {}
        if cache is None:
            self.relationship = self._learn()
            return
        path = Path(cache)
        if path.suffix != ".npz":
            path = path.with_name(f"{path.name.removesuffix('.npy')}.npz")
        fingerprint = self._fingerprint()
        cached = _read_cache(path, fingerprint, num_classes)
        if cached is None:
            cached = self._learn()
            write_atomically(path, lambda file: np.savez(file, relationship=cached, fingerprint=fingerprint))
        self.relationship = cached

    def __getitem__(self, category: Any) -> np.ndarray:
        """Row or rows of the relationship as a numpy array; ``category`` may be a tensor of labels."""
        if isinstance(category, Tensor):
            category = category.cpu().numpy()
        return self.relationship[category]

    def lookup(self, labels: Tensor) -> Tensor:
        """The rows for ``labels`` ``[b]`` as a float32 tensor ``[b, N_p]`` on the labels' device, without a sync."""
        table = self._on_device.get(labels.device)
        if table is None:
            table = self._on_device[labels.device] = torch.from_numpy(self.relationship).to(labels.device)
        return table[labels.long()]

    def _learn(self) -> np.ndarray:
        # the regression needs the samples, the mean only their sums
        keep = self.method == "reverse"
        sums, counts = torch.zeros(0), torch.zeros(0, dtype=torch.long)
        kept: list[tuple[Tensor, Tensor]] = []
        accumulated = torch.float32 if self.device.type == "mps" else torch.float64  # MPS has no float64
        for batch, logits in predictions(self.data_loader, self.classifier, self.device, "Collecting labels"):
            labels = labels_of(batch).cpu()
            if not len(labels):
                continue
            limit = self.num_classes if self.num_classes is not None else int(labels.max()) + 1
            if int(labels.min()) < 0 or int(labels.max()) >= limit:
                raise ValueError(
                    f"expected labels in [0, {limit}), got labels from {int(labels.min())} to {int(labels.max())}"
                )
            probabilities = F.softmax(at_least_float32(logits) / self.temperature, dim=1).to(accumulated)
            if not sums.numel():
                sums = probabilities.new_zeros(limit, probabilities.size(1))
            if limit > len(counts):
                sums = F.pad(sums, (0, 0, 0, limit - len(sums)))
                counts = F.pad(counts, (0, limit - len(counts)))
            sums.index_add_(0, labels.to(sums.device), probabilities)
            counts += torch.bincount(labels, minlength=len(counts))
            if keep:
                kept.append((probabilities.cpu(), labels))
        if not len(counts):
            raise ValueError("expected a data loader with at least one batch, got an empty one")
        missing = (counts == 0).nonzero().flatten()
        if len(missing) and self.absent == "error":
            raise ValueError(
                f"expected samples of every target class, but {len(missing)} of {len(counts)} have none: "
                f"{missing[:20].tolist()}; pass absent='mean' or absent='uniform' to give them a row all the same"
            )
        totals = sums.cpu().double()
        mean = totals.sum(0) / counts.sum()
        if keep:
            probabilities, labels = (torch.cat(column) for column in zip(*kept, strict=True))
            rows = self._reverse(probabilities, labels, len(counts))
        else:
            rows = totals / counts.clamp_min(1)[:, None]
        rows[missing] = mean if self.absent == "mean" else 1 / rows.size(1)
        return rows.float().numpy()

    def _reverse(self, probabilities: Tensor, labels: Tensor, num_classes: int) -> Tensor:
        try:
            from sklearn.linear_model import LogisticRegression
        except ImportError as error:
            raise ImportError("Relationship(method='reverse') needs scikit-learn: pip install scikit-learn") from error
        present = labels.unique()
        rows = torch.zeros(num_classes, probabilities.size(1), dtype=torch.float64)
        p_source = probabilities.double().mean(0)
        if len(present) == 1:
            rows[present] = p_source
            return rows
        regression = LogisticRegression(C=self.C, max_iter=1000).fit(probabilities.double().numpy(), labels.numpy())
        p_target_given_source = torch.from_numpy(regression.predict_proba(np.eye(probabilities.size(1))))
        joint = p_target_given_source.T * p_source
        rows[present] = joint / joint.sum(1, keepdim=True)
        return rows

    def _fingerprint(self) -> str:
        options = (self.num_classes, self.absent, self.method, self.temperature, self.C)
        data = getattr(self.data_loader, "dataset", self.data_loader)
        return fingerprint(repr(options), dict(self.classifier.state_dict()), data)


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
