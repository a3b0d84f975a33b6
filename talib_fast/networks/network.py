"""A pretrained network as backbone and head, with the information that fine-tuning needs."""

import copy
from dataclasses import dataclass, field

from torch import nn

from ..images.preprocessing import Preprocessing


@dataclass
class Network:
    """A pretrained network as backbone and head.

    Args:
        name: the name that ``--network`` takes.
        backbone: maps images [B, 3, S, S] to a map [B, C, H, W] or to features [B, F]; its ``out_features`` is C or F.
        head: the pretrained classifier [B, F] -> [B, N_p]; None if there is none.
        pool_layer: maps the backbone's output to [B, F]; None: global average pooling.
        delta_layers: the modules of the backbone whose outputs DELTA compares; empty if none are known.
        channel_dim: the channels' dimension of these outputs: 1, or -1 for tokens [B, T, C] and maps [B, H, W, C].
        preprocessing: the preprocessing of the network's images.
        head_name: the head's name in the original architecture, such as ``classifier.1``; None if it has no head.
        notes: sentences to show to the user.
    """

    name: str
    backbone: nn.Module
    head: nn.Linear | None
    pool_layer: nn.Module | None
    delta_layers: tuple[str, ...]
    channel_dim: int = 1
    preprocessing: Preprocessing = field(default_factory=lambda: Preprocessing(224))
    head_name: str | None = None
    notes: tuple[str, ...] = ()

    def clone(self) -> "Network":
        """A deep copy, which can be trained without changing this network."""
        return copy.deepcopy(self)
