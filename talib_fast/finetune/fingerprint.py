"""Tell whether what a cache was made from is still the same."""

import contextlib
import copyreg
import dis
import hashlib
import importlib
import importlib.util
import io
import sys
import sysconfig
import threading
import types
from collections.abc import Iterable, Iterator, Sized
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

# properties in which data sets may show their content
_SHOWN_BY_DATA_SETS = ["classes", "targets", "labels", "samples", "imgs", "tensors", "indices", "dataset", "datasets"]
_PLAIN = frozenset({str, bytes, int, float, complex, bool, range, type(None)})
_LOCKS = (type(threading.Lock()), type(threading.RLock()))  # decide nothing
_DESCRIPTORS = (classmethod, staticmethod, property)
_LIBRARIES = frozenset({"torch", "torchvision", "numpy", __name__.partition(".")[0]})
_STANDARD = sysconfig.get_path("stdlib")


class Unknown(Exception):
    """The content of an object can't be known. The message names the object and says why."""


def fingerprint(*values: Any) -> str:
    """A hash that is equal for equal ``values``, in any process, and differs for others.

    Tensors and arrays count by content, random generators by state, functions by their code and what it refers to.
    Other objects count by the code of their class and what :mod:`pickle` would save of them, so no sample of a data set
    is loaded. Code in installed libraries counts by its code alone, code of PyTorch and Python by its name. Modules
    that a function imports when it is called are imported for this.

    Raises:
        Unknown: a value holds something that can't be pickled, such as a running generator or an open file.
    """
    digest = hashlib.sha256()
    seen: dict[int, tuple[int, Any]] = {}  # the objects stay alive, so that no other one gets the id
    pending = list(reversed(values))  # a stack: objects may be nested deeper than Python allows calls to be
    while pending:
        value = pending.pop()
        kind = type(value)
        if kind in _PLAIN or isinstance(value, (np.generic, PurePath)):
            digest.update(f"{kind.__qualname__} {value!r} ".encode())
            continue
        digest.update(f"{kind.__qualname__} ".encode())
        if kind is not tuple:  # there are many tuples, and none holds itself
            if id(value) in seen:
                digest.update(f"{seen[id(value)][0]} ".encode())
                continue
            seen[id(value)] = len(seen), value
        data = _data(value)
        if data is not None:
            digest.update(f"{value.dtype} {list(value.shape)} ".encode())
            digest.update(data)
        elif kind in (list, tuple) and _PLAIN.issuperset(map(type, value)):
            digest.update(f"{len(value)} {value!r} ".encode())
        else:
            parts = _parts(value)
            digest.update(f"{len(parts)} ".encode())
            pending.extend(reversed(parts))
    return digest.hexdigest()


def model_parts(model: nn.Module) -> list[Any]:
    """What decides a model's outputs, except its code, for ``fingerprint``.

    That is its state and its layers' settings. For a layer without state, such as a pooling or an activation, the
    class's name is included.
    """
    layers = [module for module in model.modules() if next(module.children(), None) is None]
    settings = [("" if layer.state_dict() else type(layer).__qualname__, layer.extra_repr()) for layer in layers]
    return [dict(model.state_dict()), settings]


def _data(value: Any) -> memoryview | None:
    """The bytes of a tensor or an array that holds nothing but numbers. None for any other value."""
    if type(value) in (Tensor, nn.Parameter, nn.Buffer) and value.layout == torch.strided and not value.is_nested:
        if value.device.type == "meta":
            return memoryview(b"")
        plain = value.detach().resolve_conj().resolve_neg()
        if not plain.is_quantized:
            return plain.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    if type(value) in (np.ndarray, np.memmap) and not value.dtype.hasobject:
        return np.ascontiguousarray(value).reshape(-1).view(np.uint8).data
    return None


