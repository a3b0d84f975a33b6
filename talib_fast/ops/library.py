"""The ``talib_fast`` operator library: how operations are defined, and which backend serves them."""

import importlib
import inspect
import os
import re
import warnings
from collections import namedtuple
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..torch_private import (
    function_transforms,
    in_forward_mode,
    may_be_in_function_transform,
)

OPERATIONS = ("stoch_norm", "squared_distance", "spectral_tail")

_UNSERVED = {"Jvp", "Functionalize"}  # transforms of torch.func that take no autograd function of ours
_LIBRARY = torch.library.Library("talib_fast", "DEF")


def define(schema: str, implementation: Callable, fake: Callable, *tags: torch.Tag) -> Callable:
    """Define an operator and return its callable. A ``torch.autograd.Function`` around it gives the derivative.

    Args:
        schema: name, arguments and results, as :class:`torch.library.Library` takes them.
        implementation: serves every device without a registered kernel. A registered kernel that does not run on a GPU
            calls it there, under the name ``..._in_pytorch``.
        fake: gives shapes, dtypes and strides of the results without computing them.
        tags: further properties of the operator for compilers.
    """
    name, bracket, rest = schema.partition("(")

    def in_place_of_a_kernel(*args: Any) -> Any:
        _tell_unserved((args[0] if isinstance(args[0], Tensor) else args[0][0]).device)
        return implementation(*args)

    for own_name, serves in ((name, implementation), (f"{name}_in_pytorch", in_place_of_a_kernel)):
        _LIBRARY.define(own_name + bracket + rest, tags=(torch.Tag.pt2_compliant_tag, *tags))
        _LIBRARY.impl(own_name, serves, "CompositeExplicitAutograd")
        # otherwise PyTorch checks the arguments of every call to report a missing derivative
        _LIBRARY.impl(own_name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"talib_fast::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.talib_fast, name).default


def apply(function: type[Function], *args: Any) -> Any:
    """Call ``function.apply`` for a function with a ``setup_context``, at no cost for torch.func where it is not used.

    It is no method of a base class, because torch.compile of torch 2.10 can't follow that.
    """
    if torch.compiler.is_compiling() or may_be_in_function_transform():
        return function.apply(*args)
    # not through Function.apply, which inspects the signature of ``forward`` on every call
    return super(Function, function).apply(*args)  # type: ignore[misc]


def argument_names(function: type[Function]) -> Any:
    """A named tuple of the arguments of ``forward``, which PyTorch passes on to other methods by position."""
    return namedtuple("Arguments", inspect.signature(function.forward).parameters)


def needs_pytorch_formula() -> bool:
    """Whether PyTorch's own operators have to compute the result, because an autograd function would fail or run twice.

    Forward-mode differentiation and ``torch.func.functionalize`` accept no autograd function of ours. ``torch.compile``
    loses its derivative inside transforms of ``torch.func``. ``torch.jit.trace`` records both the function and the
    operators inside it.
    """
    if torch.compiler.is_compiling():
        return bool(function_transforms())
    return in_forward_mode() or torch.jit.is_tracing() or not _UNSERVED.isdisjoint(function_transforms())


def compiles_without_gradient(*inputs: Tensor) -> bool:
    """Whether this is being compiled where no gradient is needed.

    There, torch.compile can't call an autograd function whose ``forward`` takes any number of tensors: it would pass a
    context as well.
    """
    return torch.compiler.is_compiling() and not (
        torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    )


def is_empty(tensor: Tensor) -> bool:
    """Whether a tensor has no elements. False under ``torch.jit.trace``, which can't follow a decision by size."""
    return not torch.jit.is_tracing() and tensor.numel() == 0


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of sums over ``tensor``: float64 for float64, float32 for shorter floats.

    Raises:
        TypeError: ``tensor`` is not float16, bfloat16, float32 or float64.
    """
    if tensor.dtype == torch.float64:
        return torch.float64
    if tensor.dtype in (torch.float32, torch.float16, torch.bfloat16):
        return torch.float32
    raise TypeError(f"expected a float16, bfloat16, float32 or float64 tensor, got {tensor.dtype}")


@dataclass(frozen=True)
class Compiled:
    """The outcome of loading a compiled library.

    Attributes:
        loaded: whether it is in use.
        status: a sentence that says so, with the reason.
        build: what the library of kernels says about its build. ``compiler``, ``torch`` (version of its headers),
            ``cpu`` and ``cuda`` (operations with a kernel), ``nvcc`` and ``architectures``. Without CUDA kernels
            ``without_cuda``, the reason, replaces the last two.
    """

    loaded: bool
    status: str
    build: Mapping[str, str] = field(default_factory=dict)


def _unserved(gpu: int | None = None) -> str:
    """Why the CUDA kernels serve no GPU, or not GPU number ``gpu``. Empty if they do, or if there are none.

    Whether the driver is too old is known at once. A question about one GPU initialises CUDA.
    """
    ask = getattr(torch.ops.talib_fast, "unserved", None)
    return ask(gpu) if ask is not None else ""


def unserved_gpu(index: int) -> str:
    """Why the compiled kernels do not run on a GPU, and what to do. Empty if they run, or if there are none.

    It asks the GPU, which initialises CUDA.

    Args:
        index: number of the GPU.
    """
    if not (why := _unserved(index)):
        return ""
    built_for = _COMPILED.build.get("architectures", "others")
    return f"the kernels are built for {built_for}, and {why}"


_TOLD: set[torch.device] = set()


def _tell_unserved(device: torch.device) -> None:
    """Warn once per GPU that PyTorch serves its calls."""
    if device not in _TOLD:
        _TOLD.add(device)
        warnings.warn(f"talib_fast falls back to PyTorch on {device}: {unserved_gpu(device.index or 0)}", stacklevel=3)


def _load_compiled() -> Compiled:
    """Load the compiled kernels, which then replace the PyTorch implementations.

    The environment variable ``TALIB_FAST_BACKEND`` chooses. ``auto`` (the default) loads them if they are there,
    ``compiled`` raises if they are missing, ``pytorch`` does not load them.
    """
    choice = os.environ.get("TALIB_FAST_BACKEND", "auto")
    if choice not in ("auto", "compiled", "pytorch"):
        raise ValueError(f"TALIB_FAST_BACKEND must be auto, compiled or pytorch, got {choice!r}")
    if choice == "pytorch":
        return Compiled(False, "TALIB_FAST_BACKEND=pytorch leaves compiled kernels alone")
    library = next(iter(sorted(Path(__file__).parent.parent.glob("_C*.so"))), None)
    if library is None:
        reason = "talib_fast was installed without compiled kernels"
    else:
        try:
            torch.ops.load_library(library)
            lines = torch.ops.talib_fast.build_info().splitlines()
            build = dict(line.split("=", 1) for line in lines)
            if why := _unserved():
                warnings.warn(f"talib_fast falls back to PyTorch on GPUs: {why}", stacklevel=2)
            return Compiled(True, f"{library.name} is loaded", build)
        except OSError as error:
            reason = f"{library.name} does not load: {error}"
    if choice == "compiled":
        raise ImportError(f"TALIB_FAST_BACKEND=compiled, but {reason}")
    if library is not None:
        warnings.warn(f"talib_fast falls back to PyTorch: {reason}", stacklevel=2)
    return Compiled(False, reason)


def _not_for_this_torch(library: Path) -> str:
    """Why the library of autograd nodes can't be loaded, according to its file. Empty if it can.

    With another torch than the one whose headers it was built with, it would load and then crash or corrupt memory.
    """
    found = re.search(rb"talib_fast\._autograd is built for torch=([^\0]*)\0", library.read_bytes())
    built_for = found[1].decode() if found else "an unknown version"
    if built_for == torch.__version__:
        return ""
    return f"{library.name} is built for torch {built_for}, not {torch.__version__}: install talib_fast again"


def _load_autograd(kernels: Compiled) -> tuple[Any, Compiled]:
    """The module of autograd nodes or None, and the outcome of loading it.

    The environment variable ``TALIB_FAST_AUTOGRAD`` chooses. ``auto`` (the default) loads it if it is there, ``python``
    does not load it.
    """
    choice = os.environ.get("TALIB_FAST_AUTOGRAD", "auto")
    if choice not in ("auto", "python"):
        raise ValueError(f"TALIB_FAST_AUTOGRAD must be auto or python, got {choice!r}")
    if choice == "python":
        return None, Compiled(False, "TALIB_FAST_AUTOGRAD=python leaves it alone")
    if not kernels.loaded:
        return None, Compiled(False, kernels.status)
    package = Path(__file__).parent.parent
    library = package / f"_autograd{EXTENSION_SUFFIXES[0]}"
    if not library.exists():
        found = sorted(package.glob("_autograd*.so"))
        reason = f"{found[0].name} is built for another Python: install talib_fast again" if found else ""
        return None, Compiled(False, reason or "talib_fast was installed without it")
    if reason := _not_for_this_torch(library):
        return None, Compiled(False, reason)
    try:
        return importlib.import_module("talib_fast._autograd"), Compiled(True, f"{library.name} is loaded")
    except ImportError as error:
        return None, Compiled(False, f"{library.name} does not load: {error}")


_COMPILED = _load_compiled()
_AUTOGRAD, _AUTOGRAD_STATUS = _load_autograd(_COMPILED)


def compiled() -> Compiled:
    """The outcome of loading the compiled library of kernels.

    Returns:
        An object with ``loaded`` (bool), ``status`` (a sentence) and ``build`` (what the library says about its build).

    Example:

        >>> from talib_fast.ops import compiled
        >>> type(compiled().loaded).__name__
        'bool'
    """
    return _COMPILED


def compiled_nodes() -> Compiled:
    """The outcome of loading the compiled library of autograd nodes, as :func:`~talib_fast.ops.compiled` returns it."""
    return _AUTOGRAD_STATUS


def node_function(name: str) -> Callable | None:
    """A function of the library of autograd nodes. None without the library. It returns None if Python must serve."""
    return getattr(_AUTOGRAD, name, None)


def backends() -> dict[str, dict[str, tuple[str, str]]]:
    """Which backend serves each operation on each device, and why: ``{operation: {device: (backend, reason)}}``.

    ``cuda`` stands for the current GPU, if there is one. It is asked, which initialises CUDA.

    Returns:
        ``"compiled"`` or ``"PyTorch"`` and a sentence, for each operation and each of ``cpu`` and ``cuda``.

    Example:

        >>> from talib_fast.ops import backends
        >>> sorted(backends())
        ['spectral_tail', 'squared_distance', 'stoch_norm']
    """
    served: dict[str, dict[str, tuple[str, str]]] = {}
    this_gpu = unserved_gpu(torch.cuda.current_device()) if torch.cuda.is_available() else ""
    for operation in OPERATIONS:
        served[operation] = {}
        for device in ("cpu", "cuda"):
            has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key(
                f"talib_fast::{operation}_forward", device.upper()
            )
            if has_kernel and device == "cuda" and this_gpu:
                served[operation][device] = ("PyTorch", this_gpu)
            elif has_kernel:
                served[operation][device] = ("compiled", "the compiled library holds a kernel for it")
            elif not _COMPILED.loaded:
                served[operation][device] = ("PyTorch", _COMPILED.status)
            elif device == "cuda" and "without_cuda" in _COMPILED.build:
                reason = f"the compiled library holds no CUDA kernels: {_COMPILED.build['without_cuda']}"
                served[operation][device] = ("PyTorch", reason)
            elif device == "cuda" and (why := _unserved()):
                served[operation][device] = ("PyTorch", why)
            elif device == "cpu":
                served[operation][device] = ("PyTorch", "its compiled kernel needs AVX2, which this processor lacks")
            else:
                served[operation][device] = ("PyTorch", f"the compiled library holds no {device} kernel for it")
    return served
