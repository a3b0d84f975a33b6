"""Running part of a test in several processes that are the ranks of a gloo group."""

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

_MOST = 3  # ranks of a group
_groups = itertools.count()


@functools.cache
def _processes():
    """They stay for the tests that follow, as it takes seconds to start one."""
    return ProcessPoolExecutor(_MOST, multiprocessing.get_context("spawn"), _end_with_the_tests)


def _end_with_the_tests():
    """Also where those are killed, and so can't say that this process has no more work."""

    def wait_for_them():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait_for_them, daemon=True).start()


def end_processes():
    """To be called while coverage still takes what they saw."""
    if _processes.cache_info().currsize:
        _processes().shutdown()
        _processes.cache_clear()


def spawn_ranks(world_size, work, folder, *arguments):
    """Run ``work(rank, folder, *arguments)``, a function of a module, on each of ``world_size`` ranks."""
    assert world_size <= _MOST
    group = {"init_method": f"file://{folder}/group-{next(_groups)}", "world_size": world_size}
    # each rank waits for the others, so that no process takes two of them
    ranks = [_processes().submit(_as_rank, group, rank, work, str(folder), *arguments) for rank in range(world_size)]
    done, _ = wait(ranks, return_when=FIRST_EXCEPTION)
    if failed := [rank for rank in done if rank.exception()]:
        for process in _processes()._processes.values():  # the other ranks may wait for the failed one
            process.kill()
        _processes.cache_clear()
        failed[0].result()


def in_group(work, *arguments, **group):
    """Run ``work(*arguments)`` in the process group that ``group`` describes; it ends after all that ``work`` made."""
    dist.init_process_group("gloo", **group)
    try:
        work(*arguments)
    finally:
        # nothing else may hold the group: its threads have to end before the interpreter does, and not from a model's
        # end, which waits for them with the GIL that they may want
        gc.collect()
        dist.destroy_process_group()


def _as_rank(group, rank, work, folder, *arguments):
    torch.set_num_threads(1)
    in_group(work, rank, folder, *arguments, rank=rank, **group)
