"""Running a model over a data loader without leaving traces on the model."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..progress import progress
from .labels import integer_labels


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put ``model`` into evaluation mode and each of its modules back into its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def inputs_of(batch: Any) -> Tensor:
    """The inputs x of a batch ``x`` or ``(x, ...)``."""
    x = batch[0] if isinstance(batch, Sequence) and len(batch) else batch
    if not isinstance(x, Tensor):
        raise TypeError(f"expected batches that are a tensor or start with one, got {type(batch).__name__}")
    return x


def labels_of(batch: Any) -> Tensor:
    """The labels ``[b]`` of a batch ``(x, labels, ...)``, one integer per input."""
    if not isinstance(batch, Sequence) or len(batch) < 2:
        raise TypeError(f"expected batches (x, labels, ...), got {type(batch).__name__}")
    labels = integer_labels(batch[1])
    if labels.shape != (len(inputs_of(batch)),):
        raise ValueError(f"expected one label per input, [{len(inputs_of(batch))}], got {list(labels.shape)}")
    return labels


def predictions(
    data_loader: Iterable, classifier: nn.Module, device: torch.device | str, description: str, show: bool = True
) -> Iterator[tuple[Any, Tensor]]:
    """Each batch of ``data_loader`` with the logits ``[b, N]`` that ``classifier`` gives for it in evaluation mode."""
    with evaluating(classifier):
        for batch in progress(data_loader, description, show=show):
            # the mode spans the loop, but no_grad must not leak into the caller's code between two batches
            with torch.no_grad():
                logits = classifier(inputs_of(batch).to(device, non_blocking=True))
            if not isinstance(logits, Tensor) or logits.dim() != 2:
                got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
                raise ValueError(f"expected the classifier to return logits of shape [b, N] in eval mode, got {got}")
            yield batch, logits


class OnHost:
    """Rows that come batch by batch, collected in host memory.

    From a GPU they travel through pinned memory, and each batch's copy goes on while the next one is computed.
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
        pinned = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
        pinned.copy_(rows, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(rows.device))
        self._on_the_way = pinned, copied

    def _arrive(self) -> None:
        if self._on_the_way is None:
            return
        pinned, copied = self._on_the_way
        copied.synchronize()
        self._batches.append(pinned.clone())  # into ordinary memory: pinned memory is scarce, and used again
        self._on_the_way = None

    def joined(self) -> Tensor:
        """All rows in their order, ``[N, ...]``; at least one batch must have been collected."""
        self._arrive()
        return torch.cat(self._batches)

    def __len__(self) -> int:
        """The number of batches."""
        return len(self._batches) + (self._on_the_way is not None)