def _parts(value: Any) -> list[Any]:
    """What ``value`` consists of, apart from the name of its class."""
    kind = type(value)
    if kind in (list, tuple):
        return list(value)
    if kind in (dict, types.MappingProxyType):
        return [part for item in value.items() for part in item]
    if kind in (set, frozenset):
        try:
            return sorted(fingerprint(part) for part in value)  # their order differs between processes
        except RecursionError:
            raise Unknown("a set that holds itself") from None
    if kind is np.ndarray:
        return [value.shape, value.tolist()]
    if isinstance(value, type):
        return _class_parts(value)
    if isinstance(value, types.ModuleType):
        if _installed(value.__name__):
            return [value.__name__]
        return [value.__name__, {name: part for name, part in sorted(vars(value).items()) if name[:2] != "__"}]
    if isinstance(value, types.FunctionType):
        return _function_parts(value)
    if isinstance(value, types.CodeType):
        # the instructions refer to arguments by number
        arguments = [value.co_varnames, value.co_argcount, value.co_kwonlyargcount, value.co_flags]
        return [value.co_code, value.co_consts, value.co_names, getattr(value, "co_exceptiontable", b""), *arguments]
    if isinstance(value, types.MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, (classmethod, staticmethod)):
        return [value.__func__]
    if isinstance(value, property):
        return [value.fget, value.fset]
    if isinstance(value, torch.TypedStorage):
        return [vars(value)]  # a dtype and an untyped storage; its methods warn
    if isinstance(value, torch.UntypedStorage):  # in tensors of other classes; pickle would add random numbers
        return [torch.empty(0, dtype=torch.uint8, device=value.device).set_(value)]
    if isinstance(value, torch.Generator):
        return [str(value.device), value.get_state()]
    if isinstance(value, _LOCKS):
        return []
    if isinstance(value, (DataLoader, Sampler)):
        from .loader import loader_parts, sampler_parts  # here, because that module imports this one

        return loader_parts(value, ordered=True) if isinstance(value, DataLoader) else sampler_parts(value)
    return _pickled(value) + _shown(value)


def _pickled(value: Any) -> list[Any]:
    """What :mod:`pickle` would save of an object."""
    try:
        reduce = copyreg.dispatch_table.get(type(value))
        saved = value.__reduce_ex__(4) if reduce is None else reduce(value)
        if isinstance(saved, str):  # the name of a global, such as a compiled function's
            return [getattr(value, "__module__", None), saved, getattr(value, "__dict__", None)]
        # function, arguments, state, iterators over items, and what sets the state
        return [part if part is None or number not in (3, 4) else list(part) for number, part in enumerate(saved)]
    except Exception as error:  # an object may refuse to be pickled with any error
        raise Unknown(f"{_called(value)}, whose content can't be known") from error


def _called(value: Any) -> str:
    """What messages call an object."""
    if isinstance(value, types.GeneratorType):
        return f"a generator ({value.__qualname__})"
    if isinstance(value, io.IOBase):
        return "an open file"
    return f"an object of {type(value).__module__}.{type(value).__qualname__}"


def _shown(value: Any) -> list[Any]:
    """The length of an object and what a data set shows, which may be more than :mod:`pickle` saves."""
    shown: list[Any] = []
    if isinstance(value, Sized):
        with contextlib.suppress(Exception):  # it may refuse with any error
            shown.append(len(value))
    if isinstance(value, Dataset):
        for attribute in _SHOWN_BY_DATA_SETS:
            with contextlib.suppress(Exception):
                shown += [attribute, getattr(value, attribute)]
    return shown


def _known_by_name(module: str | None) -> bool:
    """Whether a module counts by name: Python's own, and PyTorch, which changes its code while it runs."""
    if module is None:
        return False
    name, file = module.partition(".")[0], _file(module)
    return name in _LIBRARIES or (name in sys.stdlib_module_names and (file is None or file.startswith(_STANDARD)))


