from pathlib import Path

import build_parts
import pytest
from build_parts import Impossible, Toolkit

TOOLKIT = Toolkit("/opt/cuda/bin/nvcc", "/opt/cuda", "13.0", ("7.5", "9.0", "10.0"), ("/opt/cuda/lib",))


def decide(environ=None, **changes):
    """What is decided for a CUDA torch with a compiler and a toolkit, but for ``changes``."""
    found = {
        **{"compiler": "/usr/bin/c++", "torch_version": "2.14.1+cu130", "torch_cuda": "13.0"},
        **{"toolkit": TOOLKIT, "cuda_sources": ["csrc/cuda/stoch_norm.cu"]},
        "autograd_sources": ["csrc/autograd/stoch_norm.cpp"],
    }
    return build_parts.decide(environ or {}, **{**found, **changes})


CPU_TORCH = {"torch_version": "2.13.0+cpu", "torch_cuda": None}


def test_everything_is_built_where_everything_is_there():
    assert decide() == build_parts.Plan()
    assert decide({"FORCE_CUDA": "1"}) == decide({"FORCE_CUDA": "1"}, **CPU_TORCH) == build_parts.Plan()


@pytest.mark.parametrize(
    ("environ", "changes", "reason"),
    [
        ({"TALIB_FAST_NO_EXT": "1"}, {}, "TALIB_FAST_NO_EXT=1 is set, so nothing is compiled"),
        ({"CXX": "clang++"}, {"compiler": None}, "is not built (there is no C++ compiler clang++); the package works"),
    ],
)
def test_no_library_for_a_reason(environ, changes, reason):
    assert reason in decide(environ, **changes).without_library
    with pytest.raises(Impossible, match=r"FORCE_CUDA=1 asks for CUDA kernels, but they cannot be built: "):
        decide({**environ, "FORCE_CUDA": "1"}, **changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"cuda_sources": []}, "csrc/cuda holds no .cu file"),
        (
            {"toolkit": "no CUDA toolkit is found"},
            "no CUDA toolkit is found: install the toolkit of CUDA 13 and put its nvcc on the PATH or set CUDA_HOME",
        ),
        (
            {**CPU_TORCH, "toolkit": "no CUDA toolkit is found"},
            "no CUDA toolkit is found: install the toolkit of CUDA 12 or later and put its nvcc on the PATH",
        ),
        (
            {"torch_cuda": "12.8"},
            "torch is built with CUDA 12.8, but /opt/cuda/bin/nvcc is of CUDA 13.0: "
            "set CUDA_HOME to a toolkit of CUDA 12",
        ),
        (
            {**CPU_TORCH, "toolkit": Toolkit("/opt/cuda/bin/nvcc", "/opt/cuda", "11.8", ("9.0",), ())},
            "C++20 needs CUDA 12 or later, but /opt/cuda/bin/nvcc is of CUDA 11.8",
        ),
    ],
)
def test_no_cuda_kernels_for_a_reason(changes, reason):
    with pytest.raises(Impossible) as raised:
        decide({"FORCE_CUDA": "1"}, **changes)
    assert f"but they cannot be built: {reason}" in str(raised.value)
    if changes.get("torch_cuda", ...) is not None:
        plan = decide(**changes)
        assert plan.without_cuda.startswith(reason) and not plan.without_library


def test_a_torch_without_cuda_gets_no_cuda_kernels_unasked():
    reason = "torch 2.13.0+cpu is built without CUDA (FORCE_CUDA=1 builds them anyway)"
    assert decide(**CPU_TORCH) == build_parts.Plan(without_cuda=reason)


@pytest.mark.parametrize(
    ("environ", "changes", "reason"),
    [
        ({"TALIB_FAST_NO_AUTOGRAD": "1"}, {}, "TALIB_FAST_NO_AUTOGRAD=1 is set, so that any torch can load the build"),
        ({"TALIB_FAST_NO_AUTOGRAD": "0"}, {"autograd_sources": []}, "csrc/autograd holds no .cpp file"),
    ],
)
def test_no_autograd_nodes_for_a_reason(environ, changes, reason):
    assert decide(environ, **changes) == build_parts.Plan(without_autograd=reason)
    assert decide({**environ, "FORCE_CUDA": "1"}, **changes) == build_parts.Plan(without_autograd=reason)
    assert build_parts.autograd_failed(reason) == (
        f"the library of autograd nodes is not built ({reason}); the package works without it, "
        "but is slower on small feature maps"
    )


