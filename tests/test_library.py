import os
import re
import subprocess
import sys

import pytest
import torch

import talib_fast
from talib_fast import finetune, ops
from talib_fast.ops.library import Compiled


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )


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


class TestLoading:
    @pytest.fixture
    def package(self, tmp_path, monkeypatch):
        """A folder that stands for the installed package, without a compiled library at first."""
        (tmp_path / "ops").mkdir()
        monkeypatch.setattr("talib_fast.ops.library.__file__", str(tmp_path / "ops" / "library.py"))
        return tmp_path

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
