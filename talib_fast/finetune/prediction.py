"""Run a model over a data loader and leave the model as it was."""

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..progress import progress
from .folding import folded
from .labels import integer_labels
from .loader import Share
from .ranks import gathered, gathered_rows, together


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A context in which ``model`` is in evaluation mode. Afterwards each of its modules has its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def inputs_of(batch: Any) -> Any:
    """The inputs x of a batch ``x`` or ``(x, ...)``: a tensor, or another object with a method ``to(device)``."""
    # a PackedSequence is a tuple, but an input as a whole
    listed = isinstance(batch, Sequence) and not isinstance(batch, PackedSequence)
    x = batch[0] if listed and len(batch) else batch
    if not callable(getattr(x, "to", None)):
        raise TypeError(
            f"expected batches that are a tensor or start with one, got {type(batch).__name__}; "
            "other inputs need a method to(device)"
        )
    return x


def labels_of(batch: Any) -> Any:
    """The labels of a batch ``(x, labels, ...)``, of any kind."""
    if not isinstance(batch, Sequence) or isinstance(batch, PackedSequence) or len(batch) < 2:
        raise TypeError(f"expected batches (x, labels, ...), got {type(batch).__name__}")
    return batch[1]


def class_labels_of(batch: Any, size: int) -> Tensor:
    """The labels ``[b]`` of a batch. They must be integers, one for each of ``size`` inputs."""
    labels = integer_labels(labels_of(batch))
    if labels.shape != (size,):
        raise ValueError(f"expected one label per input, [{size}], got {list(labels.shape)}")
    return labels


def predictions(
    data_loader: Iterable,
    classifier: nn.Module,
    device: torch.device | str,
    description: str,
    show: bool = True,
    maps: bool = False,
) -> Generator[tuple[Any, Tensor], None, None]:
    """Each batch of ``data_loader`` with the logits ``[b, N]`` of ``classifier`` in evaluation mode.

    With ``maps`` they may have any shape ``[b, ...]``. From the second batch on the batch norms are folded.
    """
    with evaluating(classifier), folded(classifier) as classify:
        for batch in progress(data_loader, description, show=show):
            x = inputs_of(batch)
            # not around the loop: the caller's code between two batches must keep its own mode
            with torch.no_grad():
                logits = classify(x.to(device, non_blocking=True) if isinstance(x, Tensor) else x.to(device))
            fits = isinstance(logits, Tensor) and logits.dim() == 2
            if maps and isinstance(logits, Tensor) and logits.dim():
                fits = fits or not isinstance(x, Tensor) or logits.shape[:1] == x.shape[:1]
            if not fits:
                got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
                raise ValueError(f"expected the classifier to return logits of shape [b, N] in eval mode, got {got}")
            yield batch, logits


def counted(
    batches: Generator[tuple[Any, Tensor], None, None], share: Share | None
) -> Iterator[tuple[Any, Tensor, Tensor | None]]:
    """Batches and logits, and which of their samples count: booleans on the CPU, or None if all count.

    Raises:
        ValueError: the number of samples is not that of the share.
    """
    start = 0
    with closing(batches):  # after an error its traceback would keep the generator, and evaluation mode, alive
        for batch, logits in batches:
            counts = None if share is None else torch.from_numpy(share.counts[start : start + len(logits)])
            start += len(logits)
            if counts is not None and len(counts) < len(logits):
                break
            yield batch, logits, None if counts is None or bool(counts.all()) else counts
    if share is not None and start != len(share.counts):
        raise ValueError(
            f"expected one output for each of this process's {len(share.counts)} samples, got {start} or more: if a "
            "loader leaves samples out, repeated ones can't be recognised"
        )


class OnHost:
    """Collects rows in host memory, batch by batch.

    From a GPU they are copied through pinned memory, while the next batch is computed.
    """

    def __init__(self) -> None:
        self._batches: list[Tensor] = []
        self._on_the_way: tuple[Tensor, torch.cuda.Event] | None = None

    def append(self, rows: Tensor) -> None:
        """Collect one more batch."""
        self._arrive()
        if rows.device.type != "cuda":
            self._batches.append(rows.cpu())
            return
        pinned = torch.empty(rows.shape, dtype=rows.dtype, device="cpu", pin_memory=True)
        pinned.copy_(rows, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(rows.device))
        self._on_the_way = pinned, copied

    def _arrive(self) -> None:
        """Wait for the copy of the last batch."""
        if self._on_the_way is None:
            return
        pinned, copied = self._on_the_way
        copied.synchronize()
        self._batches.append(pinned.clone())  # in ordinary memory, because pinned memory is scarce and is reused
        self._on_the_way = None

    def joined(self) -> Tensor:
        """All rows in order, ``[N, ...]``. At least one batch must have been collected.

        Training can use them, even if they were computed under :class:`torch.inference_mode`.
        """
        self._arrive()
        with torch.inference_mode(False), torch.no_grad():
            return torch.cat(self._batches)

    def __len__(self) -> int:
        """The number of batches."""
        return len(self._batches) + (self._on_the_way is not None)


def joined_over_ranks(collected: OnHost, share: Share | None, process_group: Any) -> Tensor:
    """The rows of all processes on the CPU, in the order of the whole if it is known, else in the order of the ranks.

    Raises:
        ValueError: there are none, or they differ in dtype or shape.
    """
    rows = together(lambda: collected.joined() if len(collected) else None, process_group)
    told = gathered(None if rows is None else (rows.dtype, tuple(rows.shape[1:])), process_group)
    kinds = [kind for kind in told if kind is not None]
    if not kinds:
        raise ValueError("expected a data loader with at least one batch, got an empty one")
    if any(kind != kinds[0] for kind in kinds):
        raise ValueError(f"expected outputs of one dtype and shape on all ranks, got {kinds}")
    if process_group is None:
        return rows  # type: ignore[return-value]
    with torch.inference_mode(False), torch.no_grad():
        if rows is None:
            rows = torch.empty(0, *kinds[0][1], dtype=kinds[0][0], device="cpu")
        joined = torch.cat(gathered_rows(rows, process_group))
        if share is None:
            return joined
        places = np.concatenate(gathered(share.places[share.counts], process_group))
        return joined[torch.from_numpy(np.argsort(places, kind="stable"))]
