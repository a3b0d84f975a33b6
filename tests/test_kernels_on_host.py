"""The CUDA kernels, compiled by g++, serve the operation's own tests: plain, and under sanitizers."""

import os
import re
import subprocess
import sys

import pytest
import simt_support
import torch
from process_support import PATIENCE

from talib_fast.ops import compiled_nodes

KERNELS = (
    "cpu and (TestOperation or TestKernels) and not more_threads and not larger_than_the and not more_items_than_blocks"
)
AGAIN = f"{KERNELS} and not gradcheck and not opcheck"  # derivatives and schemas, which no order of threads changes
# A thread or block more costs a sanitizer much: what it runs is small, and still takes every path of the kernels.
SMALL = {
    "stoch_norm": "cpu and TestKernels and (every_shape or one_branch or equal_bits or shifted or drawn) "
    "and not 48 and not 260 and not 160 and not bfloat16",  # which walks as float16 does
    "activation": "cpu and TestKernels and every_shape and not strided and (relu+residual or leaky_relu or silu)",
    "squared_distance": "cpu and TestKernels and not more_threads and not larger and not 1003 and not 4100 and not 159",
    "spectral_tail": "cpu and TestKernels and not more_threads and not 2048 and not every_size",
}
SLICED = {"SIMT_SHARED_BYTES": "8000", "SIMT_CACHE_BYTES": "20000"}  # little stays on chip: blocks share channels

MANY_SLICES = {"SIMT_MULTIPROCESSORS": "64"}  # of a Gram matrix's columns


@pytest.mark.parametrize(
    ("operation", "kind", "tests", "settings"),
    [
        ("stoch_norm", "plain", KERNELS, {}),
        ("stoch_norm", "plain", None, {**SLICED, "SIMT_THREADS": "96", "SIMT_SEED": "3", "SIMT_BLOCKS": "2"}),
        ("stoch_norm", "plain", None, {**SLICED, "SIMT_CACHE_BYTES": "1", "SIMT_THREADS": "32", "SIMT_SEED": "4"}),
        ("stoch_norm", "address", None, {"SIMT_SEED": "1"}),
        ("stoch_norm", "address", None, {**SLICED, "SIMT_THREADS": "128", "SIMT_SEED": "2"}),
        ("stoch_norm", "thread", None, {**SLICED, "SIMT_THREADS": "64", "SIMT_SEED": "1", "SIMT_BLOCKS": "3"}),
        ("activation", "plain", f"{KERNELS} and TestKernels", {}),  # what else it does is PyTorch's or stoch_norm's
        ("activation", "plain", None, {**SLICED, "SIMT_THREADS": "96", "SIMT_SEED": "3", "SIMT_BLOCKS": "2"}),
        ("activation", "address", None, {"SIMT_SEED": "1"}),
        ("activation", "address", None, {**SLICED, "SIMT_THREADS": "128", "SIMT_SEED": "2"}),
        ("activation", "thread", None, {**SLICED, "SIMT_THREADS": "64", "SIMT_SEED": "1", "SIMT_BLOCKS": "3"}),
        ("squared_distance", "plain", KERNELS, {}),
        # a driver whose launches have room for fewer tensors
        ("squared_distance", "plain", AGAIN, {"SIMT_SEED": "3", "SIMT_BLOCKS": "3", "SIMT_DRIVER": "12000"}),
        ("squared_distance", "address", None, {"SIMT_SEED": "1"}),
        ("squared_distance", "thread", None, {"SIMT_SEED": "2", "SIMT_BLOCKS": "3"}),
        ("spectral_tail", "plain", KERNELS, {}),
        (
            "spectral_tail",
            "plain",
            AGAIN,
            {**MANY_SLICES, "SIMT_THREADS": "96", "SIMT_SEED": "3", "SIMT_BLOCKS": "2"},
        ),
        ("spectral_tail", "plain", AGAIN, {"SIMT_SHARED_BYTES": "232448", "SIMT_THREADS": "32", "SIMT_SEED": "4"}),
        ("spectral_tail", "address", None, {"SIMT_SEED": "1"}),
        ("spectral_tail", "address", None, {**MANY_SLICES, "SIMT_THREADS": "128", "SIMT_SEED": "2"}),
        ("spectral_tail", "thread", None, {**MANY_SLICES, "SIMT_THREADS": "64", "SIMT_SEED": "1", "SIMT_BLOCKS": "3"}),
    ],
)
def test_kernels(operation, kind, tests, settings):
    run(f"test_{operation}.py", kind, tests or SMALL[operation], settings)


