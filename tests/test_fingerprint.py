import dataclasses
import enum
import functools
import io
import logging
import os
import random
import re
import subprocess
import sys
import threading
import types
import weakref
from collections import OrderedDict, deque
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from process_support import PATIENCE
from torch import nn
from torch.utils.data import Dataset, Subset, TensorDataset

from talib_fast.finetune.fingerprint import Unknown, fingerprint


class Scale:
    def __init__(self, by):
        self.by = by

    def __call__(self, x):
        return self.by * x


class Custom(Dataset):
    """A data set of four samples that keeps what it has under names of its own."""

    def __init__(self, content=0):
        self.content = content

    def __len__(self):
        return 4

    def __getitem__(self, index):
        raise AssertionError("a sample is loaded")


class Slotted:
    __slots__ = ("content",)

    def __init__(self, content):
        self.content = content


class Property(Dataset):
    """Says only by a property what it holds, and not to pickle."""

    def __init__(self, labels):
        self._labels = labels

    def __reduce__(self):
        return Property, ()

    @property
    def targets(self):
        return self._labels


class Unsized(Custom):
    def __len__(self):
        raise TypeError("endless")


def loss(smoothing, default=1):
    def scaled(logits, labels, factor=default):
        return factor * F.cross_entropy(logits, labels, label_smoothing=smoothing)

    return scaled


class Elements(enum.Enum):
    FIRE = 1
    WATER = 2


@dataclasses.dataclass
class Record:
    number: int = 0
    words: list = dataclasses.field(default_factory=list)


class Lazy(Dataset):
    @functools.cached_property
    def lock(self):
        return threading.Lock()


@functools.lru_cache
def remembered(x):
    return x


class Picture(torch.Tensor):
    pass


class Method:
    def __init__(self, function):
        self.bound = types.MethodType(function, self)


def objects():
    """One of each kind, made anew."""
    words = {"a", "b", "c", "d", "e", 5}
    ring = [1]
    ring.append(ring)
    chain = None
    for _ in range(5000):
        chain = Slotted(chain)
    parts = [threading.Lock(), np.random.default_rng(1), torch.Generator(), Path("a"), torch.float32, torch, len]
    parts += [random.Random(0), re.compile("a+"), Elements.FIRE, Elements, Record(3), Lazy(), remembered, iter([1, 2])]
    parts += [logging.getLogger("talib_fast"), np.random.RandomState(0), range(3), types.MappingProxyType({1: 2})]
    parts += [
        Method(scale),
        int | str,
        nn.Linear,
        torch.zeros(2, device="meta"),
        torch.ones(2, dtype=torch.cfloat).conj(),
    ]
    parts += [words, frozenset(words), deque([1, 2]), ring, chain, {"a": np.arange(3)}, torch.eye(2).to_sparse()]
    parts += [lambda x: x + 1, loss(0.1), functools.partial(F.relu, inplace=True), Scale(2).__call__]
    parts += [nn.Linear, nn.Flatten(), torch.device("cpu"), torch.arange(3.0).as_subclass(Picture)]
    parts += [torch.ones(2).untyped_storage()]
    parts += [torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)]
    return [Custom(part) for part in parts]


def configuration(**settings):
    module = types.ModuleType("config")
    vars(module).update(settings, itself=module)
    return module


def counting(by):
    class Counting(type):
        def __len__(cls):
            return by

    return Counting("Counted", (), {})


def scale(x):
    return FACTOR * x


def remember(x):
    return scale(x)


FACTOR = 2


def test_equal_objects_have_one_fingerprint():
    for one, other in zip(objects(), objects(), strict=True):
        assert fingerprint(one) == fingerprint(other), one.content


