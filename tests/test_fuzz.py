# Random calls of the three operations: each either equals a float64 oracle, within what the dtypes allow, or is refused
# with a ValueError or TypeError that says what was expected and what came.
#
#     TALIB_FAST_FUZZ_EXAMPLES=10000 pytest tests/test_fuzz.py     # as many new calls of each operation, `make fuzz`
#
# Without the variable, or with a number up to 300, the calls are the same every time. With --library the CUDA kernels
# run on the host (test_kernels_on_host.py), each call with block sizes and an order of threads of its own.

import contextlib
import itertools
import math
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st
from torch import Tensor

from talib_fast.finetune.stochnorm import StochNorm1d, StochNorm2d, StochNorm3d
from talib_fast.ops import spectral_tail, squared_distance, stoch_norm

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


@pytest.fixture
def on_host_harness(pytestconfig):
    return pytestconfig.getoption("--library") is not None


THREADS = [32, 64, 96, 160, 256, 512, 1024]
SHARED_BYTES = [49152, 101376, 232448]


@contextlib.contextmanager
def harness_settings(data, on_host_harness, threads=THREADS, shared_bytes=SHARED_BYTES):
    """Let the host harness run the kernels of this example in blocks and an order that are drawn for it."""
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


# ---- Tensors of every shape, dtype and layout.

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
    """How to make a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    order: tuple[int, ...]  # of the dimensions in memory, slowest first
    steps: tuple[int, ...]  # per dimension: 1 dense, more with gaps, EXPANDED, or SLIDING by one element, overlapping
    offset: int  # elements in front of the first
    negated: bool  # lazily, by the negative bit
    values: str
    scale: float
    shift: float
    specials: tuple[tuple[int, float], ...]  # places and what stands there
    seed: int

    def plain(self):
        """Whether its values are of moderate size, where nothing can overflow or vanish."""
        return self.scale == 1 and not self.specials


# made once: hypothesis takes longer to make a strategy than to draw from it
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
PERMUTATIONS = {dims: st.permutations(range(dims)) for dims in range(6)}


def draw_shape(draw, ranks, limit):
    """Of that many dimensions, from and to, and of up to `limit` elements, also if no size were 0."""
    shape = draw(SHAPES[ranks])
    while math.prod(size or 1 for size in shape) > limit:
        longest = shape.index(max(shape))
        shape[longest] //= 2
    return tuple(shape)


def draw_recipe(draw, shape, dtypes=ANY_FLOAT, values=ANY_VALUES, running=False):
    """Of a tensor of that shape; a `running` one can be written to."""
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
        if recipe.values == "orthogonal" and normal.numel():  # singular values of 1 and 2 alone
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
    """A tensor made by a recipe, and the memory around it, which holds nothing but NaN."""

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
        """Its values in float64, as they were."""
        return self.tensor.detach().cpu().double().clone()

    def check_unchanged(self) -> None:
        assert same_bits(self.memory, self.before)

    def check_unchanged_around(self) -> None:
        """The memory that is not the tensor's is as it was."""
        self.tensor.detach().copy_(torch.zeros(()))
        after, self.memory[:] = self.memory.clone(), self.before
        self.tensor.detach().copy_(torch.zeros(()))
        assert same_bits(after, self.memory)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | (a.isnan() & b.isnan())).all())


# ---- What a result may be.

# No implementation adds up more numbers one by one in the accumulation dtype: they take them in blocks or lanes.
LONGEST_CHAIN = 128


class Ball:
    """Numbers in float64, and how far from each the same number may lie when it is computed in ``dtype``.

    Every operation adds its own rounding to what its operands bring along. Where an intermediate result may overflow,
    the radius is infinite, and anything may come out. A value that is not finite, of a finite radius, has to come out
    not finite.
    """

    def __init__(self, value: Tensor, dtype: torch.dtype, radius: Tensor | None = None) -> None:
        self.value, self.dtype = value, dtype
        self.radius = torch.zeros_like(value) if radius is None else radius

    def _result(self, value, radius, magnitude, *others: "Ball", rounding=1.0) -> "Ball":
        """`magnitude`: of what is rounded, the largest on the way to the result."""
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
        """Over the last dimension, which stays."""
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
        result.radius = torch.where(high < 0, 0.0, result.radius)  # surely the root of a negative number
        return result

    def where(self, mask: Tensor, otherwise: "Ball") -> "Ball":
        value = torch.where(mask, self.value, otherwise.value)
        return Ball(value, self.dtype, torch.where(mask, self.radius, otherwise.radius))

    def to(self, dtype: torch.dtype) -> "Ball":
        """Rounded once."""
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
        """Computed in this order of operations or in that of ``other``."""
        return Ball(self.value, self.dtype, torch.maximum(self.radius, other.radius))

    def in_doubt_with(self, other: "Ball") -> "Ball":
        """Undetermined where ``other``, an intermediate result, is."""
        return Ball(self.value, self.dtype, torch.where(other.radius.isinf(), math.inf, self.radius))