@pytest.mark.parametrize(
    ("operation", "tests"),
    [
        ("stoch_norm", "cpu and TestOperation"),
        ("activation", "cpu and TestOperation"),
        ("squared_distance", "cpu and TestOperation"),
        ("spectral_tail", SMALL["spectral_tail"]),
    ],
)
def test_operations_without_code_for_the_device(operation, tests):
    """Where the registered kernels can't run, every one of them leaves its calls to PyTorch."""
    run(f"test_{operation}.py", "plain", tests, {"SIMT_UNSERVED": "1"}, "-W", "ignore:talib_fast falls back to PyTorch")


LAYERS_WITHOUT_CODE = """
import importlib
import sys
import warnings
import torch
from talib_fast.finetune.stochnorm import StochNorm2d
from talib_fast.ops import library

torch.ops.load_library(sys.argv[1])
if sys.argv[2] == "node":
    step = importlib.import_module("talib_fast._autograd").stoch_norm_step
    importlib.import_module("talib_fast.ops.stoch_norm_step")._ordinary_step = step
found = []
for compiled in (False, True):
    torch.manual_seed(0)
    layer = StochNorm2d(6, p=0.5)
    function = torch.compile(layer, backend="aot_eager") if compiled else layer
    x = torch.arange(48.0).view(2, 6, 2, 2).sin().requires_grad_()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        y = function(x)
    y.square().sum().backward()
    found.append([y, x.grad, layer.weight.grad, layer.running_mean])
    told = [str(warning.message) for warning in told if "talib_fast" in str(warning.message)]
    assert len(told) == (sys.argv[3] == "1" and not compiled), told
    if told:
        print(told[0], type(y.grad_fn).__name__)
torch.save(found, sys.argv[4])
"""


