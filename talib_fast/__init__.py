"""Fine-tuning methods of the Transfer-Learning-Library with fused kernels: a drop-in replacement, class for class.

Example:

    >>> import talib_fast
    >>> sorted(name for name in talib_fast.__all__ if name[0] != "_")
    ['finetune', 'load', 'ops', 'patch', 'unpatch']
"""

import importlib
import sys
from os.path import basename
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from . import finetune, ops
    from .inference.model import load
    from .patching import patch, unpatch

__all__ = ["__version__", "finetune", "load", "ops", "patch", "unpatch"]

_MODULES = {"finetune": ".finetune", "ops": ".ops"}
_FUNCTIONS = {"load": ".inference.model", "patch": ".patching", "unpatch": ".patching"}


def __getattr__(name: str) -> Any:
    """Import the public names when they are first used."""
    if name in _MODULES:
        return importlib.import_module(_MODULES[name], __name__)
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(_FUNCTIONS[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _is_a_command() -> bool:
    """Whether the interpreter runs the command line, which imports torch later, when it can be interrupted."""
    words = sys.orig_argv
    if sys.argv[:1] == ["-m"] and "-m" in words:
        return words[words.index("-m") + 1 :][:1] == [__name__]
    return basename(sys.argv[0] if sys.argv else "") == "talib-fast"


if not _is_a_command():
    from . import finetune, ops  # registers the operators, which a loaded torch.export program needs
