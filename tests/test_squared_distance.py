import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from talib_fast.ops import squared_distance

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
        by_channel = difference.square().movedim(channel_dim, 0).flatten(1).sum(1)
        terms.append(0.5 * (by_channel * (1 if weights is None else weights[j].double())).sum())
    return torch.stack(terms)


@pytest.mark.parametrize("with_sources", [True, False])
@pytest.mark.parametrize("with_weights", [True, False])
class TestValuesAndGradients:
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
        assert gradcheck(distance, leaves)
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


def test_nothing_to_sum():
    total, terms = squared_distance([])
    assert total.item() == 0 and total.dim() == 0 and terms.shape == (0,)


def test_scalars_and_zero_size():
    total, terms = squared_distance([torch.tensor(3.0), torch.zeros(0)])
    assert total == 4.5 and terms.tolist() == [4.5, 0.0]


def test_compiles_into_one_graph():
    def distance(a, b):
        return squared_distance([a * 2, b], [b, a], [torch.arange(3.0), torch.ones(3)])[0]

    a, b = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    expected = distance(a, b)
    compiled = torch.compile(distance, fullgraph=True, backend="aot_eager")(a, b)
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(torch.autograd.grad(compiled, (a, b)), torch.autograd.grad(expected, (a, b)))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([torch.ones(2)], []), ValueError, "expected 1 sources, one per target, got 0"),
        (([torch.ones(2, 3)], None, []), ValueError, "expected 1 weights"),
        (([torch.ones(2)], [torch.ones(1)]), ValueError, r"source 0 of its target's shape \[2\], got \[1\]"),
        (([torch.ones(2).long()],), TypeError, "got torch.int64"),
        (([torch.ones(2)], [torch.ones(2, device="meta")]), ValueError, "source 0 on cpu.*got meta"),
        (([torch.ones(2, 3)], None, [torch.ones(2)]), ValueError, r"weight 0 of shape \[3\].*got \[2\]"),
        (([torch.ones(2)], None, [torch.ones(2)]), ValueError, "channel_dim 1 is out of range"),
        (([torch.ones(2, 3)], None, [torch.ones(3, requires_grad=True)]), ValueError, "weights are constants"),
    ],
)
def test_bad_input_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        squared_distance(*arguments)
