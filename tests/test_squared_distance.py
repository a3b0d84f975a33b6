import pytest
import torch
from cuda_support import capture, kernels, no_synchronisation
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functionalize, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from talib_fast.ops import backends, squared_distance

OP = torch.ops.talib_fast
SHAPES = [(2, 3, 4, 5), (3, 6), (1, 1), (2, 0, 3), (2, 4, 3)]


def lists(dtype=torch.float64, device="cpu", shapes=SHAPES):
    def draw(*shape):
        return torch.randn(shape, dtype=torch.float64).to(device, dtype)

    targets = [draw(*shape) for shape in shapes]
    return targets, [draw(*shape) for shape in shapes], [draw(shape[1]).abs() for shape in shapes]


def oracle(targets, sources=None, weights=None, channel_dim=1):
    terms = []
    for j, target in enumerate(targets):
        difference = target.double() - (0 if sources is None else sources[j].double())
        by_channel = difference.square().movedim(channel_dim, 0).unsqueeze(-1).flatten(1).sum(1)
        terms.append(0.5 * (by_channel * (1 if weights is None else weights[j].double())).sum())
    return torch.stack(terms)


@pytest.mark.parametrize("with_sources", [True, False])
@pytest.mark.parametrize("with_weights", [True, False])
class TestOperation:
    def arguments(self, with_sources, with_weights, **kwargs):
        targets, sources, weights = lists(**kwargs)
        return targets, sources if with_sources else None, weights if with_weights else None

    def test_matches_the_oracle(self, with_sources, with_weights, device):
        targets, sources, weights = self.arguments(with_sources, with_weights, device=device)
        for target in targets:
            target.requires_grad_()
        total, terms = squared_distance(targets, sources, weights)
        expected = oracle(targets, sources, weights)
        torch.testing.assert_close(terms, expected.detach())
        torch.testing.assert_close(total, expected.sum())
        assert total.dim() == 0 and total.device.type == device.type and not terms.requires_grad
        grads = torch.autograd.grad(3 * total, targets)
        torch.testing.assert_close(grads, torch.autograd.grad(3 * expected.sum(), targets))

    def test_gradcheck_and_gradgradcheck(self, with_sources, with_weights, device):
        targets, sources, weights = self.arguments(with_sources, with_weights, device=device)

        def distance(*targets):
            return squared_distance(targets, sources, weights)[0]

        leaves = tuple(target.requires_grad_() for target in targets)
        assert gradcheck(distance, leaves, check_forward_ad=True, check_batched_forward_grad=True)
        assert gradgradcheck(distance, leaves)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_opcheck(self, with_sources, with_weights, dtype, device):
        targets, sources, weights = self.arguments(with_sources, with_weights, dtype=dtype, device=device)
        targets[0] = targets[0].to(memory_format=torch.channels_last)
        arguments = targets, sources or [], weights or [], 1
        torch.library.opcheck(OP.squared_distance_forward.default, arguments)
        torch.library.opcheck(OP.squared_distance_backward.default, (torch.ones((), device=device), *arguments))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_error_at_most_twice_that_of_pytorch(dtype, device):
    (t,), (s,), (w,) = lists(dtype, device, [(8, 16, 9, 9)])
    t.requires_grad_()
    expected = oracle([t.detach()], [s], [w])[0]
    theirs = 0.5 * (w.view(-1, 1, 1) * (t - s).square()).sum()
    total, _ = squared_distance([t], [s], [w])
    assert total.dtype == torch.float32
    assert (total - expected).abs() <= 2 * (theirs.double() - expected).abs() + 1e-6 * expected
    (grad,) = torch.autograd.grad(total, t)
    (their_grad,) = torch.autograd.grad(theirs.float(), t)
    exact = w.double().view(-1, 1, 1) * (t.double() - s.double())
    assert grad.dtype == dtype
    assert (grad - exact).abs().max() <= 2 * (their_grad - exact).abs().max() + 1e-6 * exact.abs().max()


def test_fault_float16_overflowed(device):
    target = torch.full((4, 256, 8, 8), 4.0, dtype=torch.float16, device=device)
    total, _ = squared_distance([target])
    assert total == 0.5 * 16 * 4 * 256 * 64


