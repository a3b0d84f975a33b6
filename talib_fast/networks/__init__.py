"""Pretrained networks, split into a backbone and the head they were pretrained with.

>>> from talib_fast.networks import build
>>> network = build("mobilenet_v2", image_size=64)
>>> network.backbone(torch.zeros(2, 3, 64, 64)).shape, network.head.out_features
(torch.Size([2, 1280, 2, 2]), 1000)
"""

from .mobilenet_v2 import DELTA_LAYERS as MOBILENET_DELTA_LAYERS
from .mobilenet_v2 import InvertedResidual, MobileNetV2, conv_bn_relu
from .network import Network
from .pretrained import NETWORKS, build, cut, library_model
from .trained import restored, trained_state

__all__ = [
    "MOBILENET_DELTA_LAYERS",
    "NETWORKS",
    "InvertedResidual",
    "MobileNetV2",
    "Network",
    "build",
    "conv_bn_relu",
    "cut",
    "library_model",
    "restored",
    "trained_state",
]