def _installed(module: str | None) -> bool:
    """Whether a module belongs to an installed library, of which only the code counts, not the data."""
    if module is None or _known_by_name(module):
        return module is not None
    return not {"site-packages", "dist-packages"}.isdisjoint(PurePath(_file(module) or "").parts)


def _file(module: str) -> str | None:
    """The file of a module, or of its top package if it is not imported."""
    if module in sys.modules:
        return getattr(sys.modules[module], "__file__", None)
    try:
        spec = importlib.util.find_spec(module.partition(".")[0])  # without importing anything
    except (ImportError, ValueError):
        return None
    return None if spec is None else spec.origin


def _class_parts(kind: type) -> list[Any]:
    """What a class consists of."""
    parts: list[Any] = [kind.__module__, kind.__qualname__, kind.__bases__, type(kind)]
    if _known_by_name(kind.__module__):
        return parts
    installed = _installed(kind.__module__)
    for name, value in vars(kind).items():
        if installed:
            value = getattr(value, "__func__", getattr(value, "fget", value))
            if isinstance(value, types.FunctionType):
                parts += [name, value.__code__]
        elif callable(value) or isinstance(value, _DESCRIPTORS) or not name.startswith(("__", "_abc_")):
            parts += [name, value]
    return parts


def _function_parts(function: types.FunctionType) -> list[Any]:
    """What a function consists of."""
    module = function.__globals__.get("__name__")
    parts: list[Any] = [function.__module__, function.__qualname__]
    if _known_by_name(module) and _importable(function):
        return parts
    parts.append(function.__code__)
    if _installed(module) and _importable(function):
        return parts
    cells = []
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # an empty cell
            cells.append(cell.cell_contents)
    parts += [function.__defaults__, function.__kwdefaults__, function.__dict__, cells]
    return parts if _installed(module) else [*parts, *_used(function)]


def _importable(function: types.FunctionType) -> bool:
    """Whether the function's module has it under its name."""
    found: Any = sys.modules.get(function.__module__)
    for name in function.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is function


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """The code of a function and of the functions within it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _used(function: types.FunctionType) -> list[Any]:
    """The globals that a function's code refers to. Of modules that are not installed, the attributes that it uses."""
    codes = list(_codes(function.__code__))
    instructions = [step for code in codes for step in dis.get_instructions(code) if step.opname != "EXTENDED_ARG"]
    used = {}
    for number, instruction in enumerate(instructions):
        name = instruction.argval
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME") and name in function.__globals__:
            used[name] = function.__globals__[name]
        elif instruction.opname == "IMPORT_NAME":
            level, parts = (instructions[number - back].argval for back in (2, 1))  # from ..name import parts
            used[f"import {level} {name}"] = _imported(function.__globals__.get("__package__"), level, name, parts)
    attributes = {name for code in codes for name in code.co_names}
    modules: set[str] = set()
    return [part for name in sorted(used) for part in (name, _of_module(used[name], attributes, modules))]


def _imported(package: str | None, level: int, name: str, parts: Iterable[str] | None) -> Any:
    """What a function's import statement gives, imported if necessary. For an installed library only the name."""
    with contextlib.suppress(Exception):  # the import may be for another system
        name = importlib.util.resolve_name("." * level + name, package)
        if _installed(name):
            return name
        module = importlib.import_module(name)
        for part in parts or ():
            if not hasattr(module, part):
                importlib.import_module(f"{name}.{part}")
    return sys.modules.get(name, name)


def _of_module(value: Any, attributes: Iterable[str], seen: set[str]) -> Any:
    """``value``, or of a module that is not installed the attributes that are used."""
    if not isinstance(value, types.ModuleType):
        return value
    if value.__name__ in seen or _installed(value.__name__):
        return value.__name__
    seen.add(value.__name__)
    found = {name: vars(value)[name] for name in sorted(attributes) if name in vars(value)}
    return [value.__name__, {name: _of_module(part, attributes, seen) for name, part in found.items()}]
