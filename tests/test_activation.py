"""stoch_norm with the activation and the residual that it takes along, against their composition."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from test_stoch_norm import MANY_ITEMS, OP, assert_near, inputs, layout, oracle
from torch import nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.func import functionalize, vmap

from talib_fast.ops import stoch_norm
from talib_fast.ops.activation import NAMES, Activation, pack_signs, unpack_signs

SLOPE = 0.2
ACTIVATIONS = {
    "none": lambda z: z,
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": lambda z: F.leaky_relu(z, SLOPE),
    "silu": F.silu,
    "hardswish": F.hardswish,
    "gelu": F.gelu,
}
WITH_RESIDUAL = ("none", "relu", "relu6", "leaky_relu")
WAYS = [*((name, False) for name in ACTIVATIONS if name != "none"), *((name, True) for name in WITH_RESIDUAL)]
ways = pytest.mark.parametrize(("activation", "adds"), WAYS, ids=[f"{n}+residual" if a else n for n, a in WAYS])


def operands(shape, adds, dtype=torch.float64, device="cpu", name="contiguous"):
    args = inputs(shape, dtype, device)
    args["input"] = layout(args["input"], name)
    residual = layout(torch.randn(shape, dtype=torch.float64).to(device, dtype), name) if adds else None
    return args, residual


def composition(args, activation, residual):
    """In float64, with gradients; the output and the moved running statistics."""
    z, mean, var = oracle(**args)
    return ACTIVATIONS[activation](z if residual is None else z + residual.double()), mean, var


def fused(args, activation, residual):
    return stoch_norm(**args, activation=activation, negative_slope=SLOPE, residual=residual)[0]


def leaves_of(args, residual):
    leaves = [args["input"], args["weight"], args["bias"], *([] if residual is None else [residual])]
    return [leaf.requires_grad_() for leaf in leaves]


def compare_with_composition(shape, dtype, name, activation, adds, device):
    """Output, moved statistics and gradients."""
    torch.set_num_threads(2)
    args, residual = operands(shape, adds, dtype, device, name)
    args["mask"] = torch.rand(shape[1], device=device) < 0.5
    exact = {key: value.double() if value.is_floating_point() else value for key, value in args.items()}
    exact_residual = None if residual is None else residual.double()
    exact_leaves, leaves = leaves_of(exact, exact_residual), leaves_of(args, residual)
    expected, *moved = composition(exact, activation, exact_residual)
    output = fused(args, activation, residual)
    tolerance = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 4e-6, torch.float64: 1e-10}[dtype]
    assert_near(output, expected, tolerance)
    for got, value in zip((args["running_mean"], args["running_var"]), moved, strict=True):
        assert_near(got, value, tolerance)
    # gradients where no kink is near, whose side rounding decides
    z = oracle(**exact)[0] + (0 if exact_residual is None else exact_residual)
    kinks = [0, 6] if activation == "relu6" else [-3, 3] if activation == "hardswish" else [0]
    smooth = torch.stack([(z - kink).abs() > 1e-4 for kink in kinks]).all(0)
    grad = layout((torch.randn(shape, dtype=torch.float64).to(device) * smooth).to(dtype), name)
    got = torch.autograd.grad(output, leaves, grad)
    for gradient, value in zip(got, torch.autograd.grad(expected, exact_leaves, grad.double()), strict=True):
        assert gradient.dtype == dtype
        assert_near(gradient, value, 3 * tolerance)
    if name != "strided":
        assert all(tensor.stride() == args["input"].stride() for tensor in (output, got[0], *got[3:]))


@pytest.mark.parametrize("name", NAMES)
def test_derivatives_are_those_of_pytorch(name):
    z = torch.cat([torch.linspace(-7.9, 7.9, 101, dtype=torch.float64), torch.tensor([0.0, 6.0])]).requires_grad_()
    grad = torch.randn_like(z)
    (expected,) = torch.autograd.grad(ACTIVATIONS[name](z), z, grad)
    torch.testing.assert_close(Activation(name, SLOPE).backward(grad, z), expected)


class TestOperation:
    @ways
    @pytest.mark.parametrize("name", ["contiguous", "channels_last", "strided"])
    def test_matches_the_composition(self, activation, adds, name, device):
        args, residual = operands((3, 5, 4, 3), adds, device=device, name=name)
        leaves = leaves_of(args, residual)
        before = args["running_mean"].clone(), args["running_var"].clone()
        expected, *moved = composition(args, activation, residual)
        output = fused(args, activation, residual)
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close([args["running_mean"], args["running_var"]], moved)
        assert not torch.equal(before[0], args["running_mean"])
        grad = torch.randn_like(output)
        got = torch.autograd.grad(output, leaves, grad)
        torch.testing.assert_close(got, torch.autograd.grad(expected, leaves, grad))

    @ways
    def test_gradcheck_and_gradgradcheck(self, activation, adds, device):
        args, residual = operands((3, 4, 3), adds, device=device)
        leaves = leaves_of(args, residual)

        def normalize(input, weight, bias, *residual):
            running = {name: args[name].clone() for name in ("running_mean", "running_var")}
            fresh = {**args, **running, "input": input, "weight": weight, "bias": bias}
            return fused(fresh, activation, residual[0] if residual else None)

        assert gradcheck(normalize, leaves)
        assert gradgradcheck(normalize, leaves)

    @pytest.mark.parametrize("wanted", list(itertools.product([True, False], repeat=3)), ids=str)
    def test_only_the_gradients_that_are_asked_for(self, wanted, device):
        args, residual = operands((4, 5, 3), True, device=device)
        leaves = [args["input"], args["weight"], residual]
        for leaf, wants in zip(leaves, wanted, strict=True):
            leaf.requires_grad_(wants)
        asked = [leaf for leaf, wants in zip(leaves, wanted, strict=True) if wants]
        expected = composition(args, "relu", residual)[0].sum()
        output = fused(args, "relu", residual)
        assert output.requires_grad == any(wanted)
        if asked:
            expected = torch.autograd.grad(expected, asked)
            torch.testing.assert_close(torch.autograd.grad(output.sum(), asked), expected)

    def test_without_weight_and_bias(self, device):
        for activation, adds in WAYS:
            args, residual = operands((4, 5, 3), adds, device=device)
            args["weight"] = args["bias"] = None
            args["input"].requires_grad_()
            expected = composition(args, activation, residual)[0]
            output = fused(args, activation, residual)
            torch.testing.assert_close(output, expected)
            (got,), (grad,) = (torch.autograd.grad(y.square().sum(), args["input"]) for y in (output, expected))
            torch.testing.assert_close(got, grad)

    @pytest.mark.parametrize("name", ["contiguous", "channels_last", "strided"])
    @pytest.mark.parametrize("way", [("silu", False), ("relu", True)], ids=str)
    def test_opcheck(self, name, way, device):
        activation, adds = way
        args, residual = operands((3, 4, 5, 2), adds, torch.bfloat16, device, name)
        code = NAMES.index(activation)
        x, weight, bias, mask = (args[key] for key in ("input", "weight", "bias", "mask"))
        running = args["running_mean"], args["running_var"]
        forward = (x, weight, bias, *running, mask, 0.1, 1e-5, 1.0, None, residual, code)
        torch.library.opcheck(OP.stoch_norm_forward.default, forward)
        _, statistics, signs = OP.stoch_norm_forward(*forward)
        functional = (x, weight, bias, torch.stack(running), mask, 1e-5, 1.0, residual, code)
        torch.library.opcheck(OP.stoch_norm_functional.default, functional)
        backward = (torch.randn_like(x), x, statistics, weight, mask, 1.0, bias, signs if adds else None, code)
        torch.library.opcheck(OP.stoch_norm_backward.default, backward)

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (dict(activation="tanh"), ValueError, "expected activation to be one of none, relu, .*got 'tanh'"),
            (dict(activation=None), TypeError, "expected activation to be a string, got NoneType"),
            (dict(activation=nn.ReLU()), TypeError, "expected activation to be a string, got ReLU"),
            (dict(negative_slope="0.1"), TypeError, "expected negative_slope to be a number, got '0.1'"),
            (dict(negative_slope=float("nan")), ValueError, "expected negative_slope to be finite, got nan"),
            (dict(residual=torch.zeros(4, 5)), ValueError, r"residual of the input's shape \[4, 5, 3\], got \[4, 5\]"),
            (
                dict(residual=torch.zeros(4, 5, 3).half()),
                TypeError,
                "the input's dtype torch.float32, got torch.float16",
            ),
            (dict(residual=torch.zeros(4, 5, 3, device="meta")), ValueError, "on the input's device cpu, got meta"),
            (dict(residual=torch.zeros(4, 5, 3).to_sparse()), TypeError, "expected residual to be a dense tensor"),
            (dict(residual=1.0), TypeError, "expected residual to be a tensor, got float"),
            (dict(activation="silu", residual=torch.zeros(4, 5, 3)), ValueError, "expected no residual with silu"),
        ],
    )
    def test_what_it_does_not_take(self, change, error, message):
        args = inputs((4, 5, 3), torch.float32)
        before = args["running_mean"].clone()
        with pytest.raises(error, match=message):
            stoch_norm(**args, **change)
        assert torch.equal(args["running_mean"], before)

    @ways
    def test_forward_mode_and_functionalize(self, activation, adds, device):
        args, residual = operands((3, 4, 3), adds, device=device)
        tangents = [torch.randn_like(args["input"])] * (1 + adds)

        def normalize(input, *residual):
            running = {name: args[name].clone() for name in ("running_mean", "running_var")}
            return fused({**args, **running, "input": input}, activation, residual[0] if residual else None)

        def composed(input, *residual):
            return composition({**args, "input": input}, activation, residual[0] if residual else None)[0]

        primals = [args["input"], *([residual] if adds else [])]
        _, expected = torch.autograd.functional.jvp(composed, tuple(primals), tuple(tangents))
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(*pair) for pair in zip(primals, tangents, strict=True)]
            torch.testing.assert_close(forward_ad.unpack_dual(normalize(*duals)).tangent, expected)
        torch.testing.assert_close(functionalize(normalize)(*primals), composed(*primals))

    @pytest.mark.parametrize("name", ["contiguous", "channels_last"])
    def test_vmap_and_grad(self, name, device):
        members = [operands((3, 4, 5, 2), True, device=device, name=name) for _ in range(3)]

        def loss(input, residual, mean, var, activation):
            args = {**members[0][0], "input": input, "running_mean": mean, "running_var": var}
            return fused(args, activation, residual if activation in WITH_RESIDUAL else None).square().sum()

        stacked = [torch.stack([args[key] for args, _ in members]) for key in ("input", "running_mean", "running_var")]
        residuals = torch.stack([residual for _, residual in members])
        for activation in ("relu", "gelu"):
            per_member = torch.func.grad(lambda *a, activation=activation: loss(*a, activation))
            running = stacked[1].clone(), stacked[2].clone()
            got = vmap(per_member)(stacked[0], residuals, *running)
            for j, (args, residual) in enumerate(members):
                shared = {**members[0][0], **{key: args[key] for key in ("running_mean", "running_var")}}
                leaf = args["input"].clone().requires_grad_()
                added = residual if activation in WITH_RESIDUAL else None
                expected, mean, _ = composition({**shared, "input": leaf}, activation, added)
                (gradient,) = torch.autograd.grad(expected.square().sum(), leaf)
                torch.testing.assert_close(got[j], gradient)
                torch.testing.assert_close(running[0][j], mean)


class TestKernels:
    @ways
    @pytest.mark.parametrize("name", ["contiguous", "channels_last", "strided"])
    @pytest.mark.parametrize(
        ("shape", "dtype"),
        [
            ((7, 5), torch.float32),
            ((3, 24, 7), torch.bfloat16),
            ((5, 40, 5, 5), torch.float32),
            ((2, 3, 24, 31), torch.float16),
            ((4, 64, 8, 8), torch.bfloat16),
            ((2, 32, 12, 12), torch.float64),
            ((3, 8, 16, 32), torch.float32),
        ],
        ids=str,
    )
    def test_every_shape_and_dtype(self, shape, dtype, name, activation, adds, device):
        compare_with_composition(shape, dtype, name, activation, adds, device)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("name", MANY_ITEMS)
    def test_more_items_than_blocks(self, name, dtype, device):
        compare_with_composition(MANY_ITEMS[name], dtype, name, "relu", True, device)

    @pytest.mark.parametrize("adds", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("name", ["contiguous", "channels_last"])
    @pytest.mark.parametrize("shape", [(3, 40, 5, 5), (4, 64, 8, 8), (2, 3, 24, 32), (70, 5)], ids=str)
    def test_the_gradient_passes_exactly_where_the_output_is_positive(self, shape, name, dtype, adds, device):
        torch.set_num_threads(2)
        args, residual = operands(shape, adds, dtype, device)
        args["input"] = layout(torch.randint(5, shape, device=device).to(dtype) * 0.7, name)
        fresh = {key: value.clone(memory_format=torch.preserve_format) for key, value in args.items()}
        z = stoch_norm(**{**fresh, "bias": None})[0]
        args["bias"] = -z.movedim(1, 0).flatten(1)[:, 0].contiguous()  # a fifth of the values come within rounding of 0
        if adds:
            residual = layout(args["input"] - args["input"], name)
        leaves = [args["bias"].requires_grad_(), *([residual.requires_grad_()] if adds else [])]
        output = fused(args, "relu", residual)
        passed, *rest = torch.autograd.grad(output, leaves, torch.ones_like(output))
        assert torch.equal(passed, (output > 0).to(dtype).sum([0, *range(2, len(shape))]))
        assert all(torch.equal(grad, (output > 0).to(dtype)) for grad in rest)
        assert (z + args["bias"].view(-1, *[1] * (len(shape) - 2))).abs().lt(1e-5).float().mean() > 0.1

    @pytest.mark.parametrize("name", ["contiguous", "channels_last"])
    @pytest.mark.parametrize("shape", [(2, 5, 7), (6, 40, 5, 5), (4, 64, 8, 8), (3, 48), (2, 3, 24, 31)], ids=str)
    @pytest.mark.parametrize("activation", ["relu", "relu6", "leaky_relu"])
    def test_signs_are_bits_in_the_order_of_memory(self, activation, shape, name, device):
        args, residual = operands(shape, True, device=device, name=name)
        code = NAMES.index(activation)
        forward = [args[key] for key in ("input", "weight", "bias", "running_mean", "running_var", "mask")]
        z = oracle(**args)[0] + residual
        output, _, signs = OP.stoch_norm_forward(*forward, 0.1, 1e-5, residual=residual, activation=code)
        passes = (z > 0) & (z < 6) if activation == "relu6" else z > 0
        order = sorted(range(z.dim()), key=output.stride, reverse=True)
        row = passes.permute(order).flatten().tolist()
        words = [sum(bit << i for i, bit in enumerate(row[j : j + 32])) for j in range(0, len(row), 32)]
        assert [word % 2**32 for word in signs.tolist()] == words
        assert torch.equal(unpack_signs(signs, output), passes) and torch.equal(
            pack_signs(torch.empty_like(output, dtype=torch.bool).copy_(passes)), signs
        )

    @pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name not in WITH_RESIDUAL])
    @pytest.mark.parametrize("name", ["contiguous", "channels_last"])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
    def test_far_from_0_smooth_ones_are_0_or_a_straight_line(self, dtype, name, activation, device):
        sizes = torch.tensor([3.5, 20.0, 90.0, 600.0, 3e4], dtype=torch.float64)
        values = torch.cat([-sizes, sizes]).view(5, 2).expand(4, 24, 5, 2)
        x = layout(values.to(device, dtype), name).requires_grad_()
        zero, one = torch.zeros(24, device=device), torch.ones(24, device=device)
        mask = torch.zeros(24, dtype=torch.bool, device=device)
        output, _ = stoch_norm(x, zero.clone(), one.clone(), mask, one, zero, eps=0.0, activation=activation)
        (grad,) = torch.autograd.grad(output, x, torch.ones_like(output))
        exact = x.detach().double().requires_grad_()
        expected = ACTIVATIONS[activation](exact)
        (exact_grad,) = torch.autograd.grad(expected, exact, torch.ones_like(expected))
        tolerance = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-6, torch.float64: 1e-12}[dtype]
        torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(grad.double(), exact_grad, rtol=tolerance, atol=tolerance)
        flat = x < (-3 if activation == "hardswish" else -1000)
        assert flat.any() and not output[flat].any() and not grad[flat].any()

    @pytest.mark.parametrize("shape", [(6, 4), (3, 4, 7), (2, 4, 24, 30), (4, 64, 4, 4)], ids=str)
    def test_infinite_values(self, shape, device):
        args, residual = operands(shape, True, torch.float32, device)
        args["mask"] = torch.zeros(shape[1], dtype=torch.bool, device=device)
        args["weight"] = args["weight"].abs() + 0.1
        args["input"].view(shape[0], shape[1], -1)[0, 1, 0] = -torch.inf
        args["input"].requires_grad_()
        for activation, added in itertools.product(("relu", "relu6"), (None, residual)):
            output = fused(args, activation, added)
            assert output.isfinite().all() and output.view(shape[0], shape[1], -1)[0, 1, 0] == 0
            args["running_mean"].zero_(), args["running_var"].fill_(1.0)
            (grad,) = torch.autograd.grad(output.sum(), args["input"])
            assert grad.isfinite().all()

    @ways
    def test_equal_input_gives_equal_bits(self, activation, adds, device):
        results = []
        for _ in range(2):
            torch.manual_seed(1)
            args, residual = operands((9, 40, 7, 9), adds, torch.float32, device)
            leaves = leaves_of(args, residual)
            output = fused(args, activation, residual)
            results.append((output, *torch.autograd.grad(output.square().sum(), leaves)))
        assert all(torch.equal(*pair) for pair in zip(*results, strict=True))

    @pytest.mark.parametrize("shape", [(8, 16, 4, 4), (5, 24, 9, 9)], ids=str)
    @pytest.mark.parametrize("name", ["contiguous", "channels_last"])
    def test_relu_and_residual_are_bit_equal_to_the_operators_they_stand_for(self, shape, name, device):
        args, residual = operands(shape, True, torch.float32, device, name)
        plain = {key: value.clone(memory_format=torch.preserve_format) for key, value in args.items()}
        for added in (None, residual):
            z = stoch_norm(**plain)[0]
            assert torch.equal(fused(args, "relu", added), F.relu(z if added is None else z + added))
            assert torch.equal(args["running_var"], plain["running_var"])

    def test_a_residual_of_another_layout(self, device):
        args, residual = operands((3, 24, 5, 4), True, device=device)
        for other in (
            layout(residual, "channels_last"),
            layout(residual, "strided"),
            residual[:1].expand(3, -1, -1, -1),
        ):
            leaf = other.detach().requires_grad_()
            expected = composition(args, "relu", leaf)[0]
            fresh = {key: value.clone() for key, value in args.items()}
            output = fused(fresh, "relu", leaf)
            torch.testing.assert_close(output, expected)
            got, grad = (torch.autograd.grad(y.square().sum(), leaf) for y in (output, expected))
            torch.testing.assert_close(got, grad)

    def test_empty_input(self, device):
        for activation, adds in WAYS:
            args, residual = operands((2, 5, 3), adds, device=device)
            args["input"] = args["input"][:0]
            residual = None if residual is None else residual[:0]
            leaves = leaves_of(args, residual)
            output = fused(args, activation, residual)
            gradients = torch.autograd.grad(output.sum(), leaves)
            assert output.shape == (0, 5, 3) and not any(gradient.any() for gradient in gradients)

    def test_a_wrong_operand_never_reaches_a_kernel(self, device):
        args, residual = operands((4, 6, 5), True, torch.float32, device)
        forward = [args[key] for key in ("input", "weight", "bias", "running_mean", "running_var", "mask")]
        with pytest.raises(RuntimeError):
            OP.stoch_norm_forward(*forward, 0.1, 1e-5, residual=residual[..., :2], activation=1)
        _, statistics, signs = OP.stoch_norm_forward(*forward, 0.1, 1e-5, residual=residual, activation=1)
        backward = [residual, args["input"], statistics, args["weight"], args["mask"], 1.0, args["bias"]]
        with pytest.raises(RuntimeError):
            OP.stoch_norm_backward(*backward, signs[:1], 1)


@ways
def test_nothing_of_the_input_s_size_is_kept_but_the_input(activation, adds):
    args, residual = operands((4, 8, 16, 16), adds, torch.float32)
    leaves_of(args, residual)
    kept = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        fused(args, activation, residual)
    others = [tensor for tensor in kept if tensor.data_ptr() != args["input"].data_ptr()]
    assert len(others) < len(kept)
    bits = args["input"].numel() // 8 if adds and activation != "none" else 0
    assert sum(tensor.nbytes for tensor in others) <= bits + 6 * 8 * 4


@ways
def test_the_output_may_be_changed_in_place(activation, adds):
    args, residual = operands((4, 5, 3), adds)
    leaves = leaves_of(args, residual)
    expected = torch.autograd.grad(composition(args, activation, residual)[0].sum(), leaves)
    output = fused(args, activation, residual)
    torch.testing.assert_close(torch.autograd.grad(output.mul_(3).sum(), leaves), tuple(3 * grad for grad in expected))


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("name", ["channels_last", "strided"])
def test_hooks_that_change_the_layout_of_what_is_saved(name, adds):
    args, residual = operands((3, 24, 5, 4), adds, name=name)
    leaves = leaves_of(args, residual)
    expected = torch.autograd.grad(composition(args, "relu", residual)[0].sum(), leaves)
    with save_on_cpu():  # whose copies are contiguous
        output = fused(args, "relu", residual)
    torch.testing.assert_close(torch.autograd.grad(output.sum(), leaves), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_gradient_that_overflowed_stays_where_the_activation_is_flat(dtype):
    args, residual = operands((4, 5, 3), True, dtype)
    for activation, added in itertools.product(("relu", "relu6", "hardswish"), (None, residual)):
        if activation == "hardswish" and added is not None:
            continue
        args["mask"] = torch.zeros(5, dtype=torch.bool)
        leaf = args["input"].clone().requires_grad_()
        fresh = {**{key: value.clone() for key, value in args.items()}, "input": leaf}
        z = (oracle(**args)[0] + (0 if added is None else added)) * 1
        output = fused(fresh, activation, added)
        (grad,) = torch.autograd.grad(output, leaf, torch.full_like(output, torch.inf))
        flat = z < -3 if activation == "hardswish" else z < 0
        assert flat.any() and not grad[flat].any()


@pytest.mark.no_cover
@ways
def test_compiles(activation, adds):
    args, residual = operands((3, 4, 5, 2), adds)
    names = ("input", "weight", "bias")

    torch.compiler.reset()
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    leaves = leaves_of(args, residual)
    fresh = {key: args[key] if key in names else args[key].clone() for key in args}
    expected, *moved = composition(args, activation, residual)
    output = compiled(fresh, activation, residual)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close([fresh["running_mean"], fresh["running_var"]], moved)
    got, gradients = (torch.autograd.grad(y.square().sum(), leaves) for y in (output, expected))
    torch.testing.assert_close(got, gradients)
