"""Helpers for tests of kernels on a GPU."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch


@contextlib.contextmanager
def no_synchronisation() -> Iterator[None]:
    """A context in which a synchronisation with the device is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def capture(step: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A CUDA graph of ``step`` and its static output, captured after a step on a side stream."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        filled = step()
    return graph, filled


def kernels(step: Callable[[], Any], operation: str) -> list[str]:
    """The names of the operation's kernels that ``step`` launches in its second call."""
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    return [event.name for event in profile.events() if operation in event.name]
