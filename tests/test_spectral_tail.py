import pytest
import torch
import torch.distributed as dist
from cuda_support import capture, kernels, no_synchronisation
from rank_support import needs_gloo, spawn_ranks
from torch import nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functionalize, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from talib_fast.finetune.bss import BatchSpectralShrinkage
from talib_fast.ops import backends, spectral_tail

OP = torch.ops.talib_fast
CASES = [((4, 7), 0), ((4, 7), 1), ((4, 7), 4), ((7, 4), 2), ((5, 5), 3), ((2, 3, 4), 2), ((1, 6), 1)]


def forward(matrix, k):
    """The value and the vectors of one tensor, whichever backend serves it."""
    (value,), (vectors,) = OP.spectral_tail_forward([matrix], [k])
    return value, vectors


def backward(grad, matrix, vectors, k):
    (gradient,) = OP.spectral_tail_backward([grad], [matrix], [vectors], [k])
    return gradient


def oracle(matrix, k):
    return torch.linalg.svdvals(matrix.double()).flip(-1)[..., :k].square().sum(-1)


def with_condition_number(condition, b, f):
    left, right = (torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q for n in (b, f))
    singular_values = torch.logspace(0, -torch.tensor(float(condition)).log10().item(), b, dtype=torch.float64)
    return left @ (singular_values[:, None] * right[:b])


@pytest.mark.parametrize(("shape", "k"), CASES)
class TestValuesAndGradients:
    def test_matches_the_oracle(self, shape, k, device):
        matrix = torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)
        value = spectral_tail(matrix, k)
        torch.testing.assert_close(value, oracle(matrix, k))
        assert value.shape == shape[:-2]
        torch.testing.assert_close(
            torch.autograd.grad(value.sum(), matrix), torch.autograd.grad(oracle(matrix, k).sum(), matrix)
        )

    def test_gradcheck_and_gradgradcheck(self, shape, k, device):
        matrix = torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)
        assert gradcheck(
            lambda m: spectral_tail(m, k), (matrix,), check_forward_ad=True, check_batched_forward_grad=True
        )
        assert gradgradcheck(lambda m: spectral_tail(m, k), (matrix,), check_fwd_over_rev=True)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
    def test_opcheck(self, shape, k, dtype, device):
        matrix = torch.randn(shape, device=device).to(dtype)
        torch.library.opcheck(OP.spectral_tail_forward.default, ([matrix, matrix.mT], [k, 0]))
        value, vectors = forward(matrix, k)
        torch.library.opcheck(OP.spectral_tail_backward.default, ([torch.ones_like(value)], [matrix], [vectors], [k]))
        for decomposed in (OP.spectral_tail_linalg_forward.default, OP.spectral_tail_qr_forward.default):
            torch.library.opcheck(decomposed, (matrix, k))
        torch.library.opcheck(OP.spectral_tail_linalg_backward.default, (torch.ones_like(value), matrix, vectors, k))


def orthogonal(n):
    return torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q


def with_spectrum(values, f):
    return orthogonal(len(values)) * values @ orthogonal(f)[: len(values)]


