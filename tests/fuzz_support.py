"""Random calls of the operations: tensors of every shape, dtype and layout, and the interval of each right result.

A legal call must equal a float64 oracle, within the rounding errors of the dtypes. An illegal call must raise a
ValueError or TypeError that says what was expected and what came.

    TALIB_FAST_FUZZ_EXAMPLES=10000 pytest tests/test_fuzz_*.py     # so many new calls of each operation (`make fuzz`)

Without the variable, or with a number up to 300, the calls are the same every time. With --library, the CUDA kernels
run on the host (test_kernels_on_host.py), and each call has its own block size and its own order of threads.
"""

import contextlib
import math
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

IN_CI = 300
EXAMPLES = int(os.environ.get("TALIB_FAST_FUZZ_EXAMPLES", IN_CI))


def fuzzed(examples):
    return settings(
        max_examples=max(examples, 1),
        derandomize=EXAMPLES <= IN_CI,
        deadline=None,
        database=None,
        print_blob=True,
        # `device` is the same in all examples of a test
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


calls = fuzzed(EXAMPLES)
refusals = fuzzed(EXAMPLES // 5)


THREADS = [32, 64, 96, 160, 256, 512, 1024]
SHARED_BYTES = [49152, 101376, 232448]


@contextlib.contextmanager
def harness_settings(data, on_host_harness, threads=THREADS, shared_bytes=SHARED_BYTES):
    """Let the host harness run the kernels of this example with random block sizes and a random order of threads."""
    if not on_host_harness:
        yield
        return
    choices = {
        "SIMT_BLOCKS": st.integers(1, 4),
        "SIMT_SEED": st.integers(0, 1000),
        "SIMT_MULTIPROCESSORS": st.sampled_from([1, 3, 7, 64]),
        "SIMT_SHARED_BYTES": st.sampled_from(shared_bytes),
        "SIMT_THREADS": st.sampled_from(threads),
        "SIMT_CACHE_BYTES": st.sampled_from([1, 20000, 1048576]),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in data.draw(st.fixed_dictionaries(choices), label="harness").items():
            patch.setenv(name, str(value))
        yield


# ---- Tensors of every shape, dtype and layout

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SCALES = {
    torch.float16: [1e-6, 1e-3, 100.0, 1e4],
    torch.bfloat16: [1e-30, 1e-3, 1e4, 1e18, 1e30],
    torch.float32: [1e-40, 1e-30, 1e-3, 1e4, 1e16, 1e18, 1e30],
    torch.float64: [1e-200, 1e-30, 1e-3, 1e4, 1e30, 1e150, 1e300],
}
EXPANDED, SLIDING = 0, -1


@dataclass(frozen=True)
class Recipe:
    """The description of a random tensor.

    Attributes:
        order: the order of the dimensions in memory, the slowest first.
        steps: for each dimension 1 (dense), more (gaps), EXPANDED, or SLIDING (overlapping, by one element).
        offset: number of elements in memory before the first one.
        negated: whether the tensor has the negative bit.
        specials: indices and their special values, such as NaN.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    order: tuple[int, ...]
    steps: tuple[int, ...]
    offset: int
    negated: bool
    values: str
    scale: float
    shift: float
    specials: tuple[tuple[int, float], ...]
    seed: int

    def plain(self):
        """Whether all values are of moderate size, so that nothing can overflow or underflow."""
        return self.scale == 1 and not self.specials


# created once, since hypothesis takes longer to create a strategy than to draw from it
COIN, SEED, SPACING, ONE_IN_FIVE = st.booleans(), st.integers(0, 2**31), st.integers(1, 3), st.integers(0, 4)
USUAL_SIZE = st.one_of(st.integers(1, 4), st.integers(0, 9))
SIZE = st.one_of(USUAL_SIZE, USUAL_SIZE, USUAL_SIZE, st.sampled_from([16, 31, 33, 64, 65, 130, 257, 600]))
RUNNING_LAYOUT = ["contiguous", "contiguous", "channels_last", "permuted", "gaps", "offset", "any"]
LAYOUT = st.sampled_from([*RUNNING_LAYOUT, "negated", "expanded", "sliding"])
RUNNING_LAYOUT = st.sampled_from(RUNNING_LAYOUT)
OFFSET = st.integers(0, 9)
SCALE = {dtype: st.one_of(st.just(1.0), st.just(1.0), st.sampled_from(scales)) for dtype, scales in SCALES.items()}
SHIFT = st.sampled_from([0, 0, 0, 3, 100])
SPECIALS = {
    dtype: st.lists(
        st.tuples(
            st.integers(0, 10**6),
            st.sampled_from([math.inf, -math.inf, math.nan, 0.0, torch.finfo(dtype).max, torch.finfo(dtype).tiny]),
        ),
        min_size=1,
        max_size=3,
    )
    for dtype in FLOATS
}
ANY_FLOAT = st.sampled_from(FLOATS)
SHAPES = {ranks: st.lists(SIZE, min_size=ranks[0], max_size=ranks[1]) for ranks in ((0, 5), (1, 5), (2, 2), (2, 5))}
ANY_VALUES = st.sampled_from(["normal", "normal", "integers", "constant"])
VARIANCES = st.sampled_from(["positive", "positive", "positive", "normal"])
MOSTLY = st.sampled_from([True, True, False])
PERMUTATIONS = {dims: st.permutations(range(dims)) for dims in range(6)}


def draw_shape(draw, ranks, limit):
    """A shape with `ranks` (least, most) dimensions and at most `limit` elements; sizes of 0 count as 1."""
    shape = draw(SHAPES[ranks])
    while math.prod(size or 1 for size in shape) > limit:
        longest = shape.index(max(shape))
        shape[longest] //= 2
    return tuple(shape)


def draw_recipe(draw, shape, dtypes=ANY_FLOAT, values=ANY_VALUES, running=False):
    """A recipe for a tensor of that shape; a `running` tensor has a layout that can be written to."""
    dims, dtype, layout = len(shape), draw(dtypes), draw(RUNNING_LAYOUT if running else LAYOUT)
    order, steps, offset, negated = tuple(range(dims)), (1,) * dims, 0, False
    if layout == "channels_last" and dims > 2:
        order = (0, *range(2, dims), 1)
    elif layout in ("permuted", "any"):
        order = tuple(draw(PERMUTATIONS[dims]))
    if layout in ("gaps", "any"):
        steps = tuple(draw(SPACING) for _ in range(dims))
    elif layout in ("expanded", "sliding"):
        overlap = EXPANDED if layout == "expanded" else SLIDING
        steps = tuple(overlap if draw(COIN) else 1 for _ in range(dims))
    if layout in ("offset", "any"):
        offset = draw(OFFSET)
    if layout == "negated":
        negated = dtype in (torch.float32, torch.float64)
    scale = draw(SCALE[dtype])
    shift = scale * draw(SHIFT)
    specials = draw(SPECIALS[dtype]) if draw(ONE_IN_FIVE) == 4 else ()
    return Recipe(shape, dtype, order, steps, offset, negated, draw(values), scale, shift, tuple(specials), draw(SEED))


def _values(recipe, shape):
    generator = torch.Generator().manual_seed(recipe.seed)
    normal = torch.randn(shape, generator=generator, dtype=torch.float64)
    if recipe.values == "integers":
        normal = normal.mul(1.5).round()
    elif recipe.values == "constant":
        normal = torch.ones(shape, dtype=torch.float64)
    elif recipe.values == "positive":
        normal = normal.abs() + 0.1
    elif len(shape) >= 2:
        *_, b, f = shape
        if recipe.values == "orthogonal" and normal.numel():  # all singular values are 1 or 2
            left, _, right = torch.linalg.svd(normal, full_matrices=False)
            normal = left * (torch.arange(min(b, f)) % 2 + 1.0) @ right
        elif recipe.values == "low rank":
            normal[..., b // 2 :, :] = normal[..., : b - b // 2, :].flip(-2)
        elif recipe.values == "blocks":
            normal[..., : b // 2, f // 2 :] = 0
            normal[..., b // 2 :, : f // 2] = 0
        elif recipe.values == "decay":
            normal *= 10.0 ** -torch.arange(b, dtype=torch.float64)[:, None]
    return normal * recipe.scale + recipe.shift


class Operand:
    """A tensor made by a recipe, and the memory around it, which is full of NaN."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        shape, strides, elements = recipe.shape, [0] * len(recipe.shape), 1
        for dim in reversed(recipe.order):
            step, size = recipe.steps[dim], max(shape[dim], 1)
            strides[dim] = 1 if step == SLIDING else elements * step
            elements = elements + size - 1 if step == SLIDING else max(elements, strides[dim] * size)
        elements += recipe.offset + 3
        place, offset = strides, recipe.offset
        if recipe.negated:
            self.memory = torch.full((elements, 2), math.nan, dtype=recipe.dtype, device=device)
            line = torch.view_as_complex(self.memory).conj().imag
            place, offset = [2 * stride for stride in strides], 2 * offset + 1
        else:
            line = self.memory = torch.full((elements,), math.nan, dtype=recipe.dtype, device=device)
        self.tensor = line.as_strided(shape, place, offset)
        if min(recipe.steps, default=1) > 0:
            self.tensor.copy_(_values(recipe, shape))
        else:
            line.copy_(_values(recipe, (elements,)))
        for where, special in recipe.specials:
            if self.tensor.numel():
                index = torch.unravel_index(torch.tensor(where % self.tensor.numel()), shape)
                self.tensor[tuple(int(i) for i in index)] = special
        self.before = self.memory.clone()

    def exact(self) -> Tensor:
        """The tensor's values in float64, exactly."""
        return self.tensor.detach().cpu().double().clone()

    def check_unchanged(self) -> None:
        assert same_bits(self.memory, self.before)

    def check_unchanged_around(self) -> None:
        """Check that the memory around the tensor has not changed."""
        self.tensor.detach().copy_(torch.zeros(()))
        after, self.memory[:] = self.memory.clone(), self.before
        self.tensor.detach().copy_(torch.zeros(()))
        assert same_bits(after, self.memory)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | (a.isnan() & b.isnan())).all())


# ---- The interval of a right result

# The longest sequential sum in the accumulation dtype: all implementations add in blocks or lanes.
LONGEST_CHAIN = 128


class Ball:
    """Numbers in float64, each with the largest error that it may have when it is computed in ``dtype`` (its radius).

    Every operation adds its own rounding error to the radii of its operands. If an intermediate result may overflow,
    the radius is infinite, and every result is right. If a value is not finite and its radius is finite, the result
    must not be finite.
    """

    def __init__(self, value: Tensor, dtype: torch.dtype, radius: Tensor | None = None) -> None:
        self.value, self.dtype = value, dtype
        self.radius = torch.zeros_like(value) if radius is None else radius

    def _result(self, value, radius, magnitude, *others: "Ball", rounding=1.0) -> "Ball":
        """The ball of a result; `magnitude` is the largest absolute value that is rounded on the way to it."""
        kind = torch.finfo(self.dtype)
        radius = torch.nan_to_num(radius + rounding * kind.eps * magnitude + kind.tiny, nan=math.inf, posinf=math.inf)
        radius = torch.where(magnitude + radius > kind.max, math.inf, radius)
        finite = determined = torch.ones((), dtype=torch.bool)
        for operand in (self, *others):
            finite, determined = finite & operand.value.isfinite(), determined & operand.radius.isfinite()
        radius = torch.where(~finite & ~value.isfinite() & determined, 0.0, radius)
        return Ball(value, self.dtype, torch.where(finite & ~value.isfinite(), math.inf, radius))

    def __add__(self, other: "Ball") -> "Ball":
        magnitude = self.value.abs() + other.value.abs()
        return self._result(self.value + other.value, self.radius + other.radius, magnitude, other)

    def __neg__(self) -> "Ball":
        return Ball(-self.value, self.dtype, self.radius)

    def __sub__(self, other: "Ball") -> "Ball":
        return self + -other

    def __mul__(self, other: "Ball") -> "Ball":
        value = self.value * other.value
        a, b = self.value.abs(), other.value.abs()
        radius = a * other.radius + b * self.radius + self.radius * other.radius
        return self._result(value, torch.where(radius.isnan(), math.inf, radius), value.abs(), other)

    def __truediv__(self, number: float) -> "Ball":
        return self._result(self.value / number, self.radius / number, self.value.abs() / number)

    def sum(self) -> "Ball":
        """The sum over the last dimension, which is kept."""
        size, count = self.value.abs().sum(-1, keepdim=True), self.value.size(-1)
        finite, determined = self.value.isfinite().all(-1, True), self.radius.isfinite().all(-1, True)
        like_all = Ball(torch.where(finite, 0.0, math.nan), self.dtype, torch.where(determined, 0.0, math.inf))
        value, radius = self.value.sum(-1, keepdim=True), self.radius.sum(-1, keepdim=True)
        return like_all._result(value, radius, size, rounding=min(count, LONGEST_CHAIN))

    def rsqrt(self) -> "Ball":
        low, high = self.value - self.radius, self.value + self.radius
        value = self.value.rsqrt()
        radius = torch.where(low > 0, low.rsqrt() - value, math.inf)
        result = self._result(value, radius, value.abs())
        result.radius = torch.where(high < 0, 0.0, result.radius)  # certainly negative: the result is NaN
        return result

    def where(self, mask: Tensor, otherwise: "Ball") -> "Ball":
        value = torch.where(mask, self.value, otherwise.value)
        return Ball(value, self.dtype, torch.where(mask, self.radius, otherwise.radius))

    def to(self, dtype: torch.dtype) -> "Ball":
        """The result of one rounding to ``dtype``."""
        if dtype == torch.float64:
            return Ball(self.value, dtype, self.radius)
        kind = torch.finfo(dtype)
        size = self.value.abs()
        radius = self.radius + kind.eps / 2 * (size + self.radius) + kind.tiny * kind.eps
        radius = torch.where(self.radius.isfinite(), radius, math.inf)
        surely = (size - radius > kind.max) & radius.isfinite()
        radius = torch.where(size + radius > kind.max, math.inf, radius)
        value = torch.where(surely, math.inf, self.value)
        radius = torch.where(surely, 0.0, radius)
        return Ball(value, dtype, torch.where(~value.isfinite() & self.radius.isfinite(), 0.0, radius))

    def or_else(self, other: "Ball") -> "Ball":
        """The result of this order of operations or of that of ``other``."""
        return Ball(self.value, self.dtype, torch.maximum(self.radius, other.radius))

    def in_doubt_with(self, other: "Ball") -> "Ball":
        """The same, but undetermined (infinite radius) where the intermediate result ``other`` is."""
        return Ball(self.value, self.dtype, torch.where(other.radius.isinf(), math.inf, self.radius))


def constant(number: float, dtype: torch.dtype) -> Ball:
    return Ball(torch.tensor(number, dtype=torch.float64), dtype)


def check(got: Tensor, expected: Ball, name: str, determined: bool = False) -> None:
    """Check that a result lies within its ball; with ``determined``, no radius may be infinite."""
    expected = expected.to(got.dtype)
    found = got.detach().cpu().double()
    value = expected.value.expand(found.shape)
    radius = expected.radius.expand(found.shape)
    assert not determined or radius.isfinite().all(), f"the oracle does not know {name}"
    right = radius.isinf() | ((found - value).abs() <= radius) | (~value.isfinite() & ~found.isfinite())
    if not right.all():
        at = tuple((~right).nonzero()[0].tolist())
        raise AssertionError(
            f"{name}{list(at)} is {found[at].item()!r}, expected {value[at].item()!r} ± {radius[at].item():.3g} "
            f"({(~right).sum()} of {found.numel()} are wrong)"
        )


def accumulation(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---- Illegal calls


class Fault(NamedTuple):
    """A change that makes a legal call illegal."""

    name: str
    apply: Callable[[dict], object]  # changes the arguments
    error: type[Exception]

    def __repr__(self):
        return self.name


def change(name, function):
    def apply(arguments):
        arguments[name] = function(arguments[name])

    return apply


def change_one(name, function):
    """Change one tensor of a list."""

    def apply(arguments):
        arguments[name][-1] = function(arguments[name][-1])

    return apply


NO_FLOATS = [
    ("of integers", lambda t: torch.zeros(t.shape, dtype=torch.int64, device=t.device)),
    ("complex", lambda t: torch.zeros(t.shape, dtype=torch.complex64, device=t.device)),
    ("sparse", lambda t: torch.zeros(t.shape, device=t.device).to_sparse()),
    ("a list", lambda t: [1.0]),
]
ELSEWHERE = ("elsewhere", lambda t: torch.empty_like(t, device="meta"))
LONGER = ("longer", lambda t: t.new_zeros(t.size(0) + 1))
NO_NUMBERS = [None, "1", True, [0.1]]


def check_refusal(fault: Fault, call: Callable[[], object], operands: Iterable[Operand]) -> None:
    with pytest.raises(fault.error) as raised:
        call()
    assert raised.type is fault.error
    assert re.search("expected .*got ", str(raised.value)), raised.value
    for operand in operands:
        operand.check_unchanged()
