import collections
import dataclasses
import enum
import functools
import weakref
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch._dynamo
from torch import nn
from torch.torch_version import TorchVersion

from talib_fast.finetune.delta import IntermediateLayerGetter
from talib_fast.finetune.structures import clone, map_tensors, tensors_in

X = torch.arange(4.0)


class Pair(NamedTuple):
    a: Any
    b: Any = 1


class Point(tuple):
    _fields = ("a", "b")

    def __new__(cls, a, b):
        return super().__new__(cls, (a, b))


class Output(collections.OrderedDict):
    a = property(lambda self: self["a"])


class WithArguments(dict):
    def __init__(self, a, b):
        super().__init__(a=a)
        self.b = b


class Named(list):
    def __init__(self, a, name):
        super().__init__([a])
        self.name = name


@dataclasses.dataclass
class Data:
    a: Any
    calls: int = dataclasses.field(init=False, default=0)

    def __post_init__(self):
        self.calls += 1


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    a: Any
    b: int = 1


class Slotted:
    __slots__ = ("__a", "__weakref__", "never")

    def __init__(self, a):
        self.__a = a


class Plain:
    def __init__(self, a, _more):
        self.a = a

    def __setattr__(self, name, value):
        assert not self.__dict__
        super().__setattr__(name, value)


STRUCTURES = [
    (X, [X]),
    {"a": X, "b": {"c": (1, X)}},
    Pair(X, [Frozen(X)]),
    Point(X, X),
    Output(a=X, b="b"),
    WithArguments(X, X),
    Named(X, "name"),
    Data(X),
    Frozen(X),
    Slotted(X),
    Plain(X, 1),
    SimpleNamespace(a=X, b=[X]),
    collections.defaultdict(list, a=X),
    collections.deque([X], maxlen=3),
    collections.UserDict(a=X),
    {X},
    frozenset([X]),
    torch.ones(2, 3).max(0),
    nn.utils.rnn.pack_sequence([torch.ones(3, 1)]),
]


@pytest.mark.parametrize("structure", STRUCTURES, ids=[type(structure).__name__ for structure in STRUCTURES])
def test_structures_keep_their_class_and_what_they_hold(structure):
    before = tensors_in(structure)
    copied = clone(structure)
    assert type(copied) is type(structure) and copied is not structure
    after = tensors_in(copied)
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert {tensor.data_ptr() for tensor in before}.isdisjoint(tensor.data_ptr() for tensor in after)
    assert all(old is new for old, new in zip(before, tensors_in(structure), strict=True))
    assert map_tensors(lambda tensor: tensor, structure) is structure
    state = {name: part for name, part in getattr(structure, "__dict__", {}).items() if name not in ("a", "b", "data")}
    assert state.items() <= getattr(copied, "__dict__", {}).items()


def test_what_a_class_adds_is_kept():
    assert clone(Output(a=X)).a.tolist() == X.tolist() and list(clone(Output(b="b", a=X))) == ["b", "a"]
    assert clone(Named(X, "name")).name == "name" and clone(Data(X)).calls == 1
    assert clone(WithArguments(X, X)).b.tolist() == X.tolist()
    assert clone(collections.defaultdict(list, a=X))["new"] == []
    assert clone(collections.deque([X], maxlen=3)).maxlen == 3


def test_hugging_face_outputs():
    outputs = pytest.importorskip("transformers.modeling_outputs")
    output = outputs.BaseModelOutput(last_hidden_state=X, hidden_states=(X, X + 1))
    copied = clone(output)
    assert type(copied) is outputs.BaseModelOutput and copied.last_hidden_state is not X
    assert copied.last_hidden_state is copied["last_hidden_state"] is copied[0] is copied.hidden_states[0]
    assert copied.attentions is None and output.last_hidden_state is X
    torch.testing.assert_close(copied.to_tuple(), output.to_tuple())


def test_a_tensor_that_is_there_twice_stays_one():
    calls = []
    copied = map_tensors(lambda tensor: calls.append(tensor) or tensor + 1, [X, {"a": X}, Frozen((X,))])
    assert copied[0] is copied[1]["a"] is copied[2].a[0] and len(calls) == 1


def test_only_what_changes_is_copied():
    kept, structure = [X + 1], {"a": (X,)}
    structure["kept"] = kept
    copied = map_tensors(lambda tensor: -tensor if tensor is X else tensor, structure)
    assert copied["kept"] is kept and copied["a"][0].tolist() == (-X).tolist() and structure["a"][0] is X


def test_structures_that_hold_themselves():
    listed = [X]
    listed.append((listed, "text"))
    copied = clone(listed)
    assert copied[1][0] is copied and copied[0] is not X and listed[1][0] is listed
    owner = SimpleNamespace(a=X)
    owner.child = Frozen(owner)
    copied = clone(owner)
    assert copied.child.a is copied and copied is not owner
    assert clone(listed[1])[0][1][0][0] is not X
    without = [1]
    without.append(without)
    assert clone(without) is without


def test_modules_types_and_functions_are_never_copied():
    class Kind(enum.Enum):
        ONE = SimpleNamespace(a=X)

    module, function = nn.Linear(1, 1), functools.partial(torch.add, X)
    module.output = X
    held = SimpleNamespace(a=X, module=module, cls=Frozen, function=function, kind=Kind.ONE, ref=weakref.ref(module))
    copied = clone(held)
    assert copied.a is not X
    assert all(getattr(copied, name) is getattr(held, name) for name in ("module", "cls", "function", "kind", "ref"))


of_own_class = pytest.mark.xfail(
    TorchVersion(torch.__version__) < "2.11", raises=torch._dynamo.exc.Unsupported, strict=True,
    reason="torch.compile of torch 2.10 does not follow an object's attributes",
)  # fmt: skip


@pytest.mark.parametrize(
    "make",
    [
        lambda x: {"a": x},
        lambda x: (x, [x]),
        pytest.param(lambda x: Output(a=x), marks=of_own_class),
        pytest.param(Data, marks=of_own_class),
        Pair,
        pytest.param(Frozen, marks=of_own_class),
    ],
    ids=["dict", "tuple", "OrderedDict", "dataclass", "named tuple", "dataclass with slots"],
)
def test_outputs_of_layers_inside_a_compiled_function(make):
    class Layer(nn.Module):
        def forward(self, x):
            return make(x * 2)

    class Overwriting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Layer()

        def forward(self, x):
            output = self.layer(x)
            for part in (
                output.values() if isinstance(output, dict) else (output[0] if isinstance(output, tuple) else output.a,)
            ):
                part.zero_()

    getter = IntermediateLayerGetter(Overwriting(), ["layer"])
    kept = torch.compile(lambda x: getter(x)[0]["layer"], backend="eager", fullgraph=True)(X)
    assert type(kept) is type(make(X))
    assert all(tensor.tolist() == (X * 2).tolist() for tensor in tensors_in(kept))
