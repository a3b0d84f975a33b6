"""What decides the samples of a data loader, and which of them each of several processes gets."""

import copy
import sys
import warnings
from collections.abc import Iterable, Sequence, Sized
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from .fingerprint import Unknown, fingerprint
from .ranks import gathered, together

_UNSHARED = (0, 0)  # number of processes and rank, where no sharing is known


class _Source(NamedTuple):
    """What a sampler draws from, before the processes share it: samples at the positions 0 to ``size`` - 1."""

    size: int
    indices: Sequence | None = None  # the index at each position, if known
    drawn: Sequence | np.ndarray | None = None  # the indices that come once each, in a random order
    decided_by: Any = None  # what decides a random order
    unknown: str = ""  # the reason why nothing of this is known


class _Draws(NamedTuple):
    """Positions in a source, and the length of each batch."""

    positions: np.ndarray
    lengths: list[int]


class _Plan(NamedTuple):
    """Which samples of a source each rank draws."""

    source: _Source
    shares: list[_Draws]  # of every rank
    rank: int


class Share(NamedTuple):
    """One process's part of the samples, in the order in which its loader yields them."""

    counts: np.ndarray  # False for a repeated sample, which only fills a batch or a share
    places: np.ndarray  # places in the whole: the data set's indices for a DistributedSampler, else the sampler's order


def loader_parts(data_loader: Iterable, ordered: bool, all_ranks: bool = False) -> list[Any]:
    """All that decides a loader's samples, for ``fingerprint``, except what a data set draws at random.

    Args:
        data_loader: a DataLoader, or any other iterable, which counts by its content.
        ordered: whether the order of the samples and their batches matters. If not, a shuffled loader counts as the
            same.
        all_ranks: include the samples of all processes among which a distributed sampler shares them.

    Raises:
        Unknown: it can't be known, as with a sampler of the user's own, which may draw random numbers.
    """
    if not isinstance(data_loader, DataLoader):
        return [data_loader]
    loader, skipped = _plain(data_loader)
    parts: list[Any] = [loader.dataset, loader.collate_fn]
    if issubclass(type(data_loader), _accelerate("DataLoaderDispatcher")):
        state = data_loader.state  # type: ignore[attr-defined]
        parts += [type(data_loader).__qualname__, state.num_processes, state.process_index]
    parts.append(loader.worker_init_fn if loader.num_workers else None)
    if ordered and loader.num_workers and not getattr(loader, "in_order", True):
        raise Unknown("the order in which the workers are ready (in_order=False)")
    if type(loader) is not DataLoader:
        plain: DataLoader = DataLoader(loader.dataset)
        usual = vars(plain).keys() | {"_iterator", "_IterableDataset_len_called"}
        parts += [type(loader), {name: value for name, value in vars(loader).items() if name not in usual}]
    if isinstance(loader.dataset, IterableDataset):
        batches = loader.batch_size if ordered or loader.drop_last else None
        return [*parts, loader.num_workers, batches, loader.drop_last, skipped]
    plan = _plan(data_loader)
    draws = _union(plan.shares) if all_ranks else plan.shares[plan.rank]
    return [*parts, *_drawn(plan.source, draws, ordered)]


def sampler_parts(sampler: Any) -> list[Any]:
    """All that decides what a sampler yields, for ``fingerprint``.

    Raises:
        Unknown: it can't be known.
    """
    source, shares, rank = _batched(sampler) if isinstance(sampler, BatchSampler) else _single(sampler)
    return _drawn(source, shares[rank], ordered=True)


def share_of(data_loader: Iterable, process_group: Any) -> Share | None:
    """This process's share of the samples that a distributed sampler distributes. None if no sampler does.

    Raises:
        ValueError: the processes that share the samples are not those of the group.
    """
    if process_group is None:
        return None
    told = gathered(together(lambda: _sharing(data_loader), process_group), process_group)
    if set(told) == {_UNSHARED}:
        _warn_of_repeats(data_loader)
        return None
    if sorted(told) != [(len(told), number) for number in range(len(told))]:
        raise ValueError(
            f"expected a loader whose sampler distributes the data over the {len(told)} processes of process_group, "
            f"got (processes, rank) {told}"
        )
    return together(lambda: _share(data_loader), process_group)


