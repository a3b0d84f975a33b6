"""The category relationship of Co-Tuning: how a source classifier sees the target classes.

Paper: You, Kou, Long and Wang, `Co-Tuning for Transfer Learning (NeurIPS 2020)
<https://proceedings.neurips.cc/paper/2020/hash/c8067ad1937f728f51288b3eb986afaa-Abstract.html>`__.
"""

import math
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_module, check_positive_integer
from ..storage import write_atomically
from .calibration import target_logits
from .fingerprint import Unknown, fingerprint, model_parts
from .labels import check_range, integer_labels
from .loader import Share, loader_parts, share_of, warn_of_share
from .logits import at_least_float32, check_temperature
from .prediction import OnHost, class_labels_of, counted, joined_over_ranks, predictions
from .ranks import check_group, from_first, gathered, summed, together


class Relationship:
    """p(y_s | y_t): how the source classifier sees each target class.

    ``method="direct"`` averages the source probabilities over the samples of each class. ``method="reverse"`` is the
    paper's way. It fits p(y_t | y_s) by a logistic regression from source probabilities to target classes, calibrates
    it by a temperature, and turns it round by Bayes' rule with the mean source probabilities as p(y_s).

    The regularisation strength and the temperature of ``reverse`` are those with the best cross entropy on held-out
    samples, in up to five folds. The label smoothing is 1/(n + 2) for n held-out samples, so that a few samples that
    are all predicted do not make the classifier certain. If fewer than two classes have two samples, nothing can be
    held out: the first C is used, without calibration. ``reverse`` needs scikit-learn.

    A subclass may override ``collect_labels`` and ``get_category_relationship``. Its own methods then decide.

    A cache saves the pass over the data. It is stored as ``.npz``, in place of ``.npy`` or after any other name, and
    written in one step. It is used only if its fingerprint fits. The fingerprint covers:

    - the classifier's weights and layers, but not its code;
    - the options;
    - the data set and ``collate_fn``, by what :mod:`pickle` would save of them and by the code of their classes and
      functions. The contents of files that the data set only names, and random numbers that it draws, are not covered;
    - the indices of the sampler, in any order.

    If the fingerprint does not fit, a warning says so and the relationship is computed again. The same happens on every
    call where the fingerprint can't be known, as with a generator, an open file or a sampler of your own. A ``.npy``
    file of the Transfer-Learning-Library has no fingerprint. It is left alone, and a warning says how to use it.

    Paper: You, Kou, Long and Wang, `Co-Tuning for Transfer Learning (NeurIPS 2020)
    <https://proceedings.neurips.cc/paper/2020/hash/c8067ad1937f728f51288b3eb986afaa-Abstract.html>`__.

    Args:
        data_loader: batches ``(x, labels, ...)`` of the target data. x is a tensor or has a method ``to(device)``.
        classifier: returns source logits ``[b, N_p]`` in evaluation mode. From the second batch on its batch norms are
            folded as by :func:`~talib_fast.finetune.frozen.frozen`. Afterwards it is as it was.
        device: the device of the classifier.
        cache: file to keep the relationship in.
        num_classes: number of target classes N_t. By default the largest label + 1.
        absent: the row of a target class without samples. ``"error"`` gives NaN, and looking it up raises. ``"mean"``
            gives the mean over all samples, ``"uniform"`` gives 1/N_p.
        method: ``"direct"`` or ``"reverse"``.
        temperature: divides the logits. :func:`~talib_fast.finetune.co_tuning.calibrate_temperature` finds one.
        C: for ``reverse``, the inverse regularisation strength of the logistic regression, or several to choose from.
        progress: show a progress bar.
        process_group: processes that share the data. Each of them gets what one process would compute from all data.
            The samples that a :class:`~torch.utils.data.DistributedSampler` or accelerate's ``prepare_data_loader``
            repeats count once. If the data are shared in another way, every sample of every process counts. A warning
            says where accelerate fills batches with repeated samples, as for iterable data sets and dispatched batches.
            If the group's first process has a cache, it reads and writes it for all. By default each process works
            alone.

    Attributes:
        relationship: float32 array ``[N_t, N_p]`` whose rows sum to 1. Another one may be assigned.

    Raises:
        TypeError: batches, labels or options have the wrong type. Like the other errors, it is raised on all processes
            of the group.
        ValueError: batches, labels or options are not as above, the loader is empty, or logits are not finite.
        ImportError: ``reverse`` without scikit-learn.

    Example:

        >>> import torch
        >>> from torch import nn
        >>> from talib_fast.finetune.co_tuning import Relationship
        >>> classifier = nn.Linear(4, 3)  # gives logits of 3 source classes
        >>> batches = [(torch.randn(8, 4), torch.arange(8) % 2)]  # 2 target classes
        >>> relationship = Relationship(batches, classifier, "cpu", progress=False)
        >>> relationship.relationship.shape, relationship[torch.tensor([0, 1, 1])].shape
        ((2, 3), (3, 3))
    """

    _absent_classes: frozenset[int] = frozenset()

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
        process_group: Any = None,
    ) -> None:
        check_group(process_group)

        def checked() -> tuple[torch.device, tuple[float, ...]]:
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
                    import sklearn.linear_model  # noqa: F401  before the pass over the data
                except ImportError as error:
                    raise ImportError(
                        "Relationship(method='reverse') needs scikit-learn: pip install scikit-learn"
                    ) from error
            return torch.device(device), tuple(map(float, strengths))

        self.device, self.C = together(checked, process_group)
        if process_group is None:
            warn_of_share(data_loader, "Relationship", joins=True)
        self.data_loader = data_loader
        self.classifier = classifier
        self.num_classes = num_classes
        self.absent = absent
        self.method = method
        self.temperature = float(temperature)
        self.process_group = process_group
        self._progress = progress
        cache = from_first(lambda: None if cache is None else os.fspath(cache), process_group)
        self.relationship = self._learn() if cache is None else self._cached(Path(cache))

    @property
    def relationship(self) -> np.ndarray:
        return self._relationship

    @relationship.setter
    def relationship(self, relationship: np.ndarray) -> None:
        self._relationship = np.asarray(relationship, dtype=np.float32)
        absent = np.isnan(self._relationship).all(1) if self._relationship.ndim == 2 else ()
        self._absent_classes = frozenset(np.flatnonzero(absent).tolist())
        self._on_device: dict[torch.device, Tensor] = {}  # the table's copies

    def __getitem__(self, category: Any) -> np.ndarray:
        """Row or rows of the relationship as a NumPy array.

        Args:
            category: an index of any kind that NumPy takes, or a tensor of labels.

        Raises:
            TypeError: a tensor's labels are no integers.
            ValueError: a tensor's label is out of range, or a class had no samples and ``absent="error"``.
        """
        if isinstance(category, Tensor):
            category = integer_labels(category).cpu()
            check_range(category, len(self.relationship))
            category = category.numpy()
        rows = self.relationship[category]
        if self._absent_classes and np.isnan(rows).any():
            classes = np.broadcast_to(np.arange(len(self.relationship))[:, None], self.relationship.shape)[category]
            self._check_samples(classes[np.isnan(rows)].tolist())
        return rows

    def lookup(self, labels: Tensor) -> Tensor:
        """The rows for ``labels`` ``[b]``: float32 ``[b, N_p]`` on the labels' device, without a synchronisation.

        Raises:
            TypeError: the labels are no integers.
            ValueError: a label on the CPU is out of range, or its class had no samples. On an accelerator and in
                compiled code, a label out of range fails in a kernel's bounds check, and a class without samples gives
                a row of NaN.
        """
        labels = integer_labels(labels)
        table = self._on_device.get(labels.device)
        if table is None:
            table = self._on_device[labels.device] = self._table_on(labels.device)
        if labels.device.type == "cpu" and not torch.compiler.is_compiling():
            check_range(labels, len(table))
            if self._absent_classes:
                self._check_samples(labels.flatten().tolist())
        # unlike indexing, gather refuses negative labels, and it is faster
        rows = labels.reshape(-1, 1).expand(-1, table.size(1))
        return table.gather(0, rows).view(*labels.shape, table.size(1))

    def _table_on(self, device: torch.device) -> Tensor:
        """The table as a tensor on ``device``."""
        if torch.compiler.is_compiling():
            return torch.from_numpy(self.relationship).to(device)
        with torch.inference_mode(False):  # it is kept, and used in training too
            return torch.from_numpy(self.relationship).to(device)

    def _check_samples(self, labels: Iterable[int]) -> None:
        """Raise ValueError if a label's class had no samples."""
        missing = sorted(self._absent_classes.intersection(labels))
        if missing:
            raise ValueError(
                f"expected labels of classes with samples, but {missing[:20]} had none when the relationship was "
                "learned: absent='mean' or absent='uniform' gives such classes a row"
            )

    def collect_labels(self) -> tuple[np.ndarray, np.ndarray]:
        """Run the classifier over the data, of all processes if there is a process group.

        Returns:
            Source probabilities ``[N, N_p]`` and target labels ``[N]`` of all samples, as NumPy arrays.
        """
        share = share_of(self.data_loader, self.process_group)
        kept, kept_labels = OnHost(), OnHost()

        def collect() -> None:
            for labels, logits in self._samples(share):
                kept.append(F.softmax(at_least_float32(logits) / self.temperature, dim=1))
                kept_labels.append(labels)

        together(collect, self.process_group)
        probabilities = joined_over_ranks(kept, share, self.process_group)
        return probabilities.numpy(), joined_over_ranks(kept_labels, share, self.process_group).numpy()

    def get_category_relationship(self, source_probabilities: np.ndarray, target_labels: np.ndarray) -> np.ndarray:
        """Compute the relationship from samples.

        Args:
            source_probabilities: ``[N, N_p]``.
            target_labels: ``[N]``, integers.

        Returns:
            p(y_s | y_t), a float32 array ``[N_t, N_p]``.

        Raises:
            ValueError: the shapes do not fit, or a label is out of range.
        """
        probabilities = torch.as_tensor(source_probabilities, device="cpu").double()
        labels = integer_labels(target_labels).cpu()
        if probabilities.dim() != 2 or labels.shape != probabilities.shape[:1] or not len(labels):
            raise ValueError(
                "expected source_probabilities [N, N_p] and target_labels [N], "
                f"got {list(probabilities.shape)} and {list(labels.shape)}"
            )
        num_classes = self.num_classes if self.num_classes is not None else int(labels.max()) + 1
        check_range(labels, num_classes)
        sums = probabilities.new_zeros(num_classes, probabilities.size(1)).index_add_(0, labels, probabilities)
        counts = torch.bincount(labels, minlength=num_classes)
        return self._table(sums, counts, (probabilities, labels) if self.method == "reverse" else None)

    def _cached(self, cache: Path) -> np.ndarray:
        """The relationship from the file, or if that does not fit, computed and written to it."""
        path = cache if cache.suffix == ".npz" else cache.with_name(f"{cache.name.removesuffix('.npy')}.npz")
        fingerprint, unknown = self._fingerprint()

        def read() -> tuple[np.ndarray | None, str]:
            if unknown:
                return None, f"the cached relationship {path} is computed again every time: it depends on {unknown}"
            return _read_cache(path, fingerprint, self.num_classes, or_npy=path != cache)

        table, message = from_first(read, self.process_group)
        if message:  # on the first rank, and if warnings are errors, raised on all
            from_first(lambda: warnings.warn(message, stacklevel=6), self.process_group)
        if table is not None:
            return table
        learned = self._learn()

        def write() -> None:
            write_atomically(path, lambda file: np.savez(file, relationship=learned, fingerprint=fingerprint))

        if not unknown:
            from_first(write, self.process_group)
        return learned

    def _learn(self) -> np.ndarray:
        """Compute the relationship from the data."""
        kind = type(self)
        own = kind.collect_labels is _COLLECT and kind.get_category_relationship is _RELATE
        if own and self.method == "direct":  # the sums over classes are enough
            return self._table(*self._sums())
        collected = self.collect_labels()
        table = together(lambda: self.get_category_relationship(*collected), self.process_group)
        return from_first(lambda: np.asarray(table, dtype=np.float32), self.process_group)

    def _samples(self, share: Share | None) -> Iterator[tuple[Tensor, Tensor]]:
        """The labels, on the CPU, and logits of each batch, without samples that count elsewhere."""
        batches = predictions(self.data_loader, self.classifier, self.device, "Collecting labels", self._progress)
        for batch, logits, counts in counted(batches, share):
            labels = class_labels_of(batch, len(logits)).cpu()
            if counts is not None:
                labels, logits = labels[counts], logits[counts.to(logits.device)]
            if len(labels):
                yield labels, logits

    def _sums(self) -> tuple[Tensor, Tensor]:
        """The sums ``[N_t, N_p]`` of source probabilities and numbers of samples ``[N_t]`` by class, of all ranks."""
        share = share_of(self.data_loader, self.process_group)
        sums, counts = together(lambda: self._own_sums(share), self.process_group)
        shapes = [shape for shape in gathered(tuple(sums.shape), self.process_group) if shape[0]]
        if not shapes:
            raise ValueError("expected a data loader with at least one batch, got an empty one")
        if len({width for _, width in shapes}) > 1:
            raise ValueError(f"expected logits of one number of source classes, got {sorted(shapes)} on the ranks")
        length, width = max(shapes)
        sums = F.pad(sums, (0, width - sums.size(1), 0, length - len(sums)))
        counts = F.pad(counts, (0, length - len(counts)))
        return summed(sums, self.process_group).double(), summed(counts, self.process_group)

    def _own_sums(self, share: Share | None) -> tuple[Tensor, Tensor]:
        """``_sums`` of this rank alone."""
        accumulated = torch.float32 if self.device.type == "mps" else torch.float64  # MPS has no float64
        sums = torch.zeros(0, 0, dtype=accumulated, device=self.device)
        counts = torch.zeros(0, dtype=torch.long, device="cpu")
        for labels, logits in self._samples(share):
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
        return sums, counts

    def _table(self, sums: Tensor, counts: Tensor, samples: tuple[Tensor, Tensor] | None = None) -> np.ndarray:
        """The table from the sums by class, or for ``reverse`` from ``samples``: their probabilities and labels."""
        spoilt = (~sums.isfinite().all(1)).nonzero().flatten().tolist()
        if spoilt:
            raise ValueError(f"expected finite logits, got others for samples of the target classes {spoilt[:20]}")
        rows = sums / counts.clamp_min(1)[:, None] if samples is None else self._reverse(*samples, len(counts))
        mean = sums.sum(0) / counts.sum()
        constant = {"uniform": 1 / len(mean), "error": math.nan}
        rows[counts == 0] = mean if self.absent == "mean" else torch.full_like(mean, constant[self.absent])
        return rows.float().numpy()

    def _reverse(self, probabilities: Tensor, labels: Tensor, num_classes: int) -> Tensor:
        """The rows by the paper's way, from samples."""
        present, labels = labels.unique(return_inverse=True)
        logits = target_logits(probabilities.numpy(), labels.numpy(), self.C)
        # p(y_t | y_s) p(y_s) over its sum over y_s; in logarithms, because a whole row may underflow
        log_joint = F.log_softmax(logits, dim=1).T + probabilities.mean(0).log()
        rows = probabilities.new_zeros(num_classes, probabilities.size(1))
        rows[present] = F.softmax(log_joint, dim=1)
        return rows

    def _fingerprint(self) -> tuple[str, str]:
        """The fingerprint of all that decides the relationship, or what it depends on that can't be known."""
        share = share_of(self.data_loader, self.process_group)
        options = [getattr(self, name) for name in _OPTIONS]
        parts: list[Any] = [options, model_parts(self.classifier)]
        if type(self) is not Relationship:
            parts += [type(self), {name: value for name, value in vars(self).items() if name not in _ATTRIBUTES}]

        def own() -> tuple[str, str]:
            try:
                return fingerprint(*parts, *loader_parts(self.data_loader, False, all_ranks=share is not None)), ""
            except Unknown as error:
                return "", str(error)

        told = gathered(together(own, self.process_group), self.process_group)
        unknown = [reason for _, reason in told if reason]
        if unknown:
            return "", unknown[0]
        found = [mine for mine, _ in told]
        # data that the ranks share are the same for any number of ranks
        alike = len(found) == 1 or (share is not None and len(set(found)) == 1)
        return (found[0] if alike else fingerprint(*found)), ""

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "process_group": None}  # a group can't be pickled


