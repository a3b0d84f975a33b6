"""Name a model's parameters without the parts that wrappers around the model or its modules add."""

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.utils.parametrize import ParametrizationList
from torch.optim.swa_utils import AveragedModel

# names that only wrappers give to their child: torch.compile, activation checkpointing, FullyShardedDataParallel, and
# Lightning Fabric, which has two
WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_forward_module", "_original_module")
_OF_WRAPPERS = {*WRAPPED, "module", "base_model", "model"}
_WRAPPERS = (DataParallel, DistributedDataParallel, AveragedModel)  # whose child is called "module"

FLATTENED = "got a flattened shard of FullyShardedDataParallel: use torch.distributed.fsdp.fully_shard instead"


def parameters_by_name(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter under each of its names, without the parts that wrappers add.

    Wrappers are DataParallel, DistributedDataParallel, AveragedModel, FullyShardedDataParallel, ``torch.compile``,
    ``checkpoint_wrapper``, Lightning Fabric's module, and PEFT's model and tuner. The original of a parametrised tensor
    has that tensor's name. The order is that of ``model.named_parameters()``.

    Raises:
        TypeError: FullyShardedDataParallel has flattened parameters.
    """
    found: dict[str, Tensor] = {}
    _collect(model, "", found)
    return found


def _collect(module: nn.Module, prefix: str, found: dict[str, Tensor]) -> None:
    """Add the parameters of ``module`` and its children to ``found``."""
    for key, parameter in module._parameters.items():
        if parameter is None:
            continue
        name = prefix + key
        if key == "_flat_param":
            raise TypeError(f"expected a model's parameters in their own shapes, {FLATTENED}")
        if key == "original" and isinstance(module, ParametrizationList):
            owner, _, name = prefix[:-1].rpartition("parametrizations.")
            name = owner + name
        found[name] = parameter
    for key, child in module._modules.items():
        if child is not None:
            _collect(child, prefix if key in _OF_WRAPPERS and _wraps(module, key) else f"{prefix}{key}.", found)


def _wraps(module: nn.Module, key: str) -> bool:
    """Whether ``module`` is a wrapper of its child ``key``, one of the names that wrappers use."""
    if key == "module":
        return isinstance(module, _WRAPPERS) and len(module._modules) == 1
    if key in ("base_model", "model"):  # PEFT's model is around the user's, or around a tuner that is
        return hasattr(module, "inject_adapter") or (key == "base_model" and hasattr(module, "get_base_model"))
    return True


def plain_name(name: str) -> str:
    """``name`` without parts that wrappers add but that a user's modules may have too.

    These are any ``module``, which many wrappers use, and what PEFT adds for a layer that it adapts or trains a copy
    of.
    """
    if "module" not in name and "base_layer" not in name:  # the usual case, quickly
        return name
    parts = [part for part in name.split(".") if part not in ("module", "base_layer")]
    if "modules_to_save" in parts:
        at = parts.index("modules_to_save")
        del parts[at : at + 2]
    return ".".join(parts)


def by_plain_name(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters by plain name, without those whose plain name is not unique."""
    plain: dict[str, Tensor] = {}
    ambiguous = []
    for name, parameter in parameters.items():
        name = plain_name(name)
        if plain.setdefault(name, parameter) is not parameter:
            ambiguous.append(name)
    for name in ambiguous:
        plain.pop(name, None)
    return plain
