"""How a source classifier sees the target classes: the category relationship of Co-Tuning.

https://proceedings.neurips.cc/paper/2020/hash/c8067ad1937f728f51288b3eb986afaa-Abstract.html
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

    ``direct`` averages the source probabilities over the samples of a class. ``reverse`` is the paper's: it fits
    p(y_t | y_s), a logistic regression from source probabilities to target classes, calibrates it by a temperature, and
    turns it round by Bayes' rule with the mean source probabilities as p(y_s). Strength of regularisation and
    temperature are those that predict best, by cross entropy, what up to five folds of the samples hold out in turn;
    the labels are smoothed by one sample in all that are held out and two more, so that few samples, all predicted,
    don't make it certain. Where fewer than two classes have two samples, nothing can be held out: the first C is
    taken, uncalibrated. It needs scikit-learn.

    A subclass may have a ``collect_labels`` or ``get_category_relationship`` of its own, which then decide.

    A cache saves the pass over the data. It is stored as ``.npz`` (in place of ``.npy``, after any other name), written
    in one step, and used only if its fingerprint fits the classifier's weights and layers, the options and what
    decides the loader's samples: the data set and ``collate_fn``, by what :mod:`pickle` would save of them and by the
    code of their classes and functions, and the sampler's indices, in whatever order. Otherwise it is computed again,
    with a warning; and so it is every time where something of this can't be known, as with a generator, an open file
    or a sampler of one's own. Not seen are the classifier's code, the contents of files that the data set only names,
    and random numbers that it draws. An ``.npy`` of the Transfer-Learning-Library has no fingerprint: it is left alone,
    with a warning that says how to use it.

    Args:
        data_loader: batches ``(x, labels, ...)`` of the target data; x is a tensor or moves by its ``to(device)``.
        classifier: gives source logits ``[b, N_p]`` in evaluation mode, from the second batch on with batch norms
            folded as by :func:`~talib_fast.finetune.frozen.frozen`; afterwards it is as it was.
        device: where the classifier is.
        cache: file to keep the relationship in.
        num_classes: number of target classes N_t; by default the largest label + 1.
        absent: what a target class without a sample gets: with ``error`` a row of NaN, and looking it up raises;
            ``mean`` gives it the mean over all samples, ``uniform`` 1/N_p.
        method: ``direct`` or ``reverse``.
        temperature: divides the logits, see :func:`calibrate_temperature`.
        C: inverse regularisation strength of the logistic regression, for ``reverse``, or several to choose from.
        progress: show a progress bar.
        process_group: processes that share out the data; each of them gets what one process would compute of all. A
            :class:`~torch.utils.data.DistributedSampler` may repeat samples, as may the sampler of accelerate's
            ``prepare_data_loader``: they count once. Of data that are shared out in another way every sample of every
            process counts, with a warning where accelerate fills batches up with repeated ones, as it does with
            iterable data sets and dispatched batches. The group's first process reads and writes the cache, if it's
            given one. By default each process is alone.

    Attributes:
        relationship: float32 array ``[N_t, N_p]``, rows sum to 1. Another one may be assigned.

    Raises:
        TypeError, ValueError: batches, labels or options are not as above, the loader is empty, or logits of a class
            are not finite; on all processes if on one.
        ImportError: ``reverse`` without scikit-learn.
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
                    import sklearn.linear_model  # noqa: F401  before the data is gone through
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
        if cache is None:
            self.relationship = self._learn()
            return
        path = Path(cache)
        if path.suffix != ".npz":
            path = path.with_name(f"{path.name.removesuffix('.npy')}.npz")
        fingerprint, unknown = self._fingerprint()

        def read() -> tuple[np.ndarray | None, str]:
            if unknown:
                return None, f"the cached relationship {path} is computed again every time: it depends on {unknown}"
            return _read_cache(path, fingerprint, num_classes, upstreams=Path(cache).suffix != ".npz")

        cached, message = from_first(read, process_group)
        if message:  # where warnings are errors, the first rank's is every rank's
            from_first(lambda: warnings.warn(message, stacklevel=5), process_group)
        if cached is None:
            cached = self._learn()
            if not unknown:

                def write() -> None:
                    write_atomically(path, lambda file: np.savez(file, relationship=cached, fingerprint=fingerprint))

                from_first(write, process_group)
        self.relationship = cached

    @property
    def relationship(self) -> np.ndarray:
        return self._relationship

    @relationship.setter
    def relationship(self, relationship: np.ndarray) -> None:
        self._relationship = np.asarray(relationship, dtype=np.float32)
        absent = np.isnan(self._relationship).all(1) if self._relationship.ndim == 2 else ()
        self._absent_classes = frozenset(np.flatnonzero(absent).tolist())
        self._on_device: dict[torch.device, Tensor] = {}  # copies of it

    def __getitem__(self, category: Any) -> np.ndarray:
        """Row or rows of the relationship as a numpy array.

        Args:
            category: what NumPy takes for an index, or a tensor of labels.

        Raises:
            TypeError, ValueError: a tensor's labels are no integers, or out of range.
            ValueError: a class had no samples, and no row by ``absent`` either.
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
        """The rows for ``labels`` ``[b]`` as a float32 tensor ``[b, N_p]`` on the labels' device, without a sync.

        Raises:
            TypeError: the labels are no integers.
            ValueError: a label on the CPU is out of range, or of a class that had no samples. On an accelerator, and
                in compiled code, the first ends in a kernel's own bounds check, and the second gives a row of NaN.
        """
        labels = integer_labels(labels)
        table = self._on_device.get(labels.device)
        if table is None:
            table = self._on_device[labels.device] = self._table_on(labels.device)
        if labels.device.type == "cpu" and not torch.compiler.is_compiling():
            check_range(labels, len(table))
            if self._absent_classes:
                self._check_samples(labels.flatten().tolist())
        # unlike indexing, a gather takes no negative label, and it is faster
        rows = labels.reshape(-1, 1).expand(-1, table.size(1))
        return table.gather(0, rows).view(*labels.shape, table.size(1))

    def _table_on(self, device: torch.device) -> Tensor:
        if torch.compiler.is_compiling():
            return torch.from_numpy(self.relationship).to(device)
        with torch.inference_mode(False):  # it is kept for training too
            return torch.from_numpy(self.relationship).to(device)

    def _check_samples(self, labels: Iterable[int]) -> None:
        missing = sorted(self._absent_classes.intersection(labels))
        if missing:
            raise ValueError(
                f"expected labels of classes with samples, but {missing[:20]} had none when the relationship was "
                "learned; absent='mean' or absent='uniform' gives them a row all the same"
            )

    def collect_labels(self) -> tuple[np.ndarray, np.ndarray]:
        """Go through the data, of all processes if there is a process group.

        Returns:
            Source probabilities ``[N, N_p]`` and target labels ``[N]`` of all samples.
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
        """The relationship that the samples show.

        Args:
            source_probabilities: ``[N, N_p]``.
            target_labels: ``[N]``.

        Returns:
            p(y_s | y_t), float32 ``[N_t, N_p]``.
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

    def _learn(self) -> np.ndarray:
        kind = type(self)
        own = kind.collect_labels is _COLLECT and kind.get_category_relationship is _RELATE
        if own and self.method == "direct":  # of which the sums are enough
            return self._table(*self._sums())
        collected = self.collect_labels()
        table = together(lambda: self.get_category_relationship(*collected), self.process_group)
        return from_first(lambda: np.asarray(table, dtype=np.float32), self.process_group)

    def _samples(self, share: Share | None) -> Iterator[tuple[Tensor, Tensor]]:
        """Each batch's labels, on the CPU, and logits, without samples that count elsewhere."""
        batches = predictions(self.data_loader, self.classifier, self.device, "Collecting labels", self._progress)
        for batch, logits, counts in counted(batches, share):
            labels = class_labels_of(batch, len(logits)).cpu()
            if counts is not None:
                labels, logits = labels[counts], logits[counts.to(logits.device)]
            if len(labels):
                yield labels, logits

    def _sums(self) -> tuple[Tensor, Tensor]:
        """The source probabilities' sums ``[N_t, N_p]`` and the numbers of samples ``[N_t]`` by class, of all ranks."""
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
        """The rows from the sums by class, or from ``samples`` of probabilities and labels."""
        spoilt = (~sums.isfinite().all(1)).nonzero().flatten().tolist()
        if spoilt:
            raise ValueError(f"expected finite logits, got others for samples of the target classes {spoilt[:20]}")
        rows = sums / counts.clamp_min(1)[:, None] if samples is None else self._reverse(*samples, len(counts))
        mean = sums.sum(0) / counts.sum()
        constant = {"uniform": 1 / len(mean), "error": math.nan}
        rows[counts == 0] = mean if self.absent == "mean" else torch.full_like(mean, constant[self.absent])
        return rows.float().numpy()

    def _reverse(self, probabilities: Tensor, labels: Tensor, num_classes: int) -> Tensor:
        present, labels = labels.unique(return_inverse=True)
        logits = target_logits(probabilities.numpy(), labels.numpy(), self.C)
        # p(y_t | y_s) p(y_s) over its sum over y_s; in logarithms, as all of a row may be too small for a number
        log_joint = F.log_softmax(logits, dim=1).T + probabilities.mean(0).log()
        rows = probabilities.new_zeros(num_classes, probabilities.size(1))
        rows[present] = F.softmax(log_joint, dim=1)
        return rows

    def _fingerprint(self) -> tuple[str, str]:
        """Of all that decides the relationship, on whichever rank; or what it depends on that can't be known."""
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
        # what the ranks share out is the same for any number of them
        alike = len(found) == 1 or (share is not None and len(set(found)) == 1)
        return (found[0] if alike else fingerprint(*found)), ""

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "process_group": None}  # which can't be pickled


_COLLECT, _RELATE = Relationship.collect_labels, Relationship.get_category_relationship
_OPTIONS = ("num_classes", "absent", "method", "temperature", "C")
# what the fingerprint sees elsewhere, or what decides nothing
_ATTRIBUTES = {*_OPTIONS, "data_loader", "classifier", "device", "process_group", "_progress"}


def _read_cache(
    path: Path, fingerprint: str, num_classes: int | None, upstreams: bool
) -> tuple[np.ndarray | None, str]:
    """The table in a file, or why it is to be computed again; ``upstreams``: look for the library's own file too."""
    if not path.exists():
        other = path.with_suffix(".npy")
        if not upstreams or not other.exists():
            return None, ""
        return None, (
            f"the cached relationship {other} is computed again: it has no fingerprint, so that nothing tells what it "
            f"was made from; it is left alone, and to use it, set .relationship = numpy.load({str(other)!r})"
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
    except Exception as error:  # zip, its codecs and numpy each have their own errors for a damaged file
        reason = f"it can't be read ({error})"
    return None, f"the cached relationship {path} is computed again: {reason}"
