import copy
import functools
import importlib
import itertools
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rank_support import needs_gloo, spawn_ranks
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from talib_fast.finetune.stochnorm import (
    StochNorm1d,
    StochNorm2d,
    StochNorm3d,
    SyncStochNorm,
    convert_model,
    convert_sync,
    restore_batch_norm,
)
from talib_fast.libraries import import_library
from talib_fast.ops import draw, stoch_norm
from talib_fast.ops.draw import is_recorded
from talib_fast.ops.stoch_norm_operators import _backward as reference_backward
from talib_fast.ops.stoch_norm_operators import _forward as reference_forward

SHAPES = [(6, 5), (4, 5, 7), (3, 5, 4, 3), (2, 5, 3, 2, 4)]
LAYERS = {2: StochNorm1d, 3: StochNorm1d, 4: StochNorm2d, 5: StochNorm3d}
OP = torch.ops.talib_fast


def oracle(input, running_mean, running_var, mask, weight=None, bias=None, momentum=0.1, eps=1e-5):
    """Stochastic normalisation by its formulas, in float64; returns output and updated statistics."""
    x = input.double()
    dims, shape = [0, *range(2, x.dim())], [1, -1, *[1] * (x.dim() - 2)]
    running_mean, running_var = running_mean.to(x), running_var.to(x)
    batch_mean = x.mean(dims)
    batch_var = ((x - batch_mean.view(shape)) ** 2).mean(dims)
    m, v = torch.where(mask, batch_mean, running_mean), torch.where(mask, batch_var, running_var)
    output = (x - m.view(shape)) / torch.sqrt(v + eps).view(shape)
    output = output if weight is None else output * weight.double().view(shape)
    output = output if bias is None else output + bias.double().view(shape)
    n = x.numel() // x.size(1)
    mean = (1 - momentum) * running_mean + momentum * batch_mean.detach()
    var = (1 - momentum) * running_var + momentum * batch_var.detach() * n / (n - 1)
    return output, mean, var


def inputs(shape, dtype=torch.float64, device="cpu"):
    channels = shape[1]
    return dict(
        input=(torch.randn(shape, dtype=torch.float64) * 2 + 3).to(device, dtype),
        running_mean=torch.randn(channels, dtype=torch.float64).to(device, dtype),
        running_var=(torch.rand(channels, dtype=torch.float64) + 0.5).to(device, dtype),
        mask=(torch.arange(channels) % 2 == 0).to(device),
        weight=torch.randn(channels, dtype=torch.float64).to(device, dtype),
        bias=torch.randn(channels, dtype=torch.float64).to(device, dtype),
    )


def assert_near(got: Tensor, expected: Tensor, tolerance: float) -> None:
    """The largest error is at most `tolerance`, relative to the largest value."""
    assert got.isfinite().all()
    error = (got.double() - expected).abs().max()
    assert error <= tolerance * max(expected.abs().max().item(), 1)


def layout(x: Tensor, name: str) -> Tensor:
    if name == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if name == "strided":
        return torch.stack([x, x], dim=-1)[..., 0]
    if name == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    return x


class TestOperation:
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("name", ["contiguous", "channels_last", "strided", "transposed"])
    @pytest.mark.parametrize("affine", [True, False])
    def test_matches_the_oracle(self, shape, name, affine, device):
        args = inputs(shape, device=device)
        args["input"] = layout(args["input"], name)
        if not affine:
            args["weight"] = args["bias"] = None
        expected, mean, var = oracle(**args)
        output, _ = stoch_norm(**args)
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(args["running_mean"], mean)
        torch.testing.assert_close(args["running_var"], var)
        if name in ("contiguous", "channels_last"):
            assert output.stride() == args["input"].stride()

    @pytest.mark.parametrize("shape", SHAPES)
    def test_gradients_are_those_of_the_oracle(self, shape, device):
        args = inputs(shape, device=device)
        leaves = [args[name].requires_grad_() for name in ("input", "weight", "bias")]
        expected = torch.autograd.grad((oracle(**args)[0] ** 3).sum(), leaves)
        got = torch.autograd.grad((stoch_norm(**args)[0] ** 3).sum(), leaves)
        torch.testing.assert_close(got, expected)

    @pytest.mark.parametrize("shape", SHAPES)
    def test_gradcheck_and_gradgradcheck(self, shape, device):
        args = inputs(shape, device=device)

        def normalize(input, weight, bias):
            fresh = {**args, "running_mean": args["running_mean"].clone(), "running_var": args["running_var"].clone()}
            return stoch_norm(**{**fresh, "input": input, "weight": weight, "bias": bias})[0]

        leaves = tuple(args[name].requires_grad_() for name in ("input", "weight", "bias"))
        assert gradcheck(normalize, leaves)
        assert gradgradcheck(normalize, leaves)

    @pytest.mark.parametrize("wanted", ["input", "weight", "bias"])
    def test_only_the_wanted_gradient_is_given(self, wanted):
        args = inputs((4, 5, 3))
        args[wanted].requires_grad_()
        stoch_norm(**args)[0].square().sum().backward()
        for name in ("input", "weight", "bias"):
            assert (args[name].grad is not None) == (name == wanted)
        assert args[wanted].grad.abs().min() > 0

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    @pytest.mark.parametrize("mixed", [True, False])
    def test_error_at_most_twice_that_of_batch_norm(self, dtype, mixed, device):
        args = inputs((16, 8, 9, 9), dtype, device)
        args["mask"] = torch.ones_like(args["mask"])
        if mixed:
            for name in ("running_mean", "running_var", "weight", "bias"):
                args[name] = args[name].float()
        x, weight, bias = (args[name].requires_grad_() for name in ("input", "weight", "bias"))
        grad = torch.randn_like(x)

        exact = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
        expected = F.batch_norm(exact[0], None, None, *exact[1:], True)
        expected_grads = torch.autograd.grad(expected, exact, grad.double())
        reference = F.batch_norm(x, None, None, weight, bias, True)
        reference_grads = torch.autograd.grad(reference, (x, weight, bias), grad)
        output, _ = stoch_norm(**args)
        grads = torch.autograd.grad(output, (x, weight, bias), grad)
        assert output.dtype == dtype and [g.dtype for g in grads] == [x.dtype, weight.dtype, bias.dtype]
        for got, theirs, exactly in zip(
            (output, *grads), (reference, *reference_grads), (expected, *expected_grads), strict=True
        ):
            error, their_error = ((t.double() - exactly).abs().max() for t in (got, theirs))
            assert error <= 2 * their_error + 1e-6 * exactly.abs().max()

    def test_large_mean_does_not_cancel(self, device):
        args = inputs((64, 4, 8, 8), torch.float32, device)
        args["input"] = args["input"] / 2 + 1e4
        args["mask"] = torch.ones_like(args["mask"])
        expected = oracle(**args)[0]
        torch.testing.assert_close(stoch_norm(**args)[0].double(), expected, atol=5e-3, rtol=5e-3)

    def test_an_unselected_non_finite_branch_does_not_leak(self, device):
        args = inputs((4, 3, 5), device=device)
        args["mask"] = torch.tensor([True, False, True], device=device)
        args["running_var"][0] = torch.inf
        args["input"][0, 1, 0] = torch.inf
        output, _ = stoch_norm(**args)
        assert output[:, 0].isfinite().all() and output[:, 2].isfinite().all()
        assert output[:, 1].isfinite().sum() == 19

    def test_all_channels_on_one_branch_are_batch_norm(self, device):
        for training in (True, False):
            args = inputs((4, 5, 3, 3), device=device)
            args["mask"] = torch.full_like(args["mask"], training)
            statistics = args["running_mean"].clone(), args["running_var"].clone()
            expected = F.batch_norm(args["input"], *statistics, args["weight"], args["bias"], training)
            torch.testing.assert_close(stoch_norm(**args)[0], expected)

    @pytest.mark.parametrize("var", [-1e-5, -1.0])
    def test_gradients_of_an_empty_input_are_zero_whatever_the_running_variance(self, var, device):
        args = inputs((2, 5, 3), torch.float32, device)
        args["input"], args["running_var"] = args["input"][:0], torch.full_like(args["running_var"], var)
        leaves = [args[name].requires_grad_() for name in ("weight", "bias")]
        gradients = torch.autograd.grad(stoch_norm(**args)[0].sum(), leaves)
        assert not any(gradient.any() for gradient in gradients)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_empty_input_leaves_the_statistics_alone(self, dtype, device):
        args = inputs((2, 5, 3), device=device)
        for name in ("running_mean", "running_var"):  # finer than the sums of a float32 input, if float64
            args[name] = torch.rand(5, dtype=dtype, device=device)
        before = args["running_mean"].clone(), args["running_var"].clone()
        args["input"] = args["input"][:0].requires_grad_()
        output, _ = stoch_norm(**args)
        output.sum().backward()
        assert output.shape == (0, 5, 3) and args["input"].grad.shape == (0, 5, 3)
        assert torch.equal(args["running_mean"], before[0]) and torch.equal(args["running_var"], before[1])

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    @pytest.mark.parametrize("name", ["contiguous", "channels_last", "strided"])
    @pytest.mark.parametrize("affine", [True, False])
    def test_opcheck(self, dtype, name, affine, device):
        args = inputs((3, 4, 5, 2), dtype, device)
        x = layout(args["input"], name)
        weight, bias = (args["weight"], args["bias"]) if affine else (None, None)
        forward = (x, weight, bias, args["running_mean"], args["running_var"], args["mask"], 0.1, 1e-5)
        torch.library.opcheck(OP.stoch_norm_forward.default, forward)
        _, statistics, _ = OP.stoch_norm_forward(*forward)
        backward = (torch.randn_like(x), x, statistics, weight, args["mask"])
        torch.library.opcheck(OP.stoch_norm_backward.default, backward)
        drawn, counter = torch.rand(4, device=device), torch.tensor(3, device=device)
        torch.library.opcheck(OP.stoch_norm_forward.default, (*forward[:5], drawn, 0.1, 1e-5, 0.5, counter))
        torch.library.opcheck(OP.stoch_norm_backward.default, (*backward[:4], drawn, 0.5))
        running = torch.stack(forward[3:5])
        torch.library.opcheck(OP.stoch_norm_functional.default, (*forward[:3], running, args["mask"], 1e-5))
        torch.library.opcheck(OP.stoch_norm_functional.default, (*forward[:3], running, -drawn, 1e-5, 0.5))
        torch.library.opcheck(OP.stoch_norm_mask.default, (drawn, 0.5))

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (dict(input=torch.zeros(4, 5, dtype=torch.long)), TypeError, "expected input to be a float16.*int64"),
            (dict(input=torch.zeros(5)), ValueError, r"expected input of shape \[N, C, \*\], got \[5\]"),
            (dict(mask=torch.ones(5)), TypeError, "expected a bool mask, got torch.float32"),
            (dict(mask=torch.ones(4, dtype=torch.bool)), ValueError, r"mask of shape \[5\].*got \[4\]"),
            (dict(weight=torch.ones(5, 1)), ValueError, r"weight of shape \[5\].*got \[5, 1\]"),
            (dict(running_mean=torch.ones(5, device="meta")), ValueError, "running_mean on the input's device cpu"),
            (dict(input=torch.zeros(1, 5)), ValueError, r"more than 1 value per channel.*\[1, 5\]"),
            (dict(input=[1.0]), TypeError, "expected input to be a tensor, got list"),
            (
                dict(input=torch.zeros(4, 5).to_sparse()),
                TypeError,
                "expected input to be a dense tensor, got torch.sparse",
            ),
            (dict(running_var=torch.ones(5).long()), TypeError, "expected running_var to be a float16.*int64"),
            (
                dict(running_var=torch.ones(1).expand(5)),
                ValueError,
                "memory of its own for every channel of running_var",
            ),
            (dict(running_mean=torch._neg_view(torch.ones(5))), ValueError, "running_mean.*got a negated view"),
            (dict(eps=-1e-5), ValueError, r"expected eps in \[0, 1.8e\+308\], got -1e-05"),
            (dict(eps=float("inf")), ValueError, "expected eps in .*got inf"),
            (dict(eps="1"), TypeError, "expected eps to be a number, got '1'"),
            (dict(momentum=1.5), ValueError, r"expected momentum in \[0, 1\], got 1.5"),
            (dict(momentum=None), TypeError, "expected momentum to be a number, got None"),
        ],
    )
    def test_bad_input_is_named(self, change, error, message):
        with pytest.raises(error, match=message):
            stoch_norm(**{**inputs((4, 5)), **change})


