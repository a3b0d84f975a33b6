import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from build_support import LIBRARY, NODES, build_wheel, copy_of_the_tree, info, wheel_of
from compiler_support import needs_compiler
from packages import Failed


@pytest.fixture
def source(tmp_path):
    return copy_of_the_tree(tmp_path)


def remove_kernels(source: Path) -> None:
    """Remove the package's own, which take long and are compiled by other tests."""
    for kernels in (*(source / "csrc" / "cpu").glob("*.cpp"), *(source / "csrc" / "cuda").glob("*.cu")):
        kernels.unlink()


def needed(library: Path) -> set[str]:
    """The shared libraries that a library asks the loader for."""
    if shutil.which("readelf") is None:
        pytest.skip("no readelf")
    said = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"NEEDED.*\[(.+)\]", said))


def test_a_missing_compiler_is_one_sentence(source):
    names, said = build_wheel(source, CXX="/nonexistent/g++")
    assert said.count("talib_fast: the compiled library is not built") == 1
    assert "(there is no C++ compiler /nonexistent/g++)" in said and "install g++ and ninja" in said
    assert "talib_fast/ops/stoch_norm.py" in names and LIBRARY not in names


@needs_compiler
def test_a_failing_compiler_is_one_sentence(source):
    shutil.rmtree(source / "csrc" / "cpu")  # which takes long
    (source / "csrc" / "build_info.cpp").write_text("int x = y;\n")
    names, said = build_wheel(source)
    assert re.search(
        r"not built \(csrc/build_info\.cpp:1:9: error: .y. was not declared in this scope\); the pack", said
    )
    assert LIBRARY not in names


def test_nothing_is_compiled_on_request(source):
    names, said = build_wheel(source, TALIB_FAST_NO_EXT="1")
    assert said.count("TALIB_FAST_NO_EXT=1 is set, so nothing is compiled") == 1
    assert LIBRARY not in names


@needs_compiler
def test_cuda_kernels_asked_for_by_name_must_be_there(source):
    (source / "csrc" / "cuda").mkdir(exist_ok=True)
    (source / "csrc" / "cuda" / "another.cu").touch()
    with pytest.raises(
        Failed,
        match=r"talib_fast: FORCE_CUDA=1 asks for CUDA kernels, but they cannot be built: "
        r"CUDA_HOME is /nonexistent, which holds no bin/nvcc: install the toolkit of CUDA \d+ ",
    ):
        build_wheel(source, FORCE_CUDA="1", CUDA_HOME="/nonexistent")
    assert not list(source.parent.glob("*.whl"))


KERNEL = """
#include "registration.h"
__global__ void fill(float* x) { x[threadIdx.x] = 1; }
torch::stable::Tensor forward(torch::stable::Tensor input) {
  fill<<<1, 32>>>(static_cast<float*>(input.data_ptr()));
  return input;
}
STABLE_TORCH_LIBRARY_IMPL(talib_fast, CUDA, m) { talib_fast::register_kernel<"stoch_norm_forward", &forward>(m); }
"""


