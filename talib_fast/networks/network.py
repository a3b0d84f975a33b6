"""A pretrained network in pieces, and what its user has to know about it."""

import copy
from dataclasses import dataclass, field

from torch import nn

from ..images.preprocessing import Preprocessing


@dataclass
class Network:
    """A pretrained network in two pieces.

    Args:
        name: as ``--network`` takes it.
        backbone: maps images [B, 3, S, S] to a map [B, C, H, W] or to features [B, F]; knows its width as
            ``out_features``.
        head: the pretrained classifier [B, F] -> [B, N_p]; None where there is none.
        pool_layer: turns the backbone's output into [B, F]; None: global average pooling.
        delta_layers: the modules of the backbone whose outputs DELTA compares; empty where none are known.
        channel_dim: of these outputs: 1, or -1 for tokens [B, T, C] and maps [B, H, W, C].
        preprocessing: what the network wants its images to be.
        head_name: the head's place in the original architecture, such as ``classifier.1``; None: it has none.
        notes: sentences that the user should read.
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
        """A deep copy: training it leaves this network as it was."""
        return copy.deepcopy(self)
