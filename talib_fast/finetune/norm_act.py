"""Stochastic norms with the activation that follows them in one layer, as in timm."""

import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.activation import NO_ACTIVATION, Activation
from ..ops.stoch_norm_formula import followed
from .norms import StochNorm2d, SyncStochNorm, activation_of, runs_its_forward_alone

TIMM = "timm.layers"
TIMMS_NORMS = f"{TIMM}.norm_act"


def imported_from_timm(name: str) -> Any:
    """Import one of timm's modules. None where timm can't be imported."""
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError):  # timm imports torchvision, which raises the latter if it does not fit torch
        return None


def counterparts_in_timm() -> dict[type, type]:
    """Map timm's batch norms with an activation to stochastic norms. Empty until timm is imported.

    Once timm is imported, the stochastic norms are also instances of timm's ``BatchNormAct2d``. timm's tools look for
    that class. Those that would take the layer for a plain batch norm, as freezing does, would drop its activation.
    """
    timm: Any = sys.modules.get(TIMMS_NORMS)
    if timm is None:
        return {}
    if not issubclass(StochNormAct2d, timm.BatchNormAct2d):
        StochNormAct2d.__bases__ = (StochNorm2d, timm.BatchNormAct2d)
    return {timm.BatchNormAct2d: StochNormAct2d, timm.SyncBatchNormAct: SyncStochNormAct}


def _activation_layer(act_layer: Any, options: dict[str, Any]) -> nn.Module:
    """The module of an activation that is given as a class, as a name that timm knows, or as None."""
    if isinstance(act_layer, str) and act_layer:
        layers = imported_from_timm(TIMM)
        if layers is None:
            raise ValueError(f"expected act_layer to be a class, since timm is not installed, got {act_layer!r}")
        act_layer = layers.get_act_layer(act_layer)
    if not act_layer:
        return nn.Identity()
    try:
        return act_layer(**options)
    except TypeError:  # some activations have no inplace option
        return act_layer(**{name: option for name, option in options.items() if name != "inplace"})


class StochNormAct2d(StochNorm2d):
    """Stochastic normalisation of ``[N, C, H, W]`` inputs and an activation, in place of timm's ``BatchNormAct2d``.

    The layer computes ``act(drop(norm(x)))`` and has timm's attributes and state dict. In training one operation
    computes norm and activation together. This needs an activation that :func:`~talib_fast.ops.stoch_norm` supports, a
    ``drop`` that is an identity, and no hook on either. Otherwise the modules run one after the other. Everything else
    is as in :class:`~talib_fast.finetune.stochnorm.StochNorm1d`.

    timm's ``create_model(norm_layer=...)`` accepts only its own classes. Convert the network with
    :func:`~talib_fast.finetune.stochnorm.convert_model` instead.

    Args:
        num_features: number of channels C.
        eps: added to the variance; positive.
        momentum: share of the batch in the new running statistics. None averages over all batches.
        affine: learn a weight and a bias per channel.
        track_running_stats: False keeps no running statistics.
        apply_act: False makes ``act`` an ``nn.Identity``.
        act_layer: the class of the activation, or its name where timm is installed. None is no activation.
        act_kwargs: keyword arguments for ``act_layer``.
        inplace: whether ``act`` works in place when it runs as a module of its own. None leaves its default.
        drop_layer: the class of ``drop``, called without arguments. None makes it an ``nn.Identity``.
        p: probability that a channel uses the statistics of the batch, in [0, 1].
        device: device of the parameters and buffers.
        dtype: dtype of the parameters and buffers.

    Raises:
        ValueError: ``act_layer`` is a name and timm is not installed.

    Example:

        >>> import torch
        >>> from torch import nn
        >>> from talib_fast.finetune.stochnorm import StochNormAct2d
        >>> layer = StochNormAct2d(16, act_layer=nn.ReLU, p=0.5)
        >>> bool((layer(torch.randn(8, 16, 5, 5)) >= 0).all())
        True
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> "StochNormAct2d":
        counterparts_in_timm()
        return super().__new__(cls)

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        apply_act: bool = True,
        act_layer: Callable[..., nn.Module] | str | None = nn.ReLU,
        act_kwargs: dict[str, Any] | None = None,
        inplace: bool | None = True,
        drop_layer: Callable[[], nn.Module] | None = None,
        p: float = 0.5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, p, device, dtype)
        options = {} if inplace is None else {"inplace": inplace}
        self.drop = nn.Identity() if drop_layer is None else drop_layer()
        self.act = _activation_layer(act_layer if apply_act else None, {**options, **(act_kwargs or {})})

    def _followers(self) -> list[nn.Module]:
        """The modules that run after the norm, in order. timm's synchronised layer may have none."""
        modules: Any = self._modules
        return [modules[name] for name in ("drop", "act") if name in modules]

    def _taken_along(self) -> Activation | None:
        """The one activation that all modules after the norm amount to. None if the operation can't fuse them."""
        followers = self._followers()
        if not self.training or not runs_its_forward_alone(*followers):
            return None
        activations = [activation_of(follower) for follower in followers]
        active = [activation for activation in activations if activation != NO_ACTIVATION]
        if not active:
            return NO_ACTIVATION
        return active[0] if len(active) == 1 else None

    def _followed(self, output: Tensor) -> Tensor:
        """Run the modules after the norm one by one."""
        for follower in self._followers():
            output = follower(output)
        return output

    def _forward_symbolic(self, input: Any) -> Any:
        output = super()._forward_symbolic(input)
        return output if output.node.op == "call_module" else self._followed(output)

    def followed_by(
        self,
        input: Tensor,
        activation: Activation = NO_ACTIVATION,
        residual: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        taken = self._taken_along()
        if taken == NO_ACTIVATION or not isinstance(input, Tensor):  # torch.fx records the layer as one node
            return super().followed_by(input, activation, residual)
        output = self._followed(super().followed_by(input)) if taken is None else super().followed_by(input, taken)
        return followed(output, activation, residual() if residual else None)


class SyncStochNormAct(SyncStochNorm, StochNormAct2d):
    """Stochastic normalisation over all ranks and an activation, in place of timm's ``SyncBatchNormAct``.

    It takes the arguments of :class:`~talib_fast.finetune.stochnorm.SyncStochNorm` and
    :class:`~talib_fast.finetune.stochnorm.StochNormAct2d`.
    """
