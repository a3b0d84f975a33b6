"""Random calls of squared_distance; see fuzz_support.py."""

import itertools
from dataclasses import dataclass

import pytest
import torch
from fuzz_support import (
    ANY_FLOAT,
    COIN,
    ELSEWHERE,
    LONGER,
    MOSTLY,
    NO_FLOATS,
    NO_NUMBERS,
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
    constant,
    draw_recipe,
    draw_shape,
    harness_settings,
    refusals,
    same_bits,
)
from hypothesis import assume, given
from hypothesis import strategies as st

from talib_fast.ops import squared_distance

pytestmark = pytest.mark.no_cover  # which would follow hypothesis; the operation's own tests cover it


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
