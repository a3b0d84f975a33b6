"""What several processes learn of a data set that they share out equals what one learns of all of it."""

import copy
import importlib
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from rank_support import in_group, needs_gloo, spawn_ranks
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, Subset, TensorDataset

from talib_fast.finetune.co_tuning import Relationship
from talib_fast.finetune.lwf import collect_pretrain_labels

pytestmark = needs_gloo


def labelled(size, classes=3):
    """Samples whose last class comes once, at the end, so that one rank alone sees it."""
    generator = torch.Generator().manual_seed(size)
    labels = torch.arange(size) % (classes - 1)
    labels[-1] = classes - 1
    return TensorDataset(torch.randn(size, 4, generator=generator), labels)


def source_network():
    torch.manual_seed(0)
    return nn.Linear(4, 5).double()


class InDouble:
    """Batches in float64, so that sums in another order agree."""

    def __call__(self, samples):
        x, labels = zip(*samples, strict=True)
        return torch.stack(x).double(), torch.stack(labels)


def relationship_of(loader, group=None, cache=None, network=source_network, **options):
    return Relationship(loader, network(), "cpu", cache, progress=False, process_group=group, **options)


def answers_of(loader, group=None):
    return collect_pretrain_labels(loader, source_network(), "cpu", progress=False, process_group=group)


def loaders_of_a_share(data, rank, ranks):
    """By name: this rank's loader, and the indices that all of them see, in the order in which they are to come."""
    size, everything = len(data), list(range(len(data)))
    installed = importlib.util.find_spec("accelerate")
    accelerate = importlib.import_module("accelerate.data_loader") if installed else None
    for batch_size in (1, 3, 6):
        plain = DataLoader(data, batch_size, collate_fn=InDouble())
        for options in ({}, {"shuffle": True, "seed": 3}, {"drop_last": True}):
            sampler = DistributedSampler(data, ranks, rank, **{"shuffle": False} | options)
            left = size // ranks * ranks if "drop_last" in options else size
            loader = DataLoader(data, batch_size, sampler=sampler, collate_fn=InDouble())
            yield f"DistributedSampler {options} {batch_size}", loader, everything[:left]
        if accelerate is None:
            continue
        for even in (True, False):
            shards = accelerate.prepare_data_loader(
                plain, num_processes=ranks, process_index=rank, put_on_device=False, even_batches=even
            )
            yield f"accelerate {even} {batch_size}", shards, everything
        if batch_size % ranks == 0:
            halves = accelerate.prepare_data_loader(
                plain, num_processes=ranks, process_index=rank, put_on_device=False, split_batches=True
            )
            yield f"accelerate, split {batch_size}", halves, everything
    own = Subset(data, range(rank, size, ranks))
    in_turns = [index for number in range(ranks) for index in range(number, size, ranks)]
    yield "every rank's own data", DataLoader(own, 2, collate_fn=InDouble()), in_turns


def _learn_as_a_rank(rank, folder):
    group, ranks = dist.group.WORLD, dist.get_world_size()
    methods = ["direct", "reverse"] if ranks == 2 and importlib.util.find_spec("sklearn") else ["direct"]
    with_reverse = ("DistributedSampler {'shuffle': True, 'seed': 3} 3", "accelerate True 3")
    for size in (7, 8, ranks - 1):
        data = labelled(size)
        for name, loader, indices in loaders_of_a_share(data, rank, ranks):
            if not indices:
                continue
            whole = DataLoader(Subset(data, indices), 3, collate_fn=InDouble())
            assert torch.equal(answers_of(loader, group), answers_of(whole)), (name, size)
            for method in methods if name in with_reverse and size == 7 else ["direct"]:
                options = {"method": method, "C": 1.0}
                got, alone = relationship_of(loader, group, **options), relationship_of(whole, **options)
                np.testing.assert_allclose(got.relationship, alone.relationship, rtol=1e-6, err_msg=f"{name} {size}")
                tables = [None] * ranks
                dist.all_gather_object(tables, got.relationship)
                assert all(np.array_equal(table, tables[0], equal_nan=True) for table in tables)
    _keep_as_a_rank(rank, ranks, group, Path(folder))
    _fail_as_a_rank(rank, ranks, group)


def uncalled():
    network = source_network()
    network.register_forward_hook(lambda *_: pytest.fail("the cache was not used"))
    return network


def _keep_as_a_rank(rank, ranks, group, folder):
    """One process's file serves the group, and the other way round; all ranks decide alike."""
    data, path = labelled(7), folder / "relationship.npz"
    alone = DataLoader(data, 4, collate_fn=InDouble())
    sampler = DistributedSampler(data, ranks, rank, shuffle=True)
    shared = DataLoader(data, 2, sampler=sampler, collate_fn=InDouble())
    expected = relationship_of(shared, group, path).relationship
    again = relationship_of(shared, group, path, uncalled).relationship
    np.testing.assert_array_equal(again, expected)
    np.testing.assert_array_equal(relationship_of(alone, None, path, uncalled).relationship, expected)
    given = path if rank == 0 else None  # the first rank's is every rank's
    np.testing.assert_array_equal(relationship_of(shared, group, given, uncalled).relationship, expected)
    dist.barrier()
    with pytest.warns(UserWarning, match="is computed again: it was made") if rank == 0 else nullcontext():
        relationship_of(shared, group, path, temperature=2.0)
    with pytest.warns(UserWarning, match="only this process's share"):
        mine = relationship_of(shared, num_classes=3, absent="mean").relationship
    assert not np.allclose(mine, expected)