def constant(number: float, dtype: torch.dtype) -> Ball:
    return Ball(torch.tensor(number, dtype=torch.float64), dtype)


def check(got: Tensor, expected: Ball, name: str, determined: bool = False) -> None:
    """``determined``: nothing in the call excuses an undetermined result."""
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


# ---- stoch_norm


@dataclass(frozen=True)
class Normalization:
    input: Recipe
    running_mean: Recipe
    running_var: Recipe
    weight: Recipe | None
    bias: Recipe | None
    grad: Recipe
    p: float  # share of channels on the batch's statistics
    mask_seed: int
    mask_step: int
    momentum: float
    eps: float
    wanted: frozenset[str]  # whose gradients

    def mask(self, device):
        generator = torch.Generator().manual_seed(self.mask_seed)
        channels = self.input.shape[1]
        if self.mask_step == EXPANDED:
            return (torch.rand(1, generator=generator) < self.p).to(device).expand(channels)
        return (torch.rand(channels * self.mask_step, generator=generator) < self.p).to(device)[:: self.mask_step]

    def plain(self):
        recipes = (self.input, self.running_mean, self.running_var, self.weight, self.bias, self.grad)
        return (
            all(recipe.plain() for recipe in recipes if recipe is not None)
            and self.input.shift == 0
            and self.eps >= 1e-5
            and self.running_var.values == "positive"
            and torch.float16 not in {recipe.dtype for recipe in recipes if recipe is not None}
        )


P = st.sampled_from([0.5, 0.5, 0.0, 1.0, 0.1])
MASK_STEP = st.sampled_from([1, 1, 2, EXPANDED])
MOMENTUM = st.one_of(st.sampled_from([0.1, 0, 1]), st.floats(0, 1))
EPS = st.sampled_from([1e-5, 1e-5, 1e-3, 1.0, 1e-12, 1e-30, 0])
WANTED = st.sets(st.sampled_from(["input", "weight", "bias"]))


@st.composite
def normalizations(draw, limit):
    shape = draw_shape(draw, (2, 5), limit)
    assume(not math.prod(shape) == shape[1] != 0)
    vector = (shape[1],)
    input = draw_recipe(draw, shape)
    affine, also_bias = draw(COIN), draw(COIN)
    return Normalization(
        input=input,
        running_mean=draw_recipe(draw, vector, running=True),
        running_var=draw_recipe(draw, vector, values=VARIANCES, running=True),
        weight=draw_recipe(draw, vector) if affine else None,
        bias=draw_recipe(draw, vector) if affine and also_bias else None,
        grad=draw_recipe(draw, shape, dtypes=st.just(input.dtype)),
        p=draw(P),
        mask_seed=draw(SEED),
        mask_step=draw(MASK_STEP),
        momentum=draw(MOMENTUM),
        eps=draw(EPS),
        wanted=frozenset(draw(WANTED)),
    )


def by_channel(tensor: Tensor) -> Tensor:
    """``[C, n]``"""
    return tensor.movedim(1, 0).flatten(1)


