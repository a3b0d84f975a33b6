"""Random calls of stoch_norm and of its layers; see fuzz_support.py."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from fuzz_support import (
    COIN,
    ELSEWHERE,
    EXPANDED,
    LONGER,
    NO_FLOATS,
    NO_NUMBERS,
    SEED,
    SHARED_BYTES,
    VARIANCES,
    Ball,
    Fault,
    Operand,
    Recipe,
    accumulation,
    calls,
    change,
    check,
    check_refusal,
    constant,
    draw_recipe,
    draw_shape,
    harness_settings,
    refusals,
    same_bits,
)
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from talib_fast.finetune.stochnorm import StochNorm1d, StochNorm2d, StochNorm3d
from talib_fast.ops import stoch_norm

pytestmark = pytest.mark.no_cover  # which would follow hypothesis; the operation's own tests cover it


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
    rstd = ((squares / n).where(s, running_var) + number["eps"]).rsqrt()
    weight, bias = vectors.get("weight", one), vectors.get("bias", zero)
    difference, scale = x - mean, rstd * weight
    normalized = difference * rstd
    dbias = dy.sum()
    dweight = (dy * normalized).sum().or_else((dy * difference).sum() * rstd)
    dinput = scale * (dy - ((dbias + normalized * dweight) / n).where(s, zero))
    slope, offset = scale * rstd * dweight / n, scale * dbias / n
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
    results = {"output": output.detach(), "mean": statistics[0], "rstd": statistics[1]}
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
