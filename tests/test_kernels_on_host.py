"""The CUDA kernels, compiled by g++, serve the operation's own tests: plain, and under sanitizers."""

import os
import subprocess
import sys

import pytest
import simt_support

KERNELS = "cpu and (TestOperation or TestKernels) and not more_threads and not larger_than_the"
AGAIN = f"{KERNELS} and not gradcheck and not opcheck"  # derivatives and schemas, which no order of threads changes
# A thread or block more costs a sanitizer much: what it runs is small, and still takes every path of the kernels.
SMALL = {
    "stoch_norm": "cpu and TestKernels and (every_shape or one_branch or equal_bits or shifted or drawn) "
    "and not 48 and not 260 and not 160 and not bfloat16",  # which walks as float16 does
    "activation": "cpu and TestKernels and every_shape and not strided and (relu+residual or leaky_relu or silu)",
    "squared_distance": "cpu and TestKernels and not more_threads and not larger and not 1003 and not 159",
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
        ("activation", "plain", "cpu and TestKernels", {}),  # what else it does is PyTorch's or stoch_norm's
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


@pytest.mark.parametrize("operation", ["stoch_norm", "squared_distance", "spectral_tail"])
def test_fuzzed_kernels(operation):
    """In blocks and orders of threads that test_fuzz.py draws for every example."""
    examples = os.environ.get("TALIB_FAST_FUZZ_EXAMPLES", "100")
    run(f"test_fuzz.py::test_{operation}", "plain", "cpu", {"TALIB_FAST_FUZZ_EXAMPLES": examples})


def run(tests, kind, chosen, settings):
    """Some of a file's tests on the kernels of that kind of build."""
    if reason := simt_support.missing(kind):
        pytest.skip(reason)
    library = simt_support.build(kind) / "libtalib_fast_simt.so"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--library", library, "-k", chosen]
    environment = {**simt_support.sanitizer_environment(kind), "TALIB_FAST_BACKEND": "pytorch", **settings}
    environment.pop("COVERAGE_PROCESS_CONFIG", None)  # other tests cover the Python, and it takes time
    done = subprocess.run(
        [*command, simt_support.ROOT / "tests" / tests],
        cwd=simt_support.ROOT, capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    assert " passed" in done.stdout
