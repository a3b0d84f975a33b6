"""Times candidates in turn, on a machine whose speed drifts, and measures their peak memory.

A round times every candidate once, in rotating order, so a slow spell of the machine meets all of them. The ratio of
two candidates is taken round by round. A sample is a few forward passes whose outputs are kept, as in training, and
then their backward passes. The inputs rotate through more sets than the largest cache holds.
"""

import contextlib
import ctypes
import gc
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from report import progress
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from talib_fast.training.memory import PeakMemory, release_memory

Samples = dict[str, dict[str, list[float]]]

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_MOST_SETS = 32
_MOST_REPETITIONS = 16
_SAMPLE_SECONDS = {"cpu": 0.005, "cuda": 0.001}
# For sizes from here on, malloc takes fresh memory from the system every time. A virtual machine may have returned this
# memory to its host, and to get it back costs far more than a page fault. So an untimed pass comes before each sample,
# as a step comes before each step in training.
_MAPPED_BYTES = 32 * 2**20


@dataclass
class Feed:
    """A candidate's arguments, first those that receive gradients (``leaves``), and the gradient of its output."""

    leaves: tuple[Tensor, ...]
    grad: Tensor
    constants: tuple[Tensor, ...] = ()
    _converted: dict[torch.dtype, Tensor] = field(default_factory=dict)

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        return *self.leaves, *self.constants

    @property
    def nbytes(self) -> int:
        """The bytes of the leaves, and so of their gradients."""
        return sum(leaf.nbytes for leaf in self.leaves)

    def grad_for(self, output: Tensor) -> Tensor:
        """The gradient in the output's dtype, converted once. A candidate may return another dtype than it takes."""
        if output.dtype == self.grad.dtype:
            return self.grad
        if output.dtype not in self._converted:
            self._converted[output.dtype] = self.grad.to(output.dtype)
        return self._converted[output.dtype]


@dataclass
class Candidate:
    """Something to time.

    Attributes:
        name: the name in results and tables.
        forward: maps a feed's arguments to an output.
        parameters: they receive gradients beside the feed's leaves; None: there is no backward pass.
        observe: gives further figures of the last sample, such as the share of channels that were drawn.
    """

    name: str
    forward: Callable[..., Tensor]
    parameters: tuple[Tensor, ...] | None = None
    observe: Callable[[], dict[str, float]] | None = None

    def backward(self, output: Tensor, feed: Feed) -> tuple[Tensor, ...]:
        assert self.parameters is not None
        return torch.autograd.grad(output, (*feed.leaves, *self.parameters), feed.grad_for(output))


def sets_beyond_cache(device: torch.device, bytes_per_set: int) -> int:
    """The number of sets of inputs that exceeds the device's largest cache."""
    return min(_MOST_SETS, max(1, math.ceil(last_cache_bytes(device) / bytes_per_set)))


def feeds(
    device: torch.device,
    shape: Sequence[int],
    dtype: torch.dtype,
    channels_last: bool,
    sets: int | None = None,
    leaves: int = 1,
) -> list[Feed]:
    """Random inputs and gradients, in so many sets that the device's largest cache cannot hold all of them."""
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def draw() -> Tensor:
        return torch.randn(*shape, device=device).to(dtype).contiguous(memory_format=layout)

    if sets is None:
        sets = sets_beyond_cache(device, math.prod(shape) * dtype.itemsize)
    return [Feed(tuple(draw().requires_grad_() for _ in range(leaves)), draw()) for _ in range(sets)]


def _cache_bytes(level: int) -> int | None:
    for cache in sorted(_CACHES.glob("index*")):
        with contextlib.suppress(OSError, ValueError):
            if int((cache / "level").read_text()) == level:
                return int((cache / "size").read_text().strip().removesuffix("K")) * 1024
    return None


def last_cache_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    return _cache_bytes(3) or 32 * 2**20


