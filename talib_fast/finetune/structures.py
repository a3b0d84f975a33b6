"""Apply functions to the tensors inside nested structures, such as what models return and what batches hold."""

import collections
import contextlib
import copy
import dataclasses
import enum
import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = frozenset((type(None), bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device, slice))
_COLLECTIONS = (list, set, collections.deque)
_IMMUTABLE = (tuple, frozenset)
# classes in C that a class may derive from: its instances can then be made without a call of its constructor
_BASES = frozenset(
    (*_COLLECTIONS, *_IMMUTABLE, dict, collections.OrderedDict, collections.defaultdict, types.SimpleNamespace, object)
)
_HEAP_TYPE = 1 << 9  # in a class's __flags__, set by CPython unless it is a static variable in C


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Return the same structure with ``function`` applied to every tensor.

    It looks into tuples, lists, dicts, sets and deques, and into objects of classes written in Python: dataclasses,
    named tuples, Hugging Face's outputs, plain objects. They may hold each other, and themselves. An object that holds
    a changed tensor is copied, without a call of its constructor, and keeps its class and everything else. All other
    objects, and every module, type and function, are the same objects in both structures. ``function`` is called once
    for each tensor.
    """
    if isinstance(value, Tensor):
        return function(value)
    if type(value) in _PLAIN:
        return value
    if torch.compiler.is_compiling():
        return _map_traced(function, value)
    return _Structure(function, value).mapped(value)


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of a structure, each once."""
    found: list[Tensor] = []

    def collect(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(collect, value)
    return found


def clone(value: Any) -> Any:
    """The same structure with every tensor copied."""
    return map_tensors(Tensor.clone, value)


def moved(value: Any, device: torch.device | str) -> Any:
    """The same structure with every tensor on ``device``."""
    return map_tensors(lambda tensor: tensor.to(device), value)


def _map_traced(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """``map_tensors`` in a form that torch.compile can follow. It does not notice repeated objects, nor cycles."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*[_map_traced(function, part) for part in value])
    if isinstance(value, (list, tuple)):
        return type(value)([_map_traced(function, part) for part in value])
    if type(value) is dict:
        return {name: _map_traced(function, part) for name, part in value.items()}
    if isinstance(value, (nn.Module, enum.Enum, type, types.FunctionType)):
        return value
    if hasattr(value, "__dict__"):
        attributes = value.__dict__
    elif dataclasses.is_dataclass(value):  # with slots
        attributes = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    else:
        return value
    attributes = {name: _map_traced(function, part) for name, part in attributes.items()}
    items = {name: _map_traced(function, part) for name, part in value.items()} if isinstance(value, dict) else {}
    copied = copy.copy(value) if hasattr(value, "__dict__") else object.__new__(type(value))
    for name, part in items.items():
        copied[name] = part
    for name, part in attributes.items():
        object.__setattr__(copied, name, part)
    return copied


class _Structure:
    """The objects of a structure, and their copies."""

    def __init__(self, function: Callable[[Tensor], Tensor], value: Any) -> None:
        self._function = function
        self._objects: dict[int, Any] = {}  # by id; they stay alive, so that no other object gets the id
        self._holders: dict[int, list[int]] = {}  # by an object's id, the ids of the objects that hold it
        self._copies: dict[int, Any] = {}  # by the original's id: all tensors, and other objects when first needed
        self._visit(value)
        self._changed: set[int] = set()
        pending = [key for key, copy in self._copies.items() if copy is not self._objects[key]]
        while pending:
            key = pending.pop()
            if key not in self._changed:
                self._changed.add(key)
                pending += self._holders.get(key, ())

    def _visit(self, value: Any) -> None:
        """Record ``value`` and everything in it, and apply the function to its tensors."""
        self._objects[id(value)] = value
        for part in _parts(value):
            if type(part) in _PLAIN:
                continue
            self._holders.setdefault(id(part), []).append(id(value))
            if id(part) in self._objects:
                continue
            if isinstance(part, Tensor):
                self._objects[id(part)] = part
                self._copies[id(part)] = self._function(part)
            else:
                self._visit(part)

    def mapped(self, value: Any) -> Any:
        """The copy of ``value``, or ``value`` itself if nothing in it has changed."""
        key = id(value)
        if key not in self._changed:
            return value
        if key not in self._copies:
            if isinstance(value, _IMMUTABLE):
                parts = [self.mapped(part) for part in _items(value)]
                if key in self._copies:  # a part holds it, and has made the copy
                    return self._copies[key]
                copied = self._copies[key] = _made_of(value, parts)
            else:
                copied = self._copies[key] = _emptied(value)
                self._fill(copied, value)
            self._copy_attributes(copied, value)
        return self._copies[key]

    def _fill(self, copied: Any, value: Any) -> None:
        """Put the mapped items of a collection into its empty copy."""
        cls: Any = type(value)
        base = _base(cls)
        if isinstance(value, dict):
            for name, part in base.items(value):
                base.__setitem__(copied, name, self.mapped(part))
        elif isinstance(value, _COLLECTIONS):
            parts = [self.mapped(part) for part in _items(value)]
            (base.update if base is set else base.extend)(copied, parts)

    def _copy_attributes(self, copied: Any, value: Any) -> None:
        """Set the mapped attributes of ``value`` on its copy."""
        if hasattr(value, "__dict__"):
            copied.__dict__.update({name: self.mapped(part) for name, part in value.__dict__.items()})
        for member, part in _slots(value):
            member.__set__(copied, self.mapped(part))


def _parts(value: Any) -> list[Any]:
    """The objects in ``value`` that may hold tensors."""
    cls: Any = type(value)
    if _base(cls) not in _BASES or isinstance(value, (nn.Module, enum.Enum)):
        return list(value) if _is_structseq(value) else []
    parts = _items(value)
    parts += getattr(value, "__dict__", {}).values()
    parts += [part for _, part in _slots(value)]
    return parts


def _items(value: Any) -> list[Any]:
    """The items of a collection, without calling methods that its class overrides."""
    if isinstance(value, dict):
        return list(dict.values(value))
    if isinstance(value, (*_IMMUTABLE, *_COLLECTIONS)):
        cls: Any = type(value)
        return list(_base(cls).__iter__(value))
    return []


def _made_of(value: Any, parts: list[Any]) -> Any:
    """A tuple or frozenset of the class of ``value``, with other items."""
    cls: Any = type(value)
    return cls(parts) if _is_structseq(value) else _base(cls).__new__(cls, parts)


def _emptied(value: Any) -> Any:
    """An empty object of the class of ``value``, without a call of its constructor."""
    cls: Any = type(value)
    base = _base(cls)
    copied = base.__new__(cls)
    if base is collections.defaultdict:
        copied.default_factory = value.default_factory
    elif base is collections.deque:
        base.__init__(copied, (), value.maxlen)
    return copied


def _is_structseq(value: Any) -> bool:
    """Whether it is a named tuple that is written in C, such as what ``torch.max`` returns."""
    return isinstance(value, tuple) and hasattr(value, "n_sequence_fields")


def _is_of_python(cls: type) -> bool:
    """Whether a class is written in Python, and another class makes its instances."""
    return bool(cls.__flags__ & _HEAP_TYPE) and not isinstance(vars(cls).get("__new__"), types.BuiltinFunctionType)


@functools.lru_cache(maxsize=256)
def _base(cls: type) -> Any:
    """The first class in the inheritance order of ``cls`` that is not written in Python."""
    return next(base for base in cls.__mro__ if not _is_of_python(base))


@functools.lru_cache(maxsize=256)
def _members(cls: type) -> list[types.MemberDescriptorType]:
    """The ``__slots__`` of a class written in Python."""
    members = [member for base in cls.__mro__ if _is_of_python(base) for member in vars(base).values()]
    return [member for member in members if isinstance(member, types.MemberDescriptorType)]


def _slots(value: Any) -> list[tuple[types.MemberDescriptorType, Any]]:
    """The ``__slots__`` of an object that are set, with their values."""
    cls: Any = type(value)
    slots = []
    for member in _members(cls):
        with contextlib.suppress(AttributeError):
            slots.append((member, member.__get__(value)))
    return slots
