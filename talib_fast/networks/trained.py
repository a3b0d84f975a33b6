"""A fine-tuned network in its original architecture: as a state dict with that one's names, and back."""

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

REMEDY = "fine-tune the network anew, or take another model"


def trained_state(network: Network, backbone: nn.Module, head: nn.Linear) -> dict[str, Tensor]:
    """A fine-tuned backbone and head as a state dict that the original architecture loads strictly.

    Args:
        network: what was fine-tuned.
        backbone: its backbone now, on any device; stochastic norms become the batch norms that they were.
        head: the new head.

    Returns:
        Copies on the CPU, contiguous. The head has the names of the old one, or ``talib_fast_head.weight`` and
        ``.bias`` where the architecture has no place for it.
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
    """The network that :func:`trained_state` is the state of, in evaluation mode. Nothing is downloaded for it.

    Args:
        name: of the network, as ``--network`` takes it.
        head_name: the head's place in the architecture; None: it has none, the new head follows the pooled features.
        num_classes: number of the new head's classes.

    Returns:
        A module that maps float images [B, 3, S, S] to logits [B, num_classes].

    Raises:
        UserError: the network's library is missing or knows no such network, or the state does not fit.
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
    """A network that has no head of its own, and one on its features, whose maps are averaged."""

    def __init__(self, backbone: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.backbone = backbone
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        setattr(self, NEW_HEAD, head)

    def forward(self, images: Tensor) -> Tensor:
        features = self.backbone(images)
        return getattr(self, NEW_HEAD)(features if features.dim() == 2 else self.pool(features))


def architecture(name: str) -> nn.Module:
    """The whole network with random weights."""
    library, _, model_name = name.partition(":")
    if name in NETWORKS:
        return MobileNetV2Classifier() if name == "mobilenet_v2" else NETWORKS[name](None).backbone
    if library not in LIBRARIES or not model_name:
        raise UserError(f"there is no network {name} here: update talib_fast, or fine-tune another network")
    return library_model(library, model_name, pretrained=False)
