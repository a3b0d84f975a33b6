"""What decides a loader's samples: caches of another loader are not used, those of the same one are."""

import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from process_support import PATIENCE
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

from talib_fast.finetune.co_tuning import Relationship
from talib_fast.finetune.delta import channel_attention
from talib_fast.finetune.fingerprint import Unknown, fingerprint
from talib_fast.finetune.loader import loader_parts
from talib_fast.finetune.lwf import collect_pretrain_labels

SIZE = 12
DATA = TensorDataset(torch.arange(2.0 * SIZE).view(SIZE, 2), torch.arange(SIZE) % 3)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


class Scaling:
    def __init__(self, by):
        self.by = by

    def __call__(self, samples):
        x, labels = default_collate(samples)
        return self.by * x, labels


def scaled(by, samples):
    return Scaling(by)(samples)


def closing_over(by):
    return lambda samples: Scaling(by)(samples)


class Stream(IterableDataset):
    def __init__(self, samples=DATA):
        self.samples = samples

    def __iter__(self):
        return iter(self.samples)


class Own(DataLoader):
    def __init__(self, *args, by=1, **options):
        super().__init__(*args, **options)
        self.by = by

    def __iter__(self):
        return ((self.by * x, labels) for x, labels in super().__iter__())


class Wrapped:
    def __init__(self, loader):
        self.loader = loader

    def __iter__(self):
        return iter(self.loader)


