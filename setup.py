"""Builds the compiled library `_C` with whatever compiler is there; without one the package is pure Python."""

import os
import sys
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:
    sys.exit(
        "talib_fast builds against the torch that is installed, and found none: "
        "pip install torch setuptools ninja, then pip install --no-build-isolation talib_fast"
    )

# the oldest torch whose stable ABI the library keeps to, so that one binary serves every later one
STABLE_ABI = "0x020a000000000000"


def extensions() -> list[CppExtension]:
    sources = sorted(str(path) for path in Path("csrc").rglob("*.cpp"))
    if os.environ.get("TALIB_FAST_NO_EXT") == "1":
        print("talib_fast: TALIB_FAST_NO_EXT=1, so nothing is compiled")
        return []
    torch_version = torch.__version__.partition("+")[0]
    return [
        CppExtension(
            "talib_fast._C",
            sources,
            define_macros=[("TORCH_TARGET_VERSION", STABLE_ABI), ("TALIB_FAST_TORCH_VERSION", torch_version)],
            extra_compile_args=["-O3", "-fvisibility=hidden"],
            py_limited_api=True,
        )
    ]


class Build(BuildExtension):
    def run(self) -> None:
        try:
            super().run()
        except Exception as error:  # whatever a compiler or its absence raises
            first_line = str(error).partition("\n")[0]
            print(
                f"talib_fast: the compiled library is not built ({type(error).__name__}: {first_line}); "
                "the package works without it. To get it, install g++ and ninja and install talib_fast again",
                file=sys.stderr,
            )
            self.extensions = []


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
