"""Fine-tuning methods of the Transfer-Learning-Library, fused: one import changes, the answers are right and faster."""

from . import finetune, ops
from .patching import patch, unpatch
from .version import __version__

__all__ = ["__version__", "finetune", "ops", "patch", "unpatch"]