# Runs long and short, odd, single, of one channel or many; rows few and many: whatever kernels treat differently.
KERNEL_SHAPES = [
    (2, 1), (3, 7), (130, 33), (600, 40), (2000, 260), (48, 2048), (2, 3, 1), (3, 1, 1000), (1, 5, 700),
    (70, 64, 2), (7, 5, 300), (5, 130, 7, 7), (2, 2, 129, 65), (4, 48, 33, 31), (2, 3, 160, 150), (9, 64, 3, 5, 2),
]  # fmt: skip
TOLERANCES = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}

# By layout, channels that no block of a GPU can keep, in more slices than it has blocks at once, two on each of 132
# multiprocessors, even if a slice were 128 KB of bfloat16; the first is ResNet-50's main path.
MANY_ITEMS = {"contiguous": (48, 64, 56, 56), "channels_last": (64, 64, 56, 56)}


def compare_with_oracle(shape, dtype, name, device):
    """Output, moved statistics and gradients of both branches."""
    args = inputs(shape, dtype, device)
    args["input"] = layout(args["input"], name).requires_grad_()
    for vector in ("running_mean", "running_var", "weight", "bias"):
        args[vector] = args[vector].float() if dtype != torch.float64 else args[vector]
    args["mask"] = (torch.rand(shape[1]) < 0.5).to(device)
    leaves = [args["input"], args["weight"].requires_grad_(), args["bias"].requires_grad_()]
    grad = layout(torch.randn(shape, dtype=torch.float64).to(device, dtype), name)
    exact = {k: v.detach().double().requires_grad_() if v.requires_grad else v for k, v in args.items()}
    expected, mean, var = oracle(**exact)
    expected_grads = torch.autograd.grad(expected, [exact[k] for k in ("input", "weight", "bias")], grad.double())
    output, _ = stoch_norm(**args)
    grads = torch.autograd.grad(output, leaves, grad)
    assert output.stride() == grads[0].stride() == args["input"].stride()
    # the sums' errors grow with the square root of the count
    tolerance = TOLERANCES[dtype]
    sums = tolerance * (grad.numel() / shape[1]) ** 0.5
    assert_near(output, expected, tolerance)
    assert_near(args["running_mean"], mean, min(tolerance, 2e-5))
    assert_near(args["running_var"], var, min(tolerance, 2e-5))
    assert_near(grads[0], expected_grads[0], tolerance * 2)
    assert_near(grads[1], expected_grads[1], sums)
    assert_near(grads[2], expected_grads[2], sums)


