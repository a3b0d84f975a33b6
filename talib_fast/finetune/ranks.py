"""Work that the processes of a group do together. Without a group (None) each function works alone."""

import builtins
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def check_group(process_group: Any) -> None:
    """Raise TypeError unless ``process_group`` is None or a group that this process is in."""
    if process_group is not None and not (dist.is_available() and isinstance(process_group, dist.ProcessGroup)):
        got = type(process_group).__name__
        raise TypeError(f"expected a torch.distributed.ProcessGroup that this process is in, or None, got {got}")


def is_first(group: Any) -> bool:
    """Whether this process is the first of the group."""
    return group is None or dist.get_rank(group) == 0


def gathered(value: T, group: Any) -> list[T]:
    """The ``value`` of every rank, in rank order. It must be possible to pickle it."""
    if group is None:
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group)
    return values


def attempted(
    work: Callable[[], T], group: Any, caught: type[Exception] | tuple[type[Exception], ...] = Exception
) -> tuple[T | None, Exception | None, list[tuple[str, str] | None]]:
    """Do ``work`` on every rank and exchange the errors.

    Returns:
        What ``work`` returned on this rank, this rank's error or None, and the kind and message of every rank's error.
    """
    result, mine = None, None
    try:
        result = work()
    except caught as error:
        mine = error
    return result, mine, gathered(None if mine is None else (type(mine).__name__, str(mine)), group)


def together(work: Callable[[], T], group: Any) -> T:
    """Do ``work`` on every rank and return this rank's result. An error on one rank is raised on all."""
    if group is None:
        return work()
    result, mine, errors = attempted(work, group)
    for rank, told in enumerate(errors):
        if told is None:
            continue
        if rank == dist.get_rank(group) and mine is not None:
            raise mine
        kind = getattr(builtins, told[0], None)
        if kind not in (ValueError, TypeError, ImportError, OSError, MemoryError):
            raise RuntimeError(f"rank {rank}: {told[0]}: {told[1]}") from mine
        raise kind(f"rank {rank}: {told[1]}") from mine
    return result  # type: ignore[return-value]


def sent_by_first(value: T, group: Any) -> T:
    """The ``value`` of the group's first rank, on every rank. It must be possible to pickle it."""
    if group is None:
        return value
    values = [value]
    dist.broadcast_object_list(values, dist.get_global_rank(group, 0), group)
    return values[0]


def from_first(work: Callable[[], T], group: Any) -> T:
    """Do ``work`` on the group's first rank, and return its result on every rank. It must be possible to pickle it."""
    return sent_by_first(together(work if is_first(group) else lambda: None, group), group)  # type: ignore[return-value]


def summed(tensor: Tensor, group: Any) -> Tensor:
    """The sum over the ranks of tensors of one shape, on the CPU."""
    if group is not None:
        tensor = tensor.to(_reachable(group, tensor.device))
        dist.all_reduce(tensor, group=group)
    return tensor.cpu()


def gathered_rows(rows: Tensor, group: Any) -> list[Tensor]:
    """The ``rows`` of every rank, in rank order: CPU tensors that differ in their first dimension only."""
    if group is None:
        return [rows]
    counts = gathered(len(rows), group)
    device = _reachable(group, torch.device("cuda"))
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    sent = padded.flatten().view(torch.uint8).to(device)  # bytes, because not every backend supports every dtype
    parts = [torch.empty_like(sent) for _ in counts]
    dist.all_gather(parts, sent, group)
    found = [part.cpu().view(rows.dtype).view_as(padded) for part in parts]
    return [part[:count] for part, count in zip(found, counts, strict=True)]


def _reachable(group: Any, device: torch.device) -> torch.device:
    """The CPU if the group's backend supports it, else ``device``."""
    return torch.device("cpu") if "cpu:" in str(dist.get_backend_config(group)) else device
