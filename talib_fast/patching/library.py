"""Replace the library's names where they are defined, where they were imported, and in modules imported later."""

import importlib
import importlib.abc
import importlib.util
import pkgutil
import sys
import threading
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NamedTuple

from torch import nn

from .. import finetune
from ..finetune.fusion import fuse

# The methods' modules by package: three of tllib, and one of talib, the library's earlier name.
_REGULARIZATION = ("delta", "bss", "co_tuning", "lwf", "bi_tuning", "knowledge_distillation")
_PACKAGES = {
    "tllib.modules": ("classifier",),
    "tllib.normalization": ("stochnorm",),
    "tllib.regularization": _REGULARIZATION,
    "talib.finetune": ("stochnorm", *_REGULARIZATION),
}
_METHODS = {f"{package}.{method}": method for package, held in _PACKAGES.items() for method in held}
STOCH_NORM_MODULES = [name for name, method in _METHODS.items() if method == "stochnorm"]


def convert_model(module: nn.Module, p: float) -> nn.Module:
    """Convert a model's batch norms to stochastic norms and fuse them, for scripts that only call ``convert_model``.

    It calls :func:`~talib_fast.finetune.stochnorm.convert_model`, then does what
    :func:`~talib_fast.finetune.stochnorm.fuse_activations` does.

    Args:
        module: the model, or a single layer.
        p: probability that a channel uses the statistics of the batch, in [0, 1].

    Returns:
        ``module``.
    """
    finetune.stochnorm.convert_model(module, p)
    fuse(module)
    return module


# Names for which the library gets something other than what talib_fast has under the same name.
_MORE = {"stochnorm": {"convert_model": convert_model}}


class _Replacement(NamedTuple):
    """A replaced attribute of one of the library's modules, or the replaced ``__bases__`` of one of its classes."""

    holder: ModuleType | type
    name: str
    original: Any
    ours: Any
    label: str

    def __str__(self) -> str:
        holder = self.holder
        module = f"{holder.__module__}." if isinstance(holder, type) else ""
        return f"{module}{holder.__name__}.{self.name}"


# Guards the two variables below. It is never held during an import, which has locks of its own.
_lock = threading.RLock()
_wanted: set[str] = set()
_in_place: list[_Replacement] = []


def _root(name: str) -> str:
    """The top package of a module's name."""
    return name.partition(".")[0]


def _exists(name: str) -> bool:
    """Whether a module can be imported, without importing its parent, because ``talib`` may be TA-Lib."""
    if name in sys.modules:
        return sys.modules[name] is not None
    parent = name.rpartition(".")[0]
    if not parent:
        return importlib.util.find_spec(name) is not None
    if parent in sys.modules:
        locations = getattr(sys.modules[parent], "__path__", None)
    else:
        spec = importlib.util.find_spec(parent)
        locations = spec and spec.submodule_search_locations
    finders = map(pkgutil.get_importer, locations or ())
    return any(finder is not None and finder.find_spec(name) is not None for finder in finders)


def _import(name: str) -> ModuleType:
    """Import a module. Raises ImportError for any failure."""
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise ImportError(f"patch() found {name}, but importing it failed: {error}", name=name) from error


def _found(methods: set[str]) -> Iterator[ModuleType]:
    """The modules of ``methods`` that can be imported now."""
    for package, held in _PACKAGES.items():
        wanted = [method for method in held if method in methods]
        if wanted and _exists(_root(package)) and _exists(package):
            _import(package)
            yield from (_import(f"{package}.{method}") for method in wanted if _exists(f"{package}.{method}"))


def _public(method: str) -> dict[str, Any]:
    """The names that a method's module has, without ``torch``, ``nn`` and the like."""
    ours = getattr(finetune, method)
    defined = {name for name, value in vars(ours).items() if getattr(value, "__module__", None) == ours.__name__}
    public = {name: getattr(ours, name) for name in {*ours.__all__, *defined} if not name.startswith("_")}
    return {
        name: public[name]
        for name in sorted(public)
        if getattr(public[name], "__module__", "").startswith("talib_fast.")
    } | _MORE.get(method, {})


def _definitions() -> Iterator[list[_Replacement]]:
    """For each library, the replacements in the modules that define the names, oldest first."""
    for root in sorted({_root(package) for package in _PACKAGES}):
        definitions = [
            replacement
            for replacement in _in_place
            if getattr(replacement.original, "__module__", None) == replacement.holder.__name__
            and replacement.holder.__name__ in _METHODS
            and _root(replacement.holder.__name__) == root
        ]
        if definitions:
            yield definitions


def _places(definitions: list[_Replacement]) -> Iterator[tuple[ModuleType | type, str, Any]]:
    """Where the library may use these definitions: attributes of its modules, and bases of its classes."""
    root = _root(definitions[0].holder.__name__)
    for module_name, module in sys.modules.copy().items():
        if _root(module_name) == root and isinstance(module, ModuleType):
            yield from ((module, name, value) for name, value in vars(module).copy().items())
    kinds = {kind for definition in definitions for kind in (definition.original, definition.ours)}
    for kind in kinds:
        subclasses: list[type] = type.__subclasses__(kind) if isinstance(kind, type) else []
        for subclass in subclasses:
            if _root(subclass.__module__) == root:
                yield subclass, "__bases__", subclass.__bases__