class TestKernels:
    """The compiled kernels where they are, else the PyTorch implementation, against the oracle."""

    @pytest.mark.parametrize("shape", KERNEL_SHAPES, ids=str)
    @pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
    @pytest.mark.parametrize("name", ["contiguous", "channels_last"])
    def test_every_shape(self, shape, dtype, name, device):
        compare_with_oracle(shape, dtype, name, device)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("name", MANY_ITEMS)
    def test_more_items_than_blocks(self, name, dtype, device):
        compare_with_oracle(MANY_ITEMS[name], dtype, name, device)

    @pytest.mark.parametrize("order", list(itertools.permutations(range(4)))[1:], ids=str)
    def test_every_order_of_dimensions_without_a_copy(self, order, device):
        args = inputs((3, 6, 5, 4), device=device)
        back = [order.index(dim) for dim in range(4)]
        args["input"] = args["input"].permute(order).contiguous().permute(back)
        expected, *_ = oracle(**args)
        output, _ = stoch_norm(**args)
        assert output.stride() == args["input"].stride()
        torch.testing.assert_close(output, expected)

    @pytest.mark.parametrize("chosen", [True, False])
    @pytest.mark.parametrize("shape", [(40, 24), (6, 24, 7, 7), (2, 24, 30, 20)], ids=str)
    def test_one_branch_alone(self, chosen, shape, device):
        args = inputs(shape, device=device)
        args["mask"] = torch.full_like(args["mask"], chosen)
        args["input"].requires_grad_()
        expected, mean, var = oracle(**args)
        (expected_grad,) = torch.autograd.grad((expected**2).sum(), args["input"])
        output, _ = stoch_norm(**args)
        (grad,) = torch.autograd.grad((output**2).sum(), args["input"])
        torch.testing.assert_close((output, grad), (expected, expected_grad))
        torch.testing.assert_close((args["running_mean"], args["running_var"]), (mean, var))

    @pytest.mark.parametrize("threads", [2, 3, 16])
    @pytest.mark.parametrize("shape", [(2, 3, 300, 150), (3000, 64), (8, 200, 7, 7), (3, 40, 64, 64)], ids=str)
    def test_more_threads(self, threads, shape):
        args = inputs(shape)
        args["input"].requires_grad_()
        expected, mean, var = oracle(**args)
        (expected_grad,) = torch.autograd.grad((expected**2).sum(), args["input"])
        torch.set_num_threads(threads)
        output, _ = stoch_norm(**args)
        (grad,) = torch.autograd.grad((output**2).sum(), args["input"])
        torch.testing.assert_close((output, grad), (expected, expected_grad))
        torch.testing.assert_close((args["running_mean"], args["running_var"]), (mean, var))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize(
        ("shape", "name"),
        [((8, 97, 113, 113), "contiguous"), ((192, 256, 14, 14), "contiguous"), ((800, 64, 14, 14), "channels_last")],
        ids=str,
    )
    def test_maps_larger_than_the_caches(self, shape, name, dtype, device):
        args = inputs(shape, dtype, device)
        x, weight, mask = layout(args["input"], name), args["weight"], torch.rand(shape[1], device=device) < 0.5
        running = args["running_mean"], args["running_var"]
        grad = layout(torch.randn(shape, device=device).to(dtype), name)
        exact = [t.double() for t in (x, weight, args["bias"], *running)]
        expected, exact_statistics, _ = reference_forward(*exact, mask, 0.1, 1e-5)
        expected_grad, *_ = reference_backward(grad.double(), exact[0], exact_statistics, exact[1], mask)
        torch.set_num_threads(2)
        output, statistics, _ = OP.stoch_norm_forward(x, weight, args["bias"], *running, mask, 0.1, 1e-5)
        got, *_ = OP.stoch_norm_backward(grad, x, statistics, weight, mask)
        assert_near(output, expected, TOLERANCES[dtype])
        assert_near(got, expected_grad, TOLERANCES[dtype] * 2)
        for moved, moved_exactly in zip(running, exact[3:], strict=True):
            assert_near(moved, moved_exactly, TOLERANCES[dtype])

    @pytest.mark.parametrize("name", ["contiguous", "channels_last"])
    @pytest.mark.parametrize("shape", [(16, 40, 17, 9), (400, 40)], ids=str)
    def test_equal_input_gives_equal_bits(self, name, shape, device):
        results = []
        for _ in range(3):
            torch.manual_seed(1)
            args = inputs(shape, torch.float32, device)
            args["input"] = layout(args["input"], name).requires_grad_()
            output, statistics = stoch_norm(**args)
            (grad,) = torch.autograd.grad(output.square().sum(), args["input"])
            results.append((output, *statistics, grad, args["running_mean"], args["running_var"]))
        assert all(torch.equal(a, b) for later in results[1:] for a, b in zip(results[0], later, strict=True))

    @pytest.mark.parametrize("shape", [(0, 40), (6, 40), (2, 40, 7), (2, 40, 40, 30)], ids=str)
    @pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
    def test_numbers_drawn_are_a_mask_where_they_are_below_p(self, p, shape, device):
        drawn = torch.rand(2 * 40)[::2].to(device)
        drawn[::2] = p  # as float32 has it, and no number is below itself
        flags = drawn < p
        results = []
        for mask, threshold in ((flags, ()), (drawn, (p,))):
            torch.manual_seed(1)
            args = inputs(shape, torch.float32, device)
            running, counter = (args["running_mean"], args["running_var"]), torch.tensor(7, device=device)
            forward = (args["input"], args["weight"], args["bias"], *running, mask, 0.1, 1e-5, *threshold)
            output, statistics, _ = OP.stoch_norm_forward(*forward, num_batches_tracked=counter)
            grad = torch.randn_like(output)
            grads = OP.stoch_norm_backward(grad, args["input"], statistics, args["weight"], mask, *threshold)
            results.append((output, statistics, *running, *grads))
            assert counter == (8 if output.numel() else 7)
        assert flags.any() == (p > 0)
        for expected, got in zip(*results, strict=True):
            assert torch.equal(got, expected)

    @pytest.mark.parametrize("shape", [(0, 5, 3), (6, 5), (9, 24, 7), (2, 5, 20, 30)], ids=str)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
    def test_the_functional_operator_changes_nothing_and_gives_the_batch_s_statistics(self, shape, dtype, device):
        args = inputs(shape, dtype, device)
        args["running_mean"][0] = torch.inf  # of which nothing may get into the batch's
        drawn = torch.rand(shape[1]).to(device)
        drawn[0] = 0
        vectors = [args[name].clone() for name in ("weight", "bias", "running_mean", "running_var")]
        before = [vector.clone() for vector in vectors]
        # a repetition has drawn the same numbers, with their signs set
        for mask, p in ((drawn < 0.5, 1.0), (-drawn, 0.5)):
            output, statistics, _, batch = OP.stoch_norm_functional(
                args["input"], *vectors[:2], torch.stack(vectors[2:]), mask, 1e-5, p
            )
            assert all(torch.equal(*pair) for pair in zip(vectors, before, strict=True))
            moving = [vector.clone() for vector in vectors]
            expected = OP.stoch_norm_forward(args["input"], *moving, drawn, 0.1, 1e-5, 0.5)
            assert all(torch.equal(*pair) for pair in zip((output, statistics), expected[:2], strict=True))
            grad = torch.ones_like(output)
            backward = [
                OP.stoch_norm_backward(grad, args["input"], statistics, args["weight"], m, q)
                for m, q in ((mask, p), (drawn, 0.5))
            ]
            assert all(torch.equal(*pair) for pair in zip(*backward, strict=True))
        if output.numel():
            var, mean = torch.var_mean(args["input"].double(), [0, *range(2, len(shape))])
            assert_near(batch, torch.stack((mean, var)), 2e-5)

    @pytest.mark.parametrize("shape", [(6, 4), (3, 4, 7), (2, 4, 40, 30)], ids=str)
    def test_an_infinite_value_stays_in_its_channel_and_out_of_a_running_one_s_gradient(self, shape, device):
        args = inputs(shape, device=device)
        args["mask"] = torch.tensor([True, False, True, False], device=device)
        args["input"].view(shape[0], 4, -1)[0, 1, 0] = torch.inf
        args["input"].requires_grad_()
        output, _ = stoch_norm(**args)
        (grad,) = torch.autograd.grad(output, args["input"], torch.ones_like(output))
        assert grad.isfinite().all()
        assert output.isfinite().sum() == output.numel() - 1
        assert args["running_mean"].isfinite().tolist() == [True, False, True, True]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    @pytest.mark.parametrize("vectors", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_vectors_of_any_dtype_and_stride(self, dtype, vectors, device):
        args = inputs((6, 5, 9), dtype, device)
        for name in ("running_mean", "running_var", "weight", "bias"):
            args[name] = torch.stack([args[name].to(vectors)] * 2, dim=1)[:, 0]
        expected, mean, var = oracle(**args)
        output, _ = stoch_norm(**args)
        assert_near(output, expected, TOLERANCES[dtype])
        assert_near(args["running_mean"], mean, max(TOLERANCES[dtype], TOLERANCES[vectors]))
        assert_near(args["running_var"], var, max(TOLERANCES[dtype], TOLERANCES[vectors]))

    @pytest.mark.parametrize("shape", [(2, 3), (3, 4, 7), (2, 3, 40, 30), (70, 5)], ids=str)
    def test_a_mean_whose_square_overflows(self, shape, device):
        args = inputs(shape, torch.float32, device)
        args["input"] = args["input"] * 1e17 + 1e20
        expected, mean, _ = oracle(**args)
        assert_near(stoch_norm(**args)[0], expected, 1e-3)
        assert_near(args["running_mean"], mean, 1e-5)

    @pytest.mark.parametrize("running", [torch.float16, torch.bfloat16])
    def test_a_batch_s_statistics_that_a_running_one_s_dtype_can_not_hold(self, running, device):
        args = inputs((6, 5, 9), torch.float32, device)
        args["input"] = args["input"] * 1e4  # a variance of 4e8
        for name in ("running_mean", "running_var"):
            args[name] = args[name].to(running)
        _, mean, var = oracle(**args, momentum=1e-5)
        stoch_norm(**args, momentum=1e-5)
        assert_near(args["running_mean"], mean, TOLERANCES[running])
        assert_near(args["running_var"], var, TOLERANCES[running])

    def test_a_gradient_of_another_layout(self, device):
        args = inputs((4, 6, 5, 3), device=device)
        args["input"].requires_grad_()
        grad = layout(torch.randn(4, 6, 5, 3, dtype=torch.float64, device=device), "channels_last")
        expected = torch.autograd.grad(oracle(**args)[0], args["input"], grad)
        torch.testing.assert_close(torch.autograd.grad(stoch_norm(**args)[0], args["input"], grad), expected)
        args = inputs((4, 6, 5, 3), device=device)
        args["input"].requires_grad_()
        (grad,) = torch.autograd.grad(stoch_norm(**args)[0].sum(), args["input"])  # an expanded gradient
        assert grad.shape == (4, 6, 5, 3)

    def test_a_shifted_address_is_not_aligned(self, device):
        for dtype in (torch.float32, torch.bfloat16):
            args = inputs((4, 8, 6, 6), dtype, device)
            args["input"] = torch.cat([args["input"].flatten(), args["input"].flatten()])[1:1153].view(4, 8, 6, 6)
            expected, *_ = oracle(**args)
            assert_near(stoch_norm(**args)[0], expected, TOLERANCES[dtype])

    def test_a_wrong_operand_never_reaches_a_kernel(self, device):
        args = inputs((4, 6, 3), device=device)
        forward = [args[name] for name in ("input", "weight", "bias", "running_mean", "running_var", "mask")]
        _, statistics, _ = OP.stoch_norm_forward(*forward, 0.1, 1e-5)
        for i in range(1, 6):
            short = [t[:4] if j == i else t for j, t in enumerate(forward)]
            with pytest.raises(RuntimeError):
                OP.stoch_norm_forward(*short, 0.1, 1e-5)
        backward = [torch.ones_like(args["input"]), args["input"], statistics, args["weight"], args["mask"]]
        for i in (0, 2, 3, 4):
            short = [t[..., :2] if j == i else t for j, t in enumerate(backward)]
            with pytest.raises(RuntimeError):
                OP.stoch_norm_backward(*short)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_conversions_round_as_torch_does(self, dtype, device):
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).to(device)
        every = every[every.isfinite()]
        values = torch.stack([every, every], 1)
        zero, one = torch.zeros(2, device=device), torch.ones(2, device=device)
        mask = torch.zeros(2, dtype=torch.bool, device=device)
        for factor in (1.0, 0.7, 1.3, 1 + 2**-8, 1 + 2**-11, 1e-3, 3e-6, 600.0):  # the powers make ties
            expected = (values.float() * factor).to(dtype)
            for x, want in ((values, expected), (values.t().contiguous().unsqueeze(0), expected.t().unsqueeze(0))):
                output, _ = stoch_norm(x, zero.clone(), one.clone(), mask, one * factor, None, eps=0.0)
                assert torch.equal(output, want)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_nan_and_infinity_stay_what_they_are(self, dtype, device):
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).to(device)
        every = every[~every.isfinite()]
        values = torch.stack([every, every], 1)
        zero, one = torch.zeros(2, device=device), torch.ones(2, device=device)
        mask = torch.zeros(2, dtype=torch.bool, device=device)
        widest = torch.tensor([-1, 2**31 - 1], dtype=torch.int32).view(torch.float32).to(device)  # NaN, all bits set
        for x in (values, values.t().contiguous().unsqueeze(0)):
            output, _ = stoch_norm(x, zero.clone(), one.clone(), mask, one, None, eps=0.0)
            assert torch.equal(output.isnan(), x.isnan()) and torch.equal(output.isinf(), x.isinf())
            output, _ = stoch_norm(torch.ones_like(x), zero.clone(), one.clone(), mask, widest, None, eps=0.0)
            assert output.isnan().all()

    @pytest.mark.parametrize("channels", [1, 2, 3, 8, 15, 16, 24, 33])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("count", [1, 133])  # images; rows are 35 in each: few, and an odd number of many
    def test_rows_that_do_not_fill_vectors(self, channels, dtype, count, device):
        args = inputs((count, channels, 7, 5), dtype, device)
        args["input"] = layout(args["input"], "channels_last").requires_grad_()
        grad = layout(torch.randn(count, channels, 7, 5, dtype=torch.float64).to(device, dtype), "channels_last")
        exact = args["input"].detach().double().requires_grad_()
        expected, mean, var = oracle(**{**args, "input": exact})
        (expected_grad,) = torch.autograd.grad(expected, exact, grad.double())
        results = []
        for _ in range(2):
            fresh = {**args, "running_mean": args["running_mean"].clone(), "running_var": args["running_var"].clone()}
            output, _ = stoch_norm(**fresh)
            (got,) = torch.autograd.grad(output, args["input"], grad)
            assert_near(output, expected, TOLERANCES[dtype])
            assert_near(got, expected_grad, TOLERANCES[dtype] * 2)
            assert_near(fresh["running_mean"], mean, TOLERANCES[dtype])
            assert_near(fresh["running_var"], var, TOLERANCES[dtype])
            results.append((output, got, fresh["running_mean"], fresh["running_var"]))
        assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def record_draws(layer: nn.Module) -> list[Tensor]:
    """The list that gets what the layer draws in each forward pass from now on, by torch's generator on the CPU."""
    draws, again = [], torch.Generator()

    def record(layer: nn.Module, _: Any) -> None:
        again.set_state(torch.get_rng_state())
        draws.append(torch.rand(layer.num_features, generator=again))

    layer.register_forward_pre_hook(record)
    return draws


