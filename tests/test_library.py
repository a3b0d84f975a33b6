import os
import re
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from types import SimpleNamespace

import pytest
import torch
from process_support import PATIENCE

import talib_fast
from talib_fast import finetune, ops
from talib_fast.ops.library import Compiled


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, **environment}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=PATIENCE)


def test_backends_name_every_operation_on_every_device():
    served = ops.backends()
    assert set(served) == {"stoch_norm", "squared_distance", "spectral_tail"}
    for devices in served.values():
        assert set(devices) == {"cpu", "cuda"}
        assert all(backend in ("compiled", "PyTorch") and reason for backend, reason in devices.values())


def test_the_compiled_library_says_what_it_was_built_by():
    compiled = ops.compiled()
    if not compiled.loaded:
        pytest.skip(compiled.status)
    assert re.fullmatch(r"_C\S*\.so is loaded", compiled.status)
    assert re.match(r"(GCC|.*[Cc]lang) ?\d+\.\d+", compiled.build["compiler"])
    assert re.fullmatch(r"2\.\d+\.\d+\S*", compiled.build["torch"])
    assert {"cpu", "cuda"} < set(compiled.build)
    assert ("without_cuda" in compiled.build) != ({"nvcc", "architectures"} <= set(compiled.build))


def test_every_operation_has_a_forward_and_a_backward():
    for name in ops.backends():
        assert hasattr(torch.ops.talib_fast, f"{name}_forward") and hasattr(torch.ops.talib_fast, f"{name}_backward")


