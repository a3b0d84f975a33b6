"""Convert batch norms to stochastic norms in place, and back."""

import warnings
from collections import Counter
from typing import Any

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
from .ranks import check_group

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
# Modules of torch that give a layer a class derived from its own. Such a class only adds to what the layer does.
_DERIVED_BY_TORCH = ("torch.nn.utils.parametrize", "torch.distributed.fsdp")
_derived: dict[tuple[type, type], type] = {}


def _counterpart(kind: type, counterparts: dict[type, type]) -> type | None:
    """The class that a layer of class ``kind`` gets. Where torch derived ``kind``, so is that class."""
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
        _derived[_derived[kind, found[0]], norm] = kind  # for the conversion back
    return _derived[kind, found[0]]


def _listed(left: dict[str, type]) -> str:
    """How many layers of which classes, with the first three by name."""
    classes = Counter(f"{kind.__module__}.{kind.__qualname__}" for kind in left.values())
    counts = ", ".join(f"{count} of {kind}" for kind, count in classes.items())
    names = [name or "the module itself" for name in left]
    return f"{counts} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"


def _change_classes(
    module: nn.Module, counterparts: dict[type, type], family: type
) -> tuple[list[Any], dict[str, type]]:
    """Give each layer its counterpart's class. Returns those layers, and the other instances of ``family`` by name."""
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
    """Convert every batch norm in ``module`` to the stochastic norm of its rank, in place.

    The layers stay the same objects and only change their class. So they keep their parameters, buffers, ``training``,
    ``requires_grad``, hooks, parametrisations, FSDP sharding and sharing. These classes are converted:

    - ``nn.BatchNorm1d``, ``nn.BatchNorm2d`` and ``nn.BatchNorm3d`` to the StochNorm of the same rank;
    - ``nn.SyncBatchNorm`` to :class:`~talib_fast.finetune.stochnorm.SyncStochNorm`;
    - timm's ``BatchNormAct2d`` and ``SyncBatchNormAct`` to :class:`~talib_fast.finetune.stochnorm.StochNormAct2d` and
      :class:`~talib_fast.finetune.stochnorm.SyncStochNormAct`.

    A stochastic norm only gets the new ``p``. Other subclasses may do more than normalise. They are left unchanged, and
    a warning lists them. :func:`~talib_fast.finetune.stochnorm.restore_batch_norm` converts back.

    Args:
        module: the model, or a single layer. Convert a ``copy.deepcopy`` to keep the original.
        p: probability that a channel uses the statistics of the batch, in [0, 1].

    Returns:
        ``module``.

    Raises:
        TypeError: ``module`` is no module, or ``p`` is no number.
        ValueError: ``p`` is not in [0, 1].

    Example:

        >>> from torch import nn
        >>> from talib_fast.finetune.stochnorm import convert_model
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> model = convert_model(model, p=0.5)
        >>> type(model[1]).__name__, model[1].p
        ('StochNorm2d', 0.5)
    """
    check_module(module, "module")
    check_number(p, "p", 1)
    watch_for_lost_methods()
    stochastic = {kind: kind for kind in _SYNCHRONIZED}  # which keep their class and get the new p
    counterparts = {**_STOCHASTIC, **counterparts_in_timm(), **stochastic}
    converted, left = _change_classes(module, counterparts, _BatchNorm)
    for layer in converted:
        layer.p = float(p)
    if left:
        warnings.warn(f"convert_model leaves unknown batch norms as they are: {_listed(left)}", stacklevel=2)
    elif not converted:
        warnings.warn("convert_model found no batch norm to convert", stacklevel=2)
    return module


def restore_batch_norm(module: nn.Module) -> nn.Module:
    """Convert every stochastic norm in ``module`` back to the batch norm it came from, in place.

    It undoes :func:`~talib_fast.finetune.stochnorm.convert_model` and
    :func:`~talib_fast.finetune.stochnorm.fuse_activations`. In evaluation the model computes the same as before. The
    layers stay the same objects and keep everything but ``p``. :class:`~talib_fast.finetune.stochnorm.SyncStochNorm`
    becomes ``nn.SyncBatchNorm``, which trains on GPUs only.

    Subclasses that may do more are left unchanged, and a warning lists them. The same holds for
    :class:`~talib_fast.finetune.stochnorm.StochNormAct2d` and :class:`~talib_fast.finetune.stochnorm.SyncStochNormAct`
    where timm is not installed.

    Args:
        module: the model, or a single layer.

    Returns:
        ``module``.

    Raises:
        TypeError: ``module`` is no module.

    Example:

        >>> from torch import nn
        >>> from talib_fast.finetune.stochnorm import convert_model, restore_batch_norm
        >>> model = convert_model(nn.Sequential(nn.BatchNorm2d(8)), p=0.5)
        >>> type(restore_batch_norm(model)[0]).__name__
        'BatchNorm2d'
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
        warnings.warn(f"restore_batch_norm leaves unknown stochastic norms as they are: {_listed(left)}", stacklevel=2)
    return module


def convert_sync(module: nn.Module, process_group: Any = None) -> nn.Module:
    """Convert every stochastic norm in ``module`` to one that uses the statistics of all ranks, in place.

    :class:`~talib_fast.finetune.stochnorm.StochNormAct2d` becomes
    :class:`~talib_fast.finetune.stochnorm.SyncStochNormAct`, the others become
    :class:`~talib_fast.finetune.stochnorm.SyncStochNorm`. Call :func:`~talib_fast.finetune.stochnorm.convert_model`
    first. The layers stay the same objects. Layers that are synchronised already get the process group. Other
    subclasses are left unchanged, and a warning lists them.

    Use it in place of ``nn.SyncBatchNorm.convert_sync_batchnorm``, which would turn stochastic norms into batch norms.

    Args:
        module: the model, or a single layer.
        process_group: the group to synchronise in. None is the default group.

    Returns:
        ``module``.

    Raises:
        TypeError: ``module`` is no module, or ``process_group`` is no process group that this process is in.

    Example:

        >>> from torch import nn
        >>> from talib_fast.finetune.stochnorm import convert_model, convert_sync
        >>> model = convert_sync(convert_model(nn.Sequential(nn.BatchNorm2d(8)), p=0.5))
        >>> type(model[0]).__name__
        'SyncStochNorm'
    """
    check_module(module, "module")
    check_group(process_group)
    converted, left = _change_classes(module, _SYNCHRONIZED, _StochNorm)
    for layer in converted:
        layer.process_group = process_group
    if left:
        warnings.warn(f"convert_sync leaves unknown stochastic norms as they are: {_listed(left)}", stacklevel=2)
    elif not converted:
        warnings.warn("convert_sync found no stochastic norm: call convert_model first", stacklevel=2)
    return module