def masks(layer: StochNorm2d, *inputs: Tensor) -> list[Tensor]:
    """Which channels took the batch's statistics in a forward pass of each input."""
    draws = record_draws(layer)
    for x in inputs:
        layer(x)
    return [drawn < layer.p for drawn in draws]


class TestLayer:
    @pytest.mark.parametrize("shape", SHAPES)
    def test_training_step_is_the_operation_with_the_drawn_mask(self, shape, device):
        layer = LAYERS[len(shape)](5, p=0.5).to(device)
        x = torch.randn(shape, device=device)
        torch.manual_seed(3)
        output = layer(x)
        torch.manual_seed(3)
        mask = torch.rand(5, device=device) < 0.5
        expected, mean, var = oracle(x, torch.zeros(5), torch.ones(5), mask, layer.weight, layer.bias)
        torch.testing.assert_close(output, expected.to(output))
        torch.testing.assert_close(layer.running_mean, mean.to(output))
        torch.testing.assert_close(layer.running_var, var.to(output))
        assert layer.num_batches_tracked == 1

    @pytest.mark.parametrize("momentum", [0.1, None])
    def test_counts_batches_in_whatever_dtype_the_counter_has(self, momentum, device):
        layer = StochNorm2d(4, momentum=momentum).to(device)
        casted = copy.deepcopy(layer).type(torch.float64)  # all buffers
        for size in (3, 0, 2):
            x = torch.randn(size, 4, 2, 2, dtype=torch.float64, device=device)
            layer.double()(x), casted(x)
        assert casted.num_batches_tracked.dtype == torch.float64
        assert layer.num_batches_tracked == casted.num_batches_tracked == 2
        torch.testing.assert_close(casted.running_var, layer.running_var)

    def test_p_is_the_probability_of_the_batch_statistics(self):
        layer = StochNorm2d(2000, p=0.3)
        assert 0.25 < masks(layer, torch.randn(2, 2000, 1, 2))[0].float().mean() < 0.35

    @pytest.mark.parametrize("p", [0, 1, 0.0, 1.0])
    def test_p_at_its_ends(self, p):
        assert (masks(StochNorm1d(1000, p=p), torch.randn(4, 1000))[0] == bool(p)).all()

    def test_masks_are_drawn_per_channel_and_anew(self):
        first, second = masks(StochNorm2d(64), *[torch.randn(4, 64, 2, 2)] * 2)
        assert 0 < first.sum() < 64 and (first != second).any()

    @pytest.mark.parametrize("shape", SHAPES)
    def test_evaluation_uses_the_running_statistics_and_leaves_them_alone(self, shape, device):
        layer = LAYERS[len(shape)](5).to(device)
        layer(torch.randn(shape, device=device))
        layer.eval()
        before = copy.deepcopy(layer.state_dict())
        x = torch.randn(shape, device=device)
        expected = F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias)
        torch.testing.assert_close(layer(x), expected)
        torch.testing.assert_close(dict(layer.state_dict()), dict(before))

    def test_evaluates_a_single_value_per_channel(self):
        assert StochNorm2d(5).eval()(torch.randn(1, 5, 1, 1)).shape == (1, 5, 1, 1)

    def test_signature(self):
        layer = StochNorm2d(5, 1e-3, 0.2, False, True, 0.25)
        assert (layer.eps, layer.momentum, layer.affine, layer.track_running_stats, layer.p) == (
            1e-3, 0.2, False, True, 0.25,
        )  # fmt: skip
        assert (
            repr(layer)
            == repr(nn.BatchNorm2d(5, 1e-3, 0.2, False)).replace("BatchNorm2d", "StochNorm2d")[:-1] + ", p=0.25)"
        )
        assert StochNorm1d(5).p == 0.5

    @pytest.mark.parametrize(
        ("p", "error"),
        [(-0.1, ValueError), (1.5, ValueError), (float("nan"), ValueError), (True, TypeError), ("1", TypeError)],
    )
    def test_p_is_validated(self, p, error):
        for make in (lambda: StochNorm2d(4, p=p), lambda: convert_model(nn.BatchNorm2d(4), p)):
            with pytest.raises(error, match="expected p"):
                make()

    def test_deepcopy_pickle_and_state_dict_round_trip(self):
        layer = StochNorm2d(5, p=0.25)
        layer(torch.randn(3, 5, 2, 2))
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert twin.p == 0.25
            torch.testing.assert_close(dict(twin.state_dict()), dict(layer.state_dict()))
        fresh = StochNorm2d(5)
        fresh.load_state_dict(layer.state_dict())
        torch.testing.assert_close(fresh.running_var, layer.running_var)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_autocast(self, dtype, device):
        net = nn.Sequential(nn.Conv2d(3, 8, 3), StochNorm2d(8), nn.ReLU()).to(device)
        x = torch.randn(4, 3, 8, 8, device=device)
        with torch.autocast(device.type, dtype):
            output = net(x)
        assert output.dtype == dtype
        output.float().square().sum().backward()
        assert net[1].weight.grad.dtype == torch.float32
        assert all(parameter.grad.isfinite().all() for parameter in net.parameters())

    def test_compiles_into_one_graph_and_equals_eager(self):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear, self.norm = nn.Linear(6, 8), StochNorm1d(8)

            def forward(self, x):
                return self.norm(self.linear(x)).relu()

        net = Net()
        twin = copy.deepcopy(net)
        compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
        for training in (True, False):
            net.train(training), twin.train(training)
            for step in range(3):
                x = torch.randn(16, 6)
                results = []
                for model, module in ((net, net), (compiled, twin)):
                    torch.manual_seed(step)
                    output = model(x)
                    output.square().sum().backward()
                    results.append(
                        (output, module.linear.weight.grad, module.norm.running_var, module.norm.weight.grad)
                    )
                torch.testing.assert_close(*results)

    def test_eps_of_0_is_refused_in_training(self):
        layer, x = StochNorm1d(3, eps=0.0), torch.randn(5, 3)
        with pytest.raises(ValueError, match=r"expected eps to be positive during training, got 0\.0"):
            layer(x)
        assert layer.num_batches_tracked == 0

    def test_exports_in_evaluation(self):
        layer = StochNorm2d(3).eval()
        x = torch.randn(2, 3, 4, 4)
        torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), layer(x))


def small_net(p=None):
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip
    return net if p is None else convert_model(net, p)


