"""Turn upstream's StochNorm layers in a model into talib_fast's."""

import warnings
from typing import Any

import torch
from torch import nn

from ..checks import check_number
from ..finetune.fusion import fuse
from ..finetune.stochnorm import StochNorm1d, StochNorm2d, StochNorm3d
from .library import STOCH_NORM_MODULES

_STOCH_NORMS = {layer.__name__: layer for layer in (StochNorm1d, StochNorm2d, StochNorm3d)}


def _is_upstream(kind: type) -> bool:
    """Whether a class is one of upstream's StochNorm layers."""
    return kind.__module__ in STOCH_NORM_MODULES and kind.__name__ in _STOCH_NORMS


def _missing_state(layer: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """The attributes and buffers that an upstream layer lacks."""
    mean = layer.running_mean
    p: Any = layer.p
    # Upstream's convert_model passes p as track_running_stats, and the layer's p stays 0.5.
    if not isinstance(layer.track_running_stats, bool):
        p = layer.track_running_stats
    buffers: dict[str, Any] = {"running_mean": mean, "running_var": layer.running_var, "num_batches_tracked": None}
    if isinstance(mean, torch.Tensor):
        buffers["num_batches_tracked"] = torch.zeros((), dtype=torch.long, device=mean.device)
    check_number(p, "p", 1)
    return {"p": float(p), "track_running_stats": mean is not None}, buffers


def patch_model(model: nn.Module) -> dict[str, str]:
    """Turn the layers into talib_fast's in place. See ``talib_fast.patch``."""
    plan, left = [], []
    for name, layer in model.named_modules():
        kind = type(layer)
        # An upstream layer that was unpickled while its class was replaced has our class, but not all buffers.
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
    if plan:
        fuse(model)
    if left:
        warnings.warn(f"patch leaves unknown subclasses of StochNorm as they are: {', '.join(left)}", stacklevel=3)
    return {name or "model": f"talib_fast.finetune.stochnorm.{ours.__name__}" for name, _, _, ours, _, _ in plan}