def stoch_norm_oracle(call: Normalization, exact: dict[str, Tensor], mask: Tensor) -> dict[str, Ball]:
    """Everything the operation gives, ``[C, n]`` or ``[C, 1]``."""
    dtype = accumulation(call.input.dtype)
    x, dy = (Ball(by_channel(exact[name]), dtype) for name in ("input", "grad"))
    vectors = {name: Ball(exact[name][:, None], dtype) for name in exact if name not in ("input", "grad")}
    n = x.value.size(1)
    s = mask.cpu()[:, None]
    number = {name: constant(float(getattr(call, name)), dtype) for name in ("momentum", "eps")}
    running_mean, running_var = vectors["running_mean"], vectors["running_var"]
    one, zero = (Ball(torch.full((len(mask), 1), fill, dtype=torch.float64), dtype) for fill in (1.0, 0.0))
    if n == 0:
        return {"running_mean": running_mean, "running_var": running_var, "output": x, "dinput": x} | dict.fromkeys(
            ("dweight", "dbias"), zero
        )

    # the sums may be those of differences from any number between the smallest and the largest
    farthest = Ball((x.value.amax(1, keepdim=True) - x.value.amin(1, keepdim=True)).expand_as(x.value), dtype)
    batch_mean = (x.sum() / n).in_doubt_with(farthest.sum())
    # a mean that is off by d adds d² to the mean square, not more, whatever the single differences are off by
    differences = Ball(x.value - batch_mean.value, dtype)._result(
        x.value - batch_mean.value, torch.zeros_like(x.value), x.value.abs() + batch_mean.value.abs(), x, batch_mean
    )
    squares = (differences * differences).sum()
    squares = squares._result(squares.value, squares.radius + n * batch_mean.radius**2, squares.value, batch_mean)
    squares = squares.in_doubt_with((farthest * farthest).sum())
    moved = {}
    for name, old, batch in (
        ("running_mean", running_mean, batch_mean),
        ("running_var", running_var, squares / max(n - 1, 1)),
    ):
        # all the way, whatever the old one is
        moved[name] = batch if call.momentum == 1 else old + number["momentum"] * (batch - old)

    mean = batch_mean.where(s, running_mean)
    invstd = ((squares / n).where(s, running_var) + number["eps"]).rsqrt()
    weight, bias = vectors.get("weight", one), vectors.get("bias", zero)
    difference, scale = x - mean, invstd * weight
    normalized = difference * invstd
    dbias = dy.sum()
    dweight = (dy * normalized).sum().or_else((dy * difference).sum() * invstd)
    dinput = scale * (dy - ((dbias + normalized * dweight) / n).where(s, zero))
    slope, offset = scale * invstd * dweight / n, scale * dbias / n
    return {
        **moved,
        "output": (normalized * weight + bias).or_else(difference * scale + bias),
        "dinput": dinput.or_else(dy * scale - (difference * slope + offset).where(s, zero)),
        "dweight": dweight,
        "dbias": dbias,
    }


def run_stoch_norm(call: Normalization, device: torch.device):
    """Operands, mask and everything that came out."""
    operands = {
        name: Operand(recipe, device)
        for name in ("input", "running_mean", "running_var", "weight", "bias", "grad")
        if (recipe := getattr(call, name)) is not None
    }
    exact = {name: operand.exact() for name, operand in operands.items()}
    mask = call.mask(device)
    tensors = {name: operand.tensor for name, operand in operands.items() if name != "grad"}
    wanted = [name for name in ("input", "weight", "bias") if name in call.wanted and name in tensors]
    for name in wanted:
        tensors[name] = tensors[name].detach().requires_grad_()
    running = torch.stack([tensors[name].double() for name in ("running_mean", "running_var")])
    output, statistics = stoch_norm(**tensors, mask=mask, momentum=call.momentum, eps=call.eps)
    results = {"output": output.detach(), "mean": statistics[0], "invstd": statistics[1]}
    for name in ("running_mean", "running_var"):
        results[name] = tensors[name].detach().clone()
    if wanted:
        assert output.requires_grad
        gradients = torch.autograd.grad(output, [tensors[name] for name in wanted], operands["grad"].tensor)
        for name, gradient in zip(wanted, gradients, strict=True):
            assert gradient.dtype == tensors[name].dtype and gradient.shape == tensors[name].shape
            results[f"d{name}"] = gradient
    else:
        assert not output.requires_grad
    # compiled code's way
    vectors = (tensors.get(name) for name in ("input", "weight", "bias"))
    again, *_ = torch.ops.talib_fast.stoch_norm_functional(*vectors, running, mask, call.eps)
    results["again"] = again.detach()
    for name in ("running_mean", "running_var"):
        assert same_bits(results[name], operands[name].tensor)
        operands.pop(name).check_unchanged_around()
    for operand in operands.values():
        operand.check_unchanged()
    return exact, mask, results


@calls
@given(data=st.data())
def test_stoch_norm(device, on_host_harness, data):
    call = data.draw(normalizations(300 if on_host_harness else 3000), label="call")
    # less than any GPU has: blocks have to share channels
    with harness_settings(data, on_host_harness, shared_bytes=[13000, 20000, *SHARED_BYTES]):
        exact, mask, results = run_stoch_norm(call, device)
        *_, second = run_stoch_norm(call, device)
    assert all(same_bits(results[name], second[name]) for name in results)
    expected = stoch_norm_oracle(call, exact, mask)
    plain = call.plain()
    output = results["output"]
    assert output.dtype == call.input.dtype and output.shape == call.input.shape
    for name in ("output", "dinput"):
        if name in results:
            check(by_channel(results[name]), expected[name], name, plain)
    check(by_channel(results["again"]), expected["output"], "output of compiled code", plain)
    for name in ("running_mean", "running_var", "dweight", "dbias"):
        if name in results:
            check(results[name][:, None], expected[name], name, plain)
    if output.numel() == 0:
        for name in ("running_mean", "running_var"):
            assert torch.equal(results[name].cpu().double().nan_to_num(), exact[name].nan_to_num())