class TestFunctionTransforms:
    """torch.func's: members of a mapped dimension have their own statistics."""

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("mapped", ["all", "input alone beside the statistics", "all but the input"])
    def test_vmap_and_grad(self, shape, mapped, device):
        members = [inputs(shape, device=device) for _ in range(3)]
        dims = dict.fromkeys(members[0], 0)
        if mapped == "all but the input":
            dims["input"] = None
        elif mapped != "all":
            dims |= dict.fromkeys(("weight", "bias", "mask"))
        for name, dim in dims.items():
            if dim is None:
                for member in members[1:]:
                    member[name] = members[0][name]
        stacked = {
            name: members[0][name] if dim is None else torch.stack([member[name] for member in members])
            for name, dim in dims.items()
        }
        if mapped == "all":  # any dimension may be the mapped one
            stacked["input"], dims["input"] = stacked["input"].movedim(0, 1).contiguous(), 1

        def loss(weight, arguments):
            output, _ = stoch_norm(**{**arguments, "weight": weight})
            return output.pow(3).sum(), output

        function = grad(loss, has_aux=True)
        weight, weight_dim = stacked.pop("weight"), dims.pop("weight")
        got, output = vmap(function, (weight_dim, dims))(weight, stacked)
        for j, member in enumerate(members):
            weight = member.pop("weight")
            expected, expected_output = function(weight, member)
            torch.testing.assert_close((got[j], output[j]), (expected, expected_output))
            for name in ("running_mean", "running_var"):
                torch.testing.assert_close(stacked[name][j], member[name])

    def test_running_statistics_for_all_members_together_are_refused(self):
        arguments = inputs((3, 4, 5))
        stacked = torch.stack([arguments.pop("input")] * 2)
        with pytest.raises(ValueError, match="running statistics for every member"):
            vmap(lambda input: stoch_norm(input, **arguments)[0])(stacked)

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("kind", [nn.BatchNorm2d, StochNorm2d])
    def test_an_ensemble_of_layers_as_of_batch_norms(self, kind, training, device):
        layers = [kind(4).train(training).to(device) for _ in range(3)]
        parameters, buffers = stack_module_state(layers)
        x = torch.randn(6, 4, 3, 3, device=device)

        def loss(parameters, buffers):
            return functional_call(layers[0], (parameters, buffers), (x,)).pow(3).sum()

        gradients = vmap(grad(loss), randomness="different")(parameters, buffers)
        assert gradients["weight"].shape == (3, 4) and gradients["weight"].isfinite().all()
        assert buffers["num_batches_tracked"].tolist() == [int(training)] * 3
        assert layers[0].num_batches_tracked == 0
        counter = buffers.pop("num_batches_tracked")[0]  # a counter for all members counts once
        vmap(lambda p, b: loss(p, {**b, "num_batches_tracked": counter}), randomness="same")(parameters, buffers)
        assert counter == 2 * training

    @pytest.mark.parametrize("randomness", ["same", "different"])
    def test_masks_of_members(self, randomness):
        layers = [StochNorm1d(50) for _ in range(2)]
        parameters, buffers = stack_module_state(layers)
        buffers["running_mean"] += 1
        x = torch.randn(6, 50)
        first, second = vmap(lambda *state: functional_call(layers[0], state, (x,)), randomness=randomness)(
            parameters, buffers
        )
        assert torch.allclose(first, second) is (randomness == "same")

    def test_gradients_are_those_of_autograd(self):
        layer, x = StochNorm2d(4).double(), torch.randn(3, 4, 2, 2, dtype=torch.float64)
        parameters, buffers = dict(layer.named_parameters()), dict(copy.deepcopy(layer).named_buffers())

        def loss(parameters, buffers):
            torch.manual_seed(1)
            return functional_call(layer, (parameters, buffers), (x,)).pow(3).sum()

        torch.manual_seed(1)
        mask = torch.rand(4) < 0.5
        gradients = grad(loss)(parameters, buffers)
        output, _ = stoch_norm(x, layer.running_mean.clone(), layer.running_var.clone(), mask, layer.weight, layer.bias)
        output.pow(3).sum().backward()
        torch.testing.assert_close(gradients, {"weight": layer.weight.grad, "bias": layer.bias.grad})
        assert not is_recorded(layer.running_mean)  # what a transform hands in is gone with it


class TestConvertModel:
    def test_every_rank(self):
        for norm, stoch in (
            (nn.BatchNorm1d, StochNorm1d),
            (nn.BatchNorm2d, StochNorm2d),
            (nn.BatchNorm3d, StochNorm3d),
        ):
            assert type(convert_model(norm(4), 0.5)) is stoch
            assert type(convert_model(nn.Sequential(nn.Sequential(norm(4))), 0.5)[0][0]) is stoch

    def test_returns_the_module_with_its_parameters(self):
        net = small_net()
        parameters, buffers = list(net.parameters()), list(net.buffers())
        assert convert_model(net, 0.5) is net
        assert all(a is b for a, b in zip(parameters, net.parameters(), strict=True))
        assert all(a is b for a, b in zip(buffers, net.buffers(), strict=True))

    def test_trains_like_batch_norm_at_p_1(self):
        plain = small_net()
        nets = plain, convert_model(copy.deepcopy(plain), 1.0)
        optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in nets]
        for _ in range(5):
            x, labels = torch.randn(8, 3, 8, 8), torch.randint(4, (8,))
            losses = []
            for net, optimizer in zip(nets, optimizers, strict=True):
                loss = F.cross_entropy(net(x), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss)
            torch.testing.assert_close(*losses)
        torch.testing.assert_close(*[dict(net.state_dict()) for net in nets], rtol=1e-4, atol=1e-5)

    def test_a_stochastic_norm_gets_the_new_p(self):
        net = nn.Sequential(StochNorm2d(3), SyncStochNorm(3), nn.BatchNorm2d(3))
        assert [layer.p for layer in convert_model(net, 0.9)] == [0.9] * 3
        assert [type(layer) for layer in net] == [StochNorm2d, SyncStochNorm, StochNorm2d]

    def test_warns_where_there_is_nothing_to_convert(self):
        with pytest.warns(UserWarning, match="found no batch norm"):
            convert_model(nn.Linear(2, 2), 0.5)

    def test_rejects_what_is_no_module(self):
        with pytest.raises(TypeError, match=r"expected module to be a torch\.nn\.Module, got dict"):
            convert_model({}, 0.5)


def formula(x, weight, bias, mask, statistics):
    """The output in float64, of PyTorch's operators, each with a derivative of every kind."""
    x, shape = x.double(), [1, -1, *[1] * (x.dim() - 2)]
    dims = [0, *range(2, x.dim())]
    mean, var = (statistic.double().view(shape) for statistic in statistics)
    mask = mask.view(shape)
    mean = torch.where(mask, x.mean(dims, keepdim=True), mean)
    var = torch.where(mask, (x - x.mean(dims, keepdim=True)).square().mean(dims, keepdim=True), var)
    return (x - mean) / (var + 1e-5).sqrt() * weight.double().view(shape) + bias.double().view(shape)


