"""Convert a fine-tuned network to a state dict of its original architecture, and back."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..errors import UserError, first_line
from ..finetune.stochnorm import restore_batch_norm
from .mobilenet_v2 import MobileNetV2Classifier
from .network import Network
from .pretrained import LIBRARIES, NETWORKS, library_model
from .weights import NEW_HEAD, load_exactly

REMEDY = "fine-tune the network again, or choose another model"


def trained_state(network: Network, backbone: nn.Module, head: nn.Linear) -> dict[str, Tensor]:
    """A fine-tuned backbone and head as a state dict that the original architecture loads strictly.

    Args:
        network: the pretrained network.
        backbone: its fine-tuned backbone, on any device; stochastic norms are turned back into batch norms.
        head: the new head.

    Returns:
        Contiguous copies on the CPU. The head has the names of the old head, or ``talib_fast_head.weight`` and
        ``.bias`` if the architecture has no head.
    """
    place = network.head_name or NEW_HEAD
    state = restore_batch_norm(copy.deepcopy(backbone)).state_dict()
    state.update({f"{place}.{name}": value for name, value in head.state_dict().items()})
    return {
        name: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, value in state.items()
        if isinstance(value, Tensor)
    }


def restored(name: str, head_name: str | None, num_classes: int, state: Mapping[str, Tensor]) -> nn.Module:
    """The network with a state of :func:`trained_state`, in evaluation mode. Nothing is downloaded.

    Args:
        name: the network's name for ``--network``.
        head_name: the head's name in the architecture; None if it has no head: the new head follows the pooled
            features.
        num_classes: number of the new head's classes.
        state: the state dict.

    Returns:
        A module that maps float images [B, 3, S, S] to logits [B, num_classes].

    Raises:
        UserError: the network's library is missing or has no such network, or the state does not fit.
    """
    model = architecture(name)
    weight = state.get(f"{head_name or NEW_HEAD}.weight")
    if weight is None or weight.dim() != 2:
        raise UserError(f"the weights of {name} have no head {head_name or NEW_HEAD}: {REMEDY}")
    head = nn.Linear(weight.shape[1], num_classes, bias=f"{head_name or NEW_HEAD}.bias" in state)
    if head_name is None:
        whole: nn.Module = WithHead(model, head)
        state = {
            name if name.startswith(f"{NEW_HEAD}.") else f"backbone.{name}": value for name, value in state.items()
        }
    else:
        whole = model
        try:
            model.set_submodule(head_name, head, strict=True)
        except (AttributeError, ValueError) as error:
            raise UserError(f"{name} has no head {head_name} ({first_line(error)}): {REMEDY}") from error
    load_exactly(whole, state, f"the state dict of {name}", REMEDY)
    return whole.eval()


class WithHead(nn.Module):
    """A network without a head of its own, and a new head on its features; maps are averaged first."""

    def __init__(self, backbone: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.backbone = backbone
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        setattr(self, NEW_HEAD, head)

    def forward(self, images: Tensor) -> Tensor:
        features = self.backbone(images)
        return getattr(self, NEW_HEAD)(features if features.dim() == 2 else self.pool(features))


def architecture(name: str) -> nn.Module:
    """The whole network with random weights; raises UserError if there is no network of this name."""
    library, _, model_name = name.partition(":")
    if name == "mobilenet_v2":
        return MobileNetV2Classifier()
    if name in NETWORKS:  # a network that was registered there has no head of its own
        return NETWORKS[name](None).backbone
    if library not in LIBRARIES or not model_name:
        raise UserError(f"this talib_fast has no network {name}: update talib_fast, or fine-tune another network")
    return library_model(library, model_name, pretrained=False)