LAYERS = {2: StochNorm1d, 3: StochNorm1d, 4: StochNorm2d, 5: StochNorm3d}


@refusals
@given(data=st.data())
def test_stoch_norm_layer(device, data):
    """A training step is the operation, with the mask that torch's generator draws."""
    call = data.draw(normalizations(500), label="call")
    assume(call.eps > 0)  # as batch norms ask for
    average = data.draw(st.booleans(), label="average over all batches")
    layer = LAYERS[len(call.input.shape)](
        call.input.shape[1], call.eps, None if average else call.momentum, call.weight is not None, p=call.p
    ).to(device)
    operand = Operand(call.input, device)
    exact = {"input": operand.exact(), "grad": operand.exact()}
    for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
        recipe = getattr(call, name, None)
        if recipe is not None:
            tensor.detach().copy_(Operand(recipe, device).tensor)
        if name != "num_batches_tracked":
            exact[name] = tensor.detach().cpu().double().clone()
    torch.manual_seed(call.mask_seed)
    mask = torch.rand(call.input.shape[1], device=device) < call.p
    torch.manual_seed(call.mask_seed)
    output = layer(operand.tensor)
    operand.check_unchanged()
    moved = replace(call, momentum=1.0) if average else call
    expected = stoch_norm_oracle(moved, exact, mask)
    check(by_channel(output), expected["output"], "output")
    for name in ("running_mean", "running_var"):
        check(getattr(layer, name)[:, None], expected[name], name)
    assert layer.num_batches_tracked == int(output.numel() > 0)


@refusals
@given(
    layer=st.sampled_from([StochNorm1d, StochNorm2d, StochNorm3d]),
    p=st.one_of(st.floats(max_value=0, exclude_max=True), st.floats(1, exclude_min=True), st.just(math.nan)),
)
def test_stoch_norm_layer_refuses(layer, p):
    with pytest.raises(ValueError, match=r"expected p in \[0, 1\], got "):
        layer(3, p=p)


class Fault(NamedTuple):
    """What makes a legal call an illegal one."""

    name: str
    apply: Callable[[dict], object]  # to the arguments
    error: type[Exception]

    def __repr__(self):
        return self.name


def change(name, function):
    def apply(arguments):
        arguments[name] = function(arguments[name])

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


VECTORS = ("running_mean", "running_var", "weight", "bias")
STOCH_NORM_FAULTS = [
    *(
        Fault(f"{name} {kind}", change(name, function), TypeError)
        for name in ("input", *VECTORS)
        for kind, function in NO_FLOATS
    ),
    *(
        Fault(f"{name} {kind}", change(name, function), ValueError)
        for name in VECTORS
        for kind, function in (LONGER, ELSEWHERE)
    ),
    Fault("a mask of floats", change("mask", lambda t: t.float()), TypeError),
    Fault("a list of a mask", change("mask", lambda t: [True]), TypeError),
    Fault("a longer mask", change("mask", lambda t: torch.cat([t, t[:1]])), ValueError),
    Fault("a flat input", change("input", lambda t: t.flatten()), ValueError),
    Fault(
        "one value per channel",
        change("input", lambda t: t.flatten(2)[:1, :, :1] if t.dim() > 2 else t[:1]),
        ValueError,
    ),
    *(
        Fault(f"{name} of all channels in one place", change(name, lambda t: t[:1].expand(t.shape)), ValueError)
        for name in VECTORS[:2]
    ),
    *(Fault(f"negated {name}", change(name, torch._neg_view), ValueError) for name in VECTORS[:2]),
    *(
        Fault(f"{name} {value}", change(name, lambda _, value=value: value), ValueError)
        for name, values in (("eps", [-1e-5, math.nan, math.inf]), ("momentum", [-0.1, 1.5, math.nan, -math.inf]))
        for value in values
    ),
    *(
        Fault(f"{name} {value!r}", change(name, lambda _, value=value: value), TypeError)
        for name in ("eps", "momentum")
        for value in NO_NUMBERS
    ),
]