class Doubled(Relationship):
    def collect_labels(self):
        probabilities, labels = super().collect_labels()
        assert len(labels) == 7  # of all ranks
        return probabilities, labels * 2


def _fail_as_a_rank(rank, ranks, group):
    """An error of one rank is every rank's."""
    data = labelled(7)
    shared = DataLoader(data, 2, sampler=DistributedSampler(data, ranks, rank), collate_fn=InDouble())
    doubled = Doubled(shared, source_network(), "cpu", progress=False, process_group=group)
    assert np.isnan(doubled.relationship).all(1).tolist() == [False, True] * 2 + [False]
    assert copy.deepcopy(doubled).process_group is None
    with pytest.raises(ValueError, match=r"labels in \[0, 2\), got labels from"):
        relationship_of(shared, group, num_classes=2)
    with pytest.raises(ValueError, match="method to be direct or reverse, got 'inverse'"):
        relationship_of(shared, group, method="inverse" if rank == 1 else "direct")
    with pytest.raises(TypeError, match="classifier"):
        collect_pretrain_labels(shared, source_network() if rank == 0 else None, "cpu", process_group=group)
    wrong = [(torch.zeros(2, 4).double(), torch.zeros(2 - rank // (ranks - 1), dtype=torch.long))]
    with pytest.raises(ValueError, match=r"one label per input, \[2\], got \[1\]"):
        relationship_of(wrong, group)
    with pytest.raises(TypeError, match=r"batches that are a tensor or start with one, got dict"):
        answers_of([{}] * (rank == 0), group)
    kind, message = (KeyError, "part") if rank == 0 else (RuntimeError, "rank 0: KeyError: 'part'")
    with pytest.raises(kind, match=message):
        answers_of(map({}.__getitem__, ["part"] * (rank == 0)), group)
    with pytest.raises(ValueError, match="at least one batch, got an empty one"):
        answers_of([], group)
    with pytest.raises(ValueError, match=rf"over the {ranks} processes of process_group, got"):
        answers_of(DataLoader(data, sampler=DistributedSampler(data, ranks + 1, rank)), group)
    with pytest.raises(ValueError, match=rf"over the {ranks} processes of process_group, got"):
        answers_of(DataLoader(data, sampler=DistributedSampler(data, ranks, 0)), group)
    fewer = DataLoader(data, 2, sampler=shared.sampler, collate_fn=lambda samples: InDouble()(samples[:1]))
    with pytest.raises(ValueError, match="one output for each of this process's"):
        answers_of(fewer, group)


@pytest.mark.parametrize("ranks", [2, 3])
def test_what_ranks_learn_of_a_data_set_equals_one_process(ranks, tmp_path):
    spawn_ranks(ranks, _learn_as_a_rank, tmp_path)


def test_a_group_of_one_keeps_the_data_sets_order_too(tmp_path):
    data = labelled(7)

    def learn():
        sampler = DistributedSampler(data, shuffle=True)
        shuffled = DataLoader(data, 2, sampler=sampler, collate_fn=InDouble())
        whole = DataLoader(data, 3, collate_fn=InDouble())
        got = answers_of(shuffled, dist.group.WORLD)
        torch.testing.assert_close(got, answers_of(whole))
        assert not torch.allclose(got, answers_of(shuffled))  # in the loader's order

    in_group(learn, init_method=f"file://{tmp_path}/init", rank=0, world_size=1)


def test_a_process_group_is_one():
    for function in (relationship_of, answers_of):
        with pytest.raises(TypeError, match=r"expected a torch\.distributed\.ProcessGroup .*, got str"):
            function([], "gloo")


class Stream(IterableDataset):
    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return iter(self.data)


@pytest.mark.skipif(not importlib.util.find_spec("accelerate"), reason="needs accelerate")
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("options", [{"num_processes": 2, "process_index": 0}, {"dispatch_batches": True}], ids=str)
def test_samples_that_accelerate_may_repeat_unseen_are_warned_of(tmp_path, drop_last, options):
    from accelerate.data_loader import prepare_data_loader

    def learn():
        plain = DataLoader(Stream(labelled(8)), 2, collate_fn=InDouble(), drop_last=drop_last)
        loader = prepare_data_loader(plain, put_on_device=True, device=torch.device("cpu"), **options)
        with nullcontext() if drop_last else pytest.warns(UserWarning, match="which count again; drop_last=True"):
            answers_of(loader, dist.group.WORLD)

    in_group(learn, init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
