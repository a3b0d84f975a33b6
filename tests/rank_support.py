"""Running part of a test in several processes that are the ranks of a gloo group."""

import gc

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

needs_gloo = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo backend")


def spawn_ranks(world_size, work, folder, *arguments):
    """Run ``work(rank, folder, *arguments)``, a function of a module, on each of ``world_size`` ranks."""
    mp.spawn(_as_rank, (world_size, work, str(folder), *arguments), nprocs=world_size)


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


def _as_rank(rank, world_size, work, folder, *arguments):
    torch.set_num_threads(1)
    in_group(work, rank, folder, *arguments, init_method=f"file://{folder}/init", rank=rank, world_size=world_size)
