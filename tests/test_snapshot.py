import pytest
import torch
from compiler_support import needs_inductor

from talib_fast.ops.snapshot import snapshot


def overwritten(query, kept, new):
    """A product with ``kept``, which is overwritten afterwards."""
    product = query @ snapshot(kept)
    kept.copy_(new)
    return product


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("strides", ["contiguous", "transposed", "expanded"])
def test_snapshot_is_a_copy(device, dtype, strides):
    input = torch.arange(12, device=device).to(dtype).view(3, 4)
    input = {"contiguous": input, "transposed": input.T, "expanded": input[:, :1].expand(3, 4)}[strides]
    for copy in (snapshot(input), torch.ops.talib_fast.snapshot(input)):
        assert torch.equal(copy, input) and copy.data_ptr() != input.data_ptr()
        assert copy.stride() == input.clone().stride() and copy.dtype == dtype
    torch.library.opcheck(torch.ops.talib_fast.snapshot.default, (input,))


@pytest.mark.parametrize(
    "backend", ["aot_eager", "aot_eager_decomp_partition", pytest.param("inductor", marks=needs_inductor)]
)
def test_fault_compiled_gradients_were_those_of_the_overwritten_tensor(backend):
    torch._dynamo.reset()
    query, kept, new = torch.randn(2, 3, requires_grad=True), torch.randn(3, 4), torch.randn(3, 4)
    expected = torch.ones(2, 4) @ kept.T
    compiled = torch.compile(overwritten, backend=backend, fullgraph=True)
    compiled(query, kept, new).sum().backward()
    torch.testing.assert_close(query.grad, expected)
    assert torch.equal(kept, new)