class TestKernels:
    """The whole answer of the operation, value, basis and gradient, whichever backend serves it."""

    def check(self, matrix, k, device):
        matrix = matrix.to(device)
        value, vectors = forward(matrix, k)
        grad = torch.rand_like(value) + 0.5
        gradient = backward(grad, matrix, vectors, k)
        exact = matrix.double().cpu()
        value, vectors, grad = (tensor.double().cpu() for tensor in (value, vectors, grad))
        wide = exact if exact.size(-2) <= exact.size(-1) else exact.mT
        by_the_others = 2 * k > wide.size(-2)
        count = wide.size(-2) - k if by_the_others else k
        identity = torch.eye(count).double().expand(*matrix.shape[:-2], count, count)
        torch.testing.assert_close(vectors.mT @ vectors, identity)
        part = vectors @ (vectors.mT @ wide)
        part = wide - part if by_the_others else part
        # no other k directions may give less, up to the rounding of the Gram matrix
        noise = 1e-15 * exact.square().sum((-1, -2))
        smallest = oracle(exact, k)
        assert (abs(value - smallest) <= 1e-6 * smallest + noise).all()
        assert (abs(part.square().sum((-1, -2)) - smallest) <= 1e-6 * smallest + noise).all()
        expected = 2 * grad[..., None, None] * (part if wide is exact else part.mT)
        assert gradient.dtype == matrix.dtype and gradient.shape == matrix.shape
        torch.testing.assert_close(gradient.cpu(), expected.to(matrix.dtype), rtol=2e-3, atol=1e-6)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
    @pytest.mark.parametrize(
        "shape",
        [(1, 1), (1, 9), (9, 1), (2, 2), (3, 7), (4, 64), (5, 65), (48, 2048), (130, 33), (3, 6, 9), (6, 20, 12)],
        ids=lambda shape: "x".join(map(str, shape)),
    )
    def test_random_matrices(self, shape, dtype, device):
        rank = min(shape[-2:])
        for k in sorted({0, 1, min(2, rank), rank // 2, rank - 1, rank}):
            self.check(torch.randn(shape).to(dtype), k, device)

    @pytest.mark.parametrize("k", [1, 2, 5, 11, 16])
    @pytest.mark.parametrize(
        "spectrum",
        [
            torch.ones(16), torch.zeros(16), torch.tensor([1.0] * 8 + [2.0] * 8), torch.tensor([0.0] * 15 + [3.0]),
            torch.tensor([1.0, *[1 + 1e-6] * 14, 2.0]), torch.linspace(1, 2, 16), torch.logspace(0, -3, 16),
        ],
        ids=["equal", "zero", "two values", "rank one", "near ties", "linear", "geometric"],
    )  # fmt: skip
    def test_spectra(self, spectrum, k, device):
        self.check(with_spectrum(spectrum.double(), 40).float(), k, device)

    @pytest.mark.parametrize("k", [1, 3, 7])
    def test_matrices_in_blocks(self, k, device):
        for blocks in ([1, 2, 4], [7], [3, 0, 4], [1] * 7):
            self.check(torch.block_diag(*(torch.randn(n, n) for n in blocks), torch.zeros(0, 3)), k, device)
        self.check(torch.diag(torch.arange(7.0)), k, device)
        self.check(torch.ones(7, 9), k, device)

    def test_any_strides(self, device):
        base = torch.randn(3, 10, 4, 40)
        for matrix in (base[0, ..., ::2], base[0].transpose(0, 2), base[:, 1, :, 3:], base[1].mT[::3], base[0, 0].mT):
            self.check(matrix, 2, device)
        self.check(torch.randn(5, 1).expand(5, 8), 2, device)

    def test_scale_does_not_matter(self, device):
        matrix = torch.randn(6, 9)
        for scale in (1e-15, 1e15):
            value = spectral_tail((matrix * scale).to(device), 2).double().cpu()
            torch.testing.assert_close(value, oracle(matrix * scale, 2), rtol=1e-5, atol=0)

    @pytest.mark.parametrize("k", [1, 3])
    def test_every_size_class(self, k, device):
        """Of the CUDA kernels."""
        for m in (33, 64, 65, 128, 129, 256):
            self.check(torch.randn(m, 300), k, device)

    def test_what_the_cuda_kernels_leave_to_pytorch(self, device):
        self.check(torch.randn(300, 257), 2, device)

    SEVERAL = ((3, 7), (48, 100), (7, 3), (2, 5, 8), (4, 0), (100, 70), (0, 3, 4), (2, 2, 3, 4), (150, 160), (300, 290))

    def test_several_tensors_are_served_as_one_by_one(self, device):
        """More tensors than a launch of the CUDA kernels takes, and every size class of theirs."""
        dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
        ranks = [min(shape[-2:]) for shape in self.SEVERAL * 2]
        k = [min(j % 4, rank) for j, rank in enumerate(ranks)]
        matrices = [
            torch.randn(shape, device=device).to(dtypes[j % 4]).requires_grad_(j != 1)
            for j, shape in enumerate(self.SEVERAL * 2)
        ]
        values = spectral_tail(matrices, k)
        assert isinstance(values, tuple)
        sum(value.sum().double() for value in values).backward()
        for matrix, number, value in zip(matrices, k, values, strict=True):
            alone = matrix.detach().requires_grad_()
            expected = spectral_tail(alone, number)
            expected.sum().backward()
            assert value.shape == matrix.shape[:-2] and value.dtype == expected.dtype
            torch.testing.assert_close(value, expected, equal_nan=True)
            if matrix.requires_grad:
                torch.testing.assert_close(matrix.grad, alone.grad)
            else:
                assert matrix.grad is None

    @pytest.mark.parametrize("shape", [(48, 2048), (3, 40, 900), (130, 300)])
    def test_more_threads_give_the_same_bits(self, shape):
        matrix, threads, found = torch.randn(shape), torch.get_num_threads(), []
        try:
            for number in (1, 2, 5):
                torch.set_num_threads(number)
                value, vectors = forward(matrix, 3)
                found.append((value, vectors, backward(torch.ones_like(value), matrix, vectors, 3)))
        finally:
            torch.set_num_threads(threads)
        if backends()["spectral_tail"]["cpu"][0] == "compiled":  # LAPACK's bits may depend on its threads
            for other in found[1:]:
                assert all(map(torch.equal, other, found[0]))

    def test_operands_that_do_not_fit_are_errors(self):
        if backends()["spectral_tail"]["cpu"][0] != "compiled":
            pytest.skip("the PyTorch implementation leaves that to the public function")
        matrix = torch.randn(4, 6)
        value, vectors = forward(matrix, 2)
        for arguments in ((matrix[0], 1), (matrix[None, None], 1), (matrix, 5), (matrix, -1), (matrix.long(), 1)):
            with pytest.raises(RuntimeError, match="expected"):
                forward(*arguments)
        with pytest.raises(RuntimeError, match="expected one k per input"):
            OP.spectral_tail_forward([matrix], [1, 2])
        for arguments in (
            (value, matrix, vectors.float(), 2),
            (value.expand(2), matrix, vectors, 2),
            (value, matrix, vectors[1:], 2),
            (value, matrix, vectors, 1),
            (value, matrix, vectors, 5),
        ):
            with pytest.raises(RuntimeError, match="expected"):
                backward(*arguments)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
class TestOnAGpu:
    def step(self):
        """A step of several matrices, and the matrices."""
        shapes = ((48, 2048), (20, 12), (3, 30, 40), (200, 300))
        matrices = [torch.randn(shape, device="cuda").requires_grad_() for shape in shapes]

        def step():
            values = spectral_tail(matrices, 2)
            return values, torch.autograd.grad([value.sum() for value in values], matrices)

        return step, matrices

    def test_no_synchronisation_with_the_host(self):
        step, matrices = self.step()
        with no_synchronisation():
            step()
            with torch.no_grad():
                matrices[0][3, 5].fill_(torch.inf)
            step()

    def test_three_kernels_forward_and_one_backward(self):
        matrix = torch.randn(48, 2048, device="cuda", requires_grad=True)
        found = kernels(lambda: torch.autograd.grad(spectral_tail(matrix, 1), matrix), "spectral_tail")
        assert len(found) == 4

    def test_cuda_graph(self):
        step, matrices = self.step()
        graph, captured = capture(step)
        with torch.no_grad():
            for matrix in matrices:
                matrix.normal_()
        graph.replay()
        torch.testing.assert_close(captured, step(), rtol=0, atol=0)


class TestFunctionTransforms:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize(("shape", "in_dim"), [((3, 4, 7), 0), ((4, 7, 3), 2), ((2, 3, 7, 4), 1)])
    @pytest.mark.parametrize("k", [1, 3])
    def test_vmap_and_grad(self, k, shape, in_dim, dtype, device):
        matrices = torch.randn(shape, device=device).to(dtype)
        members = matrices.movedim(in_dim, 0)

        def tail(matrix):
            return spectral_tail(matrix, k).sum()

        torch.testing.assert_close(vmap(tail, in_dim)(matrices), torch.stack([tail(m) for m in members]))
        leaf = members.clone().requires_grad_()
        (expected,) = torch.autograd.grad(spectral_tail(leaf, k).sum(), leaf)
        torch.testing.assert_close(vmap(grad(tail), in_dim)(matrices), expected)

    def test_several_tensors_of_which_one_is_mapped(self):
        mapped, alone = torch.randn(3, 4, 7), torch.randn(5, 6)

        def tails(a, b):
            return spectral_tail([a, b], [2, 1])

        of_mapped, of_alone = vmap(tails, (0, None), out_dims=(0, None))(mapped, alone)
        torch.testing.assert_close(of_mapped, spectral_tail(mapped, 2))
        torch.testing.assert_close(of_alone, spectral_tail(alone, 1))

    def test_derivatives_of_derivatives(self):
        matrix = torch.randn(4, 7, dtype=torch.float64)
        hessian = jacrev(grad(lambda m: spectral_tail(m, 2)))(matrix)
        expected = torch.autograd.functional.hessian(lambda m: spectral_tail(m, 2), matrix)
        torch.testing.assert_close(hessian, expected)


def dual_jvp(function, primals, tangents):
    """torch.func.jvp by torch.autograd.forward_ad, for a function of one result."""
    with forward_ad.dual_level():
        return tuple(forward_ad.unpack_dual(function(*map(forward_ad.make_dual, primals, tangents))))


SECOND_DERIVATIVES = {
    "hessian": hessian,
    "jacfwd of jacfwd": lambda f: jacfwd(jacfwd(f)),
    "jacrev of jacfwd": lambda f: jacrev(jacfwd(f)),
    "functionalize": lambda f: functionalize(hessian(f)),
    "functionalize within": lambda f: jacrev(jacrev(functionalize(f))),
    "autograd": lambda f: (
        lambda m: torch.autograd.functional.hessian(f, m, vectorize=True, outer_jacobian_strategy="forward-mode")
    ),
}
second_derivatives = pytest.mark.parametrize("second", SECOND_DERIVATIVES.values(), ids=SECOND_DERIVATIVES)


class TestForwardMode:
    @pytest.mark.parametrize("forward", [jvp, dual_jvp, functionalize(jvp)], ids=["jvp", "dual", "functionalize"])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize(("shape", "k"), [*CASES, ((2, 2, 3, 4), 2)])
    def test_tangents_equal_the_oracles(self, shape, k, dtype, forward, device):
        matrix, direction = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
        found = forward(lambda m: spectral_tail(m, k), (matrix,), (direction,))
        expected = jvp(lambda m: oracle(m, k), (matrix.double(),), (direction.double(),))
        result = torch.float64 if dtype == torch.float64 else torch.float32
        torch.testing.assert_close(found, tuple(x.to(result) for x in expected))

    @second_derivatives
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    @pytest.mark.parametrize(("spectrum", "k"), [([4, 3, 2, 1], 2), ([3, 2, 2, 2], 3), ([3, 2, 0, 0], 2), ([1] * 4, 4)])
    def test_second_derivatives(self, spectrum, k, dtype, second, device):
        """Also at ties, whose singular values are whole numbers, against a difference of the oracle's gradients."""
        matrix = torch.zeros(2, 6, 4, dtype=dtype, device=device)
        matrix[0, [5, 2, 0, 3], range(4)] = torch.tensor(spectrum).to(matrix)
        matrix[1] = torch.randn(6, 4)
        found = second(lambda m: spectral_tail(m, k).sum())(matrix).double()
        leaf, step = matrix.double().requires_grad_(), torch.randn(2, 6, 4).to(found)

        def gradient(times):
            return torch.autograd.grad(oracle(leaf + times * step, k).sum(), leaf)[0]

        expected = (gradient(1e-5) - gradient(-1e-5)) / 2e-5
        torch.testing.assert_close((found * step).sum((-1, -2, -3)), expected, rtol=1e-5, atol=1e-5)

    @second_derivatives
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    @pytest.mark.parametrize("spectrum", [[1, 1, 1], [2, 0, 0], [0, 0, 0]])
    def test_a_tie_with_others_leaves_a_subgradient_and_no_second_derivative(self, spectrum, dtype, second):
        matrix = torch.stack([torch.diag(torch.tensor(spectrum)).to(dtype), torch.randn(3, 3).to(dtype)])
        direction = torch.randn_like(matrix)
        value, tangent = jvp(lambda m: spectral_tail(m, 1), (matrix,), (direction,))
        expected = grad(lambda m: spectral_tail(m, 1).sum())(matrix)
        torch.testing.assert_close(value, spectral_tail(matrix, 1))
        torch.testing.assert_close(tangent, (expected * direction).sum((-1, -2)))
        assert second(lambda m: spectral_tail(m, 1))(matrix[0]).isnan().all()
        assert hessian(lambda m: spectral_tail(m, 1).sum())(matrix)[1, :, :, 1].isfinite().all()

    @pytest.mark.parametrize("third", [jacfwd, jacrev])
    @pytest.mark.parametrize("name", list(SECOND_DERIVATIVES)[:-1])
    def test_third_derivatives_are_nan(self, name, third):
        matrix = torch.randn(3, 5, dtype=torch.float64)
        for k in (0, 1, 3):
            found = third(SECOND_DERIVATIVES[name](lambda m, k=k: spectral_tail(m, k)))(matrix)
            assert found.isnan().all() if k == 1 else not found.any()

    def test_vmap_of_jvp_and_lists(self):
        matrices, tall = torch.randn(4, 3, 5), torch.randn(6, 2)

        def member(matrix, direction):
            return jvp(lambda *m: spectral_tail(m, [2, 1]), (matrix, tall), (direction, tall))

        (of_members, of_tall), tangents = vmap(member, (0, None), ((0, None), (0, None)))(matrices, matrices[0])
        expected = jvp(lambda m: oracle(m, 2), (matrices.double(),), (matrices[:1].double().expand(4, 3, 5),))
        torch.testing.assert_close(torch.stack([of_members, tangents[0]]), torch.stack(expected).float())
        torch.testing.assert_close(torch.stack([of_tall, tangents[1]]), torch.stack([of_tall, 2 * of_tall]))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_functional_graphs(self, dtype):
        matrix = torch.randn(2, 3, 5, dtype=dtype)

        def gradient(m):
            return grad(lambda m: spectral_tail(m, 1).sum())(m)

        torch.testing.assert_close(make_fx(functionalize(gradient))(matrix)(matrix - 1), gradient(matrix - 1))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
    @pytest.mark.parametrize("entry", [torch.nan, torch.inf])
    def test_what_is_not_finite(self, entry, dtype):
        matrix = torch.randn(2, 3, 5).to(dtype)
        matrix[0, 1, 2] = entry
        for k in (1, 3):
            for found in jvp(lambda m, k=k: spectral_tail(m, k), (matrix,), (torch.ones_like(matrix),)):
                assert found.isnan().tolist() == [True, False]
        of_first, of_other = hessian(lambda m: spectral_tail(m, 1).sum())(matrix)
        assert of_first[..., 0, :, :].isnan().all() and of_other[..., 1, :, :].isfinite().all()

    @pytest.mark.parametrize("scale", [1e-200, 1e160, 1e300])
    def test_float64_that_can_not_be_squared(self, scale):
        matrix, direction = torch.randn(2, 3, 5, dtype=torch.float64)

        def tail(m):
            return spectral_tail(m, 2)

        value, tangent = jvp(tail, (matrix * scale,), (direction,))
        assert value == (0 if scale < 1 else torch.inf)
        torch.testing.assert_close(tangent / scale, jvp(tail, (matrix,), (direction,))[1])
        torch.testing.assert_close(hessian(tail)(matrix * scale), hessian(tail)(matrix))


class TestLists:
    def test_one_k_for_all(self):
        matrices = [torch.randn(3, 4), torch.randn(6, 5)]
        assert spectral_tail(matrices, 2) == spectral_tail(matrices, [2, 2])
        assert spectral_tail([], 3) == ()

    def test_gradcheck_and_gradgradcheck(self):
        matrices = tuple(torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 4), (2, 4, 3)))
        assert gradcheck(lambda *m: spectral_tail(m, [1, 2]), matrices)
        assert gradgradcheck(lambda *m: spectral_tail(m, [1, 2]), matrices)

    def test_compiles_into_one_graph(self):
        matrices = [torch.randn(3, 4, requires_grad=True), torch.randn(2, 6, 5, requires_grad=True)]
        expected = spectral_tail(matrices, [1, 2])
        found = torch.compile(lambda m: spectral_tail(m, [1, 2]), fullgraph=True, backend="aot_eager")(matrices)
        torch.testing.assert_close(found, expected)

    def test_fault_compiled_without_a_gradient_raised(self):
        matrices = [torch.randn(3, 4, requires_grad=True), torch.randn(2, 6, 5, requires_grad=True)]
        compiled = torch.compile(lambda m: spectral_tail(m, [1, 2]), fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            torch.testing.assert_close(compiled(matrices), spectral_tail(matrices, [1, 2]))

    def test_bad_input_is_named(self):
        matrices = [torch.ones(2, 3), torch.ones(3, 4)]
        with pytest.raises(ValueError, match="expected one k, or 2, one per input, got 3"):
            spectral_tail(matrices, [1, 1, 1])
        with pytest.raises(ValueError, match=r"min\(b, f\) = 2 for input 0 of shape \[2, 3\], got k = 3"):
            spectral_tail(matrices, 3)
        with pytest.raises(ValueError, match="expected input 1 on cpu, the first one's device, got meta"):
            spectral_tail([matrices[0], matrices[1].to("meta")], 1)


@pytest.mark.parametrize(("condition", "tolerance"), [(1e2, 1e-6), (1e3, 1e-6), (1e4, 1e-5), (1e5, 1e-4)])
def test_float32_accuracy(condition, tolerance):
    matrix = with_condition_number(condition, 48, 512).float()
    expected = oracle(matrix, 1)
    in_forward_mode, tangent = jvp(lambda m: spectral_tail(m, 1), (matrix,), (matrix,))
    for value in (spectral_tail(matrix, 1), in_forward_mode, tangent / 2):
        assert abs(value.double() - expected) <= tolerance * expected


@pytest.mark.parametrize("condition", [1e4, 1e7])
def test_float64_is_as_accurate_as_lapack(condition):
    """Against the singular values that the matrix was built from."""
    matrix = with_condition_number(condition, 24, 64)
    exact = condition**-2.0
    in_forward_mode, tangent = jvp(lambda m: spectral_tail(m, 1), (matrix,), (matrix,))
    for value in (spectral_tail(matrix, 1), in_forward_mode, tangent / 2):
        assert abs(value - exact) <= 4 * abs(oracle(matrix, 1) - exact) + 1e-9 * exact


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("spectrum", [[3, 1, 1], [1, 1, 1], [2, 0, 0], [0, 0, 0]])
def test_second_derivative_at_a_tie_across_the_cut_is_nan(spectrum, dtype, device):
    matrix = torch.diag(torch.tensor(spectrum, dtype=dtype, device=device)).requires_grad_()
    (gradient,) = torch.autograd.grad(spectral_tail(matrix, 1), matrix, create_graph=True)
    (second,) = torch.autograd.grad((gradient * torch.randn_like(gradient)).sum(), matrix)
    assert gradient.isfinite().all() and second.isnan().all()


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_gradient_at_ties_is_a_projection(shape):
    """With all singular values equal any k directions will do: 2·P·F for some projector P of rank k."""
    matrix = torch.linalg.qr(torch.randn(9, 9, dtype=torch.float64)).Q[: shape[0], : shape[1]].clone().requires_grad_()
    value = spectral_tail(matrix, 2)
    (grad,) = torch.autograd.grad(value, matrix)
    projector = (grad / 2) @ matrix.detach().mT if shape[0] < shape[1] else matrix.detach().mT @ (grad / 2)
    torch.testing.assert_close(value.detach(), torch.tensor(2.0, dtype=torch.float64))
    torch.testing.assert_close(projector @ projector, projector)
    torch.testing.assert_close(projector.trace(), torch.tensor(2.0, dtype=torch.float64))


@pytest.mark.parametrize("scale", [1e-200, 1e160, 1e300])
@pytest.mark.parametrize("create_graph", [True, False])
@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (2, 3, 4)])
def test_float64_that_can_not_be_squared(shape, create_graph, scale):
    matrix = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(spectral_tail(matrix, 2).sum(), matrix)
    large = (matrix.detach() * scale).requires_grad_()
    value = spectral_tail(large, 2)
    assert (value == (0 if scale < 1 else torch.inf)).all()
    (grad,) = torch.autograd.grad(value.sum(), large, create_graph=create_graph)
    torch.testing.assert_close(grad / scale, expected)