class TestForwardMode:
    """jvp, jacfwd, hessian, forward_ad and functionalize, against reverse mode or a formula in float64."""

    @pytest.fixture(params=[torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
    def layer(self, request):
        layer = StochNorm2d(4).to(request.param)
        for tensor in (layer.weight.data, layer.running_var):
            tensor.uniform_(0.5, 2)
        for tensor in (layer.bias.data, layer.running_mean):
            tensor.normal_()
        return layer

    @staticmethod
    def expected(layer, x, seed=3):
        """A function of the input in float64 and the mask's seed, and the statistics that a step leaves."""
        torch.manual_seed(seed)
        mask = torch.rand(4) < layer.p
        statistics = layer.running_mean.clone(), layer.running_var.clone()
        _, mean, var = oracle(x.detach(), *statistics, mask)
        torch.manual_seed(seed)
        return lambda x: formula(x, layer.weight, layer.bias, mask, statistics), mean, var

    @staticmethod
    def close(got, expected, dtype):
        scale = max(expected.abs().max().item(), 1)
        torch.testing.assert_close(got.double() / scale, expected / scale, rtol=0, atol=TOLERANCES[dtype])

    @pytest.mark.parametrize("way", ["jvp", "forward_ad", "functional_call"])
    def test_the_tangent_and_the_statistics(self, layer, way):
        dtype = layer.weight.dtype
        x, tangent = torch.randn(2, 3, 4, 2, 2, dtype=torch.float64).to(dtype)
        function, mean, var = self.expected(layer, x)
        if way == "forward_ad":
            with forward_ad.dual_level():
                output = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, tangent)))
        elif way == "jvp":
            output = torch.func.jvp(layer, (x,), (tangent,))
        else:
            buffers = {name: buffer.clone() for name, buffer in layer.named_buffers()}
            state = dict(layer.named_parameters()), buffers
            output = torch.func.jvp(lambda x: functional_call(layer, state, (x,)), (x,), (tangent,))
            layer.load_state_dict({**layer.state_dict(), **buffers})
        for got, expected in zip(output, torch.func.jvp(function, (x.double(),), (tangent.double(),)), strict=True):
            assert got.dtype == dtype
            self.close(got, expected, dtype)
        self.close(layer.running_mean, mean, dtype)
        self.close(layer.running_var, var, dtype)
        assert layer.num_batches_tracked == 1

    def test_jacobians_and_hessians(self, layer):
        dtype = layer.weight.dtype
        x = torch.randn(2, 4, 1, 2, dtype=torch.float64).to(dtype)
        function, *_ = self.expected(layer, x)
        expected = torch.func.jacrev(function)(x.double())
        self.close(torch.func.jacfwd(layer)(x), expected, dtype)
        layer.momentum = 0.0  # the statistics stay from here on
        if dtype.itemsize < 4:
            return  # of differences of differences little is left
        function, *_ = self.expected(layer, x)
        expected = torch.func.hessian(lambda x: function(x).pow(3).sum())(x.double())
        for transform in (torch.func.hessian, lambda f: torch.func.jacfwd(torch.func.jacfwd(f))):
            torch.manual_seed(3)
            self.close(transform(lambda x: layer(x).pow(3).sum())(x), expected, torch.float32)

    def test_functionalize(self, layer):
        dtype = layer.weight.dtype
        x = torch.randn(3, 4, 2, 2, dtype=torch.float64).to(dtype)
        function, mean, _ = self.expected(layer, x)
        self.close(torch.func.functionalize(layer)(x), function(x), dtype)
        self.close(layer.running_mean, mean, dtype)
        function, *_ = self.expected(layer, x)
        expected = torch.func.grad(lambda x: function(x).pow(3).sum())(x.double())
        gradient = torch.func.functionalize(grad(lambda x: layer(x).pow(3).sum()))
        self.close(gradient(x), expected, torch.bfloat16 if dtype.itemsize < 4 else torch.float32)
        traced = make_fx(torch.func.functionalize(layer))(x)
        assert not any(str(node.target).startswith("talib_fast.") for node in traced.graph.nodes)

    @pytest.mark.parametrize("members", [None, 3])
    def test_the_operation_with_tangents_of_all_its_operands(self, members):
        args = [inputs((3, 4, 5)) for _ in range(members or 1)]
        names = ("input", "weight", "bias")
        tangents = [tuple(torch.randn_like(its[name]) for name in names) for its in args]
        expected = []
        for its, tangent in zip(args, tangents, strict=True):
            fixed = its["running_mean"], its["running_var"], its["mask"]
            torch_formula = functools.partial(formula, mask=fixed[2], statistics=[t.clone() for t in fixed[:2]])
            primals = tuple(its[name] for name in names)
            expected.append((torch.func.jvp(torch_formula, primals, tangent)[1], *oracle(**its)[1:]))

        def tangent_of(operands, tangent, *fixed):
            return torch.func.jvp(lambda x, weight, bias: stoch_norm(x, *fixed, weight, bias)[0], operands, tangent)[1]

        arguments = [
            (tuple(its[name] for name in names), tangent, its["running_mean"], its["running_var"], its["mask"])
            for its, tangent in zip(args, tangents, strict=True)
        ]
        if members is None:
            ((operands, tangent, *fixed),) = arguments
            got = [(tangent_of(operands, tangent, *fixed), *fixed[:2])]
        else:
            stacked = pytree.tree_map(lambda *tensors: torch.stack(tensors), *arguments)
            got = list(zip(vmap(tangent_of)(*stacked), *stacked[2:4], strict=True))
        torch.testing.assert_close(got, expected)


class TestGraphs:
    """torch.fx and torch.jit."""

    @pytest.mark.parametrize("training", [True, False])
    def test_symbolic_tracing_takes_the_layer_whole(self, training):
        net = small_net(0.5).train(training)
        twin, x = copy.deepcopy(net), torch.randn(4, 3, 8, 8)
        graph = torch.fx.symbolic_trace(net)
        for mode in (training, not training):  # which is not written into the graph
            graph.train(mode), twin.train(mode)
            torch.manual_seed(1)
            expected = twin(x)
            torch.manual_seed(1)
            torch.testing.assert_close(graph(x), expected)
        torch.testing.assert_close(dict(net.state_dict()), dict(twin.state_dict()))

    @pytest.mark.parametrize("track", [True, False])
    def test_a_layer_by_itself_is_traced_in_evaluation(self, track):
        layer, x = StochNorm2d(4, track_running_stats=track), torch.randn(3, 4, 2, 2)
        if track:
            with pytest.raises(RuntimeError, match="can't trace a StochNorm2d alone in training mode"):
                torch.fx.symbolic_trace(layer)
        else:
            torch.testing.assert_close(torch.fx.symbolic_trace(layer)(x), layer(x))
        layer(x)
        torch.testing.assert_close(torch.fx.symbolic_trace(layer.eval())(x), layer(x))

    def test_preparing_for_quantization_keeps_the_layer(self):
        quantize_fx = pytest.importorskip("torch.ao.quantization.quantize_fx")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            mapping = torch.ao.quantization.get_default_qat_qconfig_mapping("x86")
            x = torch.randn(4, 3, 8, 8)
            prepared = quantize_fx.prepare_qat_fx(small_net(0.5).train(), mapping, (x,))
            prepared(x).sum().backward()
        assert sum(type(module) is StochNorm2d for module in prepared.modules()) == 2

    def test_fusion_of_symbolic_graphs_leaves_the_layer_alone(self):
        optimization = pytest.importorskip("torch.fx.experimental.optimization")
        net, x = small_net(0.5).eval(), torch.randn(4, 3, 8, 8)
        net(x)
        torch.testing.assert_close(optimization.fuse(net)(x), net(x))

    def test_feature_extractors(self):
        try:
            torchvision = import_library("torchvision")
            timm = import_library("timm")
        except ImportError:
            pytest.skip("needs torchvision and timm")
        x = torch.randn(2, 3, 32, 32)
        resnet = convert_model(torchvision.models.resnet18(), 0.5).eval()
        extract = importlib.import_module("torchvision.models.feature_extraction").create_feature_extractor
        features = extract(resnet, ["layer1", "layer4.1.bn2", "fc"])(x)
        torch.testing.assert_close(features["fc"], resnet(x))
        first = resnet.layer1(resnet.maxpool(resnet.relu(resnet.bn1(resnet.conv1(x)))))
        torch.testing.assert_close(features["layer1"], first)
        model = convert_model(timm.create_model("resnet10t"), 0.5).eval()
        fx = importlib.import_module("timm.models._features_fx")
        names = {"layer1": "first", "layer4": "last"}
        features = fx.create_feature_extractor(model, names)(x)
        torch.testing.assert_close(features["last"], model.forward_features(x))

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("p", [0.0, 1.0])
    def test_tracing_is_right_and_warns_no_more_than_of_batch_norms(self, p, training, tmp_path):
        nets = small_net().train(training), small_net(p).train(training)
        x, said = torch.randn(4, 3, 8, 8), []
        for net in nets:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                traced = torch.jit.trace(net, x)
                torch.jit.save(traced, tmp_path / "traced.pt")
                loaded = torch.jit.load(tmp_path / "traced.pt")
            said.append([str(warning.message) for warning in caught])
        assert len(said[1]) <= len(said[0])
        net.load_state_dict(loaded.state_dict())
        x = torch.randn(6, 3, 8, 8, requires_grad=True)  # of another size
        results = [(model(x), torch.autograd.grad(model(x).pow(3).sum(), x)) for model in (loaded, net)]
        torch.testing.assert_close(*results)
        torch.testing.assert_close(dict(loaded.state_dict()), dict(net.state_dict()))

    def test_scripting_says_what_to_do_instead_each_time(self):
        net = small_net(0.5).eval()
        for _ in range(2):
            with (
                warnings.catch_warnings(),
                pytest.raises(RuntimeError, match=r"^torch.jit.script can't compile StochNorm2d: .*restore_batch_norm"),
            ):
                warnings.simplefilter("ignore")
                torch.jit.script(net)
        x = torch.randn(2, 3, 8, 8)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scripted = torch.jit.script(restore_batch_norm(copy.deepcopy(net)).eval())
        torch.testing.assert_close(scripted(x), net(x))


class TestRestoreBatchNorm:
    def test_it_is_the_way_back(self):
        net = nn.ModuleDict(
            {
                "a": nn.BatchNorm1d(3, momentum=None),
                "b": nn.BatchNorm2d(3, affine=False).eval(),
                "c": nn.BatchNorm3d(3, track_running_stats=False),
                "d": nn.SyncBatchNorm(3),
            }
        )
        net["shared"] = net["a"]
        net["a"].weight.requires_grad_(False)
        seen = []
        net["a"].register_forward_hook(lambda *_: seen.append(1))
        before = [(id(layer), type(layer), dict(vars(layer))) for layer in net.modules()]
        parameters, state = list(net.parameters()), copy.deepcopy(net.state_dict())
        assert restore_batch_norm(convert_model(net, 0.25)) is net
        assert [(id(layer), type(layer), dict(vars(layer))) for layer in net.modules()] == before
        assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))
        torch.testing.assert_close(dict(net.state_dict()), dict(state))
        net["a"](torch.randn(4, 3))
        assert seen and net["shared"] is net["a"]

    def test_it_evaluates_as_before_and_trains_as_a_batch_norm(self):
        net = small_net(0.5)
        net(torch.randn(4, 3, 8, 8))
        twin, x = copy.deepcopy(net).eval(), torch.randn(4, 3, 8, 8)
        restored = restore_batch_norm(copy.deepcopy(net))
        torch.testing.assert_close(restored.eval()(x), twin(x))
        assert type(restored[1]) is nn.BatchNorm2d and not hasattr(restored[1], "p")
        torch.testing.assert_close(restored.train()(x), convert_model(net, 1.0)(x))

    def test_a_synchronised_layer_becomes_a_synchronised_batch_norm(self):
        layer = restore_batch_norm(SyncStochNorm(3))
        assert type(layer) is nn.SyncBatchNorm and layer.process_group is None
        layer = restore_batch_norm(convert_sync(convert_model(nn.BatchNorm2d(3), 0.5)))
        assert type(layer) is nn.SyncBatchNorm

    def test_what_it_does_not_know_is_left_with_a_warning(self):
        class Louder(StochNorm2d):
            pass

        layer = Louder(3)
        with pytest.warns(UserWarning, match=r"restore_batch_norm leaves .* 1 of .*Louder \(the module itself\)$"):
            restore_batch_norm(layer)
        assert type(layer) is Louder
        with pytest.raises(TypeError, match=r"expected module to be a torch\.nn\.Module, got list"):
            restore_batch_norm([])


