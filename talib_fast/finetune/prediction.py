"""Running a model over a data loader without leaving traces on the model."""

from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..progress import progress


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
    labels = torch.as_tensor(batch[1])
    if labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"expected integer labels, got {labels.dtype}")
    if labels.shape != (len(inputs_of(batch)),):
        raise ValueError(f"expected one label per input, [{len(inputs_of(batch))}], got {list(labels.shape)}")
    return labels.long()


def predictions(
    data_loader: Iterable, classifier: nn.Module, device: torch.device | str, description: str, show: bool = True
) -> Iterator[tuple[Any, Tensor]]:
    """Each batch of ``data_loader`` with the logits ``[b, N]`` that ``classifier`` gives for it in evaluation mode."""
    total = len(data_loader) if isinstance(data_loader, Sized) else None
    with evaluating(classifier):
        for batch in progress(data_loader, description, total, show):
            # the mode spans the loop, but no_grad must not leak into the caller's code between two batches
            with torch.no_grad():
                logits = classifier(inputs_of(batch).to(device, non_blocking=True))
            if not isinstance(logits, Tensor) or logits.dim() != 2:
                got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
                raise ValueError(f"expected the classifier to return logits of shape [b, N] in eval mode, got {got}")
            yield batch, logits