def _uses(of: str, instead: str) -> Iterator[_Replacement]:
    """Where the library uses the definitions' ``original`` (or ``ours``), each as a replacement by the other one."""
    for definitions in _definitions():
        by_id = {id(getattr(definition, of)): definition for definition in definitions}
        for holder, name, value in _places(definitions):
            used = [by_id[id(part)] for part in (value if name == "__bases__" else (value,)) if id(part) in by_id]
            if not used:
                continue
            other = getattr(used[0], instead)
            if name == "__bases__":
                other = tuple(getattr(by_id[id(base)], instead) if id(base) in by_id else base for base in value)
            original, ours = (value, other) if of == "original" else (other, value)
            yield _Replacement(holder, name, original, ours, used[0].label)


def _report(replacements: list[_Replacement]) -> dict[str, str]:
    """The replaced names and their replacements. Bases of classes that are replaced themselves are left out."""
    originals = {id(replacement.original) for replacement in replacements}
    return {
        str(replacement): replacement.label for replacement in replacements if id(replacement.holder) not in originals
    }


def _put(replacement: _Replacement) -> None:
    """Make a replacement and record it."""
    setattr(replacement.holder, replacement.name, replacement.ours)
    _in_place.append(replacement)


def _replace_uses() -> None:
    """Replace what other modules have imported of the originals, and the originals among the bases of classes.

    A class of upstream reaches its base class by the base's name. That name now is ours, so only ours can be the base.
    """
    originals = {id(replacement.original) for replacement in _in_place}
    for replacement in _uses("original", "ours"):
        if replacement.holder.__name__ not in _METHODS and id(replacement.holder) not in originals:
            _put(replacement)


def _record_uses() -> None:
    """Record where the library has imported or derived from ours since, so that this is restored, too."""
    recorded = {(id(replacement.holder), replacement.name) for replacement in _in_place}
    for replacement in _uses("ours", "original"):
        if (id(replacement.holder), replacement.name) not in recorded:
            _in_place.append(replacement)


def _restore(since: int) -> list[_Replacement]:
    """Undo the replacements from number ``since`` on. Returns those that were still in place."""
    _record_uses()
    undone = _in_place[since:]
    del _in_place[since:]
    restored = []
    for replacement in reversed(undone):
        # an attribute that someone else has replaced since stays
        if getattr(replacement.holder, replacement.name, None) is replacement.ours:
            setattr(replacement.holder, replacement.name, replacement.original)
            restored.append(replacement)
    _replace_uses()  # of what stays replaced
    return restored


def _replace_in(modules: dict[str, ModuleType]) -> None:
    """Replace the wanted names in these modules of methods, given by name."""
    with _lock:
        since = len(_in_place)
        wanted = [(name, _METHODS[name]) for name in modules if _METHODS[name] in _wanted]
        try:
            for module_name, method in wanted:
                module = modules[module_name]
                for name, ours in _public(method).items():
                    original = vars(module).get(name, ours)
                    if original is not ours:
                        home = "patching" if name in _MORE.get(method, {}) else f"finetune.{method}"
                        _put(_Replacement(module, name, original, ours, f"talib_fast.{home}.{name}"))
            _replace_uses()
        except BaseException:
            _restore(since)
            raise


class _Loader(importlib.abc.Loader):
    """Loads a method's module by its own loader, and replaces the names before anyone can import them."""

    def __init__(self, loader: Any, name: str, reloads: bool) -> None:
        self.loader, self.name, self.reloads = loader, name, reloads

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        try:
            self.loader.exec_module(module)
        except BaseException:
            # a failed first import leaves no module, but a failed reload leaves one with some originals again
            if self.reloads:
                _replace_in({self.name: module})
            raise
        _replace_in({self.name: sys.modules.get(self.name, module)})


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the methods' modules by the other finders, wherever ``sys.path`` leads at that time."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        finders = sys.meta_path.copy()
        if _METHODS.get(fullname) not in _wanted or self not in finders:
            return None
        for finder in finders[finders.index(self) + 1 :]:
            spec = finder.find_spec(fullname, path, target) if hasattr(finder, "find_spec") else None
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = _Loader(spec.loader, fullname, reloads=target is not None)
                return spec
        return None


_finder = _Finder()


def _want(methods: set[str]) -> None:
    """Set the methods whose modules are changed when they are imported."""
    _wanted.update(methods)
    _wanted.intersection_update(methods)  # in two steps: other threads must always see the methods that stay
    if _wanted and _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    if not _wanted and _finder in sys.meta_path:
        sys.meta_path.remove(_finder)


def patch_library(methods: set[str]) -> dict[str, str]:
    """Replace the names of ``methods`` in the library's modules, now or at their import. See ``talib_fast.patch``."""
    if "lwf" in methods and "co_tuning" not in methods:
        raise ValueError(
            "expected talib.finetune.co_tuning.Classifier to be replaced along with talib.finetune.lwf.Classifier, "
            "from which it derives: leave lwf out, too"
        )
    with _lock:
        _record_uses()
        wanted_before, since = _wanted.copy(), len(_in_place)
        _want(_wanted | methods)
    try:
        _replace_in({module.__name__: module for module in _found(methods)})
    except BaseException:
        with _lock:
            _restore(since)
            _want(wanted_before)
        raise
    with _lock:
        _record_uses()
        return _report(_in_place[since:])


def unpatch_library() -> list[str]:
    """Undo all replacements, also of modules imported later. See ``talib_fast.unpatch``."""
    with _lock:
        _want(set())
        return sorted(_report(_restore(0)))
