"""An operation's tests: the same ones for every backend and device, against float64 on the CPU."""

import pytest
import torch
from cuda_support import capture, kernels, no_synchronisation
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functionalize, grad, hessian, jvp, vmap

from talib_fast.ops import backends, soft_threshold

OP = torch.ops.talib_fast
T = 0.5


def draw(*shape, dtype=torch.float64, device="cpu"):
    """Random numbers of which some are beyond the threshold, and none so near that a finite difference crosses it."""
    x = torch.randn(shape, dtype=torch.float64)
    near = (x.abs() - T).abs() < 1e-3
    return torch.where(near, x * 1.1, x).to(device, dtype)


def oracle(x, t=T):
    """Another formula than the operation's, in float64."""
    x = x.cpu().double()
    return x.sign() * (x.abs() - t).clamp_min(0)


class TestOperation:
    """What holds for any backend. tests/test_kernels_on_host.py runs it on the CUDA kernels, too."""

    def test_matches_the_oracle(self, device):
        x = draw(5, 7, device=device).requires_grad_()
        y = soft_threshold(x, T)
        torch.testing.assert_close(y.cpu(), oracle(x.detach()))
        (dx,) = torch.autograd.grad((3 * y).sum(), x)
        assert torch.equal(dx, 3.0 * (x.abs() > T))

    def test_gradcheck_and_gradgradcheck(self, device):
        x = draw(3, 4, device=device).requires_grad_()
        assert gradcheck(soft_threshold, (x, T), check_forward_ad=True, check_batched_forward_grad=True)
        assert gradgradcheck(soft_threshold, (x, T))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_opcheck(self, dtype, device):
        x = draw(2, 3, 4, 5, dtype=dtype, device=device).to(memory_format=torch.channels_last)
        torch.library.opcheck(OP.soft_threshold_forward.default, (x, T))
        torch.library.opcheck(OP.soft_threshold_backward.default, (torch.ones_like(x), x, T))


LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.contiguous(),
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "with_gaps": lambda x: torch.stack([x, x], -1)[..., 0],
    "off_by_one": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),  # no address suits a vector
}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class TestKernels:
    """What a kernel has a path of its own for: layouts, dtypes, odd sizes, more than one block."""

    def check(self, x, dy=None):
        dy = torch.randn(x.shape).to(x) if dy is None else dy
        leaf = x.detach().requires_grad_()
        y = soft_threshold(leaf, T)
        (dx,) = torch.autograd.grad(y, leaf, dy)
        assert y.dtype == dx.dtype == x.dtype
        assert torch.equal(y.cpu(), oracle(x).to(x.dtype))  # the only rounding is the last one
        assert torch.equal(dx, dy.masked_fill(x.double().abs() <= T, 0))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_every_layout_and_dtype(self, layout, dtype, device):
        for shape in ((2, 3, 4, 5), (1, 1), (7, 37), (3, 16, 2, 2)):
            self.check(LAYOUTS[layout](draw(*shape, dtype=dtype, device=device)))

    def test_a_gradient_in_another_layout(self, device):
        x = draw(2, 3, 4, 5, device=device)
        self.check(x, torch.randn(5, 4, 3, 2, dtype=x.dtype, device=device).permute(3, 2, 1, 0))
        self.check(x, torch.ones((), dtype=x.dtype, device=device).expand(x.shape))

    @pytest.mark.parametrize("size", [0, 1, 3, 4, 8, 33, 1023, 100_003], ids=str)
    def test_every_size(self, size, device):
        for dtype in (torch.float32, torch.bfloat16):
            self.check(draw(size, dtype=dtype, device=device))

    def test_larger_than_the_caches(self):
        self.check(torch.randn(5, 1024, 1025))

    def test_special_values(self, device):
        inf, nan = float("inf"), float("nan")
        x = torch.tensor([inf, -inf, nan, T, -T, 0.0, -0.0] * 5, device=device, requires_grad=True)
        y = soft_threshold(x, T)
        expected = torch.tensor([inf, -inf, nan, 0, 0, 0, 0] * 5, device=device)
        torch.testing.assert_close(y.detach(), expected, equal_nan=True)
        (dx,) = torch.autograd.grad(y.sum(), x)
        assert dx.tolist() == [1, 1, 1, 0, 0, 0, 0] * 5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_error_at_most_twice_that_of_pytorch(dtype, device):
    x = draw(1000, dtype=dtype, device=device)
    error = (soft_threshold(x, 0.3).cpu() - oracle(x, 0.3)).abs().max()
    assert error <= 2 * (torch.nn.functional.softshrink(x, 0.3).cpu() - oracle(x, 0.3)).abs().max()