class TestToolkit:
    VERSION = "Cuda compilation tools, release 12.9, V12.9.86"
    ARCHITECTURES = "compute_75\ncompute_90\ncompute_90a\ncompute_120\n"
    DRYRUN = '#$ TOP={root}/bin/..\n#$ LIBRARIES=  "-L{root}/bin/../lib/stubs" "-L{root}/bin/../lib"\n'

    @pytest.fixture
    def folder(self, tmp_path):
        """A folder whose ``bin/nvcc`` is a wrapper of a toolkit that lies elsewhere."""
        nvcc = tmp_path / "bin" / "nvcc"
        nvcc.parent.mkdir()
        answers = {"--version": self.VERSION, "--list-gpu-arch": self.ARCHITECTURES}
        answers["--dryrun"] = self.DRYRUN.format(root="/opt/cuda-12.9")
        cases = "\n".join(f"{question}) echo '{answer}' ;;" for question, answer in answers.items())
        nvcc.write_text(f"#!/bin/sh\ncase $1 in\n{cases}\nesac\n")
        nvcc.chmod(0o755)
        return tmp_path

    def test_a_wrapper_is_asked_for_its_toolkit(self, folder):
        found = Toolkit(
            str(folder / "bin" / "nvcc"), "/opt/cuda-12.9", "12.9", ("7.5", "9.0", "12.0"),
            ("/opt/cuda-12.9/lib/stubs", "/opt/cuda-12.9/lib"),
        )  # fmt: skip
        assert build_parts.find_toolkit({"CUDA_HOME": str(folder)}) == found
        assert build_parts.find_toolkit({"CUDA_PATH": str(folder), "PATH": ""}) == found
        assert build_parts.find_toolkit({"PATH": str(folder / "bin")}) == found
        assert build_parts.find_toolkit({"PATH": ""}, str(folder)) == found

    def test_a_missing_toolkit_is_said(self, folder, tmp_path):
        assert build_parts.find_toolkit({"PATH": ""}) == "no CUDA toolkit is found"
        elsewhere = {"PATH": str(folder / "bin"), "CUDA_HOME": "/nonexistent"}
        assert build_parts.find_toolkit(elsewhere) == "CUDA_HOME is /nonexistent, which holds no bin/nvcc"
        (folder / "bin" / "nvcc").write_text("#!/bin/sh\necho hello\n")
        assert build_parts.find_toolkit({"CUDA_HOME": str(folder)}).endswith("/bin/nvcc does not behave like nvcc")


# what the nvcc of 12.9 and of 13.0 list, from 7.5 on
CUDA_12 = ["7.5", "8.0", "8.6", "8.7", "8.9", "9.0", "10.0", "10.1", "10.3", "12.0", "12.1"]
CUDA_13 = ["7.5", "8.0", "8.6", "8.7", "8.8", "8.9", "9.0", "10.0", "11.0", "10.3", "12.0", "12.1"]
ON_A_CHIP = ["8.7", "8.8", "10.1", "11.0"]  # which take no machine code but their own, or may not


@pytest.mark.parametrize(
    ("given", "supported", "visible", "expected"),
    [
        (None, CUDA_12, [], "7.5 8.0+PTX 8.6 8.9 9.0 10.0 12.0+PTX"),
        (None, CUDA_13, [], "7.5 8.0+PTX 8.6 8.9 9.0 10.0 11.0 12.0+PTX"),
        (None, ["5.0", "7.0", "7.5", "8.0", "8.6", "8.9", "9.0"], [], "7.5 8.0+PTX 8.6 8.9 9.0+PTX"),
        (None, ["7.0", "7.5"], [], "7.5+PTX"),
        ("native", ["7.5", "8.0", "9.0"], [], "7.5 8.0+PTX 9.0+PTX"),
        (None, ["7.5", "8.0", "9.0"], ["9.0"], "9.0+PTX"),
        (None, ["8.0", "10.0"], ["10.0", "8.0", "10.0"], "8.0 10.0+PTX"),
        (None, ["7.5", "8.0", "9.0"], ["8.0", "9.0"], "8.0 9.0+PTX"),
        (None, ["8.0", "9.0"], ["12.0"], "9.0+PTX"),
        ("8.0;9.0+PTX", ["7.5"], ["7.5"], "8.0 9.0+PTX"),
        (" Hopper ", ["7.5"], [], "Hopper"),
    ],
)
def test_architectures(given, supported, visible, expected):
    environ = {} if given is None else {"TORCH_CUDA_ARCH_LIST": given}
    assert build_parts.architecture_list(environ, supported, visible) == expected