def test_mixed_dtypes_and_layouts(device):
    targets, sources, weights = lists(device=device)
    targets[1], sources[2], weights[0] = targets[1].half(), sources[2].float(), weights[0].bfloat16()
    targets[0] = targets[0].to(memory_format=torch.channels_last).requires_grad_()
    targets[4] = targets[4].transpose(0, 2).contiguous().transpose(0, 2)
    total, _ = squared_distance(targets, sources, weights)
    torch.testing.assert_close(total, oracle(targets, sources, weights).sum())
    assert total.dtype == torch.float64
    total.backward()
    assert targets[0].grad.dtype == torch.float64


@pytest.mark.parametrize("channel_dim", [0, 2, -1])
def test_channel_dim(channel_dim):
    target = torch.randn(2, 3, 4, dtype=torch.float64)
    weight = torch.rand(target.size(channel_dim), dtype=torch.float64)
    total, _ = squared_distance([target], weights=[weight], channel_dim=channel_dim)
    torch.testing.assert_close(total, oracle([target], None, [weight], channel_dim).sum())


def test_only_some_targets_want_gradients_and_sources_never_get_any():
    targets, sources, _ = lists()
    targets[1].requires_grad_()
    for source in sources:
        source.requires_grad_()
    squared_distance(targets, sources)[0].backward()
    assert targets[1].grad.abs().sum() > 0
    assert all(tensor.grad is None for tensor in [targets[0], *targets[2:], *sources])


def test_fault_constants_of_inference_mode_could_not_be_saved():
    targets = [target.requires_grad_() for target in lists()[0]]
    with torch.inference_mode():
        _, sources, weights = lists()
        targets[1] = torch.randn(3, 6, dtype=torch.float64)  # which trains no more
    trained = [targets[0], *targets[2:]]
    x = targets[0].detach()
    found = []
    for of_inference in (True, False):
        if not of_inference:
            targets, sources, weights = (
                [tensor.clone() if tensor.is_inference() else tensor for tensor in tensors]
                for tensors in (targets, sources, weights)
            )
        constants = sources[:1], weights[:1]

        def of_one(t, constants=constants):
            return squared_distance([t], *constants)[0]

        total, terms = squared_distance(targets, sources, weights)
        gradients = torch.autograd.grad(total, trained, create_graph=True)
        second = torch.autograd.grad(sum(gradient.square().sum() for gradient in gradients), trained)
        transformed = grad(of_one)(x), vmap(of_one)(torch.stack([x, 2 * x])), jvp(of_one, (x,), (x + 1,))
        found.append((total, terms, gradients, second, transformed))
    torch.testing.assert_close(*found)


def off_by(elements):
    return lambda x: torch.cat([x.new_zeros(elements), x.flatten()])[elements:].view(x.shape)


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NARROW = (torch.bfloat16, torch.float16)
LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.contiguous(),
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "channels_first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "with_gaps": lambda x: torch.stack([x, x], -1)[..., 0],
    "off_by_one": off_by(1),
}
# by the 8 bytes that 16-bit numbers take beside a vector of float32
NARROW_LAYOUTS = {**LAYOUTS, "off_by_four": off_by(4)}
ODD_SHAPES = [
    (2, 3, 4, 5),
    (4, 5, 7, 7),
    (3, 16, 1, 1),
    (2, 32, 8),
    (5, 7),
    (1, 1),
    (130, 3),
    (2, 5, 600),
    (2, 3, 2, 3, 4),
]