@pytest.mark.parametrize(
    ("choice", "code", "message"),
    [
        ("pytorch", 0, "TALIB_FAST_BACKEND=pytorch leaves compiled kernels alone"),
        ("fast", 1, "ValueError: TALIB_FAST_BACKEND must be auto, compiled or pytorch, got 'fast'"),
    ],
)
def test_a_backend_can_be_chosen_by_name(choice, code, message):
    done = run("import talib_fast; print(talib_fast.ops.backends())", TALIB_FAST_BACKEND=choice)
    assert done.returncode == code and message in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("choice", "code", "message"),
    [
        ("python", 0, "TALIB_FAST_AUTOGRAD=python leaves it alone"),
        ("fast", 1, "ValueError: TALIB_FAST_AUTOGRAD must be auto or python, got 'fast'"),
    ],
)
def test_autograd_nodes_can_be_left_to_python(choice, code, message):
    done = run("import talib_fast; print(talib_fast.ops.compiled_nodes().status)", TALIB_FAST_AUTOGRAD=choice)
    assert done.returncode == code and message in done.stdout + done.stderr


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A folder that stands for the installed package, without a compiled library at first."""
    (tmp_path / "ops").mkdir()
    monkeypatch.setattr("talib_fast.ops.library.__file__", str(tmp_path / "ops" / "library.py"))
    return tmp_path


class TestLoading:
    def test_without_a_library_pytorch_serves(self, package, monkeypatch):
        assert ops.library._load_compiled() == Compiled(False, "talib_fast was installed without compiled kernels")
        monkeypatch.setenv("TALIB_FAST_BACKEND", "compiled")
        with pytest.raises(ImportError, match="TALIB_FAST_BACKEND=compiled, but talib_fast was installed without"):
            ops.library._load_compiled()

    def test_a_broken_library_is_named(self, package, monkeypatch):
        (package / "_C.abi3.so").write_bytes(b"not a library")
        with pytest.warns(UserWarning, match=r"falls back to PyTorch: _C\.abi3\.so does not load"):
            ops.library._load_compiled()
        monkeypatch.setenv("TALIB_FAST_BACKEND", "compiled")
        with pytest.raises(ImportError, match=r"_C\.abi3\.so does not load"):
            ops.library._load_compiled()

    def test_a_good_library_is_loaded(self, package, monkeypatch):
        (package / "_C.abi3.so").touch()
        loaded = []
        monkeypatch.setattr(torch.ops, "load_library", loaded.append)
        monkeypatch.setattr(torch.ops.talib_fast, "build_info", lambda: "compiler=hand\ncuda=\n", raising=False)
        build = {"compiler": "hand", "cuda": ""}
        assert ops.library._load_compiled() == Compiled(True, "_C.abi3.so is loaded", build)
        assert loaded == [package / "_C.abi3.so"]


class TestLoadingNodes:
    NAME = f"_autograd{EXTENSION_SUFFIXES[0]}"
    KERNELS = Compiled(True, "_C.abi3.so is loaded")

    @pytest.fixture(autouse=True)
    def _no_choice(self, monkeypatch):
        monkeypatch.delenv("TALIB_FAST_AUTOGRAD", raising=False)

    @pytest.fixture
    def imported(self, monkeypatch):
        """The names of the modules that were to be imported; none of them is."""
        names = []
        monkeypatch.setattr(ops.library, "importlib", SimpleNamespace(import_module=names.append))
        return names

    def text(self, version: str) -> bytes:
        """The text that the library's file has among its other bytes."""
        return b"\x7fELF\0talib_fast._autograd is built for torch=" + version.encode() + b"\0\xff"

    def test_a_good_library_is_loaded(self, package, imported):
        (package / self.NAME).write_bytes(self.text(torch.__version__))
        _, came_of_it = ops.library._load_autograd(self.KERNELS)
        assert came_of_it == Compiled(True, f"{self.NAME} is loaded")
        assert imported == ["talib_fast._autograd"]

    def test_a_choice_leaves_it_alone(self, package, imported, monkeypatch):
        (package / self.NAME).write_bytes(self.text(torch.__version__))
        monkeypatch.setenv("TALIB_FAST_AUTOGRAD", "python")
        left = None, Compiled(False, "TALIB_FAST_AUTOGRAD=python leaves it alone")
        assert ops.library._load_autograd(self.KERNELS) == left and not imported
        monkeypatch.setenv("TALIB_FAST_AUTOGRAD", "compiled")
        with pytest.raises(ValueError, match="TALIB_FAST_AUTOGRAD must be auto or python, got 'compiled'"):
            ops.library._load_autograd(self.KERNELS)

    def test_without_kernels_there_are_no_nodes(self, package, imported):
        (package / self.NAME).write_bytes(self.text(torch.__version__))
        kernels = Compiled(False, "_C.abi3.so does not load")
        assert ops.library._load_autograd(kernels) == (None, kernels) and not imported

    def test_without_a_library_python_serves(self, package, imported):
        left = None, Compiled(False, "talib_fast was installed without it")
        assert ops.library._load_autograd(self.KERNELS) == left
        (package / "_autograd.cpython-39-x86_64-linux-gnu.so").write_bytes(self.text(torch.__version__))
        reason = "_autograd.cpython-39-x86_64-linux-gnu.so is built for another Python: install talib_fast again"
        assert ops.library._load_autograd(self.KERNELS) == (None, Compiled(False, reason)) and not imported

    # the second is another build of the same version, the third a file that says nothing
    @pytest.mark.parametrize("version", [f"{torch.__version__}0", f"{torch.__version__.partition('+')[0]}+other", None])
    def test_under_another_torch_it_is_not_loaded(self, version, package, imported):
        (package / self.NAME).write_bytes(self.text(version) if version else b"\x7fELF")
        built_for = version or "an unknown version"
        reason = f"{self.NAME} is built for torch {built_for}, not {torch.__version__}: install talib_fast again"
        assert ops.library._load_autograd(self.KERNELS) == (None, Compiled(False, reason)) and not imported

    def test_a_broken_library_is_named(self, package, monkeypatch):
        (package / self.NAME).write_bytes(self.text(torch.__version__))
        monkeypatch.setattr(talib_fast, "__path__", [str(package)])
        monkeypatch.delitem(sys.modules, "talib_fast._autograd", raising=False)
        module, came_of_it = ops.library._load_autograd(self.KERNELS)
        assert module is None and not came_of_it.loaded
        assert re.match(rf"{re.escape(self.NAME)} does not load: \S", came_of_it.status)

    def test_python_serves_what_no_library_does(self, monkeypatch):
        monkeypatch.setattr(ops.library, "_AUTOGRAD", None)
        assert ops.library.node_function("stoch_norm_step") is None
        monkeypatch.setattr(ops.library, "_AUTOGRAD", SimpleNamespace(stoch_norm_step=abs))
        assert ops.library.node_function("stoch_norm_step") is abs
        assert ops.library.node_function("another") is None


