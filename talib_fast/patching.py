"""One line for a script of the Transfer-Learning-Library: its names give what talib_fast has under them."""

import importlib
import importlib.util
import pkgutil
import sys
import warnings
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn

from . import finetune
from .checks import check_module, check_number
from .finetune.stochnorm import StochNorm1d, StochNorm2d, StochNorm3d

# The methods' modules by the package that holds them: tllib's two, and talib's, as the library was called before.
_REGULARIZATION = ("delta", "bss", "co_tuning", "lwf", "bi_tuning", "knowledge_distillation")
_PACKAGES = {
    "tllib.normalization": ("stochnorm",),
    "tllib.regularization": _REGULARIZATION,
    "talib.finetune": ("stochnorm", *_REGULARIZATION),
}
_STOCH_NORM_MODULES = [f"{package}.stochnorm" for package, held in _PACKAGES.items() if "stochnorm" in held]
_STOCH_NORMS = {layer.__name__: layer for layer in (StochNorm1d, StochNorm2d, StochNorm3d)}


class _Replacement(NamedTuple):
    module: ModuleType
    name: str
    original: Any
    ours: Any
    label: str

    def __str__(self) -> str:
        return f"{self.module.__name__}.{self.name}"


_in_place: list[_Replacement] = []


def _exists(name: str) -> bool:
    """Whether a module can be imported, without importing its parent: ``talib`` may be TA-Lib, which is left alone."""
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
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise ImportError(f"patch() found {name}, but importing it failed: {error}", name=name) from error


def _public(method: str) -> dict[str, Any]:
    """What a method's module exports, without ``torch``, ``nn`` and the like, which star imports take along."""
    ours = getattr(finetune, method)
    exported = [(name, getattr(ours, name)) for name in ours.__all__]
    return {name: value for name, value in exported if getattr(value, "__module__", "").startswith("talib_fast.")}


def _find(methods: set[str]) -> list[_Replacement]:
    """Everything that stands for ``methods`` in the Transfer-Learning-Library and is not ours yet."""
    found, anything = [], False
    for package, held in _PACKAGES.items():
        wanted = [method for method in held if method in methods]
        if not wanted or not _exists(package.partition(".")[0]) or not _exists(package):
            continue
        reexporting = _import(package)
        modules = [method for method in wanted if _exists(f"{package}.{method}")]
        anything = anything or bool(modules)
        replaced = []
        for method in modules:
            module = _import(f"{package}.{method}")
            for name, ours in _public(method).items():
                original = vars(module).get(name, ours)
                if original is not ours:
                    replaced.append(_Replacement(module, name, original, ours, f"talib_fast.finetune.{method}.{name}"))
        found += replaced
        for name, value in vars(reexporting).items():
            same = [replacement for replacement in replaced if replacement.original is value]
            found += [replacement._replace(module=reexporting, name=name) for replacement in same[:1]]
    if methods and not anything:
        packages = " or ".join(package for package, held in _PACKAGES.items() if methods & set(held))
        raise ImportError(
            f"expected the Transfer-Learning-Library to be installed, found none of {', '.join(sorted(methods))} "
            f"in {packages}"
        )
    return found


def _check_subclasses(replacements: list[_Replacement]) -> None:
    """Upstream's classes look themselves up by name to reach their base class: a subclass needs its base's name."""
    originals = [replacement.original for replacement in replacements]
    for replacement in replacements:
        subclasses: list[type] = getattr(replacement.original, "__subclasses__", list)()
        for subclass in subclasses:
            module = sys.modules.get(subclass.__module__)
            alive = module is not None and vars(module).get(subclass.__name__) is subclass
            if alive and subclass not in originals and subclass.__module__.startswith(("tllib.", "talib.")):
                raise ValueError(
                    f"expected {subclass.__module__}.{subclass.__name__} to be replaced along with {replacement}, "
                    "from which it derives"
                )


def _restore(replacements: list[_Replacement]) -> list[_Replacement]:
    restored = []
    for replacement in reversed(replacements):
        # What was reloaded or replaced by someone else since is theirs.
        if vars(replacement.module).get(replacement.name) is replacement.ours:
            setattr(replacement.module, replacement.name, replacement.original)
            restored.append(replacement)
    return restored


def _patch_library(methods: set[str]) -> dict[str, str]:
    replacements = _find(methods)
    _check_subclasses(replacements)
    done: list[_Replacement] = []
    try:
        for replacement in replacements:
            setattr(replacement.module, replacement.name, replacement.ours)
            done.append(replacement)
    except BaseException:
        _restore(done)
        raise
    _in_place.extend(done)
    return {str(replacement): replacement.label for replacement in done}


def _is_upstream(kind: type) -> bool:
    return kind.__module__ in _STOCH_NORM_MODULES and kind.__name__ in _STOCH_NORMS