@refusals
@given(data=st.data())
def test_stoch_norm_refuses(device, data):
    call = data.draw(normalizations(100), label="call")
    fault = data.draw(st.sampled_from(STOCH_NORM_FAULTS), label="fault")
    operands = {name: Operand(getattr(call, name) or call.running_mean, device) for name in ("input", *VECTORS)}
    assume(call.input.shape[1] > 1)  # of one channel some faults are none
    assume(math.prod(call.input.shape) > 0)
    arguments = {name: operand.tensor for name, operand in operands.items()}
    arguments |= dict(mask=call.mask(device), momentum=call.momentum, eps=call.eps)
    fault.apply(arguments)
    check_refusal(fault, lambda: stoch_norm(**arguments), operands.values())


# ---- squared_distance


@dataclass(frozen=True)
class Distance:
    targets: tuple[Recipe, ...]
    sources: tuple[Recipe, ...] | None
    weights: tuple[Recipe, ...] | None
    channel_dim: int
    wanted: tuple[bool, ...]  # per target, whether its gradient
    grad: float

    def recipes(self):
        return (*self.targets, *(self.sources or ()), *(self.weights or ()))

    def plain(self):
        return all(recipe.plain() for recipe in self.recipes()) and torch.float16 not in {t.dtype for t in self.targets}


NUMBER_OF_TARGETS = st.one_of(st.integers(1, 4), st.integers(1, 4), st.integers(1, 12))
# a list of one dtype takes another path than a mixed one
DTYPES = st.sampled_from([ANY_FLOAT, ANY_FLOAT, st.just(torch.float32), st.just(torch.bfloat16)])
MOSTLY = st.sampled_from([True, True, False])
GRAD = st.sampled_from([1.0, -0.75, 0.0, 3.7, 1e-3])


@st.composite
def distances(draw, limit):
    weighted, sourced = draw(COIN), draw(COIN)
    shapes = [draw_shape(draw, (1 if weighted else 0, 5), limit) for _ in range(draw(NUMBER_OF_TARGETS))]
    rank = min(map(len, shapes))
    channel_dim = draw(st.integers(-rank, rank - 1) if weighted else st.integers(-7, 7))
    dtypes = draw(DTYPES)
    source_dtypes = dtypes if draw(COIN) else ANY_FLOAT
    return Distance(
        targets=tuple(draw_recipe(draw, shape, dtypes) for shape in shapes),
        sources=tuple(draw_recipe(draw, shape, source_dtypes) for shape in shapes) if sourced else None,
        weights=tuple(draw_recipe(draw, (shape[channel_dim],)) for shape in shapes) if weighted else None,
        channel_dim=channel_dim,
        wanted=tuple(draw(MOSTLY) for _ in shapes),
        grad=draw(GRAD),
    )


def squared_distance_oracle(call: Distance, targets, sources, weights) -> tuple[Ball, Ball, list[Ball]]:
    """Total, terms and the targets' gradients."""
    wide = any(recipe.dtype == torch.float64 for recipe in call.targets)
    result = torch.float64 if wide else torch.float32
    terms, gradients = [], []
    for j, recipe in enumerate(call.targets):
        dtype = accumulation(recipe.dtype)
        difference = Ball(targets[j], dtype)
        if sources is not None:
            difference = difference - Ball(sources[j], dtype)
        squares = difference * difference
        in_doubt = flat(squares).sum()
        grad = constant(call.grad, dtype)
        gradient = difference * grad
        if weights is not None:
            shape = [1] * len(recipe.shape)
            shape[call.channel_dim] = -1
            weight = Ball(weights[j].view(shape), dtype)
            squares = squares * weight
            orders = (difference * weight * grad, difference * (grad * weight))
            gradient = (gradient * weight).or_else(orders[0]).or_else(orders[1])
        total = flat(squares).sum().in_doubt_with(in_doubt)
        terms.append(total * constant(0.5, dtype))
        gradients.append(gradient)
    stacked = Ball(
        torch.cat([term.value.flatten() for term in terms]),
        result,
        torch.cat([term.to(result).radius.flatten() for term in terms]),
    )
    return stacked.sum(), stacked, gradients


def flat(ball: Ball) -> Ball:
    return Ball(ball.value.flatten(), ball.dtype, ball.radius.expand(ball.value.shape).flatten())


def run_squared_distance(call: Distance, device: torch.device):
    operands = [
        None if recipes is None else [Operand(recipe, device) for recipe in recipes]
        for recipes in (call.targets, call.sources, call.weights)
    ]
    exact = [None if them is None else [operand.exact() for operand in them] for them in operands]
    targets, sources, weights = (None if them is None else [operand.tensor for operand in them] for them in operands)
    targets = [t.detach().requires_grad_(wanted) for t, wanted in zip(targets, call.wanted, strict=True)]
    total, terms = squared_distance(targets, sources, weights, call.channel_dim)
    assert not terms.requires_grad and total.requires_grad == any(call.wanted)
    assert total.shape == () and terms.shape == (len(targets),)
    results = [total.detach(), terms]
    if any(call.wanted):
        leaves = [target for target in targets if target.requires_grad]
        gradients = torch.autograd.grad(total, leaves, torch.full_like(total, call.grad))
        for leaf, gradient in zip(leaves, gradients, strict=True):
            assert gradient.dtype == leaf.dtype and gradient.shape == leaf.shape
        results.extend(gradients)
    for them in operands:
        for operand in them or ():
            operand.check_unchanged()
    return exact, results


