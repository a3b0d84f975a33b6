"""Random calls of spectral_tail; see fuzz_support.py."""

import math
from dataclasses import dataclass

import pytest
import torch
from fuzz_support import (
    COIN,
    MOSTLY,
    NO_FLOATS,
    SEED,
    Ball,
    Fault,
    Operand,
    Recipe,
    accumulation,
    calls,
    change,
    change_one,
    check,
    check_refusal,
    draw_recipe,
    draw_shape,
    harness_settings,
    refusals,
    same_bits,
)
from hypothesis import event, given
from hypothesis import strategies as st
from torch import Tensor

from talib_fast.ops import spectral_tail

pytestmark = pytest.mark.no_cover  # which would follow hypothesis; the operation's own tests cover it

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