def warn_of_share(data_loader: Iterable, what: str, joins: bool = False) -> None:
    """Warn that ``what`` covers this process's samples only, if the loader's sampler is distributed.

    ``joins``: whether the caller has a process group option, which joins the samples.
    """
    ranks = _ranks(data_loader)
    if ranks > 1:
        remedy = "; process_group=torch.distributed.group.WORLD joins them" if joins else ""
        warnings.warn(
            f"{what} sees only this process's share of the data, one of {ranks}, as the loader or its sampler "
            f"is distributed{remedy}",
            stacklevel=3,
        )


def warn_of_order(data_loader: Iterable, what: str) -> None:
    """Warn that nothing tells which sample is which in ``what``, where the loader draws another order every time."""
    random = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler, _accelerate("SeedableRandomSampler"))
    if isinstance(data_loader, DataLoader) and isinstance(_distributed(_plain(data_loader)[0]), random):
        warnings.warn(
            f"{what} come in the loader's order, which is drawn anew every time: take a loader with shuffle=False, "
            "whose order is the data set's",
            stacklevel=3,
        )


def _warn_of_repeats(data_loader: Any) -> None:
    """Warn of accelerate's loaders that fill batches with repeated samples which can't be recognised."""
    loader, _ = _plain(data_loader)
    if issubclass(type(data_loader), _accelerate("DataLoaderDispatcher")):
        what, complete = "dispatches batches", data_loader._drop_last
    elif isinstance(getattr(loader, "dataset", None), _accelerate("IterableDatasetShard")):
        shard: Any = loader.dataset
        what, complete = "distributes batches of an iterable data set", shard.drop_last
    else:
        return
    if not complete:
        warnings.warn(
            f"accelerate {what} and fills incomplete ones with samples from the start, which count again; "
            "drop_last=True leaves incomplete batches out",
            stacklevel=3,
        )


def _share(data_loader: Any) -> Share:
    """``share_of`` for a loader that is known to be shared."""
    loader, _ = _plain(data_loader)
    if loader.num_workers and not getattr(loader, "in_order", True):
        raise ValueError(
            "expected a loader that keeps its order, by which repeated samples are recognised, got in_order=False"
        )
    source, shares, rank = _plan(data_loader)
    first = np.unique(np.concatenate([share.positions for share in shares]), return_index=True)[1]
    counts = np.zeros(sum(len(share.positions) for share in shares), bool)
    counts[first] = True
    start = sum(len(share.positions) for share in shares[:rank])
    places = shares[rank].positions
    if type(_distributed(loader)) is DistributedSampler:
        places = np.asarray(source.indices)[places]
    return Share(counts[start : start + len(places)], places)


def _accelerate(name: str) -> type | tuple[()]:
    """A class of accelerate's loaders. Until accelerate is imported an empty tuple: nothing is an instance of that."""
    return getattr(sys.modules.get("accelerate.data_loader"), name, ())


def _plain(data_loader: Any) -> tuple[DataLoader, int]:
    """The loader inside one of accelerate's, and how many of its batches are skipped."""
    if issubclass(type(data_loader), _accelerate("DataLoaderAdapter")):  # isinstance sees the class of what it wraps
        return data_loader.base_dataloader, getattr(data_loader, "skip_batches", 0)
    return data_loader, 0


def _batch_sampler(loader: DataLoader) -> Any:
    """What yields the indices of each batch. None where samples come one by one."""
    if loader.batch_sampler is None and isinstance(loader.sampler, BatchSampler):
        return loader.sampler
    return loader.batch_sampler


def _distributed(loader: DataLoader) -> Any:
    """The sampler of a loader that may be distributed."""
    batch_sampler = _batch_sampler(loader)
    return loader.sampler if batch_sampler is None else getattr(batch_sampler, "sampler", None)