@calls
@given(data=st.data())
def test_squared_distance(device, on_host_harness, data):
    call = data.draw(distances(100 if on_host_harness else 1000), label="call")
    with harness_settings(data, on_host_harness, threads=[256, 1024]):  # its blocks have one size
        exact, results = run_squared_distance(call, device)
        _, second = run_squared_distance(call, device)
    assert all(map(same_bits, results, second))
    total, terms, gradients = squared_distance_oracle(call, *exact)
    plain = call.plain()
    check(results[0][None], total, "total", plain)
    check(results[1], terms, "terms", plain)
    wanted = [j for j, its in enumerate(call.wanted) if its]
    for j, gradient in zip(wanted, results[2:], strict=True):
        check(gradient, gradients[j], f"gradient {j}", plain)


def change_one(name, function):
    """One tensor of a list."""

    def apply(arguments):
        arguments[name][-1] = function(arguments[name][-1])

    return apply


SQUARED_DISTANCE_FAULTS = [
    *(
        Fault(f"{name} {kind}", change_one(name, function), TypeError)
        for name in ("targets", "sources", "weights")
        for kind, function in NO_FLOATS
    ),
    *(
        Fault(f"{name} {kind}", change_one(name, function), ValueError)
        for name, kind, function in (
            ("sources", *ELSEWHERE),
            ("weights", *ELSEWHERE),
            ("weights", *LONGER),
            ("weights", "with a gradient", lambda t: t.detach().requires_grad_()),
            ("sources", "of another shape", lambda t: t[None]),
        )
    ),
    *(
        Fault(f"{kind} {name}", change(name, function), ValueError)
        for name in ("sources", "weights")
        for kind, function in (("one more of the", lambda list: [*list, list[0]]), ("no", lambda list: []))
    ),
    *(
        Fault(f"channel_dim {value}", change("channel_dim", lambda _, value=value: value), ValueError)
        for value in (-6, 5, 100)
    ),
    *(
        Fault(f"channel_dim {value!r}", change("channel_dim", lambda _, value=value: value), TypeError)
        for value in (*NO_NUMBERS, 1.0)
    ),
]


@refusals
@given(data=st.data())
def test_squared_distance_refuses(device, data):
    call = data.draw(distances(50), label="call")
    assume(call.weights is not None)
    fault = data.draw(st.sampled_from(SQUARED_DISTANCE_FAULTS), label="fault")
    operands = {
        name: [Operand(recipe, device) for recipe in found]
        for name, found in (("targets", call.targets), ("sources", call.targets), ("weights", call.weights))
    }
    arguments = {name: [operand.tensor for operand in found] for name, found in operands.items()}
    arguments["channel_dim"] = call.channel_dim
    fault.apply(arguments)
    check_refusal(fault, lambda: squared_distance(**arguments), itertools.chain(*operands.values()))


# ---- spectral_tail

MATRICES = st.sampled_from(["normal", "normal", "integers", "constant", "orthogonal", "low rank", "blocks", "decay"])
BATCH = st.lists(st.integers(0, 3), max_size=3).filter(lambda sizes: math.prod(sizes) <= 4)
SEVERAL = st.integers(1, 4)


@dataclass(frozen=True)
class Tails:
    inputs: tuple[Recipe, ...]
    k: int | tuple[int, ...]
    alone: bool  # a tensor, not a list of them
    wanted: tuple[bool, ...]
    seed: int  # of the values' gradients

    def ranks(self):
        return self.k if isinstance(self.k, tuple) else (self.k,) * len(self.inputs)


@st.composite
def tails(draw, limit):
    alone = draw(COIN)
    count = 1 if alone else draw(SEVERAL)
    shapes = [(*draw(BATCH), *draw_shape(draw, (2, 2), limit)) for _ in range(count)]
    shorter = [min(shape[-2:]) for shape in shapes]
    if alone or draw(COIN):
        k = draw(st.integers(0, min(shorter)))
    else:
        k = tuple(draw(st.integers(0, side)) for side in shorter)
    return Tails(
        inputs=tuple(draw_recipe(draw, shape, values=MATRICES) for shape in shapes),
        k=k,
        alone=alone,
        wanted=tuple(draw(MOSTLY) for _ in shapes),
        seed=draw(SEED),
    )


