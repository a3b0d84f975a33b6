"""Turning batch norms into stochastic norms, in place, and back."""

import warnings
from collections import Counter
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..checks import check_module, check_number
from .fusion import separate
from .norm_act import TIMMS_NORMS, StochNormAct2d, SyncStochNormAct, counterparts_in_timm, imported_from_timm
from .norms import (
    StochNorm1d,
    StochNorm2d,
    StochNorm3d,
    SyncStochNorm,
    _StochNorm,
    watch_for_lost_methods,
)

_STOCHASTIC: dict[type, type] = {
    nn.BatchNorm1d: StochNorm1d,
    nn.BatchNorm2d: StochNorm2d,
    nn.BatchNorm3d: StochNorm3d,
    nn.SyncBatchNorm: SyncStochNorm,
}
_SYNCHRONIZED: dict[type, type] = {
    **dict.fromkeys(_STOCHASTIC.values(), SyncStochNorm),
    **dict.fromkeys((StochNormAct2d, SyncStochNormAct), SyncStochNormAct),
}
# Classes that torch derives, layer by layer, from the one it found: they add to it and go on being it.
_DERIVED_BY_TORCH = ("torch.nn.utils.parametrize", "torch.distributed.fsdp")
_derived: dict[tuple[type, type], type] = {}


def _counterpart(kind: type, counterparts: dict[type, type]) -> type | None:
    """What a layer of class ``kind`` becomes: its counterpart, or of a class that torch derived, one derived alike."""
    if kind in counterparts:
        return counterparts[kind]
    if not kind.__module__.startswith(_DERIVED_BY_TORCH):
        return None
    bases = [_counterpart(base, counterparts) for base in kind.__bases__]
    found = [base for base in bases if base is not None]
    if len(found) != 1:
        return None
    if found[0] in kind.__bases__:
        return kind
    if (kind, found[0]) not in _derived:
        (norm,) = (base for base, its in zip(kind.__bases__, bases, strict=True) if its is not None)
        contents = {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")}
        name = kind.__name__.replace(norm.__name__, found[0].__name__)
        rebased = (found[0] if base is norm else base for base in kind.__bases__)
        _derived[kind, found[0]] = type(name, tuple(rebased), contents)
        _derived[_derived[kind, found[0]], norm] = kind  # the way back
    return _derived[kind, found[0]]


def _listed(left: dict[str, type]) -> str:
    """How many layers of which classes, and the first three by name."""
    classes = Counter(f"{kind.__module__}.{kind.__qualname__}" for kind in left.values())
    counts = ", ".join(f"{count} of {kind}" for kind, count in classes.items())
    names = [name or "the module itself" for name in left]
    return f"{counts} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"


def _change_classes(
    module: nn.Module, counterparts: dict[type, type], family: type
) -> tuple[list[Any], dict[str, type]]:
    """Give the layers their counterparts' classes: those that got one, and what is left of ``family``, by name."""
    changed, left = [], {}
    for name, layer in module.named_modules():
        kind = _counterpart(type(layer), counterparts)
        if kind is not None:
            layer.__class__ = kind
            changed.append(layer)
        elif isinstance(layer, family):
            left[name] = type(layer)
    return changed, left


def convert_model(module: nn.Module, p: float) -> nn.Module:
    """Turn every batch norm in ``module`` into the stochastic norm of its rank, in place.

    The layers stay the objects they are and change their class, so everything about them stays too: parameters
    and buffers, ``training``, ``requires_grad``, hooks, parametrisations, that FSDP shards them and that a layer is
    shared. ``nn.SyncBatchNorm`` becomes :class:`SyncStochNorm`, timm's ``BatchNormAct2d`` and ``SyncBatchNormAct``
    become :class:`StochNormAct2d` and :class:`SyncStochNormAct`, and a stochastic norm gets ``p``. Other subclasses
    may do more than normalise: they are left alone, with a warning. :func:`restore_batch_norm` is the way back.

    Args:
        module: the model, or a single layer. Convert a ``copy.deepcopy`` to keep the original.
        p: probability of the batch's statistics, in [0, 1].

    Returns:
        ``module``.

    Raises:
        TypeError, ValueError: ``module`` is no module, or ``p`` is not a number in [0, 1].
    """
    check_module(module, "module")
    check_number(p, "p", 1)
    watch_for_lost_methods()
    counterparts = {**_STOCHASTIC, **counterparts_in_timm(), **dict(zip(_SYNCHRONIZED, _SYNCHRONIZED, strict=True))}
    converted, left = _change_classes(module, counterparts, _BatchNorm)
    for layer in converted:
        layer.p = float(p)
    if left:
        warnings.warn(f"convert_model leaves batch norms that it does not know: {_listed(left)}", stacklevel=2)
    elif not converted:
        warnings.warn("convert_model found no batch norm to convert", stacklevel=2)
    return module


def restore_batch_norm(module: nn.Module) -> nn.Module:
    """Turn every stochastic norm in ``module`` back into the batch norm it came from, in place.

    The way back of :func:`convert_model`, and of :func:`fuse_activations`: in evaluation the model computes the same.
    The layers stay the objects they are, and all but ``p`` stays with them. :class:`SyncStochNorm` becomes
    ``nn.SyncBatchNorm``, which trains on GPUs only. Subclasses that do more are left alone, with a warning, and so are
    :class:`StochNormAct2d` and :class:`SyncStochNormAct` where there is no timm.

    Args:
        module: the model, or a single layer.

    Returns:
        ``module``.

    Raises:
        TypeError: ``module`` is no module.
    """
    check_module(module, "module")
    separate(module)
    if any(isinstance(layer, StochNormAct2d) for layer in module.modules()):
        imported_from_timm(TIMMS_NORMS)
    counterparts = {stochastic: plain for plain, stochastic in {**_STOCHASTIC, **counterparts_in_timm()}.items()}
    restored, left = _change_classes(module, counterparts, _StochNorm)
    for layer in restored:
        del layer.p
        if isinstance(layer, nn.SyncBatchNorm):
            vars(layer).setdefault("process_group", None)
    if left:
        warnings.warn(
            f"restore_batch_norm leaves stochastic norms that it does not know: {_listed(left)}", stacklevel=2
        )
    return module


def convert_sync(module: nn.Module, process_group: Any = None) -> nn.Module:
    """Turn every stochastic norm in ``module`` into a :class:`SyncStochNorm` or :class:`SyncStochNormAct`, in place.

    The layers stay the objects they are and change their class, as with :func:`convert_model`, which comes first.
    Layers that are synchronised already get the process group. Subclasses may do more than normalise: they are left
    alone, with a warning.

    Args:
        module: the model, or a single layer.
        process_group: the group to synchronise in; None is the default group.

    Returns:
        ``module``.

    Raises:
        TypeError: ``module`` is no module, or ``process_group`` no process group that this process is in.
    """
    check_module(module, "module")
    if process_group is not None and not (dist.is_available() and isinstance(process_group, dist.ProcessGroup)):
        got = type(process_group).__name__
        raise TypeError(f"expected a torch.distributed.ProcessGroup that this process is in, or None, got {got}")
    converted, left = _change_classes(module, _SYNCHRONIZED, _StochNorm)
    for layer in converted:
        layer.process_group = process_group
    if left:
        warnings.warn(f"convert_sync leaves stochastic norms that it does not know: {_listed(left)}", stacklevel=2)
    elif not converted:
        warnings.warn("convert_sync found no stochastic norm: convert_model makes them", stacklevel=2)
    return module
