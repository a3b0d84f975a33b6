"""Kernels for the architecture that is hardest on them: no warnings, no spills. Needs nvcc, but no GPU."""

import re
from pathlib import Path

import architectures
import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURE = "12.0"  # it leaves the fewest registers; `make packages` compiles for all
REPORT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1kPf' for 'sm_80'
ptxas info    : Function properties for _Z1kPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 13 registers, used 0 barriers, 364 bytes cmem[0]
ptxas info    : Function properties for _Z6helperPf
    160 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1kPf' for 'sm_120'
ptxas info    : Function properties for _Z1kPf
    0 bytes stack frame, 0 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 40 bytes smem
ptxas info    : Compile time = 7.655 ms
"""


def test_what_ptxas_says_is_read():
    kernel, helper, spilling = architectures.read(REPORT)
    assert kernel == architectures.Function("_Z1kPf", "sm_80", 13, 0, 0, 0) and kernel.faults() == ""
    assert helper == architectures.Function("_Z6helperPf", "sm_80", None, 160, 8, 12)
    assert helper.faults() == "160 bytes of stack frame, 8 bytes stored and 12 loaded in spills"
    assert (spilling.architecture, spilling.registers) == ("sm_120", 255) and "4 loaded" in spilling.faults()
    assert spilling.shared == 40
    assert architectures.table([kernel, helper, spilling]).splitlines() == [
        "sm_80   sm_120  registers of",
        "13      255     _Z1kPf",
        "                _Z6helperPf",
    ]
    with pytest.raises(ValueError, match="expected 3 functions in ptxas' report, could read 2"):
        architectures.read(REPORT.replace("properties for _Z6helperPf", "properties of _Z6helperPf"))


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        ("a[0] = 1;", None),
        (
            "float t[99]; for (int i = 0; i < 99; ++i) t[i] = a[i * n]; a[0] = t[n % 99];",
            r"^\w+ for sm_90: \d+ bytes of",
        ),
        ("int unused;", r'nvcc fails with exit status \d+: .*variable "unused" was declared but never referenced'),
        ("a[0] = b;", r'nvcc fails with exit status \d+: .*identifier "b" is undefined'),
    ],
)
def test_faults_are_found(code, fault, toolkit, tmp_path):
    source = tmp_path / "k.cu"
    source.write_text(f"__global__ void k([[maybe_unused]] float* a, [[maybe_unused]] int n) {{ {code} }}\n")
    functions, faults = architectures.check(str(source), toolkit, ["9.0"])
    if fault is None:
        assert not faults and [found.architecture for found in functions] == ["sm_90"]
    else:
        assert len(faults) == 1 and re.search(fault, faults[0])


def test_a_file_without_kernels_is_a_fault(toolkit, tmp_path):
    (tmp_path / "k.cu").write_text("int host() { return 1; }\n")
    assert architectures.check(str(tmp_path / "k.cu"), toolkit, ["9.0"]) == ([], ["no kernel for sm_90"])


def test_the_command_needs_a_toolkit(monkeypatch, capsys):
    monkeypatch.setenv("CUDA_HOME", "/nonexistent")
    assert architectures.main([]) == 1
    assert "the kernels cannot be compiled: CUDA_HOME is /nonexistent" in capsys.readouterr().err


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_no_kernel_spills(source, toolkit, tmp_path):
    if ARCHITECTURE not in toolkit.architectures:
        pytest.skip(f"{toolkit.nvcc} does not know {ARCHITECTURE}")
    # kept, so that the code for the host is not compiled: that is the harness's
    functions, faults = architectures.check(str(source), toolkit, [ARCHITECTURE], keep=tmp_path)
    assert functions and not faults, "\n".join(faults)
