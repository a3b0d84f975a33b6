"""A model's parameters by the names that they have without what is around the model, or around a part of it."""

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.utils.parametrize import ParametrizationList
from torch.optim.swa_utils import AveragedModel

# the child of torch.compile's, activation checkpointing's and FullyShardedDataParallel's modules, the children of
# Lightning Fabric's, which hold one model, and of no others
WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_forward_module", "_original_module")
_OF_WRAPPERS = {*WRAPPED, "module", "base_model", "model"}
_WRAPPERS = (DataParallel, DistributedDataParallel, AveragedModel)  # whose child is called "module"

FLATTENED = "got a flattened shard of FullyShardedDataParallel: shard the model by torch.distributed.fsdp.fully_shard"


def parameters_by_name(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter under every name that it has, as if nothing were around the model or a part of it.

    That is DataParallel, DistributedDataParallel, AveragedModel, FullyShardedDataParallel, ``torch.compile``,
    ``checkpoint_wrapper``, Lightning Fabric's module, and PEFT's model and tuner. The original of a parametrised tensor
    has that tensor's name. The order is that of ``model.named_parameters()``.

    Raises:
        TypeError: FullyShardedDataParallel has flattened parameters.
    """
    found: dict[str, Tensor] = {}
    _collect(model, "", found)
    return found


def _collect(module: nn.Module, prefix: str, found: dict[str, Tensor]) -> None:
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
    """Whether ``module`` is around its child of that key, one of those that wrappers have, and no more."""
    if key == "module":
        return isinstance(module, _WRAPPERS) and len(module._modules) == 1
    if key in ("base_model", "model"):  # PEFT's model is around the user's, or around a tuner that is
        return hasattr(module, "inject_adapter") or (key == "base_model" and hasattr(module, "get_base_model"))
    return True


def plain_name(name: str) -> str:
    """``name`` without what a user's modules may be called as well: any ``module``, as further wrappers call what they
    hold, and what PEFT puts into the names of a layer that it adapts, or of one that it trains a copy of."""
    if "module" not in name and "base_layer" not in name:  # which saves most names the rest
        return name
    parts = [part for part in name.split(".") if part not in ("module", "base_layer")]
    if "modules_to_save" in parts:
        at = parts.index("modules_to_save")
        del parts[at : at + 2]
    return ".".join(parts)


def by_plain_name(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters by plain name, but for those of which several have one."""
    plain: dict[str, Tensor] = {}
    ambiguous = []
    for name, parameter in parameters.items():
        name = plain_name(name)
        if plain.setdefault(name, parameter) is not parameter:
            ambiguous.append(name)
    for name in ambiguous:
        plain.pop(name, None)
    return plain
