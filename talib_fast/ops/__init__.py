"""The three operations behind the fine-tuning methods, each differentiable and on every device."""

from .library import Compiled, backends, compiled, compiled_nodes, unserved_gpu
from .spectral_tail import spectral_tail
from .squared_distance import squared_distance
from .stoch_norm import stoch_norm

__all__ = [
    "Compiled",
    "backends",
    "compiled",
    "compiled_nodes",
    "spectral_tail",
    "squared_distance",
    "stoch_norm",
    "unserved_gpu",
]
