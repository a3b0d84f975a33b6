"""The commands: their errors, their exit statuses, and what `info` says."""

import re
import signal
import subprocess
import sys

import pytest
import torch
from process_support import finish

import talib_fast
from talib_fast import __main__ as cli
from talib_fast import errors, info, ops
from talib_fast.ops.library import Compiled
from talib_fast.training.recipes import RECIPES

pytestmark = pytest.mark.usefixtures("kept_signal_handlers")


def test_help_names_every_method(capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["finetune", "--help"])
    out = capsys.readouterr().out
    assert exit.value.code == 0
    for method in RECIPES:
        assert f"\n  {method} " in out


def test_a_command_is_needed(capsys):
    assert cli.main([]) == 2
    assert "the following arguments are required: finetune|predict|evaluate|export|info" in capsys.readouterr().err


def test_info(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert f"torch       {torch.__version__}" in out
    assert f"\nkernels     {ops.compiled().status}\n" in out and f"\nautograd    {ops.compiled_nodes().status}\n" in out
    for operation in ("stoch_norm", "squared_distance", "spectral_tail"):
        assert re.search(rf"^{operation} +cpu +(compiled|PyTorch) +\w", out, re.M)
        assert re.search(rf"^{operation} +cuda +(compiled|PyTorch) +\w", out, re.M)


def test_info_lists_gpus(monkeypatch):
    class Properties:
        name, major, minor, total_memory = "A GPU", 9, 0, 80 * 2**30

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert info.gpus() == ["cuda        no GPU is usable (torch is built with CUDA 13.0)"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    line = "cuda:0      A GPU, 80 GiB, compute capability 9.0, CUDA 13.0"
    monkeypatch.setattr(ops.library, "_COMPILED", Compiled(True, "loaded", {"architectures": "7.5 8.0"}))
    answers = {0: ""}
    monkeypatch.setattr(torch.ops.talib_fast, "unserved", answers.get, raising=False)
    assert info.gpus() == [line]
    answers[0] = "this GPU is of compute capability 9.0 (cudaErrorNoKernelImageForDevice): install it again"
    assert info.gpus() == [line, f"            the kernels are built for 7.5 8.0, and {answers[0]}"]
    monkeypatch.setattr(torch.version, "cuda", None)
    assert info.gpus() == ["cuda        this torch is built without it"]


def test_info_tells_of_the_build():
    build = {"compiler": "GCC 12.2.0", "torch": "2.13.0", "cpu": "stoch_norm", "cuda": "stoch_norm spectral_tail"}
    for_cpu = "  for cpu   stoch_norm, by GCC 12.2.0 with the headers of torch 2.13.0"
    for_cuda = "  for cuda  stoch_norm spectral_tail, by nvcc 13.0 for 8.0 9.0+PTX"
    assert info.built({**build, "nvcc": "13.0", "architectures": "8.0 9.0+PTX"}) == [for_cpu, for_cuda]
    assert info.built({**build, "cpu": "", "cuda": "", "without_cuda": "no CUDA toolkit is found"}) == [
        "  for cpu   no kernel, by GCC 12.2.0 with the headers of torch 2.13.0",
        "  for cuda  not built: no CUDA toolkit is found",
    ]
    assert info.built({}) == []


def test_unexpected_errors_of_the_system_are_sentences():
    full = OSError(28, "No space left on device", "out/results.json")
    assert errors.told(full) == (
        "out/results.json cannot be written (No space left on device), what was finished before is kept: make room, "
        "and give the same command again"
    )
    locked = PermissionError(13, "Permission denied", b"caf\xe9")
    assert errors.told(locked) == (
        "caf\\xe9 cannot be used (Permission denied): change its permissions, or choose another place"
    )
    assert errors.told(OSError("odd")) == "odd"


def start(*words):
    return subprocess.Popen(
        [sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )


def test_an_interrupt_while_torch_is_imported():
    """Python prints every import that has ended; the first of torch's own come seconds before the last."""
    process = start("-X", "importtime", "-m", "talib_fast", "finetune")
    for line in process.stderr:
        if "torch." in line:
            break
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    said = [line for line in err.splitlines() if not line.startswith("import time:")]
    assert code == 130 and said == ["talib_fast: interrupted"]


def test_whoever_reads_the_output_may_leave():
    process = start("-m", "talib_fast", "info")
    process.stdout.close()
    with process.stderr as stderr:
        assert stderr.read() == "" and process.wait() != 0


def test_importing_the_package_registers_the_operators():
    code = "import talib_fast, torch; torch.ops.talib_fast.stoch_norm_forward; talib_fast.load; talib_fast.patch"
    assert finish(start("-c", code)) == (0, "", "")
    with pytest.raises(AttributeError, match="module 'talib_fast' has no attribute 'nothing'"):
        talib_fast.nothing  # noqa: B018
