"""Measure the peak memory of a run, and release its memory afterwards."""

import ctypes
import gc
import resource
import sys
from pathlib import Path

import torch

PROC = Path("/proc/self")


class PeakMemory:
    """The highest memory use since construction: of tensors on a GPU, or of the whole process on other devices."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.resettable = False
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        try:
            (PROC / "clear_refs").write_text("5")  # Linux: sets the high-water mark to the present use
            self.resettable = True
        except OSError:
            pass  # then mib() reports the peak since the process started

    def mib(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        if self.resettable:
            for line in (PROC / "status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) / 2**10
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**20 if sys.platform == "darwin" else 2**10)


def release_memory() -> None:
    """Return freed memory to the device and the system, so that it does not count in the next run's peak."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl does not
        if trim is not None:
            trim(0)