def on_chip_bytes(device: torch.device) -> int | None:
    """The bytes of a block's shared memory, or of a core's own cache; None if that is unknown."""
    if device.type == "cuda":
        return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", None)
    return _cache_bytes(2)


class Stopwatch:
    """Seconds that work takes: by the wall clock on a CPU, between two events on a GPU.

    On a GPU the host first queues a spinning kernel of about ``head_start`` seconds, and the work after it. This times
    the device, not the speed at which Python issues kernels. Work that waits for the device has no head start, so its
    waiting is timed.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            cycles = 10_000_000
            torch.cuda._sleep(cycles)
            self._cycles_per_second = cycles / self._between_events(lambda: torch.cuda._sleep(cycles))

    def _between_events(self, work: Callable[[], object]) -> float:
        self._start.record()
        work()
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end) / 1e3

    def __call__(self, work: Callable[[], object], head_start: float = 0.0) -> float:
        if self.device.type != "cuda":
            return self.wall(work)
        torch.cuda._sleep(int(head_start * self._cycles_per_second))
        return self._between_events(work)

    def wall(self, work: Callable[[], object]) -> float:
        """Seconds on the host's clock until the device is done."""
        self.synchronize()
        start = time.perf_counter()
        work()
        self.synchronize()
        return time.perf_counter() - start

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _sample(
    candidate: Candidate, fed: Sequence[Feed], stopwatch: Callable[[Callable[[], object]], float]
) -> dict[str, float]:
    """Seconds per forward and per backward pass of ``candidate`` over ``fed``."""
    outputs: list[Tensor] = []
    gradients: list[tuple[Tensor, ...]] = []

    def forward() -> None:
        for feed in fed:
            outputs.append(candidate.forward(*feed.arguments))

    def backward() -> None:
        for output, feed in zip(outputs, fed, strict=True):
            gradients.append(candidate.backward(output, feed))

    seconds = {"forward": stopwatch(forward) / len(fed)}
    if candidate.parameters is not None:
        for output, feed in zip(outputs, fed, strict=True):
            feed.grad_for(output)
        seconds["backward"] = stopwatch(backward) / len(fed)
    return seconds


def _untimed(candidate: Candidate, fed: Sequence[Feed], stopwatch: Stopwatch) -> float:
    """The host's seconds for a pass that is no sample; its observed figures are dropped."""
    seconds = sum(_sample(candidate, fed, stopwatch.wall).values())
    if candidate.observe is not None:
        candidate.observe()
    return seconds


def interleaved(
    device: torch.device, candidates: Sequence[Candidate], inputs: Sequence[Feed], rounds: int
) -> tuple[Samples, int]:
    """Raw samples, ``{candidate: {measure: [seconds or observed figure, one per round]}}``, and passes per sample.

    Measures are ``forward`` and ``backward``. On a GPU there is also ``wall``, the host's time for both with nothing
    queued before. This is the time of a step that Python limits.
    """
    stopwatch = Stopwatch(device)
    supply: Iterator[Feed] = itertools.cycle(inputs)
    estimates = {}
    for candidate in candidates:  # the first passes load kernels and fill allocators
        for _ in range(3 if device.type == "cuda" else 1):
            estimates[candidate.name] = _untimed(candidate, [next(supply)], stopwatch)
    differentiable = [candidate for candidate in candidates if candidate.parameters is not None]
    shortest = min(estimates[candidate.name] for candidate in differentiable or candidates)
    repetitions = min(_MOST_REPETITIONS, math.ceil(_SAMPLE_SECONDS[device.type] / shortest))
    samples: Samples = {candidate.name: {} for candidate in candidates}

    def measure(candidate: Candidate) -> dict[str, float]:
        fed = list(itertools.islice(supply, repetitions))
        if device.type == "cpu" and fed[0].nbytes >= _MAPPED_BYTES:
            _untimed(candidate, fed, stopwatch)
        head_start = min(1.5 * estimates[candidate.name] * repetitions, 0.02)
        figures = _sample(candidate, fed, lambda work: stopwatch(work, head_start))
        if candidate.observe is not None:
            figures |= candidate.observe()
        if device.type == "cuda":
            figures["wall"] = _untimed(candidate, list(itertools.islice(supply, repetitions)), stopwatch)
        return figures

    gc.collect()
    gc.disable()
    try:
        for number in range(rounds):
            first = number % len(candidates)
            for candidate in (*candidates[first:], *candidates[:first]):
                for name, figure in measure(candidate).items():
                    samples[candidate.name].setdefault(name, []).append(figure)
    finally:
        gc.enable()
    return samples, repetitions


