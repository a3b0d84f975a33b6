"""Run part of a test in several processes, the ranks of a gloo group."""

import functools
import gc
import itertools
import multiprocessing
import os
import threading
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait

import pytest
import torch
import torch.distributed as dist

needs_gloo = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo backend")

_MOST = 3  # the most ranks of a group
_groups = itertools.count()


@functools.cache
def _processes():
    """The processes of the ranks. They stay for later tests, since starting one takes seconds."""
    return ProcessPoolExecutor(_MOST, multiprocessing.get_context("spawn"), _end_with_the_tests)


def _end_with_the_tests():
    """Let a rank end with its parent, also if the parent is killed and cannot shut the pool down."""

    def wait_for_them():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait_for_them, daemon=True).start()


def end_processes():
    """End the processes; to be called before coverage of this process ends, so that theirs is counted."""
    if _processes.cache_info().currsize:
        _processes().shutdown()
        _processes.cache_clear()


def spawn_ranks(world_size, work, folder, *arguments):
    """Run ``work(rank, folder, *arguments)``, a module-level function, on each of ``world_size`` ranks."""
    assert world_size <= _MOST
    group = {"init_method": f"file://{folder}/group-{next(_groups)}", "world_size": world_size}
    # a rank waits for the others, so no process can take two ranks
    ranks = [_processes().submit(_as_rank, group, rank, work, str(folder), *arguments) for rank in range(world_size)]
    done, _ = wait(ranks, return_when=FIRST_EXCEPTION)
    if failed := [rank for rank in done if rank.exception()]:
        for process in _processes()._processes.values():  # the other ranks may wait for the failed one
            process.kill()
        _processes.cache_clear()
        failed[0].result()


def in_group(work, *arguments, **group):
    """Run ``work(*arguments)`` in the process group that ``group`` describes; the group is the last to be destroyed."""
    dist.init_process_group("gloo", **group)
    try:
        work(*arguments)
    finally:
        # Drop all other references to the group, since its threads must end before the interpreter does. If a model's
        # destructor ended them, it would wait for them while it holds the GIL, which they may need.
        gc.collect()
        dist.destroy_process_group()


def _as_rank(group, rank, work, folder, *arguments):
    torch.set_num_threads(1)
    in_group(work, rank, folder, *arguments, rank=rank, **group)