def test_compiles_into_one_graph(device):
    x = draw(3, 4, device=device).requires_grad_()
    compiled = torch.compile(soft_threshold, fullgraph=True, backend="aot_eager")(x, T)
    torch.testing.assert_close(compiled, soft_threshold(x, T))
    torch.testing.assert_close(torch.autograd.grad(compiled.sum(), x)[0], (x.abs() > T).double())


def test_vmap_and_grad(device):
    x = draw(3, 4, device=device)
    torch.testing.assert_close(vmap(soft_threshold, (1, None), 1)(x, T), soft_threshold(x, T))
    torch.testing.assert_close(grad(lambda x: soft_threshold(x, T).sum())(x), (x.abs() > T).double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (3, 4)], ids=str)
def test_forward_mode_and_functionalize(shape, dtype, device):
    x, dx = (draw(*shape, dtype=dtype, device=device) for _ in range(2))
    for forward in (jvp, functionalize(jvp)):
        y, dy = forward(lambda x: soft_threshold(x, T), (x,), (dx,))
        assert torch.equal(y, soft_threshold(x, T)) and torch.equal(dy, dx.masked_fill(x.double().abs() <= T, 0))


def test_hessian(device):
    x = draw(12, device=device)
    squares = hessian(lambda x: soft_threshold(x, T).square().sum())
    for function in (squares, functionalize(squares)):
        torch.testing.assert_close(function(x), torch.diag(2.0 * (x.abs() > T)).double())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
class TestOnAGpu:
    def test_no_synchronisation_with_the_host_and_one_kernel_in_each_direction(self):
        x = draw(8, 16, 9, 9, device="cuda").requires_grad_()

        def step():
            return torch.autograd.grad(soft_threshold(x, T).sum(), x)

        with no_synchronisation():
            step()
        assert len(kernels(step, "soft_threshold")) == 2

    def test_cuda_graph(self):
        x = draw(8, 16, device="cuda")
        graph, captured = capture(lambda: soft_threshold(x, T))
        x.mul_(2)
        graph.replay()
        torch.testing.assert_close(captured, soft_threshold(x, T))

    def test_more_than_two_to_the_31_elements(self):
        elements = 2**31 + 4099
        if torch.cuda.mem_get_info()[0] < 8 * elements:
            pytest.skip("too little memory")
        x = torch.zeros(elements, dtype=torch.float16, device="cuda")
        x[-3:] = 2
        y = soft_threshold(x, T)
        assert y[-3:].tolist() == [1.5] * 3 and y.count_nonzero() == 3


@pytest.mark.parametrize(
    ("x", "threshold", "error", "message"),
    [
        ([1.0], T, TypeError, "input to be a tensor, got list"),
        (torch.ones(2).to_sparse(), T, TypeError, "input to be a dense tensor, got torch.sparse_coo"),
        (torch.ones(2).long(), T, TypeError, "got torch.int64"),
        (torch.ones(2), "1", TypeError, "threshold to be a number, got .1."),
        (torch.ones(2), -0.1, ValueError, r"threshold in \[0, 1\.8e\+308\], got -0\.1"),
        (torch.ones(2), float("nan"), ValueError, "got nan"),
        (torch.ones(2), float("inf"), ValueError, "got inf"),
    ],
)
def test_bad_input_is_named(x, threshold, error, message):
    with pytest.raises(error, match=message):
        soft_threshold(x, threshold)


def test_the_operators_check_for_themselves():
    if backends()["soft_threshold"]["cpu"][0] != "compiled":
        pytest.skip("no compiled kernel")
    x = torch.ones(2, 3)
    for wrong in (torch.ones(2), torch.ones(3, 2), torch.ones(2, 3).double()):
        with pytest.raises(RuntimeError, match="expected grad_output of the input's shape"):
            OP.soft_threshold_backward(wrong, x, T)