def serves(architecture, gpu):
    """Whether what is compiled for one of a list's architectures runs on a GPU."""
    name, plus, _ = architecture.partition("+PTX")
    (major, minor), (gpu_major, gpu_minor) = (map(int, number.split(".")) for number in (name, gpu))
    in_machine_code = name == gpu if gpu in ON_A_CHIP else major == gpu_major and minor <= gpu_minor
    return in_machine_code or (bool(plus) and (major, minor) <= (gpu_major, gpu_minor))


@pytest.mark.parametrize("supported", [CUDA_12, CUDA_13])
def test_every_gpu_is_served(supported):
    built = build_parts.architecture_list({}, supported, []).split()
    for gpu in {*CUDA_12, *CUDA_13, "12.9", "13.0"}:
        assert any(serves(architecture, gpu) for architecture in built), gpu
    in_machine_code = [architecture.removesuffix("+PTX") for architecture in built]
    assert all(any(serves(name, gpu) for name in in_machine_code) for gpu in set(supported) - {"8.7", "8.8", "10.1"})


@pytest.mark.parametrize(
    ("jobs", "cores", "sources", "threads"), [(None, 16, 3, 5), ("4", 16, 3, 1), ("8", 2, 2, 4), ("many", 6, 3, 2)]
)
def test_nvcc_keeps_to_max_jobs(jobs, cores, sources, threads):
    assert build_parts.nvcc_threads({} if jobs is None else {"MAX_JOBS": jobs}, cores, sources) == threads


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("/src/csrc/cuda/a.cu(3): error: identifier “x” is undefined\n", "csrc/cuda/a.cu(3): error: identifier “x” is"),
        ('a.cu(1): error #177-D: variable "x" was declared', "a.cu(1): error #177-D: variable"),
        ("nvcc fatal   : Unsupported gpu architecture 'compute_20'", "nvcc fatal   : Unsupported"),
        ("/usr/bin/ld: cannot find -lcudart_static: No such file", "/usr/bin/ld: cannot find -lcudart_static"),
        ("a.cpp:2:1: error: expected ‘;’ before ‘}’ token", "a.cpp:2:1: error: expected ';' before '}' token"),
    ],
)
def test_the_first_error_is_found(line, found):
    noise = ["[1/2] c++ -Werror=all-warnings -c error.cpp\n", "a.cpp:1:1: warning: unused\n"]
    assert build_parts.first_error([*noise, line, "a.cu(9): error: the second\n"], Path("/src")).startswith(found)
    assert build_parts.first_error(noise, Path("/src")) == ""


def test_what_the_library_says_of_itself():
    text = build_parts.build_text("2.13.0+cpu", ["csrc/cpu/b.cpp", "csrc/cpu/a.cpp"], [], {"without_cuda": "why = not"})
    assert text == "torch=2.13.0\ncpu=a b\ncuda=\nwithout_cuda=why = not\n"
    assert build_parts.autograd_macro("2.13.0+cpu") == ("TALIB_FAST_TORCH", '"2.13.0+cpu"')
    assert build_parts.c_string('say "$HOME" \\ é\n') == r'"say \"\044HOME\" \\ ?\n"'


def test_other_sources_are_another_symbol(tmp_path):
    def symbol(**files):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        for name, content in files.items():
            (folder / name).mkdir(parents=True)
            (folder / name / "a.cu").write_text(content)
        return build_parts.sources_symbol(folder)

    assert symbol(cuda="int x;") == symbol(cuda="int x;")
    others = [symbol(cuda="int y;"), symbol(gpu="int x;"), symbol(cuda="int x;", cpu=""), symbol(cuda="", cpu="x")]
    assert len({symbol(cuda="int x;"), *others}) == 5
