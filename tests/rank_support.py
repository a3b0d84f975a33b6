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


def _as_rank(rank, world_size, work, folder, *arguments):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=world_size)
    try:
        work(rank, folder, *arguments)
    finally:
        gc.collect()  # nothing else may hold the group: its threads have to end before the interpreter does
        dist.destroy_process_group()