def check_tail(
    matrix: Tensor, k: int, dtype: torch.dtype, value: Tensor, grad: Tensor, gradient: Tensor | None
) -> None:
    """One matrix's value, and its gradient as far as the singular values determine it."""
    sums = accumulation(dtype)
    if k == 0:
        assert value == 0 and (gradient is None or not matrix.isfinite().all() or not gradient.any())
        return
    if not matrix.isfinite().all():
        assert value.isnan() and (gradient is None or not gradient.isfinite().all())
        return
    # to numbers of about 1, exactly
    exponent = math.frexp(float(matrix.abs().max()))[1]
    matrix = scaled(matrix, -exponent)
    matrix = matrix if matrix.size(0) <= matrix.size(1) else matrix.mT
    left, sigma, _ = torch.linalg.svd(matrix, full_matrices=False)
    left, sigma = left.flip(1), sigma.flip(0)
    squares, noise = sigma.square(), 4 * torch.finfo(torch.float64).eps * sum(matrix.shape)
    if dtype == torch.float64:  # a QR factor: singular values are off by so much
        off = noise * sigma[-1]
        error = (2 * sigma[:k] * off + off**2).sum()
    else:  # a Gram matrix: their squares are
        off = noise * squares[-1]
        error = k * off
    error = error + 2 * torch.finfo(sums).eps * squares[:k].sum()
    tail = Ball(scaled(squares[:k].sum(), 2 * exponent), torch.float64, scaled(error, 2 * exponent))
    check(value[None], Ball(tail.value[None], torch.float64, tail.radius[None]).to(sums), "value")
    if gradient is None:
        return

    # The tail's directions: those below the cluster of equal singular values that its border may run through, and
    # some of the cluster. The gradient is 2·grad·P·F.
    levels = sigma if dtype == torch.float64 else squares
    near = max(1e4 * noise, 1e-9) * levels[-1]
    below = above = k
    if k < len(sigma) and levels[k] - levels[k - 1] <= near:
        while below > 0 and levels[below] - levels[below - 1] <= near:
            below -= 1
        while above < len(sigma) and levels[above] - levels[above - 1] <= near:
            above += 1
    # what a rotation between the parts costs that the noise allows: σ·off/gap
    rotation = torch.zeros(())
    for border in {below, above}:
        if 0 < border < len(sigma):
            rotation = rotation + 2 * sigma[border] * off / (levels[border] - levels[border - 1])
    rotation = rotation * len(sigma) ** 0.5 + noise * sigma[-1]
    surely = left[:, :below] @ (left[:, :below].mT @ matrix)
    wide = gradient.size(0) <= gradient.size(1)
    gradient = gradient.cpu().double()
    gradient = gradient if wide else gradient.mT
    factor = 2 * grad.double().cpu()
    if below == above:
        expected = scaled(factor * surely, exponent)
        radius = scaled(factor.abs() * rotation, exponent).expand(expected.shape)
        check(gradient.to(dtype), Ball(expected, torch.float64, radius), "gradient")
        return
    event("a tie at the border of the tail")
    if factor.abs() < 1e-3 or not scaled(torch.tensor(4.0).double(), exponent).isfinite():
        return
    part = scaled(gradient / factor, -exponent)
    kind = torch.finfo(dtype)
    rounding = kind.eps * matrix.norm() + math.ldexp(kind.tiny, -exponent) / factor.abs() * part.numel() ** 0.5
    if scaled(factor.abs() * 2 * matrix.norm(), exponent) > kind.max:
        return
    between = left[:, below:above]
    share = between.mT @ part
    rest = part - between @ share - surely
    tolerance = rotation * part.numel() ** 0.5 + rounding
    assert rest.norm() <= tolerance, (
        f"outside the tie the gradient is off by {rest.norm():.3g}, more than {tolerance:.3g}"
    )
    # of the cluster a projector of the rank that is left: within the cluster all singular values are one number
    projector = share @ (between.mT @ matrix).mT / sigma[below:above].square().mean()
    if sigma[below] > 1e-2 * sigma[-1]:
        spread = (sigma[above - 1] - sigma[below]) / sigma[below] * len(sigma)
        tolerance = (tolerance / sigma[below] + spread) * len(sigma)
        assert (projector @ projector - projector).norm() <= 4 * tolerance
        assert abs(projector.trace() - (k - below)) <= 4 * tolerance