def weighted(weights=(1.0, 2.0), seed=0):
    return WeightedRandomSampler(weights * (SIZE // 2), 6, generator=seeded(seed))


def seed_worker(number):
    np.random.seed(number)


def seed_otherwise(number):
    np.random.seed(number + 1)


def distributed(rank=0, epoch=0, **options):
    sampler = DistributedSampler(DATA, 2, rank, **options)
    sampler.set_epoch(epoch)
    return sampler


def load(batch_size=4, data=DATA, **options):
    return DataLoader(data, batch_size, **options)


def same(one, other, ordered):
    first, second = (fingerprint(*loader_parts(loader, ordered)) for loader in (one, other))
    return first == second


DIFFERENT = {
    "folds": lambda: (load(sampler=SubsetRandomSampler(range(6))), load(sampler=SubsetRandomSampler(range(6, 12)))),
    "a list's indices": lambda: (load(sampler=[0, 1, 2]), load(sampler=[0, 1, 3])),
    "how often": lambda: (load(sampler=[0, 1, 1]), load(sampler=[0, 0, 1])),
    "all or some": lambda: (load(), load(sampler=range(SIZE - 1))),
    "given batches": lambda: (load(1, batch_sampler=[[0, 1], [2]]), load(1, batch_sampler=[[0, 1], [3]])),
    "what is dropped": lambda: (load(5), load(5, drop_last=True)),
    "by the batch size": lambda: (load(5, drop_last=True), load(7, drop_last=True)),
    "what is dropped at random": lambda: (
        load(5, sampler=RandomSampler(DATA, generator=seeded(0)), drop_last=True),
        load(5, sampler=RandomSampler(DATA, generator=seeded(1)), drop_last=True),
    ),
    "with replacement": lambda: tuple(load(sampler=RandomSampler(DATA, True, generator=seeded(i))) for i in (0, 1)),
    "some at random": lambda: tuple(load(sampler=RandomSampler(DATA, False, 5, seeded(i))) for i in (0, 1)),
    "weights": lambda: (load(sampler=weighted()), load(sampler=weighted((1.0, 3.0)))),
    "weighted draws": lambda: (load(sampler=weighted()), load(sampler=weighted(seed=1))),
    "ranks": lambda: tuple(load(sampler=distributed(rank)) for rank in (0, 1)),
    "epochs": lambda: tuple(load(sampler=distributed(epoch=epoch)) for epoch in (0, 1)),
    "collate_fn": lambda: (load(collate_fn=Scaling(2)), load(collate_fn=Scaling(3))),
    "a partial collate_fn": lambda: tuple(load(collate_fn=functools.partial(scaled, by)) for by in (2, 3)),
    "a collate_fn that closes over data": lambda: tuple(load(collate_fn=closing_over(by)) for by in (2, 3)),
    "a bound collate_fn": lambda: tuple(load(collate_fn=Scaling(by).__call__) for by in (2, 3)),
    "workers' init": lambda: tuple(load(num_workers=1, worker_init_fn=i) for i in (seed_worker, seed_otherwise)),
    "workers of a stream": lambda: tuple(load(data=Stream(), num_workers=workers) for workers in (0, 2)),
    "a stream's batches": lambda: tuple(load(size, Stream(), drop_last=True) for size in (5, 7)),
    "attributes of a loader's own": lambda: (Own(DATA, by=1), Own(DATA, by=2)),
    "a loader of one's own": lambda: (Own(DATA), DataLoader(DATA)),
    "within an object": lambda: (Wrapped(load(sampler=[0, 1])), Wrapped(load(sampler=[0, 2]))),
    "data": lambda: (load(), load(data=TensorDataset(torch.zeros(SIZE, 2), DATA.tensors[1]))),
}


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("name", DIFFERENT)
def test_other_samples_are_told(name, ordered):
    one, other = DIFFERENT[name]()
    again, _ = DIFFERENT[name]()
    assert not same(one, other, ordered)
    assert same(one, again, ordered)


SAME_BUT_FOR_THE_ORDER = {
    "shuffled": lambda: (load(), load(shuffle=True)),
    "a generator's order": lambda: tuple(load(shuffle=True, generator=seeded(i)) for i in (0, 1)),
    "a generator's order, none dropped": lambda: tuple(
        load(shuffle=True, drop_last=True, generator=seeded(i)) for i in (0, 1)
    ),
    "a fold's order": lambda: tuple(load(sampler=SubsetRandomSampler(i)) for i in ([3, 5, 4], [5, 4, 3])),
    "a list's order": lambda: (load(sampler=[3, 5, 4]), load(sampler=(5, 4, 3))),
    "batch size": lambda: (load(4), load(5)),
    "given batches": lambda: (load(1, batch_sampler=[[0, 1], [2]]), load(1, batch_sampler=[[0], [1, 2]])),
    "several rounds": lambda: tuple(load(sampler=RandomSampler(DATA, False, 24, seeded(i))) for i in (0, 1)),
}


@pytest.mark.parametrize("name", SAME_BUT_FOR_THE_ORDER)
def test_the_order_counts_where_it_is_of_interest(name):
    one, other = SAME_BUT_FOR_THE_ORDER[name]()
    assert same(one, other, ordered=False) and not same(one, other, ordered=True)


SAME = {
    "samplers": lambda: (load(), load(sampler=SequentialSampler(DATA))),
    "a batch sampler": lambda: (load(), load(1, batch_sampler=BatchSampler(range(SIZE), 4, False))),
    "drop_last that drops nothing": lambda: (load(4), load(4, drop_last=True)),
    "workers": lambda: (load(), load(num_workers=2)),
    "the init of no worker": lambda: (load(), load(worker_init_fn=seed_worker)),
    "single samples": lambda: (load(None), load(None, sampler=range(SIZE))),
}


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("name", SAME)
def test_what_decides_nothing_does_not_count(name, ordered):
    assert same(*SAME[name](), ordered)


def test_an_unseeded_order_is_that_of_the_global_generator():
    parts = [fingerprint(*loader_parts(load(shuffle=True), ordered=True)) for _ in range(2)]
    torch.rand(1)
    assert parts[0] == parts[1] != fingerprint(*loader_parts(load(shuffle=True), ordered=True))


class Alternating(Sampler):
    def __iter__(self):
        return iter(range(0, SIZE, 2))

    def __len__(self):
        return SIZE // 2


UNKNOWN = {
    "a generator": (lambda: (batch for batch in load()), r"a generator \(.*genexpr"),
    "a stream of a generator": (lambda: load(data=Stream(x for x in DATA)), r"a generator \("),
    "a sampler": (lambda: load(sampler=Alternating()), r"the sampler .*Alternating, which may draw random numbers"),
    "a batch sampler": (
        lambda: load(1, batch_sampler=type("Mine", (BatchSampler,), {})(range(SIZE), 4, False)),
        r"the sampler .*Mine, which may draw",
    ),
    "an iterator over a loader": (lambda: iter(load()), r"an object of .*DataLoaderIter, whose content"),
    "an open file": (lambda: load(collate_fn=closing_over(sys.__stdout__)), r"an open file, whose content can't be"),
    "a wrapped sampler": (lambda: Wrapped(load(sampler=Alternating())), r"the sampler .*Alternating"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_cannot_be_known_is_named(name):
    make, message = UNKNOWN[name]
    for ordered in (False, True):
        with pytest.raises(Unknown, match=message):
            fingerprint(*loader_parts(make(), ordered))


MODULE = """
import helpers
SCALE = {scale}
def factor():
    return SCALE * {inner}
class Data:
    offset = {offset}
    def __len__(self):
        return 3
    def __getitem__(self, index):
        return [factor() * helpers.{name}(index) + part for part in (1, {last})], self.offset
"""
PLAIN = {"scale": 1, "inner": 1, "offset": 0, "name": "half", "last": 2}


@pytest.mark.parametrize(
    "change", [{}, *({name: 5} for name in ("scale", "inner", "offset", "last")), {"name": "third"}]
)
def test_edited_code_of_a_data_set_is_told(change, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "helpers.py").write_text("def half(x): return x / 2\ndef third(x): return x / 3\n")
    found = []
    for options in (PLAIN, PLAIN | change):
        (tmp_path / "edited.py").write_text(MODULE.format(**options))
        for name in ("edited", "helpers"):
            sys.modules.pop(name, None)
        sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
        import edited

        sys.dont_write_bytecode = before
        found.append(fingerprint(*loader_parts(DataLoader(edited.Data()), ordered=False)))
        del sys.modules["edited"], sys.modules["helpers"]
    assert (found[0] == found[1]) == (not change)


LATE = {
    "a module": "import helpers; return helpers.half(index)",
    "a name": "from helpers import half; return half(index)",
    "a module of a package": "import package.parts; return package.parts.half(index)",
    "a package's part": "from package import parts; return parts.half(index)",
    "a neighbour": "from .parts import half; return half(index)",
    "a neighbouring module": "from . import parts; return parts.half(index)",
    "what is missing": "import helpers, missing; from package import missing; return helpers.half(index)",
}


@pytest.mark.parametrize("name", LATE)
def test_edited_code_that_a_data_set_imports_when_it_loads_is_told(name, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("")
    methods = f"    def __len__(self): return 3\n    def __getitem__(self, index): {LATE[name]}\n"
    (tmp_path / "package" / "data.py").write_text(f"class Data:\n{methods}")
    found = []
    for divisor in (2, 2, 3):
        for file in ("helpers.py", "package/parts.py"):
            (tmp_path / file).write_text(f"def half(x): return x / {divisor}\n")
        data = importlib.import_module("package.data").Data()
        found.append(fingerprint(*loader_parts(DataLoader(data), ordered=False)))
        for module in ("helpers", "package", "package.data", "package.parts"):
            sys.modules.pop(module, None)
    assert found[0] == found[1] != found[2]


def uses_a_library():
    import library  # noqa: F401


def test_a_library_that_is_imported_when_a_function_is_called_is_left_until_then(tmp_path, monkeypatch):
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "library.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path / "site-packages")
    before = fingerprint(uses_a_library)
    assert "library" not in sys.modules
    uses_a_library()
    assert fingerprint(uses_a_library) == before
    del sys.modules["library"]


class SharedOut(Sampler):
    """Distributed, and has no data set, as that of transformers by length."""

    num_replicas, rank, total_size = 2, 0, SIZE

    def __iter__(self):
        return iter(range(0, SIZE, 2))


def test_a_distributed_sampler_need_not_know_its_data_set():
    with pytest.raises(Unknown, match=r"the sampler .*SharedOut"):
        fingerprint(*loader_parts(load(sampler=SharedOut()), ordered=False))
    with pytest.warns(UserWarning, match="one of 2"):
        got = relationship(load(sampler=SharedOut()))
    np.testing.assert_array_equal(got, relationship(load(sampler=range(0, SIZE, 2))))


class Lengthless(Wrapped):
    def __len__(self):
        raise NotImplementedError


def test_fault_a_loader_whose_length_raises_was_refused():
    got = collect_pretrain_labels(Lengthless(load()), nn.Identity(), "cpu")
    assert torch.equal(got, DATA.tensors[0])


@pytest.mark.skipif(not importlib.util.find_spec("accelerate"), reason="needs accelerate")
def test_a_share_of_accelerates_iterable_data_is_warned_of():
    from accelerate.data_loader import prepare_data_loader

    loaders = [prepare_data_loader(load(data=Stream()), num_processes=2, process_index=rank) for rank in (0, 1)]
    for loader in loaders:
        with pytest.warns(UserWarning, match="only this process's share of the data, one of 2"):
            relationship(loader)
    assert not same(*loaders, ordered=False)


# --- what is kept in files


def relationship(loader, cache=None, **options):
    torch.manual_seed(0)
    return Relationship(
        loader, nn.Linear(2, 4), "cpu", cache, progress=False, num_classes=3, absent="mean", **options
    ).relationship


def attention(loader, cache=None, max_batches=2):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3))
    return channel_attention(net, loader, ["0"], progress=False, cache=cache, max_batches=max_batches)["0"].numpy()


def test_fault_another_folds_relationship_was_used(tmp_path):
    folds = [load(sampler=SubsetRandomSampler(indices)) for indices in (range(6), range(6, 12))]
    path = tmp_path / "relationship"
    first = relationship(folds[0], path)
    with pytest.warns(UserWarning, match="computed again: it was made from another"):
        second = relationship(folds[1], path)
    assert not np.allclose(first, second)
    np.testing.assert_array_equal(second, relationship(folds[1]))
    np.testing.assert_array_equal(second, relationship(folds[1], path))


def test_fault_another_batch_sizes_attention_was_used(tmp_path):
    path = tmp_path / "attention.safetensors"
    attention(load(4), path)
    with pytest.warns(UserWarning, match="computed again: it was made from another"):
        got = attention(load(3), path)
    np.testing.assert_array_equal(got, attention(load(3)))
    np.testing.assert_array_equal(got, attention(load(3), path))


@pytest.mark.parametrize("compute", [relationship, attention])
def test_what_cannot_be_known_is_computed_every_time(compute, tmp_path):
    path = tmp_path / "cache.npz"
    for by in (1, 2):
        batches = [(by * x, labels) for x, labels in load()]
        with pytest.warns(UserWarning, match=r"cache.npz is computed again every time: it depends on a gen") as caught:
            got = compute((batch for batch in batches), path)
        assert [warning.filename for warning in caught] == [__file__]
        np.testing.assert_array_equal(got, compute(batches))
    assert os.listdir(tmp_path) == []
    compute(load(), path)
    content = path.read_bytes()
    with pytest.warns(UserWarning, match="every time"):
        compute((batch for batch in batches), path)
    assert path.read_bytes() == content


CODE = """
import sys
from test_loader import *
from torch.utils.data import DataLoader, Dataset

class Unread(Dataset):
    def __len__(self): return SIZE
    def __getitem__(self, index):
        assert len(sys.argv) == 2, "the cache was not used"
        return DATA[index]

def shuffled():
    return DataLoader(Unread(), 4, shuffle=True, collate_fn=Scaling(2), generator=seeded(3))

relationship(shuffled(), sys.argv[1] + "/r")
attention(shuffled(), sys.argv[1] + "/a", None)
"""


def test_a_new_process_finds_what_another_kept(tmp_path):
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    for seed, options in enumerate(([], ["again"])):
        script = tmp_path / "script.py"
        script.write_text(CODE)
        command = [sys.executable, "-W", "error::UserWarning", str(script), str(tmp_path), *options]
        subprocess.run(command, env={**environment, "PYTHONHASHSEED": str(seed)}, check=True, timeout=PATIENCE)


@pytest.mark.parametrize("name", ["relationship.npy", "relationship"])
def test_upstreams_file_is_left_alone_with_a_warning(name, tmp_path):
    old = np.full((3, 4), 0.25, np.float32)
    np.save(tmp_path / "relationship.npy", old)
    with pytest.warns(UserWarning, match=r"relationship\.npy is computed again: it has no fingerprint.*numpy\.load"):
        got = relationship(load(), tmp_path / name)
    np.testing.assert_array_equal(got, relationship(load()))
    np.testing.assert_array_equal(np.load(tmp_path / "relationship.npy"), old)
    np.testing.assert_array_equal(got, relationship(load(), tmp_path / name))  # from the file beside it


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_share_of_the_data_is_warned_of(ranks, recwarn):
    loader = load(sampler=DistributedSampler(DATA, ranks, 0))
    relationship(loader)
    collect_pretrain_labels(loader, nn.Linear(2, 4), "cpu", progress=False)
    channel_attention(nn.Sequential(nn.Linear(2, 4)), loader, ["0"], progress=False)
    warnings = [str(warning.message) for warning in recwarn]
    assert len(warnings) == (3 if ranks > 1 else 0)
    assert all(f"sees only this process's share of the data, one of {ranks}" in warning for warning in warnings)
    assert all(warning.filename == __file__ for warning in recwarn)
    assert ["process_group=" in warning for warning in warnings] == [True, True, False][: len(warnings)]