def test_second_derivatives_of_float64_do_not_square_the_condition_number():
    """Two singular values of 1e-8 and 2e-8 beside one of 1: their squares are lost in the Gram matrix's rounding."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(size, 3, dtype=torch.float64, generator=generator)).Q for size in (3, 7))
    singular_values = torch.tensor([1.0, 2e-8, 1e-8], dtype=torch.float64)
    matrix = ((left * singular_values) @ right.T).requires_grad_()
    (grad,) = torch.autograd.grad(spectral_tail(matrix, 1), matrix, create_graph=True)
    torch.testing.assert_close(grad, 2e-8 * torch.outer(left[:, 2], right[:, 2]), rtol=1e-6, atol=1e-14)
    # moved along u_3 v_2ᵀ, the chosen and the next direction turn into each other: 2·σ_3 Δσ_3 has this derivative
    along = torch.outer(left[:, 2], right[:, 1])
    (second,) = torch.autograd.grad((grad * along).sum(), matrix)
    forward = hessian(lambda m: spectral_tail(m, 1))(matrix.detach())
    _, next_one, last = singular_values.square()
    for found in ((second * along).sum(), along.flatten() @ forward.view(21, 21) @ along.flatten()):
        torch.testing.assert_close(found, 2 - 2 * next_one / (next_one - last), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("entry", [torch.nan, torch.inf])
def test_double_backward_of_what_is_not_finite(dtype, entry, device):
    matrix = torch.randn(2, 3, 5, dtype=dtype, device=device)
    matrix[0, 1, 2] = entry
    matrix.requires_grad_()
    (grad,) = torch.autograd.grad(spectral_tail(matrix, 1).sum(), matrix, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), matrix)
    for gradient in (grad, second):
        assert not gradient[0].isfinite().any() and gradient[1].isfinite().all()


def test_one_number_near_the_largest():
    matrix = torch.randn(2, 3, dtype=torch.float64)
    matrix[0, 0] = torch.finfo(torch.float64).max
    assert spectral_tail(matrix, 1).isfinite() and spectral_tail(matrix, 2) == torch.inf


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_rank_deficient_and_zero_matrices(rank):
    matrix = (torch.randn(5, rank) @ torch.randn(rank, 8)).requires_grad_()
    value = spectral_tail(matrix, 2)
    value.backward()
    assert 0 <= value < 1e-6
    assert matrix.grad.isfinite().all() and matrix.grad.abs().max() < 1e-3


def test_strides_do_not_matter():
    matrix = torch.randn(7, 2, 5)[:, 0].mT
    torch.testing.assert_close(spectral_tail(matrix, 2), spectral_tail(matrix.contiguous(), 2))


def test_empty_matrices():
    assert spectral_tail(torch.zeros(0, 4), 0) == 0
    assert spectral_tail(torch.zeros(3, 0, 4), 0).tolist() == [0, 0, 0]
    assert spectral_tail(torch.zeros(0, 3, 4), 2).shape == (0,)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_fault_non_finite_input_raised_in_lapack(bad, dtype, device):
    matrices = torch.randn(2, 4, 6, dtype=dtype, device=device)
    matrices[0, 1, 2] = bad
    matrices.requires_grad_()
    values = spectral_tail(matrices, 1)
    values.sum().backward()
    assert values.isfinite().tolist() == [False, True]
    assert not matrices.grad[0].isfinite().any() and matrices.grad[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fault_both_factors_of_a_full_svd_were_computed(dtype, monkeypatch):
    """Whatever PyTorch decomposes has the shorter side only; our kernel asks it for nothing."""
    shapes = []
    for name in ("eigh", "svd"):
        decompose = getattr(torch.linalg, name)

        def watched(matrix, *args, decompose=decompose, **kwargs):
            shapes.append(tuple(matrix.shape))
            return decompose(matrix, *args, **kwargs)

        monkeypatch.setattr(torch.linalg, name, watched)
    spectral_tail(torch.randn(6, 40, dtype=dtype, requires_grad=True), 1).backward()
    ours = dtype == torch.float32 and backends()["spectral_tail"]["cpu"][0] == "compiled"
    assert shapes == ([] if ours else [(6, 6)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fault_half_precision_raised(dtype, device):
    matrix = torch.randn(6, 9, device=device).to(dtype).requires_grad_()
    value = spectral_tail(matrix, 2)
    torch.testing.assert_close(value.double(), oracle(matrix, 2), rtol=1e-6, atol=0)
    value.backward()
    assert value.dtype == torch.float32 and matrix.grad.dtype == dtype


def test_autocast_changes_nothing(device):
    matrix = torch.randn(6, 9, device=device, requires_grad=True)
    with torch.autocast(device.type, torch.bfloat16):
        inside = spectral_tail(matrix, 1)
        (grad,) = torch.autograd.grad(inside, matrix)
    assert inside == spectral_tail(matrix, 1)
    torch.testing.assert_close(grad, torch.autograd.grad(spectral_tail(matrix, 1), matrix)[0])


def test_compiles_into_one_graph():
    matrix = torch.randn(6, 9, requires_grad=True)
    expected = spectral_tail(matrix, 2)
    compiled = torch.compile(lambda m: spectral_tail(m, 2), fullgraph=True, backend="aot_eager")(matrix)
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(torch.autograd.grad(compiled, matrix), torch.autograd.grad(expected, matrix))


@pytest.mark.parametrize(
    ("matrix", "k", "error", "message"),
    [
        (torch.ones(2, 3).long(), 1, TypeError, "got torch.int64"),
        (torch.ones(2, 3), 1.0, TypeError, r"expected k to be an integer, got 1\.0"),
        (torch.ones(2, 3), True, TypeError, "expected k to be an integer, got True"),
        ([torch.ones(2, 3)] * 2, "1", TypeError, "expected k to be an integer, got '1'"),
        ([[1.0]], 1, TypeError, "expected input 0 to be a tensor, got list"),
        (torch.ones(2, 3).to_sparse(), 1, TypeError, "expected input to be a dense tensor, got torch.sparse_coo"),
        (torch.ones(3), 1, ValueError, r"expected input of shape \[\.\.\., b, f\], got \[3\]"),
        (torch.ones(2, 3), -1, ValueError, "got k = -1"),
    ],
)
def test_bad_input_is_named(matrix, k, error, message):
    with pytest.raises(error, match=message):
        spectral_tail(matrix, k)


class TestBatchSpectralShrinkage:
    @pytest.mark.parametrize("k", [0, 1, 5])
    def test_is_the_tail_of_the_batch(self, k, device):
        feature = torch.randn(12, 32, device=device, requires_grad=True)
        loss = BatchSpectralShrinkage(k)(feature)
        assert loss.dim() == 0 and loss.device == feature.device and loss.dtype == torch.float32
        torch.testing.assert_close(loss.double(), oracle(feature, k), rtol=1e-6, atol=0)
        loss.backward()
        assert (feature.grad.abs().sum() > 0) == (k > 0)

    def test_shrinks_the_smallest_singular_value(self):
        feature = torch.randn(4, 8, requires_grad=True)
        before = torch.linalg.svdvals(feature.detach())
        BatchSpectralShrinkage(k=1)(feature).backward()
        after = torch.linalg.svdvals(feature.detach() - 0.1 * feature.grad)
        torch.testing.assert_close(after[:-1], before[:-1])
        torch.testing.assert_close(after[-1], 0.8 * before[-1])

    def test_fault_k_larger_than_the_rank_wrapped_round(self):
        with pytest.raises(ValueError, match=r"min\(b, f\) = 3 for input of shape \[3, 8\], got k = 4"):
            BatchSpectralShrinkage(4)(torch.randn(3, 8))

    def test_bad_input_is_named(self):
        with pytest.raises(ValueError, match="expected k >= 0, got -1"):
            BatchSpectralShrinkage(-1)
        with pytest.raises(TypeError, match="expected k to be an integer, got '1'"):
            BatchSpectralShrinkage("1")
        with pytest.raises(ValueError, match=r"features of shape \[b, f\], got \[2, 3, 4\]"):
            BatchSpectralShrinkage()(torch.randn(2, 3, 4))

    def test_repr(self):
        assert repr(BatchSpectralShrinkage()) == "BatchSpectralShrinkage(k=1)"
        assert repr(BatchSpectralShrinkage(2, all_ranks=True)) == "BatchSpectralShrinkage(k=2, all_ranks=True)"

    def test_alone_all_ranks_are_one(self):
        feature = torch.randn(4, 8)
        assert BatchSpectralShrinkage(2, all_ranks=True)(feature) == BatchSpectralShrinkage(2)(feature)


def _train_a_rank(rank, folder, shares, width):
    x = torch.load(f"{folder}/x.pt").split(shares)[rank]
    layer = nn.Linear(5, width[rank]).double()
    bss = BatchSpectralShrinkage(3, all_ranks=True)
    if len(set(width)) > 1:
        with pytest.raises(ValueError, match="features of one width on all ranks"):
            bss(layer(x))
        return
    layer.load_state_dict(torch.load(f"{folder}/layer.pt"))
    model = nn.parallel.DistributedDataParallel(layer)
    loss = bss(model(x))
    loss.backward()
    torch.save((loss.detach(), layer.weight.grad), f"{folder}/{rank}.pt")
    feature = torch.randn(4, 6, requires_grad=True)
    (gradient,) = torch.autograd.grad(bss(feature), feature, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
    dist.barrier()


@needs_gloo
class TestRanks:
    @pytest.mark.parametrize("shares", [[4, 4], [5, 1, 2], [8, 0]])
    def test_ranks_equal_one_process_on_the_joined_batch(self, shares, tmp_path):
        x, layer = torch.randn(8, 5, dtype=torch.float64), nn.Linear(5, 6).double()
        torch.save(x, tmp_path / "x.pt")
        torch.save(layer.state_dict(), tmp_path / "layer.pt")
        spawn_ranks(len(shares), _train_a_rank, tmp_path, shares, [6] * len(shares))
        loss = BatchSpectralShrinkage(3)(layer(x))
        loss.backward()
        for rank in range(len(shares)):
            found = torch.load(tmp_path / f"{rank}.pt")
            torch.testing.assert_close(found, (loss.detach(), layer.weight.grad))

    def test_features_of_different_width_are_an_error(self, tmp_path):
        torch.save(torch.randn(4, 5, dtype=torch.float64), tmp_path / "x.pt")
        spawn_ranks(2, _train_a_rank, tmp_path, [2, 2], [6, 7])