_COLLECT, _RELATE = Relationship.collect_labels, Relationship.get_category_relationship
_OPTIONS = ("num_classes", "absent", "method", "temperature", "C")
# attributes that the fingerprint covers elsewhere, or that decide nothing
_ATTRIBUTES = {*_OPTIONS, "data_loader", "classifier", "device", "process_group", "_progress"}


def _read_cache(path: Path, fingerprint: str, num_classes: int | None, or_npy: bool) -> tuple[np.ndarray | None, str]:
    """The table in a file, or the reason to compute it again.

    With ``or_npy`` a file of the Transfer-Learning-Library, which ends in .npy, is a reason too.
    """
    if not path.exists():
        other = path.with_suffix(".npy")
        if not or_npy or not other.exists():
            return None, ""
        return None, (
            f"the cached relationship {other} is computed again: it has no fingerprint, so what it was made from is "
            f"unknown; the file stays, and to use it, set .relationship = numpy.load({str(other)!r})"
        )
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            table = stored["relationship"]
            if str(stored["fingerprint"]) != fingerprint:
                reason = "it was made from another classifier, data set or options"
            elif table.ndim != 2 or (num_classes is not None and len(table) != num_classes):
                reason = f"it holds a table of shape {list(table.shape)}"
            else:
                return table, ""
    except Exception as error:  # zip, its codecs and NumPy have different errors for a damaged file
        reason = f"it can't be read ({error})"
    return None, f"the cached relationship {path} is computed again: {reason}"