def scaled(tensor: Tensor, exponent: int) -> Tensor:
    """Times 2^exponent, in steps that do not overflow."""
    while exponent:
        step = max(-1000, min(exponent, 1000))
        tensor, exponent = tensor * 2.0**step, exponent - step
    return tensor


def run_spectral_tail(call: Tails, device: torch.device):
    operands = [Operand(recipe, device) for recipe in call.inputs]
    exact = [operand.exact() for operand in operands]
    inputs = [operand.tensor.detach().requires_grad_(its) for operand, its in zip(operands, call.wanted, strict=True)]
    values = (spectral_tail(inputs[0], call.k),) if call.alone else spectral_tail(inputs, call.k)
    assert isinstance(values, tuple) and len(values) == len(inputs)
    generator = torch.Generator().manual_seed(call.seed)
    grads, gradients = [], [None] * len(inputs)
    for value, input in zip(values, inputs, strict=True):
        assert value.dtype == accumulation(input.dtype) and value.shape == input.shape[:-2]
        grads.append(torch.randn(value.shape, generator=generator).to(value))
    wanted = [j for j, input in enumerate(inputs) if input.requires_grad]
    if wanted:
        found = torch.autograd.grad(
            [values[j] for j in wanted], [inputs[j] for j in wanted], [grads[j] for j in wanted]
        )
        for j, gradient in zip(wanted, found, strict=True):
            assert gradient.dtype == inputs[j].dtype and gradient.shape == inputs[j].shape
            gradients[j] = gradient
    for operand in operands:
        operand.check_unchanged()
    return exact, [value.detach() for value in values], grads, gradients


@calls
@given(data=st.data())
def test_spectral_tail(device, on_host_harness, data):
    call = data.draw(tails(150 if on_host_harness else 1000), label="call")
    with harness_settings(data, on_host_harness):
        exact, values, grads, gradients = run_spectral_tail(call, device)
        _, values_again, _, gradients_again = run_spectral_tail(call, device)
    assert all(map(same_bits, values, values_again))
    assert all(same_bits(a, b) for a, b in zip(gradients, gradients_again, strict=True) if a is not None)
    for j, (recipe, k) in enumerate(zip(call.inputs, call.ranks(), strict=True)):
        matrices = exact[j].flatten(0, -3) if len(recipe.shape) > 2 else exact[j][None]
        value, grad = values[j].flatten(), grads[j].flatten()
        gradient = None if gradients[j] is None else gradients[j].reshape(matrices.shape)
        for i, matrix in enumerate(matrices):
            check_tail(matrix, k, recipe.dtype, value[i], grad[i], None if gradient is None else gradient[i])


SPECTRAL_TAIL_FAULTS = [
    *(Fault(f"a tensor {kind}", change_one("input", function), TypeError) for kind, function in NO_FLOATS),
    Fault("a vector", change_one("input", lambda t: t.flatten()), ValueError),
    Fault(
        "a tensor elsewhere", lambda a: a["input"].append(torch.empty_like(a["input"][0], device="meta")), ValueError
    ),
    Fault("k = -1", change("k", lambda _: -1), ValueError),
    Fault("k = 10⁴", change("k", lambda _: 10**4), ValueError),
    Fault("no k", change("k", lambda _: []), ValueError),
    Fault("one more k", lambda a: a.update(k=[0] * (len(a["input"]) + 1)), ValueError),
    *(
        Fault(f"k = {value!r}", change("k", lambda _, value=value: value), TypeError)
        for value in (None, "1", True, 1.0, torch.tensor(1))
    ),
]


@refusals
@given(data=st.data())
def test_spectral_tail_refuses(device, data):
    call = data.draw(tails(50), label="call")
    fault = data.draw(st.sampled_from(SPECTRAL_TAIL_FAULTS), label="fault")
    operands = [Operand(recipe, device) for recipe in call.inputs]
    arguments = {"input": [operand.tensor for operand in operands], "k": 0}
    fault.apply(arguments)
    check_refusal(fault, lambda: spectral_tail(**arguments), operands)


@refusals
@given(data=st.data())
def test_spectral_tail_of_one_tensor_refuses(device, data):
    call = data.draw(tails(50), label="call")
    operand = Operand(call.inputs[0], device)
    most = min(operand.tensor.shape[-2:])
    k = data.draw(st.one_of(st.integers(max_value=-1), st.integers(most + 1), st.sampled_from([1.0, True, [1], None])))
    fault = Fault(f"k = {k!r}", None, ValueError if type(k) is int else TypeError)
    check_refusal(fault, lambda: spectral_tail(operand.tensor, k), [operand])