@needs_compiler
class TestCuda:
    """Against any torch, also one without CUDA; no GPU is needed."""

    @pytest.fixture(autouse=True)
    def _one_kernel(self, source, toolkit):
        """One small kernel in place of the package's own."""
        remove_kernels(source)
        (source / "csrc" / "cuda" / "fill.cu").write_text(KERNEL)

    def test_they_are_built_on_request(self, source):
        plain = {"NVCC_APPEND_FLAGS": "--no-compress"}  # to find names in the machine code
        _, said = build_wheel(source, FORCE_CUDA="1", TORCH_CUDA_ARCH_LIST="8.0;9.0", **plain)
        assert "the CUDA kernels are not built" not in said and "the compiled library is not built" not in said
        assert re.search(r"^  for cuda  fill, by nvcc \d+\.\d+ for 8\.0 9\.0$", info(source), re.M)
        library = source.parent / "unpacked" / LIBRARY
        assert b"sm_90" in library.read_bytes() and b"_Z4fillPf" in library.read_bytes()
        # of torch only what every build of it has, so that one binary serves them all; CUDA's runtime is inside
        torch_libraries = {name for name in needed(library) if re.match("libtorch|libc10|libcu", name)}
        assert torch_libraries == {"libtorch.so", "libtorch_cpu.so", "libc10.so"}

    def test_a_driver_too_old_for_them_leaves_gpus_to_pytorch(self, source, tmp_path):
        build_wheel(source, FORCE_CUDA="1", TORCH_CUDA_ARCH_LIST="9.0")
        for major, served in ((12, "PyTorch"), (99, "compiled")):
            driver = tmp_path / "libcuda.so.1"
            (tmp_path / "driver.cpp").write_text(
                "#include <cstdio>\n"
                f'extern "C" int cuDriverGetVersion(int* version) {{ *version = {major}080; return 0; }}\n'
                'extern "C" int cuInit(unsigned) { std::fputs("initialised", stderr); return 999; }\n'
            )
            subprocess.run(["c++", "-shared", "-fPIC", "-o", driver, tmp_path / "driver.cpp"], check=True)
            environment = {"LD_LIBRARY_PATH": str(tmp_path), "PYTHONWARNINGS": "ignore"}
            said = info(source, **environment)
            (line,) = re.findall(r"^stoch_norm +cuda .*", said, re.M)
            assert re.match(rf"stoch_norm +cuda +{served} ", line)
            assert bool(re.search(r"the kernels are of CUDA \d+\.\d+, and the driver serves CUDA 12\.8$", line)) == (
                served == "PyTorch"
            )
            # a process that is forked after CUDA is initialised could not use it
            imported = subprocess.run(
                [sys.executable, "-c", "import talib_fast; print(talib_fast.ops.compiled().loaded)"],
                cwd=source.parent / "unpacked", capture_output=True, text=True, env={**os.environ, **environment},
            )  # fmt: skip
            assert (imported.stdout, imported.stderr) == ("True\n", "")

    def test_when_they_fail_the_rest_is_built(self, source):
        (source / "csrc" / "cuda" / "wrong.cu").write_text("__global__ void f(float* x) { x[0] = y; }\n")
        sentence = (
            r'compiling them failed \(csrc/cuda/wrong\.cu\(1\): error: identifier "y" is undefined\); fix that or '
        )
        with pytest.raises(Failed, match=f"talib_fast: FORCE_CUDA=1 asks for CUDA kernels, but {sentence}"):
            build_wheel(source, FORCE_CUDA="1", TORCH_CUDA_ARCH_LIST="9.0")
        # the same, but not asked for by name: a torch that says it was built with CUDA
        setup = (source / "setup.py").read_text()
        (source / "setup.py").write_text(setup.replace("torch_cuda=torch.version.cuda", "torch_cuda=toolkit.version"))
        _, said = build_wheel(source, TORCH_CUDA_ARCH_LIST="9.0")
        assert re.search(f"^ *talib_fast: the CUDA kernels are not built: {sentence}", said, re.M)
        assert re.search(f"^  for cuda  not built: {sentence}", info(source), re.M)


@needs_compiler
class TestNodes:
    """The library of autograd nodes."""

    @pytest.fixture(autouse=True)
    def _no_kernels(self, source):
        remove_kernels(source)

    def test_they_are_for_this_torch_and_this_python(self, source):
        names, said = build_wheel(source, TALIB_FAST_NO_AUTOGRAD="0")
        assert {LIBRARY, NODES} <= set(names) and "the library of autograd nodes is not built" not in said
        python = f"cp{sys.version_info.major}{sys.version_info.minor}"
        assert f"-{python}-{python}{sys.abiflags}-" in wheel_of(source).name
        loaded = rf"^autograd +{re.escape(Path(NODES).name)} is loaded$"
        assert re.search(loaded, info(source, TALIB_FAST_AUTOGRAD="auto"), re.M)
        # a wheel for every Python holds none that an earlier build left
        wheel_of(source).unlink()
        names, _ = build_wheel(source, TALIB_FAST_NO_AUTOGRAD="1")
        assert LIBRARY in names and NODES not in names and "-cp310-abi3-" in wheel_of(source).name

    def test_when_they_fail_the_rest_is_built(self, source):
        nodes = source / "csrc" / "autograd" / "stoch_norm.cpp"
        nodes.write_text(nodes.read_text().replace("torch/csrc/utils/pybind.h", "torch/csrc/utils/missing.h"))
        sentence = (
            r"^ *talib_fast: the library of autograd nodes is not built \(csrc/autograd/stoch_norm\.cpp:\d+:\d+: "
            r"fatal error: .*missing\.h.*\); the package works without it, but is slower on small feature maps$"
        )
        (source / NODES).write_text("of an earlier build")
        done = subprocess.run(
            [sys.executable, "setup.py", "build_ext", "--inplace"], cwd=source, text=True, timeout=600, check=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**os.environ, "FORCE_CUDA": "0", "TALIB_FAST_NO_AUTOGRAD": "0"},
        )  # fmt: skip
        assert len(re.findall(sentence, done.stdout, re.M)) == 1
        assert (source / LIBRARY).exists() and not (source / NODES).exists()

        names, said = build_wheel(source, TALIB_FAST_NO_AUTOGRAD="0")
        assert len(re.findall(sentence, said, re.M)) == 1
        assert LIBRARY in names and NODES not in names
        without = r"^autograd +talib_fast was installed without it$"
        assert re.search(without, info(source, TALIB_FAST_AUTOGRAD="auto"), re.M)