def _ranks(data_loader: Any) -> int:
    """The number of processes that share a loader's samples, in any way."""
    if not isinstance(data_loader, DataLoader):
        return 1
    loader, _ = _plain(data_loader)
    if issubclass(type(data_loader), _accelerate("DataLoaderDispatcher")):
        return data_loader.state.num_processes  # type: ignore[attr-defined]
    if isinstance(loader.dataset, _accelerate("IterableDatasetShard")):
        return loader.dataset.num_processes  # type: ignore[attr-defined]
    shard = _batch_sampler(loader)
    if isinstance(shard, _accelerate("BatchSamplerShard")):
        return shard.num_processes  # type: ignore[attr-defined]
    ranks = getattr(_distributed(loader), "num_replicas", 1)
    return ranks if isinstance(ranks, int) else 1


def _sharing(data_loader: Any) -> tuple[int, int]:
    """The number of processes that share a loader's samples in a known way, and the number of this one."""
    if not isinstance(data_loader, DataLoader) or isinstance(data_loader.dataset, IterableDataset):
        return _UNSHARED
    loader, _ = _plain(data_loader)
    batch_sampler = _batch_sampler(loader)
    if isinstance(batch_sampler, _accelerate("BatchSamplerShard")):
        is_plain = type(batch_sampler.batch_sampler) is BatchSampler  # type: ignore[attr-defined]
        return (batch_sampler.num_processes, batch_sampler.process_index) if is_plain else _UNSHARED  # type: ignore
    if batch_sampler is not None and type(batch_sampler) is not BatchSampler:
        return _UNSHARED
    ranks, rank, total = _interleaved(_distributed(loader))
    return (ranks, rank) if total else _UNSHARED


def _plan(data_loader: Any) -> _Plan:
    """Which samples each rank of a loader draws."""
    loader, skipped = _plain(data_loader)
    batch_sampler = _batch_sampler(loader)
    plan = _single(loader.sampler) if batch_sampler is None else _batched(batch_sampler)
    if not skipped:
        return plan
    starts = [sum(share.lengths[:skipped]) for share in plan.shares]
    rest = [
        _Draws(share.positions[start:], share.lengths[skipped:])
        for share, start in zip(plan.shares, starts, strict=True)
    ]
    return plan._replace(shares=rest)


def _single(sampler: Any) -> _Plan:
    """The plan of samples that come one by one."""
    return _in_batches(sampler, 1, drop_last=False)


def _batched(batch_sampler: Any) -> _Plan:
    """The plan of a batch sampler."""
    if isinstance(batch_sampler, (list, tuple)):
        indices = [index for batch in batch_sampler for index in batch]
        lengths = [len(batch) for batch in batch_sampler]
        return _Plan(_Source(len(indices), indices), [_Draws(np.arange(len(indices)), lengths)], 0)
    if isinstance(batch_sampler, _accelerate("BatchSamplerShard")):
        return _sharded(batch_sampler)
    if type(batch_sampler) is BatchSampler:
        return _in_batches(batch_sampler.sampler, batch_sampler.batch_size, batch_sampler.drop_last)
    return _Plan(_unknown(batch_sampler), [_Draws(np.arange(0), [])], 0)


def _in_batches(sampler: Any, batch_size: int, drop_last: bool) -> _Plan:
    """The plan of a sampler whose samples are cut into batches."""
    source, shares = _source(sampler), []
    ranks, rank, total = _interleaved(sampler)
    for number in range(ranks):
        positions = np.arange(number, source.size if ranks == 1 else total, ranks)
        kept = len(positions) // batch_size * batch_size if drop_last else len(positions)
        lengths = [min(batch_size, kept - start) for start in range(0, kept, batch_size)]
        # positions beyond the end repeat samples from the start
        shares.append(_Draws(positions[:kept] % max(1, source.size), lengths))
    return _Plan(source, shares, rank)


def _interleaved(sampler: Any) -> tuple[int, int, int]:
    """Number of processes, number of this one, and total of positions, of which each process takes every so many-th.

    That is how DistributedSampler works, and others that have its attributes and length. For any other sampler 1, 0 and
    0.
    """
    ranks, rank, total = (getattr(sampler, name, 0) for name in ("num_replicas", "rank", "total_size"))
    if not all(isinstance(number, int) for number in (ranks, rank, total)) or not ranks:
        return 1, 0, 0
    data = getattr(sampler, "dataset", None)
    if not isinstance(data, Sized) or not isinstance(sampler, Sized):
        return 1, 0, 0
    alike = total < len(data) + ranks and len(sampler) == len(range(rank, total, ranks))
    if not (isinstance(sampler, DistributedSampler) or alike):
        return 1, 0, 0
    return ranks, rank, total