def parametrized(layer):
    return parametrize.register_parametrization(layer, "weight", nn.Identity())


def _convert_a_sharded_layer(rank, folder):
    fsdp = importlib.import_module("torch.distributed.fsdp")
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    for layer, kind in ((nn.BatchNorm2d(4), nn.BatchNorm2d), (StochNorm2d(4), StochNorm2d)):
        net = nn.Sequential(layer)
        fsdp.fully_shard(net[0], mesh=mesh)
        fsdp.fully_shard(net, mesh=mesh)
        before = type(net[0])
        convert_model(net, 0.25)
        assert isinstance(net[0], StochNorm2d) and isinstance(net[0], fsdp.FSDPModule) and net[0].p == 0.25
        net(torch.randn(3, 4, 2, 2)).sum().backward()
        assert net[0].weight.grad is not None
        restore_batch_norm(net)
        assert isinstance(net[0], nn.BatchNorm2d) and not isinstance(net[0], StochNorm2d)
        assert type(net[0]) is before or kind is StochNorm2d


class TestLayersThatTorchDerives:
    """Parametrised and sharded layers have classes of their own, which go on being what they were derived from."""

    def test_parametrised_layers(self):
        net = nn.Sequential(parametrized(nn.BatchNorm2d(4)), parametrized(StochNorm2d(4)))
        before, unchanged = type(net[0]), type(net[1])
        convert_model(net, 0.1)
        assert all(isinstance(layer, StochNorm2d) and layer.p == 0.1 for layer in net)
        assert type(net[1]) is unchanged
        net(torch.randn(3, 4, 2, 2)).sum().backward()
        assert net[0].parametrizations.weight.original.grad is not None
        restore_batch_norm(net)
        assert type(net[0]) is before and isinstance(net[1], nn.BatchNorm2d) and not isinstance(net[1], StochNorm2d)
        convert_sync(convert_model(net, 0.1))
        assert all(isinstance(layer, SyncStochNorm) and parametrize.is_parametrized(layer) for layer in net)

    @needs_gloo
    def test_sharded_layers(self, tmp_path):
        spawn_ranks(1, _convert_a_sharded_layer, tmp_path)

    def test_a_class_of_somebody_s_is_left_with_a_warning(self):
        class Louder(StochNorm2d):
            pass

        net = nn.Sequential(parametrized(Louder(4)), Louder(4), StochNorm2d(4))
        with pytest.warns(UserWarning, match=r"1 of .*ParametrizedLouder, 1 of .*Louder \(0, 1\)$"):
            convert_model(net, 0.1)
        assert [layer.p for layer in net] == [0.5, 0.5, 0.1]

    def test_warnings_name_three_layers(self):
        class BatchNormAct2d(nn.BatchNorm2d):
            pass

        net = nn.Sequential(*[BatchNormAct2d(4) for _ in range(40)])
        with pytest.warns(
            UserWarning, match=r"leaves unknown batch norms as they are: 40 of .*BatchNormAct2d \(0, 1, 2, ...\)$"
        ):
            convert_model(net, 0.1)