class TestKernels:
    """What a kernel has a path of its own for: layouts, dtypes, odd sizes, long lists."""

    def check(self, targets, sources=None, weights=None, channel_dim=1):
        targets = [target.detach().requires_grad_() for target in targets]
        total, terms = squared_distance(targets, sources, weights, channel_dim)
        wide = any(target.dtype == torch.float64 for target in targets)
        assert total.dtype == terms.dtype == (torch.float64 if wide else torch.float32)
        exact = [target.detach().cpu().double().requires_grad_() for target in targets]
        expected = oracle(
            exact,
            None if sources is None else [source.cpu() for source in sources],
            None if weights is None else [weight.cpu() for weight in weights],
            channel_dim,
        )
        exactly = all(target.dtype == torch.float64 for target in targets)
        tolerance = {} if exactly else {"rtol": 2e-6, "atol": 1e-30}
        torch.testing.assert_close(terms.cpu().double(), expected.detach(), **tolerance)
        torch.testing.assert_close(total.cpu().double(), expected.detach().sum(), **tolerance)
        grads = torch.autograd.grad(-0.75 * total, targets)
        for target, gradient, exact_grad in zip(
            targets, grads, torch.autograd.grad(-0.75 * expected.sum(), exact), strict=True
        ):
            assert gradient.dtype == target.dtype
            torch.testing.assert_close(gradient.cpu(), exact_grad.to(target.dtype))

    @pytest.mark.parametrize("with_weights", [True, False])
    @pytest.mark.parametrize("source_layout", [*LAYOUTS, None])
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_every_layout(self, layout, source_layout, with_weights, device):
        targets, sources, weights = lists(torch.float32, device, ODD_SHAPES)
        self.check(
            [LAYOUTS[layout](target) for target in targets],
            None if source_layout is None else [LAYOUTS[source_layout](source) for source in sources],
            weights if with_weights else None,
        )

    @pytest.mark.parametrize("with_weights", [True, False])
    @pytest.mark.parametrize("source_dtype", [*DTYPES, None])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_every_dtype(self, dtype, source_dtype, with_weights, device):
        targets, sources, weights = lists(dtype, device, [(2, 3, 4, 5), (3, 16, 3, 3), (5, 35)])
        if source_dtype is not None:
            sources = [source.to(source_dtype) for source in sources]
        layout = LAYOUTS["channels_last"]
        self.check(
            [layout(target) for target in targets],
            None if source_dtype is None else [layout(source) for source in sources],
            weights if with_weights else None,
        )

    @pytest.mark.parametrize("with_weights", [True, False])
    @pytest.mark.parametrize("source_layout", NARROW_LAYOUTS)
    @pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
    @pytest.mark.parametrize("source_dtype", NARROW)
    def test_narrow_sources(self, source_dtype, layout, source_layout, with_weights, device):
        targets, sources, weights = lists(torch.float32, device, [*ODD_SHAPES, (2, 0, 3)])
        self.check(
            [LAYOUTS[layout](target) for target in targets],
            [NARROW_LAYOUTS[source_layout](source.to(source_dtype)) for source in sources],
            weights if with_weights else None,
        )

    @pytest.mark.parametrize("dtype", NARROW)
    def test_every_number_of_a_narrow_source(self, dtype, device):
        source = torch.arange(-(2**15), 2**15).short().view(dtype)
        source = source[source.isfinite()].to(device)
        target = torch.zeros(source.shape, device=device, requires_grad=True)
        (gradient,) = torch.autograd.grad(squared_distance([target], [source])[0], target)
        assert torch.equal(gradient, -source.float())

    @pytest.mark.parametrize(
        ("dtype", "source_dtype", "copies"),
        [
            *((dtype, dtype, False) for dtype in DTYPES),
            *((torch.float32, dtype, False) for dtype in NARROW),
            *((dtype, torch.float32, False) for dtype in NARROW),
            (torch.float32, torch.float64, True),
            (torch.float64, torch.float32, True),
            (torch.float16, torch.bfloat16, True),
        ],
    )
    @pytest.mark.filterwarnings("ignore:Warning. Profiler clears events:UserWarning")  # torch 2.10
    def test_which_sources_are_converted_first(self, dtype, source_dtype, copies, device):
        if backends()["squared_distance"][device.type][0] != "compiled":
            pytest.skip("PyTorch's implementation copies")
        targets, sources, weights = lists(dtype, device, [(2, 3, 4, 5), (2, 3, 4, 5)])
        targets = [target.requires_grad_() for target in targets]
        sources = [sources[0].to(source_dtype), LAYOUTS["channels_last"](sources[1].to(source_dtype))]
        weights = [weight.to(torch.float64 if dtype == torch.float64 else torch.float32) for weight in weights]
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            torch.autograd.grad(squared_distance(targets, sources, weights)[0], targets)
        names = [event.name for event in profile.events()]
        assert any("squared_distance_backward" in name for name in names)
        assert any("copy" in name for name in names) == copies, names

    def test_a_dtype_for_each_of_the_list(self, device):
        targets, sources, weights = lists(torch.float32, device, [(3, 5)] * len(DTYPES))
        targets = [target.to(dtype) for target, dtype in zip(targets, DTYPES, strict=True)]
        weights = [weight.to(dtype) for weight, dtype in zip(weights, reversed(DTYPES), strict=True)]
        self.check(targets, sources, weights)

    @pytest.mark.parametrize("count", [1, 57, 159, 501, 1003, 4100])
    def test_lists_of_every_length(self, count, device):
        shapes = [(0, 3) if j % 10 == 9 else (1 + j % 3, 3) for j in range(count)]
        targets, sources, weights = lists(torch.float32, device, shapes)
        self.check(targets, sources, weights)
        self.check(targets)

    def test_empty_ones_at_both_ends(self, device):
        self.check(*lists(torch.float32, device, [(0, 3), (2, 3), (2, 0), (5, 2), (0, 1)]))
        self.check(*lists(torch.float32, device, [(0, 3), (4, 0, 2)]))

    @pytest.mark.parametrize("with_weights", [True, False])
    @pytest.mark.parametrize("source_dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("shape", [(100_003,), (3, 40, 1001), (2000, 67), (5, 300, 49)], ids=str)
    def test_larger_than_one_block(self, shape, source_dtype, with_weights, device):
        channel_dim = min(1, len(shape) - 1)
        target, source = (
            torch.randn(shape, dtype=torch.float64).to(device, dtype) for dtype in (torch.float32, source_dtype)
        )
        weights = [torch.rand(shape[channel_dim], dtype=torch.float64).float().to(device)] if with_weights else None
        self.check([target], [source], weights, channel_dim)

    @pytest.mark.parametrize("channel_dim", [0, 1, 2, 3, -1])
    def test_every_channel_dim(self, channel_dim, device):
        target, source = (torch.randn(3, 4, 5, 6).to(device) for _ in range(2))
        for layout in LAYOUTS.values():
            self.check([layout(target)], [source], [torch.rand(target.size(channel_dim)).to(device)], channel_dim)

    def test_equal_input_gives_equal_bits(self, device):
        targets, sources, weights = lists(torch.float32, device, [(37, 33, 61), (64, 48), (9,) * 4])
        for others in ((sources, weights), ()):
            first, *repeated = (squared_distance(targets, *others) for _ in range(3))
            assert all(torch.equal(total, first[0]) and torch.equal(terms, first[1]) for total, terms in repeated)

    def test_more_threads_give_equal_bits(self):
        targets, sources, _ = lists(torch.float32, "cpu", [(7, 333, 61), (640, 480)])
        one = squared_distance(targets, sources)[0]
        torch.set_num_threads(2)
        assert torch.equal(squared_distance(targets, sources)[0], one)

    @pytest.mark.parametrize("with_weights", [True, False])
    @pytest.mark.parametrize("source_dtype", [torch.float32, torch.bfloat16])
    def test_gradients_larger_than_the_caches(self, source_dtype, with_weights):
        target, source = torch.randn(8, 5, 1024, 257), torch.randn(8, 5, 1024, 257).to(source_dtype)
        weight = torch.rand(5)
        for layout in (lambda x: x, lambda x: x.contiguous(memory_format=torch.channels_last)):
            t = layout(target).detach().requires_grad_()
            total, _ = squared_distance([t], [layout(source)], [weight] if with_weights else None)
            (grad,) = torch.autograd.grad(total, t)
            factor = weight.view(-1, 1, 1) if with_weights else 1
            torch.testing.assert_close(grad, (target - source) * factor)

    def test_infinite_and_missing_numbers_show(self, device):
        for bad in (float("inf"), float("nan")):
            target = torch.zeros(3, 40, device=device)
            target[1, 7] = bad
            total, terms = squared_distance([torch.ones(2, 2, device=device), target])
            assert terms[0] == 2 and not torch.isfinite(total) and not torch.isfinite(terms[1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
class TestOnAGpu:
    def arguments(self):
        return lists(torch.float32, "cuda", [(8, 16, 9, 9), (5, 7), (3, 40, 1001)])

    def test_no_synchronisation_with_the_host(self):
        targets, sources, weights = self.arguments()
        for target in targets:
            target.requires_grad_()
        with no_synchronisation():
            torch.autograd.grad(squared_distance(targets, sources, weights)[0], targets)

    def test_one_kernel_in_each_direction(self):
        targets, sources, _ = lists(torch.float32, "cuda", [(8, 16, 9, 9)] * 159)
        for target in targets:
            target.requires_grad_()
        found = kernels(lambda: torch.autograd.grad(squared_distance(targets, sources)[0], targets), "squared_distance")
        assert len(found) == 2

    def test_cuda_graph(self):
        targets, sources, weights = self.arguments()
        for target in targets:
            target.requires_grad_()

        def step():
            total, _ = squared_distance(targets, sources, weights)
            return total, torch.autograd.grad(total, targets)

        graph, captured = capture(step)
        with torch.no_grad():
            for source in sources:
                source.mul_(2)
        graph.replay()
        torch.testing.assert_close(captured, step())

    def test_more_than_two_to_the_31_elements(self):
        elements = 2**31 + 4099
        if torch.cuda.mem_get_info()[0] < 8 * elements:
            pytest.skip("too little memory")
        target = torch.zeros(elements, dtype=torch.float16, device="cuda")
        target[-3:] = 2
        target.requires_grad_()
        total, _ = squared_distance([target])
        assert total == 6
        (grad,) = torch.autograd.grad(total, target)
        assert grad[-3:].tolist() == [2, 2, 2] and grad.count_nonzero() == 3


def test_nothing_to_sum():
    total, terms = squared_distance([])
    assert total.item() == 0 and total.dim() == 0 and terms.shape == (0,)


def test_scalars_and_zero_size():
    total, terms = squared_distance([torch.tensor(3.0), torch.zeros(0)])
    assert total == 4.5 and terms.tolist() == [4.5, 0.0]


class TestFunctionTransforms:
    """torch.func's, over a batch of members of which each has targets of its own."""

    def arguments(self, device, **options):
        targets, sources, weights = lists(device=device, **options)
        return [torch.stack([t, 2 * t, t - 1]) for t in targets], sources, [torch.stack([w, w, 2 * w]) for w in weights]

    def distance(self, targets, sources, weights):
        return squared_distance(targets, sources, weights)[0]

    @pytest.mark.parametrize("dims", [(0, None, 0), (0, None, None), (0, 0, None)])
    def test_vmap_and_grad(self, dims, device):
        targets, sources, weights = self.arguments(device)
        if dims[1] is not None:
            sources = [torch.stack([s, s + 1, s]) for s in sources]
        if dims[2] is None:
            weights = [weight[0] for weight in weights]

        def member(j):
            lists = zip((targets, sources, weights), dims, strict=True)
            return [[x if dim is None else x[j] for x in tensors] for tensors, dim in lists]

        for function in (self.distance, grad(self.distance)):
            mapped = vmap(function, dims)(targets, sources, weights)
            expected = [function(*member(j)) for j in range(3)]
            if isinstance(mapped, list):
                for got, *members in zip(mapped, *expected, strict=True):
                    torch.testing.assert_close(got, torch.stack(members))
            else:
                torch.testing.assert_close(mapped, torch.stack(expected))

    def test_derivatives_of_derivatives(self):
        target, source, weight = torch.randn(2, 3), torch.randn(2, 3), torch.rand(3)
        hessian = jacrev(grad(lambda t: squared_distance([t], [source], [weight])[0]))(target)
        torch.testing.assert_close(hessian.reshape(6, 6), torch.diag(weight.repeat(2)))

    def test_terms_carry_no_gradient(self):
        target = torch.randn(3, 2, 3)
        gradient = vmap(grad(lambda t: squared_distance([t])[1].sum()))(target)
        assert not gradient.any()


def dual_jvp(function, primals, tangents):
    """torch.func.jvp by torch.autograd.forward_ad, for squared_distance."""
    with forward_ad.dual_level():
        results = function(*map(forward_ad.make_dual, primals, tangents))
        (total, tangent), (terms, of_terms) = map(forward_ad.unpack_dual, results)
    return (total, terms), (tangent, torch.zeros_like(terms) if of_terms is None else of_terms)


SECOND_DERIVATIVES = {
    "hessian": hessian,
    "jacfwd of jacfwd": lambda f: jacfwd(jacfwd(f)),
    "jacrev of jacfwd": lambda f: jacrev(jacfwd(f)),
    "functionalize": lambda f: functionalize(hessian(f)),
    "functionalize within": lambda f: jacfwd(grad(functionalize(f))),
    "autograd": lambda f: (
        lambda t: torch.autograd.functional.hessian(f, t, vectorize=True, outer_jacobian_strategy="forward-mode")
    ),
}


class TestForwardMode:
    @pytest.mark.parametrize("forward", [jvp, dual_jvp, functionalize(jvp)], ids=["jvp", "dual", "functionalize"])
    @pytest.mark.parametrize("dtype", [*DTYPES, None], ids=str)
    @pytest.mark.parametrize("with_others", [True, False])
    def test_tangents_equal_the_oracles(self, with_others, dtype, forward, device):
        """In one dtype, or with one for each of the list."""
        dtypes = DTYPES if dtype is None else [dtype] * len(DTYPES)
        targets, sources, weights, tangents = (
            [x.to(dtype) for x, dtype in zip(xs, dtypes, strict=True)]
            for xs in (*lists(device=device, shapes=SHAPES[:4]), lists(device=device, shapes=SHAPES[:4])[0])
        )
        others = (sources, weights) if with_others else ()
        (total, terms), (tangent, of_terms) = forward(
            lambda *targets: squared_distance(targets, *others), tuple(targets), tuple(tangents)
        )
        exact = (tuple(x.double() for x in xs) for xs in (targets, tangents))
        expected, of_expected = jvp(lambda *targets: oracle(targets, *others), *exact)
        result = torch.float64 if torch.float64 in dtypes else torch.float32
        assert total.dtype == terms.dtype == tangent.dtype == result and not of_terms.any()
        tolerance = {} if dtype == torch.float64 else {"rtol": 2e-6, "atol": 1e-4}
        found = torch.stack([total, *terms, tangent]).double()
        torch.testing.assert_close(found, torch.stack([expected.sum(), *expected, of_expected.sum()]), **tolerance)

    def test_sources_and_weights_are_constants(self):
        targets, sources, weights = lists()
        tangents = jvp(lambda *others: squared_distance(targets, *others), *[(sources, weights)] * 2)[1]
        assert not any(tangent.any() for tangent in tangents)

    @pytest.mark.parametrize("channel_dim", [0, -1])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("second", SECOND_DERIVATIVES.values(), ids=SECOND_DERIVATIVES)
    def test_second_derivatives(self, second, dtype, channel_dim):
        target, source = torch.randn(2, 3, 4, dtype=dtype), torch.randn(2, 3, 4)
        weight = torch.rand(target.size(channel_dim))
        found = second(lambda t: squared_distance([t, t], [source, t], [weight, weight], channel_dim)[0])(target)
        of_each = weight.view(-1, 1, 1) if channel_dim == 0 else weight
        expected = torch.diag(2 * of_each.expand(2, 3, 4).flatten())
        torch.testing.assert_close(found.view(24, 24).to(dtype), expected.to(dtype))

    def test_vmap_of_jvp(self):
        targets, tangents, sources = torch.randn(3, 5, 2, 3)  # five of each
        weights = torch.rand(5, 3)

        def tangent(*operands):
            target, tangent, source, weight = operands
            return jvp(lambda t: squared_distance([t], [source], [weight])[0], (target,), (tangent,))[1]

        expected = (weights[:, None] * (targets - sources) * tangents).sum((1, 2))
        torch.testing.assert_close(vmap(tangent)(targets, tangents, sources, weights), expected)

    def test_scalars_keep_their_dtype(self):
        target = torch.tensor(3.0)

        def half_square(t):
            return squared_distance([t])[0]

        value, tangent = jvp(half_square, (target,), (torch.tensor(2.0),))
        second = jacfwd(jacfwd(half_square))(target)
        assert [(x.item(), x.dtype) for x in (value, tangent, second)] == [(x, torch.float32) for x in (4.5, 6, 1)]

    def test_functional_graphs(self):
        target, source, weight = torch.randn(2, 3), torch.randn(2, 3), torch.rand(3)
        traced = make_fx(functionalize(grad(lambda t: squared_distance([t], [source], [weight])[0])))(target)
        torch.testing.assert_close(traced(2 * target), weight * (2 * target - source))


def test_compiles_with_the_same_tensor_twice():
    def distance(a, w):
        return squared_distance([a, a, a], [a.detach(), a + 1, a + 1], [w, w, w])[0]

    a, w = torch.randn(2, 3, requires_grad=True), torch.rand(3)
    compiled = torch.compile(distance, fullgraph=True, backend="aot_eager")(a, w)
    torch.testing.assert_close(compiled, distance(a, w))
    torch.testing.assert_close(torch.autograd.grad(compiled, a), torch.autograd.grad(distance(a, w), a))


def test_compiles_into_one_graph():
    def distance(a, b):
        return squared_distance([a * 2, b], [b, a], [torch.arange(3.0), torch.ones(3)])[0]

    a, b = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    expected = distance(a, b)
    compiled = torch.compile(distance, fullgraph=True, backend="aot_eager")(a, b)
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(torch.autograd.grad(compiled, (a, b)), torch.autograd.grad(expected, (a, b)))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_fault_compiled_without_a_gradient_raised(mode):
    """As in a validation step; with gradients enabled none of the tensors asks for one."""
    a, b = (torch.randn(2, 3, requires_grad=mode is not torch.enable_grad) for _ in range(2))
    distance = torch.compile(lambda a, b: squared_distance([a, b, a], [b, a, b]), fullgraph=True, backend="aot_eager")
    with mode():
        found, _ = distance(a, b)
    assert not found.requires_grad
    torch.testing.assert_close(found, 1.5 * (a - b).detach().square().sum())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([torch.ones(2)], []), ValueError, "expected 1 sources, one per target, got 0"),
        (([torch.ones(2, 3)], None, []), ValueError, "expected 1 weights"),
        (([torch.ones(2)], [torch.ones(1)]), ValueError, r"source 0 of its target's shape \[2\], got \[1\]"),
        (([torch.ones(2).long()],), TypeError, "expected target 0 to be a float16, .*got torch.int64"),
        (([torch.ones(2)], [torch.ones(2, device="meta")]), ValueError, "source 0 on cpu.*got meta"),
        (([torch.ones(2, 3)], None, [torch.ones(2)]), ValueError, r"weight 0 of shape \[3\].*got \[2\]"),
        (([torch.ones(2)], None, [torch.ones(2)]), ValueError, "channel_dim 1 is out of range"),
        (([torch.ones(2, 3)], None, [torch.ones(3, requires_grad=True)]), ValueError, "weights are constants"),
        (([[1.0]],), TypeError, "expected target 0 to be a tensor, got list"),
        (([torch.ones(2).to_sparse()],), TypeError, "expected target 0 to be a dense tensor, got torch.sparse_coo"),
        (([torch.ones(2)], [[1.0, 1.0]]), TypeError, "expected source 0 to be a tensor, got list"),
        ((torch.ones(2, 3),), TypeError, "expected targets to be a list of tensors, got one tensor"),
        (([torch.ones(2)], torch.ones(1, 2)), TypeError, "expected sources to be a list of tensors, got one tensor"),
        (([], [torch.ones(2)]), ValueError, "expected 0 sources, one per target, got 1"),
        (([torch.ones(2, 3)], None, None, 1.0), TypeError, r"expected channel_dim to be an integer, got 1\.0"),
    ],
)
def test_bad_input_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        squared_distance(*arguments)