def _sharded(shard: Any) -> _Plan:
    """The plan of accelerate's batch sampler. It is asked to distribute positions, which shows them."""
    inner = shard.batch_sampler
    if type(inner) is not BatchSampler:
        return _Plan(_unknown(inner), [_Draws(np.arange(0), [])], 0)
    source, shares = _source(inner.sampler), []
    for number in range(shard.num_processes):
        other = copy.copy(shard)
        other.process_index = number
        other.batch_sampler = BatchSampler(range(source.size), inner.batch_size, inner.drop_last)
        batches = list(other)
        positions = [position for batch in batches for position in batch]
        shares.append(_Draws(np.array(positions, dtype=np.int64), [len(batch) for batch in batches]))
    return _Plan(source, shares, shard.process_index)


def _source(sampler: Any) -> _Source:
    """What a sampler draws from."""
    kind = type(sampler)
    if kind is SequentialSampler:
        return _Source(len(sampler.data_source), range(len(sampler.data_source)))
    if kind in (list, tuple, range):
        return _Source(len(sampler), sampler)
    if kind in (np.ndarray, torch.Tensor):
        return _Source(len(sampler), list(sampler) if sampler.ndim > 1 else sampler.tolist())
    if _interleaved(sampler)[2]:
        size = len(sampler.dataset)
        if kind is not DistributedSampler:
            return _unknown(sampler)._replace(size=size)
        undivided = copy.copy(sampler)
        undivided.num_replicas, undivided.rank = 1, 0
        undivided.num_samples = undivided.total_size = size
        return _Source(size, list(undivided))
    if kind is RandomSampler or kind is _accelerate("SeedableRandomSampler"):
        size, total = len(sampler.data_source), sampler.num_samples
        whole = not sampler.replacement and size > 0 and total % size == 0
        drawn = np.tile(np.arange(size), total // size) if whole else None
        decided_by = _state(sampler.generator) if kind is RandomSampler else [sampler.initial_seed, sampler.epoch]
        return _Source(total, None, drawn, [kind.__name__, size, total, sampler.replacement, decided_by])
    if kind is SubsetRandomSampler:
        indices = list(sampler.indices)
        return _Source(len(indices), None, indices, [kind.__name__, indices, _state(sampler.generator)])
    if kind is WeightedRandomSampler:
        decided_by = [kind.__name__, sampler.weights, sampler.replacement, _state(sampler.generator)]
        return _Source(sampler.num_samples, None, None, decided_by)
    return _unknown(sampler)


def _unknown(sampler: Any) -> _Source:
    """The source of a sampler of which nothing is known but, perhaps, its length."""
    try:
        size = len(sampler)
    except Exception:  # a sampler need not have a length
        size = 0
    kind = type(sampler)
    return _Source(size, unknown=f"the sampler {kind.__module__}.{kind.__qualname__}, which may draw random numbers")


def _state(generator: torch.Generator | None) -> torch.Tensor:
    """The state of a generator, or of torch's default generator."""
    return (torch.default_generator if generator is None else generator).get_state()


def _union(shares: list[_Draws]) -> _Draws:
    """The positions of all shares together."""
    return _Draws(np.unique(np.concatenate([share.positions for share in shares])), [])


def _drawn(source: _Source, draws: _Draws, ordered: bool) -> list[Any]:
    """What decides the samples at these positions of a source."""
    if source.unknown:
        raise Unknown(source.unknown)
    positions, lengths = draws.positions, draws.lengths if ordered else []
    if source.indices is not None:
        indices = source.indices
        found = [indices[position] for position in positions.tolist()]
        return [found, lengths] if ordered else [_unordered(found)]
    if not ordered and source.drawn is not None and np.array_equal(np.sort(positions), np.arange(source.size)):
        return [_unordered(source.drawn)]
    return [source.decided_by, positions, lengths]


def _unordered(indices: Sequence | np.ndarray) -> Any:
    """The same for indices in any order."""
    if all(isinstance(index, (int, np.integer)) for index in indices):
        return np.sort(np.asarray(indices, dtype=np.int64))
    return sorted(fingerprint(index) for index in indices)