def _missing_state(layer: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """The attributes and buffers by which one of upstream's layers becomes ours."""
    mean = layer.running_mean
    p: Any = layer.p
    # Upstream's convert_model hands p over as track_running_stats, and leaves the layer's p at 0.5.
    if not isinstance(layer.track_running_stats, bool):
        p = layer.track_running_stats
    buffers: dict[str, Any] = {"running_mean": mean, "running_var": layer.running_var, "num_batches_tracked": None}
    if isinstance(mean, torch.Tensor):
        buffers["num_batches_tracked"] = torch.zeros((), dtype=torch.long, device=mean.device)
    check_number(p, "p", 1)
    return {"p": float(p), "track_running_stats": mean is not None}, buffers


def _patch_model(model: nn.Module) -> dict[str, str]:
    plan, left = [], []
    for name, layer in model.named_modules():
        kind = type(layer)
        # A pickled layer of upstream's that was loaded while its class was replaced is ours, but not complete.
        unfinished = kind in _STOCH_NORMS.values() and "num_batches_tracked" not in layer._buffers
        if unfinished or _is_upstream(kind):
            plan.append((name, layer, kind, _STOCH_NORMS[kind.__name__], *_missing_state(layer)))
        elif any(_is_upstream(base) for base in kind.__mro__):
            left.append(f"{name or 'model'} ({kind.__module__}.{kind.__qualname__})")
    try:
        for _, layer, _, ours, _, _ in plan:
            layer.__class__ = ours
    except BaseException:
        for _, layer, kind, _, _, _ in plan:
            layer.__class__ = kind
        raise
    for _, layer, _, _, attributes, buffers in plan:
        for name in buffers:
            layer._parameters.pop(name, None)  # upstream registers absent statistics as parameters
        layer._buffers.update(buffers)
        vars(layer).update(attributes)
    if left:
        warnings.warn(f"patch leaves unknown subclasses of StochNorm as they are: {', '.join(left)}", stacklevel=3)
    return {name or "model": f"talib_fast.finetune.stochnorm.{ours.__name__}" for name, _, _, ours, _, _ in plan}


def patch(
    model: nn.Module | None = None,
    *,
    stochnorm: bool = True,
    delta: bool = True,
    bss: bool = True,
    co_tuning: bool = True,
    lwf: bool = True,
    bi_tuning: bool = True,
    knowledge_distillation: bool = True,
) -> dict[str, str]:
    """Replace the Transfer-Learning-Library's fine-tuning methods by talib_fast's, or its layers in a model.

    ``patch()`` changes ``tllib`` and ``talib`` (not TA-Lib, which has the same name), as many as there are: in
    ``tllib.regularization``, ``tllib.normalization`` and ``talib.finetune``, whatever talib_fast has under the same
    name in the same module, and what the packages re-export of it. The modules are imported for that. Nothing else is
    touched. Call it before a script's ``from tllib... import ...``: names that were bound earlier keep upstream's
    classes, and constructing one of those, or of subclasses defined earlier, may then fail.

    ``patch(model)`` turns upstream's StochNorm layers in a model that was built without ``patch()`` into talib_fast's,
    and changes nothing else. They stay the objects they are, so that parameters, statistics, ``training``,
    ``requires_grad``, hooks, sharing and a running optimizer stay too; ``num_batches_tracked`` is added. p is what
    upstream's ``convert_model`` was asked for, which it had lost. It also completes the StochNorm layers of a pickled
    model that was loaded after ``patch()``. Subclasses are left alone, with a warning.

    Calling it again is harmless: what has been replaced is left as it is. If anything fails, nothing is changed.

    Args:
        model: a model to change instead of the library.
        stochnorm, delta, bss, co_tuning, lwf, bi_tuning, knowledge_distillation: False leaves that method's module
            as it is.

    Returns:
        What was replaced by what, by the dotted names of the library's attributes or of the model's layers.

    Raises:
        ImportError: none of the methods' modules is there, or one fails to be imported.
        TypeError: ``model`` is no module, or a choice is not True or False.
        ValueError: methods are chosen for a model; or one is left out that derives from a chosen one, as ``talib``'s
            Co-Tuning from its LWF; or a layer's p is not in [0, 1].
    """
    choices = {
        "stochnorm": stochnorm,
        "delta": delta,
        "bss": bss,
        "co_tuning": co_tuning,
        "lwf": lwf,
        "bi_tuning": bi_tuning,
        "knowledge_distillation": knowledge_distillation,
    }
    for name, choice in choices.items():
        if not isinstance(choice, bool):
            raise TypeError(f"expected {name} to be True or False, got {choice!r}")
    methods = {name for name, choice in choices.items() if choice}
    if model is None:
        return _patch_library(methods)
    check_module(model, "model")
    if len(methods) < len(choices):
        left_out = ", ".join(sorted(choices.keys() - methods))
        raise ValueError(f"expected a model or a choice of methods, got a model and {left_out} left out")
    return _patch_model(model)


def unpatch() -> list[str]:
    """Give the Transfer-Learning-Library back what every ``patch()`` so far has replaced.

    Models stay as they are, those built since and those given to ``patch(model)``: their layers and losses go on
    working. Attributes that someone else has set since are left alone. Harmless when nothing is patched.

    Returns:
        The dotted names that were restored.
    """
    restored = _restore(_in_place)
    _in_place.clear()
    return sorted(str(replacement) for replacement in restored)
