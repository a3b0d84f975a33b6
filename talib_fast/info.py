"""``python -m talib_fast info``: versions, devices, and which backend serves each operation."""

import platform
from collections.abc import Mapping

import numpy as np
import torch

from . import ops
from .version import __version__


def describe() -> str:
    """Versions, devices and backends as aligned lines, for bug reports."""
    lines = [
        f"talib_fast  {__version__}",
        f"torch       {torch.__version__}",
        f"numpy       {np.__version__}",
        f"python      {platform.python_version()}",
        "",
        f"cpu         {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        *gpus(),
        f"kernels     {ops.compiled().status}",
        *built(ops.compiled().build),
        f"autograd    {ops.compiled_nodes().status}",
        "",
    ]
    for operation, devices in ops.backends().items():
        for device, (backend, reason) in devices.items():
            lines.append(f"{operation:<18}{device:<6}{backend:<10}{reason}")
    return "\n".join(lines)


def gpus() -> list[str]:
    """A line for each GPU, or one that says why there is none."""
    if torch.version.cuda is None:
        return ["cuda        this torch is built without it"]
    if not torch.cuda.is_available():
        return [f"cuda        no GPU is usable (torch is built with CUDA {torch.version.cuda})"]
    lines = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        name = f"cuda:{index}"
        capability = f"compute capability {gpu.major}.{gpu.minor}, CUDA {torch.version.cuda}"
        lines.append(f"{name:<12}{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, {capability}")
        unserved = ops.unserved_gpu(index)
        lines += [f"{'':<12}{unserved}"] if unserved else []
    return lines


def built(build: Mapping[str, str]) -> list[str]:
    """What a loaded library says about its build: operations, compiler and architectures."""
    if "compiler" not in build:
        return []
    by = f"{build['cpu'] or 'no kernel'}, by {build['compiler']} with the headers of torch {build['torch']}"
    if "without_cuda" in build:
        for_cuda = f"not built: {build['without_cuda']}"
    else:
        for_cuda = f"{build['cuda']}, by nvcc {build['nvcc']} for {build['architectures']}"
    return [f"  for cpu   {by}", f"  for cuda  {for_cuda}"]
