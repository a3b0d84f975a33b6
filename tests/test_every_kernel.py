"""Every CUDA kernel, forward and backward, in seconds: what gpu.sh runs first on a GPU, and in part under
compute-sanitizer.

That none is left out, and that both schedules of stoch_norm are among them on a GPU, test_kernels_on_host.py sees.
"""

import pytest
import test_spectral_tail
import test_squared_distance
import torch
from test_activation import compare_with_composition

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)

# Runs, or rows, that 8, 4 or 1 values divide, for vectors of as many, and runs that end within one, of an odd and of an
# even number of channels. A block of a GPU keeps the first ones. The others are sliced: groups of channels of more than
# 128 KB, and too few for each multiprocessor to have one.
RESIDENT = [(6, 24, 4, 8), (5, 12, 2, 6), (5, 7, 2, 6), (3, 7, 5, 3), (4, 16, 7, 7)]
SLICED = {
    "contiguous": [(2, 4, 192, 192), (2, 4, 198, 190), (1, 4, 271, 271), (200, 8, 7, 7)],
    "channels_last": [(1, 8, 104, 104), (1, 12, 104, 104), (1, 7, 104, 104)],
}


@dtypes
@pytest.mark.parametrize(("activation", "adds"), [("none", False), ("relu", True), ("silu", False)])
@pytest.mark.parametrize(
    ("name", "shape"), [(name, shape) for name, sliced in SLICED.items() for shape in (*RESIDENT, *sliced)], ids=str
)
def test_stoch_norms(name, shape, activation, adds, dtype, device):
    compare_with_composition(shape, dtype, name, activation, adds, device)


@dtypes
@pytest.mark.parametrize("name", ["contiguous", "channels_last"])
@pytest.mark.parametrize("source_dtype", [torch.float32, torch.bfloat16, None], ids=str)
def test_squared_distances(source_dtype, name, dtype, device):
    shapes = [(2, 8, 7, 7), (3, 5, 3, 3), (5, 35), (3, 40, 1001)]
    targets, sources, weights = test_squared_distance.lists(dtype, device, shapes)
    arrange = test_squared_distance.LAYOUTS[name]
    targets = [arrange(target) for target in targets]
    sources = None if source_dtype is None else [arrange(source.to(source_dtype)) for source in sources]
    for chosen in (weights, None):
        test_squared_distance.TestKernels().check(targets, sources, chosen)


def test_squared_distances_of_a_long_list(device):
    test_squared_distance.TestKernels().check(*test_squared_distance.lists(torch.float32, device, [(3, 2)] * 100))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)  # float64 has no kernel
@pytest.mark.parametrize("shape", [(48, 300), (3, 20, 12), (100, 130), (200, 210), (256, 300)], ids=str)
def test_spectral_tails(shape, dtype, device):
    for k in (1, 5, min(shape[-2:]) - 1):
        test_spectral_tail.TestKernels().check(torch.randn(shape).to(dtype), k, device)