def peak_rise(device: torch.device, candidate: Candidate, feed: Feed) -> int:
    """The bytes by which a forward and a backward pass raise memory at their peak."""
    if feed.grad.dtype != torch.float32:  # a gradient that is converted for the candidate counts as an input
        feed.grad_for(candidate.forward(*feed.arguments))
    release_memory()
    peak = PeakMemory(device)
    before = peak.mib()
    output = candidate.forward(*feed.arguments)
    candidate.backward(output, feed)
    return round((peak.mib() - before) * 2**20)


def kept_bytes(work: Callable[[], object], given: Iterable[Tensor]) -> int:
    """The bytes that autograd keeps for the backward passes of ``work``, without those of the ``given`` tensors."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        work()
    for tensor in given:
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(kept.values())


class OperatorCalls(TorchDispatchMode):
    """Records the names of all operators that are called outside the forward passes of some modules."""

    def __init__(self, *excluded: nn.Module) -> None:
        super().__init__()
        self.names: list[str] = []
        self._inside = False
        self._hooks = [module.register_forward_pre_hook(self._switch(True)) for module in excluded]
        self._hooks += [module.register_forward_hook(self._switch(False)) for module in excluded]

    def _switch(self, inside: bool) -> Callable[..., None]:
        return lambda *_: setattr(self, "_inside", inside)

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        for hook in self._hooks:
            hook.remove()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._inside:
            self.names.append(operator.overloadpacket.__name__)
        return operator(*args, **(kwargs or {}))


def _start_worker(threads: int) -> None:
    torch.set_num_threads(threads)
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:  # M_MMAP_THRESHOLD: freed memory leaves the process, so that every rise is visible
            mallopt(-3, 64 * 2**10)


@contextlib.contextmanager
def clean_process() -> Iterator[ProcessPoolExecutor]:
    """A fresh process in which memory is measured, with the same number of threads."""
    with ProcessPoolExecutor(1, get_context("spawn"), _start_worker, (torch.get_num_threads(),)) as pool:
        yield pool


def measure(
    settings: Sequence[Any],
    timed: Callable[[Any], dict[str, Any]],
    peak_bytes: Callable[[Any], dict[str, int]],
    warm_up: Any,
) -> Iterator[dict[str, Any]]:
    """The case of each setting: the result of ``timed``, and that of ``peak_bytes`` under this name.

    On a CPU another process measures memory and waits while this one measures time. It measures ``warm_up`` first, so
    that what is loaded only once does not count.

    Args:
        settings: they have ``label``, ``layout``, ``dtype`` and ``device``.
        timed: times a setting.
        peak_bytes: measures the memory of a setting, by candidate.
        warm_up: a setting.
    """
    with contextlib.ExitStack() as stack:
        peak = peak_bytes
        if settings[0].device == "cpu":
            process = stack.enter_context(clean_process())

            def peak(setting: Any) -> dict[str, int]:
                return process.submit(peak_bytes, setting).result()

            peak(warm_up)
        for number, setting in enumerate(settings, 1):
            progress(f"{number}/{len(settings)} {setting.label} {setting.layout} {setting.dtype}")
            yield {**timed(setting), "peak_bytes": peak(setting)}
