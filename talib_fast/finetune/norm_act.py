"""Stochastic norms with the activation that follows them in one layer, as timm has them."""

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
    """One of timm's modules; None where timm can't be imported."""
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError):  # torchvision, which timm needs, raises the latter if it does not fit torch
        return None


def counterparts_in_timm() -> dict[type, type]:
    """timm's batch norms with an activation, and the stochastic norms that they become; none before timm is loaded.

    From then on stochastic ones are timm's ``BatchNormAct2d``, too: of timm's tools those that take one for any other
    batch norm, as freezing does, leave a network without its activations.
    """
    timm: Any = sys.modules.get(TIMMS_NORMS)
    if timm is None:
        return {}
    if not issubclass(StochNormAct2d, timm.BatchNormAct2d):
        StochNormAct2d.__bases__ = (StochNorm2d, timm.BatchNormAct2d)
    return {timm.BatchNormAct2d: StochNormAct2d, timm.SyncBatchNormAct: SyncStochNormAct}


def _activation_layer(act_layer: Any, options: dict[str, Any]) -> nn.Module:
    if isinstance(act_layer, str) and act_layer:
        layers = imported_from_timm(TIMM)
        if layers is None:
            raise ValueError(f"expected act_layer to be a class where timm is missing, got {act_layer!r}")
        act_layer = layers.get_act_layer(act_layer)
    if not act_layer:
        return nn.Identity()
    try:
        return act_layer(**options)
    except TypeError:  # not all of them can work in place
        return act_layer(**{name: option for name, option in options.items() if name != "inplace"})


class StochNormAct2d(StochNorm2d):
    """Stochastic normalisation of ``[N, C, H, W]`` inputs, and an activation, in place of timm's ``BatchNormAct2d``.

    The layer computes ``act(drop(norm(x)))`` and has timm's attributes and state dict. In training the operation takes
    the activation along if it is the module of one that :func:`~talib_fast.ops.stoch_norm` knows, ``drop`` does nothing
    and no hook waits for either. Otherwise as :class:`~talib_fast.finetune.stochnorm.StochNorm1d`.

    timm's ``create_model(norm_layer=...)`` takes its own classes only:
    :func:`~talib_fast.finetune.stochnorm.convert_model` the network.

    Args:
        apply_act: False: ``act`` is an ``nn.Identity``.
        act_layer: the activation's class or, where timm is installed, its name. None is no activation.
        act_kwargs: what ``act_layer`` is called with.
        inplace: whether an activation that is called by itself works in place, if it can. None does not ask for it.
        drop_layer: the class of ``drop``, called without arguments; None: an ``nn.Identity``.

    Raises:
        ValueError: ``act_layer`` is a name and timm is not installed.
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
        """What is called after the norm, in that order; timm's synchronised one may be without."""
        modules: Any = self._modules
        return [modules[name] for name in ("drop", "act") if name in modules]

    def _taken_along(self) -> Activation | None:
        """What all the followers are to the operation, None if it can't have them."""
        followers = self._followers()
        if not self.training or not runs_its_forward_alone(*followers):
            return None
        activations = [activation_of(follower) for follower in followers]
        active = [activation for activation in activations if activation != NO_ACTIVATION]
        if not active:
            return NO_ACTIVATION
        return active[0] if len(active) == 1 else None

    def _followed(self, output: Tensor) -> Tensor:
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
        if taken == NO_ACTIVATION or not isinstance(input, Tensor):  # a graph of torch.fx holds the layer as a whole
            return super().followed_by(input, activation, residual)
        output = self._followed(super().followed_by(input)) if taken is None else super().followed_by(input, taken)
        return followed(output, activation, residual() if residual else None)


class SyncStochNormAct(SyncStochNorm, StochNormAct2d):
    """:class:`SyncStochNorm` with the activation of :class:`StochNormAct2d`, in place of timm's ``SyncBatchNormAct``.

    Its arguments are those of both.
    """