def test_fingerprints_are_those_of_another_process():
    """With other addresses and another order of sets."""
    code = "from test_fingerprint import *; print(fingerprint(*objects()))"
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-W", "ignore", "-c", code]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=PATIENCE)
    assert result.stdout.strip() == fingerprint(*objects())


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a", "b"),
        (1, 1.0),
        (["ab", "c"], ["a", "bc"]),
        ([1, [2]], [[1], 2]),
        ({"a": 1}, {"a": 2}),
        ({1, 2}, {1, 3}),
        ((1, 2), [1, 2]),
        (Path("a"), Path("b")),
        (torch.zeros(3), torch.zeros(3, 1)),
        (torch.zeros(3), torch.zeros(3, dtype=torch.int32)),
        (torch.eye(3).to_sparse(), 2 * torch.eye(3).to_sparse()),
        (torch.ones(3).as_subclass(Picture), torch.zeros(3).as_subclass(Picture)),
        (torch.ones(3).as_subclass(Picture), torch.ones(3)),
        (np.arange(3), np.arange(1, 4)),
        (np.array(["a", None], dtype=object), np.array(["b", None], dtype=object)),
        (Scale(2), Scale(3)),
        (Slotted(2), Slotted(3)),
        (Slotted(Slotted([Scale(2)])), Slotted(Slotted([Scale(3)]))),
        (Property([0, 1]), Property([0, 2])),
        (torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)),
        (random.Random(1), random.Random(2)),
        (np.random.default_rng(1), np.random.default_rng(2)),
        (np.random.RandomState(1), np.random.RandomState(2)),
        (re.compile("a"), re.compile("b")),
        (Elements.FIRE, Elements.WATER),
        (Record(1), Record(2)),
        (Method(scale), Method(remember)),
        (True, 1),
        ([1, 2], [1, True]),
        (Unsized(0), Unsized(1)),
        (deque([1, 2]), deque([1, 3])),
        (OrderedDict(a=1), OrderedDict(a=2)),
        (Subset(Custom(0), [0]), Subset(Custom(1), [0])),
        (Subset(Custom(0), [0]), Subset(Custom(0), [1])),
        (TensorDataset(torch.zeros(3)), TensorDataset(torch.ones(3))),
        (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(label_smoothing=0.9)),
        (nn.CrossEntropyLoss(torch.ones(3)), nn.CrossEntropyLoss(torch.zeros(3))),
        (functools.partial(F.relu, inplace=True), functools.partial(F.relu, inplace=False)),
        (functools.partial(F.relu), functools.partial(F.gelu)),
        (lambda x: x + 1, lambda x: x + 2),
        (lambda x: F.relu(x), lambda x: F.gelu(x)),
        (lambda x: [y + 1 for y in x], lambda x: [y + 2 for y in x]),
        (loss(0.1), loss(0.2)),
        (loss(0.1), loss(0.1, default=2)),
        (Scale(2).__call__, Scale(3).__call__),
        (nn.Linear, nn.Conv2d),
        (len, max),
        (eval("lambda x, y: x"), eval("lambda y, x: y")),  # the same instructions, of other names
        (eval("lambda x, y: y"), eval("lambda x, *y: y")),
        (types.ModuleType("config"), configuration(width=1)),
        (configuration(width=1), configuration(width=2)),
        (counting(by=1), counting(by=2)),
    ],
)
def test_different_objects_have_two(one, other):
    assert fingerprint(one) != fingerprint(other)
    assert fingerprint(Custom(one)) != fingerprint(Custom(other))


@pytest.mark.parametrize("function", [scale, remember, Scale(scale), functools.partial(remember, 1)])
def test_what_a_function_uses_of_its_module_counts(function, monkeypatch):
    before = fingerprint(function)
    assert before == fingerprint(function)
    monkeypatch.setitem(globals(), "FACTOR", 3)
    assert fingerprint(function) != before


def test_a_module_that_a_function_imports_counts_before_it_runs(tmp_path, monkeypatch):
    (tmp_path / "imported_later").mkdir()
    (tmp_path / "imported_later" / "part.py").write_text("FACTOR = 2\n")
    monkeypatch.syspath_prepend(tmp_path)

    def function(x):
        from imported_later import part

        return part.FACTOR * x

    before = fingerprint(function)
    assert function(3) == 6 and fingerprint(function) == before
    monkeypatch.setattr("imported_later.part.FACTOR", 3)
    assert fingerprint(function) != before
    for name in ("imported_later", "imported_later.part"):
        monkeypatch.delitem(sys.modules, name)


def test_an_edited_method_counts_also_that_of_a_base_class(monkeypatch):
    class Derived(Scale):
        shared = 1

    first = fingerprint(Derived(2))
    Derived.shared = 2
    second = fingerprint(Derived(2))
    monkeypatch.setattr(Scale, "__call__", lambda self, x: self.by + x)
    assert len({first, second, fingerprint(Derived(2))}) == 3


def test_what_pytorch_does_to_its_own_classes_does_not_count(monkeypatch):
    part = Custom([nn.Flatten(), nn.Linear])
    before = fingerprint(part)
    really = nn.Module.__call__
    monkeypatch.setattr(nn.Module, "__call__", lambda *args, **options: really(*args, **options))  # as torch.compile
    assert fingerprint(part) == before


def test_looking_at_an_object_does_not_change_it():
    part = Custom([Slotted(1), Elements.FIRE, Record(), re.compile("a")])
    assert fingerprint(part) == fingerprint(part)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: (x for x in "ab"), "a generator (.*genexpr"),
        (lambda: io.FileIO(os.devnull), "an open file"),
        (lambda: random.SystemRandom(), "an object of random.SystemRandom"),
        (lambda: weakref.ref(Custom), "an object of weakref.*"),
        (lambda: memoryview(b"a"), "an object of builtins.memoryview"),
    ],
)
def test_what_cannot_be_known_is_named(make, named):
    part = make()
    holders = [part, Custom(part), [Slotted({"a": part})], {part}, lambda x: part, functools.partial(scale, part)]
    for value in holders[:3] + holders[4:] if part.__hash__ is None else holders:
        with pytest.raises(Unknown, match=f"^{named.replace('(', '[(]')}.*whose content can't be known$"):
            fingerprint(1, value)
    if hasattr(part, "close"):
        part.close()


def test_a_set_that_holds_itself_cannot_be_known():
    held = Custom()
    held.content = {held}
    with pytest.raises(Unknown, match="a set that holds itself"):
        fingerprint(held)


def test_shared_parts_are_told_from_each_other():
    a, b = [1], [2]
    assert len({fingerprint([a, b, part]) for part in (a, b)}) == 2


def test_the_place_in_memory_is_no_matter():
    x = torch.randn(4, 6)
    assert fingerprint(x) == fingerprint(x.t().contiguous().t()) == fingerprint(torch.cat([x, x])[4:])
    assert fingerprint(x.numpy()) == fingerprint(np.asfortranarray(x.numpy()))
