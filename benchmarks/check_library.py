"""Checks that the compiled library was built from these sources and serves every operation on this GPU.

    python benchmarks/check_library.py

If not, it prints the reason, and its exit status is 1. PyTorch would serve instead, and would be tested and measured.
"""

import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from talib_fast import info, ops
from talib_fast.ops.library import Compiled

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tools"))
import build_parts  # noqa: E402


def fault(found: Compiled, of_these_sources: bool, served: Mapping[str, tuple[str, str]]) -> str:
    """The reason why the library does not serve this GPU; empty if it does.

    Args:
        found: the outcome of loading the library.
        of_these_sources: whether it was built from these sources.
        served: by operation, the backend that serves it on this GPU, and why.
    """
    if not found.loaded:
        return found.status
    if not of_these_sources:
        return "it was built from other sources"
    unserved = {name: told for name, told in served.items() if told[0] != "compiled"}
    return "; ".join(f"{name} is served by {backend}: {why}" for name, (backend, why) in unserved.items())


def is_of(sources: Path, package: Path) -> bool:
    """Whether the library in ``package`` was built from ``sources``; False if there is no library."""
    symbol = build_parts.sources_symbol(sources).encode()
    return any(symbol in library.read_bytes() for library in package.glob("_C*.so"))


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("there is no GPU that this torch can use")
    print(info.describe())
    served = {name: devices["cuda"] for name, devices in ops.backends().items()}
    of_these_sources = is_of(ROOT / "csrc", ROOT / "talib_fast")
    if found := fault(ops.compiled(), of_these_sources, served):
        sys.exit(f"the compiled library does not serve this GPU: {found}")


if __name__ == "__main__":
    main()