@pytest.mark.parametrize("step", ["python", "node"])
def test_layers_without_code_for_the_device(step, tmp_path):
    """In Python's and in C++'s step, eager and compiled: PyTorch serves, to the kernels' values, and one warning."""
    if reason := simt_support.missing("plain"):
        pytest.skip(reason)
    if step == "node" and not compiled_nodes().loaded:
        pytest.skip(compiled_nodes().status)
    library, found = simt_support.build("plain") / "libtalib_fast_simt.so", []
    for unserved in ("0", "1"):
        done = subprocess.run(
            [sys.executable, "-c", LAYERS_WITHOUT_CODE, library, step, unserved, tmp_path / "found.pt"],
            cwd=simt_support.ROOT, capture_output=True, text=True, timeout=PATIENCE,
            env={**os.environ, "TALIB_FAST_BACKEND": "pytorch", "SIMT_UNSERVED": unserved},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found.append(torch.load(tmp_path / "found.pt"))
    torch.testing.assert_close(*found)
    assert done.stdout.startswith(
        "talib_fast falls back to PyTorch on cpu: the kernels are built for others, and this GPU is of compute "
        "capability 9.0 (cudaErrorNoKernelImageForDevice): install talib_fast again with TORCH_CUDA_ARCH_LIST=9.0"
    )
    assert done.stdout.endswith(" StochNormBackward\n") == (step == "node")


@pytest.mark.parametrize("operation", ["stoch_norm", "squared_distance", "spectral_tail"])
def test_fuzzed_kernels(operation):
    """In blocks and orders of threads that are drawn for every example."""
    examples = os.environ.get("TALIB_FAST_FUZZ_EXAMPLES", "100")
    run(f"test_fuzz_{operation}.py::test_{operation}", "plain", "cpu", {"TALIB_FAST_FUZZ_EXAMPLES": examples})


def test_every_kernel_runs_on_a_gpu(tmp_path):
    """In the cases that gpu.sh begins with, and gives to compute-sanitizer in float32 and bfloat16."""
    log = tmp_path / "launches"
    run("test_every_kernel.py", "plain", "cpu", {**simt_support.GPU, "SIMT_LOG": str(log)})
    every = set(simt_support.kernels(simt_support.build("plain") / "libtalib_fast_simt.so").values())
    assert {"resident_kernel<Forward<float, false>, 1, true>", "sliced_kernel<Forward<float, false>, 1, true>"} < every
    not_needed = {"solve_kernel<2, true>", "solve_kernel<4, true>"}  # where that much shared memory is
    assert sorted(every - {launch.kernel for launch in simt_support.launches(log)}) == sorted(not_needed)


BLOCKS_AT_ONCE = 2 * int(simt_support.GPU["SIMT_MULTIPROCESSORS"])


@pytest.mark.parametrize("operation", ["stoch_norm", "activation"])
def test_more_items_than_blocks(operation, tmp_path):
    log = tmp_path / "launches"
    run(f"test_{operation}.py", "plain", "cpu and more_items_than_blocks", {**simt_support.GPU, "SIMT_LOG": str(log)})
    passes = simt_support.launches(log)
    assert all(launch.blocks == BLOCKS_AT_ONCE for launch in passes)
    fused = "true" if operation == "activation" else "false"
    kernels = {re.sub(r" \d+,", "", launch.kernel) for launch in passes}  # whatever the width of the vectors
    assert kernels == {
        f"sliced_kernel<{direction}<{dtype}, {fused}>, {rows}>"
        for direction in ("Forward", "Backward")
        for dtype in ("float", "__nv_bfloat16")
        for rows in ("true", "false")
    }


def test_there_are_more_items_than_blocks(tmp_path):
    """Twice the multiprocessors with twice the cache leave slices as they are; no device has more blocks than items."""
    if reason := simt_support.missing("plain"):
        pytest.skip(reason)
    log = tmp_path / "launches"
    twice = {name: str(2 * int(simt_support.GPU[name])) for name in ("SIMT_MULTIPROCESSORS", "SIMT_CACHE_BYTES")}
    environment = {**os.environ, **simt_support.GPU, **twice, "SIMT_LOG": str(log), "TALIB_FAST_BACKEND": "pytorch"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (simt_support.ROOT, simt_support.ROOT / "tests", *sys.path)))
    library = simt_support.build("plain") / "libtalib_fast_simt.so"
    command = [sys.executable, "-c", EVERY_PASS_WITH_MANY_ITEMS, library]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-5000:]
    passes = simt_support.launches(log)
    assert len(passes) == 8 and all(launch.blocks > BLOCKS_AT_ONCE for launch in passes), passes


EVERY_PASS_WITH_MANY_ITEMS = """
import sys
import torch
from test_stoch_norm import MANY_ITEMS, OP, layout
torch.ops.load_library(sys.argv[1])
for name, shape in MANY_ITEMS.items():
    for dtype in (torch.float32, torch.bfloat16):
        x = layout(torch.zeros(shape, dtype=dtype), name)
        mask, (mean, var) = torch.ones(shape[1], dtype=torch.bool), torch.ones(2, shape[1])
        output, statistics, _ = OP.stoch_norm_forward(x, None, None, mean, var, mask, 0.1, 1e-5)
        OP.stoch_norm_backward(output, x, statistics, None, mask)
"""


def run(tests, kind, chosen, settings, *options):
    """Some of a file's tests on the kernels of that kind of build."""
    if reason := simt_support.missing(kind):
        pytest.skip(reason)
    library = simt_support.build(kind) / "libtalib_fast_simt.so"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--library", library, "-k", chosen]
    environment = {**simt_support.sanitizer_environment(kind), "TALIB_FAST_BACKEND": "pytorch", **settings}
    environment.pop("COVERAGE_PROCESS_CONFIG", None)  # other tests cover the Python, and it takes time
    done = subprocess.run(
        [*command, *options, simt_support.ROOT / "tests" / tests],
        cwd=simt_support.ROOT, capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    assert " passed" in done.stdout
