"""Data-parallel training under torchrun: each process (rank) takes a share of every batch.

Without torchrun there is one rank, 0, and no process group. Every function here then works alone. Ranks exchange
tensors on a GPU by NCCL and everything else by gloo, which notices when a rank ends.
"""

import gc
import os
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import UsageError, UserError, told
from ..finetune.ranks import attempted, sent_by_first
from ..finetune.stochnorm import StochNorm1d, StochNorm2d, StochNorm3d, SyncStochNorm, convert_model, convert_sync

TIMEOUT = timedelta(days=1)  # the others may wait long for rank 0; torchrun ends them if it fails

T = TypeVar("T")


class RankError(UserError):
    """An error that perhaps only this rank has, so this rank prints it itself."""


def world_size() -> int:
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


def rank() -> int:
    return int(os.environ["RANK"]) if launched() else 0


def launched() -> bool:
    """Whether torchrun started this process."""
    return dist.is_available() and dist.is_torchelastic_launched()


@contextmanager
def joined() -> Iterator[None]:
    """A context with a process group, in which only rank 0 prints and warns.

    Raises UserError if another rank has ended and cannot be reached any more.
    """
    if world_size() == 1:
        yield
        return
    nccl = torch.cuda.is_available() and dist.is_nccl_available()
    dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "cpu:gloo", timeout=TIMEOUT)
    try:
        with quiet(rank() > 0):
            yield
    except BaseException as error:
        for number in (signal.SIGINT, signal.SIGTERM):  # ignore torchrun's signal for the end of another rank
            signal.signal(number, signal.SIG_IGN)
        if dist.group.WORLD is not None:
            dist.group.WORLD.abort()  # an orderly shutdown would wait for ranks that have ended
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)):
            raise UserError(
                "another process ended too early, so all processes end; the same command continues"
            ) from error
        raise
    finally:
        gc.collect()  # drop other references to the group: its threads must end before the interpreter does
        dist.destroy_process_group()


@contextmanager
def quiet(silent: bool) -> Iterator[None]:
    """A context that hides stdout and warnings if ``silent``."""
    if not silent:
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def own_device(device: torch.device) -> torch.device:
    """The device of this process: with several processes, each has a GPU of its own, or all share the CPU."""
    if world_size() == 1:
        return device
    if device.index is not None or device.type not in ("cpu", "cuda"):
        raise UsageError(f"several processes cannot train on the device {device}: choose --device cuda or cpu")
    if device.type == "cpu":
        return device
    gpus, processes = torch.cuda.device_count(), int(os.environ["LOCAL_WORLD_SIZE"])
    if gpus < processes:
        raise UsageError(
            f"{processes} processes on this machine need a GPU each, but it has {gpus}: start fewer processes, or "
            "choose --device cpu"
        )
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def together(work: Callable[[], T]) -> T:
    """Do ``work`` on every rank; returns its result. A UserError or OSError of one rank becomes a UserError on all."""
    if world_size() == 1:
        return work()

    def explained() -> T:
        try:
            return work()
        except OSError as error:
            raise UserError(told(error)) from error

    result, mine, errors = attempted(explained, dist.group.WORLD, UserError)
    for number, failure in enumerate(errors):
        if failure is not None:
            kind, message = failure
            raised = UsageError if kind == UsageError.__name__ else UserError
            raise raised(f"rank {number}: {message}" if number else message) from mine
    return result  # type: ignore[return-value]


def from_first(work: Callable[[], T]) -> T:
    """Do ``work`` on rank 0; returns its result on all ranks. The result must be picklable, its tensors on the CPU."""
    if world_size() == 1:
        return work()
    return sent_by_first(together(work if rank() == 0 else lambda: None), dist.group.WORLD)  # type: ignore[return-value]


def summed(*numbers: float) -> list[float]:
    """Each number summed over the ranks."""
    total = torch.tensor(numbers, dtype=torch.float64)
    if world_size() > 1:
        dist.all_reduce(total)
    return total.tolist()


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its mean over the ranks, in one collective."""
    if world_size() == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    joined = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(joined)
    joined /= world_size()
    for gradient, mean in zip(gradients, joined.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


_SYNCHRONIZED = (nn.SyncBatchNorm, SyncStochNorm)


def synchronize(module: nn.Module, device: torch.device) -> None:
    """Change ``module`` in place: its batch norms and stochastic norms take the statistics of the whole batch."""
    left = []
    for name, layer in module.named_modules():
        if type(layer) in (StochNorm1d, StochNorm2d, StochNorm3d):
            convert_sync(layer)
        elif type(layer) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
            if device.type == "cuda":
                layer.__class__ = nn.SyncBatchNorm
                layer.process_group = None
            else:  # SyncBatchNorm runs on GPUs only; a stochastic norm with p = 1 computes the same on any device
                convert_sync(convert_model(layer, 1.0))
        elif isinstance(layer, _BatchNorm) and not isinstance(layer, _SYNCHRONIZED):
            left.append(f"{name} ({type(layer).__name__})")
    if left:
        warnings.warn(
            f"each process normalises only its own share of a batch in {', '.join(left)}, which cannot be synchronised",
            stacklevel=2,
        )


def share_statistics(module: nn.Module) -> None:
    """Copy rank 0's running statistics to all ranks, for the norms that :func:`synchronize` could not change."""
    if world_size() == 1:
        return
    for layer in module.modules():
        if isinstance(layer, _BatchNorm) and not isinstance(layer, _SYNCHRONIZED):
            for buffer in layer.buffers(recurse=False):
                dist.broadcast(buffer, 0)


def share(length: int) -> slice:
    """This rank's part of a batch of that length, which the ranks divide evenly."""
    size = length // world_size()
    return slice(rank() * size, (rank() + 1) * size)
