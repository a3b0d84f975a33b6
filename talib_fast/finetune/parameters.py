"""Half squared distances of a model's parameters on any devices, sharded or not."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..checks import FLOATS, is_dtensor, is_ordinary
from ..ops import squared_distance

_FLOATS_OF_8_BITS = tuple(getattr(torch, name) for name in dir(torch) if name.startswith("float8_"))


def is_of_integers(parameter: Tensor) -> bool:
    """Whether a parameter holds integers, or numbers packed into integers, as frozen ones of quantized layers do."""
    return parameter.dtype not in FLOATS and not (parameter.is_complex() or parameter.dtype in _FLOATS_OF_8_BITS)


def is_flattened(model: nn.Module) -> bool:
    """Whether FullyShardedDataParallel gives only this rank's shards of the model's parameters."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and any(
        isinstance(module, fsdp.FullyShardedDataParallel) and module.sharding_strategy != fsdp.ShardingStrategy.NO_SHARD
        for module in model.modules()
    )


def check_parameter(parameter: Tensor, name: str) -> None:
    """Raise TypeError unless ``parameter``, or this rank's shard of it, can be summed over."""
    if parameter.layout != torch.strided:
        raise TypeError(f"expected parameter {name!r} to be a dense tensor, got {parameter.layout}")
    if is_dtensor(parameter) and any(placement.is_partial() for placement in parameter.placements):  # type: ignore[attr-defined]
        raise TypeError(f"expected parameter {name!r} to be replicated or sharded, got {parameter.placements}")  # type: ignore[attr-defined]


def check_start(start: Tensor, parameter: Tensor, name: str) -> None:
    """Raise TypeError or ValueError unless ``start`` fits ``parameter`` as its starting point."""
    check_parameter(start, name)
    if is_of_integers(start) or start.is_complex() != parameter.is_complex():
        raise TypeError(
            f"expected parameter {name!r} of the source to fit the target's {parameter.dtype}, got {start.dtype}"
        )
    if start.shape != parameter.shape:
        raise ValueError(
            f"expected parameter {name!r} of one shape in both models, got {list(start.shape)} in the source and "
            f"{list(parameter.shape)} in the target: compare the models without a new head"
        )
    if start.is_meta and not parameter.is_meta:
        raise ValueError(f"expected parameter {name!r} of the source to have values, got one on the meta device")


def _real(tensor: Tensor) -> Tensor:
    """Real numbers of the same squared modulus, in a dtype that can be summed. Of a DTensor this rank's part."""
    if is_dtensor(tensor):
        tensor = tensor.to_local()  # type: ignore[attr-defined]
    if tensor.is_complex():
        return torch.view_as_real(tensor.resolve_conj())
    return tensor.float() if tensor.dtype in _FLOATS_OF_8_BITS else tensor


def _sharding(parameter: Tensor) -> Any:
    """The device mesh and its dimensions that the parameter is sharded over. None if it is not sharded."""
    if not is_dtensor(parameter):
        return None
    placements = parameter.placements  # type: ignore[attr-defined]
    mesh = parameter.device_mesh  # type: ignore[attr-defined]
    dimensions = tuple(j for j, p in enumerate(placements) if not p.is_replicate() and mesh.size(j) > 1)
    return (mesh, dimensions) if dimensions else None


def _over_ranks(part: Tensor, mesh: Any, dimensions: tuple[int, ...]) -> Tensor:
    """The sum of all ranks' parts, with the gradient of this rank's part."""
    whole = part.detach().to(mesh.device_type, copy=True)  # the mesh's backend works there, also for offloaded ones
    for dimension in dimensions:
        dist.all_reduce(whole, group=mesh.get_group(dimension))
    return whole.to(part.device) + (part - part.detach())


def half_squared_distance(parameters: Mapping[Tensor, str], starts: Sequence[Tensor] | None = None) -> Tensor:
    """Σ ½‖w − w₀‖² on the first parameter's device. Parameters on one device with the same sharding take one call.

    Parameters that hold integers are left out.

    Args:
        parameters: the parameters w with their names.
        starts: the starting points w₀ in the same order. None stands for zeros.
    """
    groups: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
    for j, (parameter, name) in enumerate(parameters.items()):
        start = None if starts is None else starts[j]
        device, sharding = parameter.device, None
        if not is_ordinary(parameter) or (start is not None and not is_ordinary(start)):
            if is_of_integers(parameter):
                continue
            check_parameter(parameter, name)
            sharding = _sharding(parameter)
            parameter, start = _real(parameter), None if start is None else _real(start)
        targets, sources = groups.setdefault((device, sharding), ([], []))
        targets.append(parameter)
        if start is not None:
            sources.append(start)
    total = None
    for (_, sharding), (targets, sources) in groups.items():
        part, _ = squared_distance(targets, None if starts is None else sources)
        if sharding is not None:
            part = _over_ranks(part, *sharding)
        total = part if total is None else total + part.to(total.device)
    if total is not None:
        return total
    first = next(iter(parameters), None)
    return torch.zeros((), device=None if first is None else first.device)