class TestUpstreamFaults:
    def test_fault_convert_model_handed_p_to_track_running_stats(self):
        layer = convert_model(nn.BatchNorm2d(4), 0.25)
        assert layer.p == 0.25 and layer.track_running_stats is True

    def test_fault_convert_model_raised_at_p_0(self):
        layer = convert_model(nn.BatchNorm2d(4), 0)
        x = torch.randn(3, 4, 2, 2)
        torch.testing.assert_close(layer(x), F.batch_norm(x, torch.zeros(4), torch.ones(4)))

    def test_fault_running_branch_differentiated_with_the_updated_statistics(self):
        args = inputs((4, 3, 5))
        args["mask"] = torch.zeros(3, dtype=torch.bool)
        x = args["input"].requires_grad_()
        scale = (args["weight"] / (args["running_var"] + 1e-5).sqrt()).clone()
        output, _ = stoch_norm(**args)
        output.sum().backward()
        torch.testing.assert_close(x.grad, scale.view(3, 1).expand(4, 3, 5))

    def test_fault_masks_came_from_numpy_on_a_hard_coded_gpu(self, device):
        layer = StochNorm2d(32).to(device)
        x = torch.randn(4, 32, 2, 2, device=device)
        outputs = []
        for _ in range(2):
            layer.reset_running_stats()
            torch.manual_seed(5)
            outputs.append(layer(x))
        assert torch.equal(*outputs)

    @pytest.mark.parametrize("momentum", [0.1, None])
    def test_fault_every_layer_waited_for_the_host(self, momentum):
        layer = StochNorm2d(8, momentum=momentum)
        with FakeTensorMode(allow_non_fake_inputs=True):  # in which no value can be asked for
            x = torch.randn(4, 8, 2, 2, requires_grad=True)
            layer(x).sum().backward()
            assert x.grad.shape == x.shape
            with pytest.raises(DataDependentOutputException):
                x.sum().item()

    @pytest.mark.parametrize("reentrant", [True, False])
    @pytest.mark.parametrize("momentum", [0.1, None])
    def test_fault_activation_checkpointing_was_not_reproduced(self, reentrant, momentum):
        plain = small_net(0.5)
        for layer in plain.modules():
            if isinstance(layer, StochNorm2d):
                layer.momentum = momentum
        kept = copy.deepcopy(plain)
        for step in range(3):
            x = torch.randn(8, 3, 8, 8, requires_grad=True)
            torch.manual_seed(step)
            plain(x).square().sum().backward()
            expected, x.grad = x.grad, None
            torch.manual_seed(step)
            hidden = checkpoint(kept[:6], x, use_reentrant=reentrant)
            kept[6:](hidden).square().sum().backward()
            torch.testing.assert_close(x.grad, expected)
        for a, b in zip(plain.parameters(), kept.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)
        torch.testing.assert_close(dict(plain.state_dict()), dict(kept.state_dict()))

    @pytest.mark.parametrize(("p", "channels", "passes"), [(0.5, 32, 2), (0.0, 4, 2), (1.0, 4, 2), (0.5, 2, 16)])
    def test_activation_checkpointing_of_a_layer_called_again(self, p, channels, passes, device):
        net = nn.Sequential(nn.Linear(6, channels), StochNorm1d(channels, p=p), nn.Linear(channels, 6)).to(device)
        twin = copy.deepcopy(net)
        views = torch.randn(passes, 16, 6, device=device)
        torch.manual_seed(1)
        sum(net(view).square().sum() for view in views).backward()
        torch.manual_seed(1)
        sum(checkpoint(twin, view, use_reentrant=False).square().sum() for view in views).backward()
        for a, b in zip(net.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)
        torch.testing.assert_close(dict(net.state_dict()), dict(twin.state_dict()))

    @pytest.mark.parametrize(("passes", "preserve_rng_state"), [(17, True), (1, False)])
    def test_checkpointing_that_cannot_be_repeated_is_no_silent_error(self, passes, preserve_rng_state, device):
        layer = StochNorm1d(4).to(device)
        x = torch.randn(passes, 8, 4, device=device, requires_grad=True)
        options = {"use_reentrant": False, "preserve_rng_state": preserve_rng_state}
        loss = sum(checkpoint(layer, view, **options).square().sum() for view in x)
        if device.type == "cpu":
            with pytest.raises(RuntimeError, match="repeats none of its last"):
                loss.backward()
        else:
            loss.backward()
            assert x.grad[0].isnan().any()

    def test_only_passes_that_may_be_repeated_are_remembered(self):
        layer, x = StochNorm1d(4), torch.randn(8, 4, requires_grad=True)
        layer(x).sum().backward()
        assert not is_recorded(layer.running_mean)
        for reentrant in (True, False):
            layer = StochNorm1d(4)
            for _ in range(20):
                checkpoint(layer, x, use_reentrant=reentrant).sum().backward()
            assert len(draw._history[draw._memory(layer.running_mean)][1]) == 16

    @pytest.mark.parametrize("first", [torch.float64, torch.bfloat16])
    def test_checkpointing_after_the_layer_took_another_dtype(self, first):
        layer = StochNorm1d(4).to(first)
        with torch.no_grad():
            layer(torch.randn(8, 4, dtype=first))
        layer.float()
        checkpoint(layer, torch.randn(8, 4, requires_grad=True), use_reentrant=False).sum().backward()
        assert layer.weight.grad.isfinite().all()

    @pytest.mark.parametrize("momentum", [0.1, None])
    def test_half_precision_statistics_of_large_values_do_not_overflow_on_the_way(self, momentum):
        layer, expected = StochNorm2d(4, momentum=momentum).half(), nn.BatchNorm2d(4, momentum=momentum)
        for scale in (1, 1, 1, 400):  # a variance that float16 can't hold, and averages that it can
            x = scale * torch.randn(4, 4, 8, 8)
            layer(x.half()), expected(x)
        torch.testing.assert_close(layer.running_var.float(), expected.running_var, rtol=5e-3, atol=0)

    def test_statistics_that_are_not_tracked_any_more_are_used_and_stay(self):
        layer = StochNorm1d(4, p=0.0)
        layer.track_running_stats = False
        before = copy.deepcopy(layer.state_dict())
        x = torch.randn(8, 4)
        torch.testing.assert_close(layer(x), x / (1 + layer.eps) ** 0.5)
        torch.testing.assert_close(layer.state_dict(), before)

    def test_fault_5d_input_raised(self):
        assert StochNorm3d(3)(torch.randn(2, 3, 2, 2, 2)).shape == (2, 3, 2, 2, 2)

    def test_fault_momentum_none_raised(self):
        ours, theirs = StochNorm1d(4, momentum=None), nn.BatchNorm1d(4, momentum=None)
        for _ in range(3):
            x = torch.randn(6, 4)
            ours(x), theirs(x)
            torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()))

    def test_averages_need_a_counter_and_without_one_stay_as_batch_norm_s(self):
        for momentum in (0.1, None):
            ours, theirs = (cls(4, momentum=momentum) for cls in (StochNorm1d, nn.BatchNorm1d))
            for layer in (ours, theirs):
                layer.num_batches_tracked = None
                layer(torch.arange(24.0).view(6, 4))
            torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()))

    def test_fault_track_running_stats_false_raised(self):
        ours, theirs = (cls(4, track_running_stats=False) for cls in (StochNorm2d, nn.BatchNorm2d))
        for training in (True, False):
            x = torch.randn(3, 4, 2, 2)
            torch.testing.assert_close(ours.train(training)(x), theirs.train(training)(x))
        assert ours.running_mean is None and not dict(ours.named_buffers())

    def test_fault_a_batch_norm_checkpoint_failed_strict_loading(self):
        trained = nn.BatchNorm2d(4)
        trained(torch.randn(3, 4, 2, 2))
        layer = StochNorm2d(4)
        layer.load_state_dict(trained.state_dict(), strict=True)
        torch.testing.assert_close(dict(layer.state_dict()), dict(trained.state_dict()))

    def test_fault_checkpoints_were_not_interchangeable_an_upstream_one_loads(self):
        names = ("weight", "bias", "running_mean", "running_var")
        checkpoint = {f"0.{name}": torch.full((4,), float(j + 1)) for j, name in enumerate(names)}
        net = nn.Sequential(StochNorm2d(4))
        net.load_state_dict(checkpoint, strict=True)
        assert net[0].running_var[0] == 4 and net[0].num_batches_tracked == 0

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_fault_half_precision_input_came_back_float32(self, dtype):
        for layer in (StochNorm2d(4), StochNorm2d(4).to(dtype)):
            for training in (True, False):
                assert layer.train(training)(torch.randn(3, 4, 2, 2, dtype=dtype)).dtype == dtype

    def test_fault_0_times_inf_was_nan_through_the_blend(self):
        layer = StochNorm1d(2, p=1)
        layer.running_var.fill_(torch.inf)
        assert layer(torch.randn(8, 2)).isfinite().all()

    @pytest.mark.parametrize(
        ("layer", "shape", "message"),
        [
            (StochNorm2d(4), (1, 4, 1, 1), "more than 1 value per channel"),
            (StochNorm2d(4, track_running_stats=False), (1, 4, 1, 1), "more than 1 value per channel"),
            (StochNorm1d(4), (3, 4, 2, 2), "expected 2D or 3D input .got 4D"),
            (StochNorm2d(4), (3, 4, 2), "expected 4D input .got 3D"),
            (StochNorm3d(4), (3, 4, 2, 2), "expected 5D input .got 4D"),
            (SyncStochNorm(4), (4,), "expected at least 2D input .got 1D"),
            (StochNorm2d(4), (3, 5, 2, 2), r"expected 4 channels at dimension 1, got input of shape \[3, 5"),
        ],
    )
    def test_fault_wrong_shapes_were_not_value_errors(self, layer, shape, message):
        with pytest.raises(ValueError, match=message):
            layer(torch.zeros(shape))

    def test_wrong_types_are_type_errors(self):
        with pytest.raises(TypeError, match=r"floating-point tensor, got torch\.int64"):
            StochNorm2d(4)(torch.zeros(2, 4, 1, 1, dtype=torch.long))
        with pytest.raises(TypeError, match="floating-point tensor, got list"):
            StochNorm2d(4)([1.0])

    def test_fault_convert_model_lost_training_requires_grad_and_hooks(self):
        norm = nn.BatchNorm2d(4).eval()
        norm.weight.requires_grad_(False)
        seen = []
        norm.register_forward_hook(lambda *_: seen.append(1))
        layer = convert_model(nn.Sequential(norm), 0.5)[0]
        layer(torch.randn(2, 4, 2, 2))
        assert not layer.training and not layer.weight.requires_grad and layer.bias.requires_grad and seen

    def test_fault_convert_model_lost_sharing(self):
        norm, tied = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        tied.weight = norm.weight
        net = convert_model(nn.ModuleDict({"a": norm, "b": nn.Sequential(norm), "c": tied}), 0.5)
        assert net["a"] is net["b"][0] and net["c"].weight is net["a"].weight

    def test_fault_convert_model_stripped_subclasses(self):
        class BatchNormAct2d(nn.BatchNorm2d):
            def forward(self, x):
                return super().forward(x).relu()

        net = nn.Sequential(BatchNormAct2d(4), nn.BatchNorm2d(4))
        with pytest.warns(UserWarning, match=r"leaves unknown batch norms as they are: 1 of .*BatchNormAct2d \(0\)$"):
            convert_model(net, 0.5)
        assert type(net[0]) is BatchNormAct2d and type(net[1]) is StochNorm2d

    def test_fault_convert_model_skipped_sync_batch_norm(self):
        layer = convert_model(nn.SyncBatchNorm(4), 0.25)
        assert type(layer) is SyncStochNorm and layer.p == 0.25 and layer.process_group is None
        assert layer(torch.randn(3, 4, 2, 2)).shape == (3, 4, 2, 2)


def _train_a_rank(rank, folder, shares, track, momentum):
    torch.manual_seed(rank)
    layer = SyncStochNorm(6, momentum=momentum, track_running_stats=track).double()
    outputs, grads, states = [], [], []
    layer.register_forward_pre_hook(lambda *_: states.append(torch.get_rng_state()))
    for x, target in torch.load(f"{folder}/data.pt"):
        mine = x.split(shares)[rank].clone().requires_grad_()

        def step(x, target=target):
            return (layer(x) * target.split(shares)[rank]).pow(2).sum()

        if outputs:
            loss = checkpoint(step, mine, use_reentrant=False)
        else:
            with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):  # its draw is remembered, too
                loss = step(mine)
        loss.backward()
        outputs.append(loss.detach()), grads.append(mine.grad)
    torch.distributed.all_reduce(layer.weight.grad)
    torch.save((outputs, grads, layer.weight.grad, dict(layer.state_dict()), states), f"{folder}/{rank}.pt")


@needs_gloo
@pytest.mark.parametrize(
    ("shares", "track", "momentum"),
    [([5, 3], True, 0.1), ([8, 0], True, 0.1), ([4, 4], True, None), ([5, 3], False, 0.1), ([0, 0], True, None)],
)
def test_ranks_equal_one_process_on_the_joined_batch(shares, track, momentum, tmp_path):
    shape = (sum(shares), 6, 3)
    data = [(torch.randn(shape, dtype=torch.float64) + 2, torch.randn(shape, dtype=torch.float64)) for _ in range(2)]
    torch.save(data, tmp_path / "data.pt")
    spawn_ranks(len(shares), _train_a_rank, tmp_path, shares, track, momentum)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(len(shares))]
    alone = StochNorm1d(6, momentum=momentum, track_running_stats=track).double()
    states = iter(ranks[0][4])
    alone.register_forward_pre_hook(lambda *_: torch.set_rng_state(next(states)))
    for step, (x, target) in enumerate(data):
        x.requires_grad_()
        loss = (alone(x) * target).pow(2).sum()
        loss.backward()
        torch.testing.assert_close(sum(rank[0][step] for rank in ranks), loss.detach())
        torch.testing.assert_close(torch.cat([rank[1][step] for rank in ranks]), x.grad)
    for rank in ranks:
        torch.testing.assert_close(rank[2], alone.weight.grad)
        torch.testing.assert_close(rank[3], dict(alone.state_dict()))


def _normalize_one_value(rank, folder):
    layer = SyncStochNorm(2, p=1.0)
    output = layer(torch.full((1 - rank, 2), 3.0))
    torch.save((output, dict(layer.state_dict())), f"{folder}/{rank}.pt")


@needs_gloo
def test_a_joined_batch_of_one_value_has_no_variance(tmp_path):
    spawn_ranks(2, _normalize_one_value, tmp_path)
    (output, state), (nothing, its_state) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    torch.testing.assert_close(state, its_state)
    assert output.tolist() == [[0.0, 0.0]] and nothing.shape == (0, 2)
    torch.testing.assert_close(state["running_mean"], torch.full((2,), 0.3))
    torch.testing.assert_close(state["running_var"], torch.full((2,), 0.9))
    assert state["num_batches_tracked"] == 1