@pytest.mark.parametrize(
    ("has_kernel", "compiled", "expected"),
    [
        (True, Compiled(True, "loaded"), ("compiled", "the compiled library holds a kernel for it")),
        (False, Compiled(True, "loaded"), ("PyTorch", "the compiled library holds no cuda kernel for it")),
        (
            False,
            Compiled(True, "loaded", {"without_cuda": "no CUDA toolkit is found"}),
            ("PyTorch", "the compiled library holds no CUDA kernels: no CUDA toolkit is found"),
        ),
        (False, Compiled(False, "it does not load"), ("PyTorch", "it does not load")),
    ],
)
def test_backends_follow_the_dispatcher(has_kernel, compiled, expected, monkeypatch):
    monkeypatch.setattr(ops.library, "_COMPILED", compiled)
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, key: has_kernel)
    served = ops.backends()["stoch_norm"]
    assert served["cuda"] == expected
    assert "CUDA" not in served["cpu"][1]
    if compiled.loaded and not has_kernel:
        assert served["cpu"] == ("PyTorch", "its compiled kernel needs AVX2, which this processor lacks")


class TestGpusWithoutCode:
    """GPUs that the CUDA kernels are not built for, by a library that is made up."""

    BUILD = Compiled(True, "loaded", {"architectures": "7.5 8.0", "nvcc": "13.0"})
    WHY = "this GPU is of compute capability 11.0 (cudaErrorNoKernelImageForDevice): install it again"
    SENTENCE = f"the kernels are built for 7.5 8.0, and {WHY}"

    @pytest.fixture(autouse=True)
    def _library(self, monkeypatch):
        monkeypatch.setattr(ops.library, "_COMPILED", self.BUILD)
        monkeypatch.setattr(ops.library, "_TOLD", set())
        monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, key: True)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        answers = {None: "", 0: "", 1: self.WHY}
        monkeypatch.setattr(torch.ops.talib_fast, "unserved", answers.get, raising=False)

    @pytest.mark.parametrize(("index", "sentence"), [(0, ""), (1, SENTENCE)])
    def test_each_is_asked(self, index, sentence, monkeypatch):
        assert ops.unserved_gpu(index) == sentence
        monkeypatch.setattr(torch.cuda, "current_device", lambda: index)
        expected = ("PyTorch", sentence) if sentence else ("compiled", "the compiled library holds a kernel for it")
        assert all(devices["cuda"] == expected for devices in ops.backends().values())
        assert all(devices["cpu"][0] == "compiled" for devices in ops.backends().values())

    def test_one_warning_each(self):
        with pytest.warns(UserWarning) as told:
            for _ in range(2):
                ops.library._tell_unserved(torch.device("cuda", 1))
        sentence = f"talib_fast falls back to PyTorch on cuda:1: {self.SENTENCE}"
        assert [str(warning.message) for warning in told] == [sentence]


def test_public_names():
    for module, names in {
        "stochnorm": "StochNorm1d StochNorm2d StochNorm3d convert_model",
        "delta": "L2Regularization SPRegularization BehavioralRegularization AttentionBehavioralRegularization "
        "IntermediateLayerGetter get_attribute channel_attention",
        "bss": "BatchSpectralShrinkage",
        "co_tuning": "CoTuningLoss Relationship Classifier",
        "lwf": "Classifier collect_pretrain_labels",
        "bi_tuning": "Classifier BiTuning Bituning",
        "classifier": "Classifier",
        "knowledge_distillation": "KnowledgeDistillationLoss",
    }.items():
        for name in names.split():
            assert name in getattr(finetune, module).__all__, (module, name)


def test_the_package_reexports_as_upstream_does():
    assert finetune.StochNorm2d is finetune.stochnorm.StochNorm2d
    assert finetune.Classifier is finetune.bi_tuning.Classifier
    assert finetune.Bituning is finetune.BiTuning


def test_star_import_of_delta_brings_torch_and_nn():
    namespace: dict = {}
    exec("from talib_fast.finetune.delta import *", namespace)
    assert namespace["torch"] is torch and namespace["nn"] is torch.nn and "SPRegularization" in namespace


def test_no_top_level_talib_is_shipped():
    assert run("import talib").returncode == 1


def test_version():
    assert talib_fast.__version__.count(".") == 2


def test_import_is_quiet_and_light():
    done = run("import sys, talib_fast; print([m for m in ('matplotlib', 'sklearn', 'PIL') if m in sys.modules])")
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "[]", "")
