"""The harness that runs CUDA kernels on the host finds every planted bug, and nothing in the correct twins."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import simt_support
from process_support import PATIENCE

SIMT = simt_support.ROOT / "tests" / "simt"
RACE = "ThreadSanitizer: data race"
OVERFLOW = "AddressSanitizer: heap-buffer-overflow"

FOUND_BY_A_SANITIZER = {
    "missing_barrier": ("thread", RACE),
    "missing_later_barrier": ("thread", RACE),
    "missing_warp_barrier": ("thread", RACE),
    "overlapping_blocks": ("thread", RACE),
    "missing_release": ("thread", RACE),
    "missing_acquire": ("thread", RACE),
    "shared_overflow": ("address", OVERFLOW),
    "dynamic_shared_overflow": ("address", OVERFLOW),
    "global_overflow": ("address", OVERFLOW),
    "misaligned_vector": ("address", "runtime error: .* misaligned address"),
}
FOUND_BY_THE_HARNESS = {
    "divergent_barrier": r"simt: divergent __syncthreads: .* in kernel divergent_barrier<true>, block \(0,0,0\)",
    "deadlock": "simt: warp 0: lanes 0000ffff wait for lanes ffff0000 at (.*\n)*simt: deadlock: 32 of 32 threads",
    "divergent_shuffle": r"simt: lanes of a warp are at different warp operations: others wait at \S+, this one at",
    "absent_lanes": "simt: shuffle reads lane 31, which takes no part",
    "wrong_mask": "simt: warp operation whose mask 0000ffff leaves out the calling lane 16",
    "endless_wait": r"simt: deadlock: after \d+ pauses with no step forward",
    "static_and_dynamic_shared": "132 bytes of static and 49024 of dynamic shared memory are more than",
}


@pytest.fixture(scope="session")
def build():
    def build(kind: str) -> Path:
        if reason := simt_support.missing(kind):
            pytest.skip(reason)
        return simt_support.build(kind)

    return build


def run(program: Path, *arguments: str, blocks: int = 1, seed: int = 0, **settings: str):
    environment = {**os.environ, "SIMT_BLOCKS": str(blocks), "SIMT_SEED": str(seed), **settings}
    environment["UBSAN_OPTIONS"] = "print_stacktrace=1"
    done = subprocess.run([program, *arguments], capture_output=True, text=True, env=environment, timeout=PATIENCE)
    return done.returncode, done.stdout + done.stderr


def planted_line(name: str) -> str:
    source = SIMT / "planted_bugs.cuh"
    (line,) = [n for n, text in enumerate(source.read_text().splitlines(), 1) if text.endswith(f"// BUG {name}")]
    return f"{source}:{line}"


@pytest.mark.parametrize(("blocks", "seed"), [(1, 0), (1, 7), (2, 0), (3, 11)])
@pytest.mark.parametrize("kind", simt_support.KINDS)
def test_correct_kernels_pass(build, kind, blocks, seed):
    code, said = run(build(kind) / "simt_self_test", blocks=blocks, seed=seed)
    assert code == 0 and "ungranted_shared: passed" in said, said
    assert "Sanitizer" not in said and "runtime error" not in said


@pytest.mark.parametrize(("blocks", "seed"), [(1, 0), (2, 7)])
@pytest.mark.parametrize("name", FOUND_BY_A_SANITIZER)
def test_sanitizers_find_planted_bugs(build, name, blocks, seed):
    kind, message = FOUND_BY_A_SANITIZER[name]
    code, said = run(build(kind) / "simt_self_test", name, "planted", blocks=blocks, seed=seed)
    assert code != 0 and re.search(message, said), said
    assert re.search(rf"{re.escape(planted_line(name))}\b", said), said


@pytest.mark.parametrize("kind", simt_support.KINDS)
@pytest.mark.parametrize("name", FOUND_BY_THE_HARNESS)
def test_harness_names_planted_bugs(build, name, kind):
    code, said = run(build(kind) / "simt_self_test", name, "planted")
    assert code != 0 and re.search(FOUND_BY_THE_HARNESS[name], said), said
    assert re.search(rf"{re.escape(planted_line(name))}\b", said), said


@pytest.mark.parametrize("kind", simt_support.KINDS)
def test_uninitialised_shared_memory_reads_as_nan(build, kind):
    code, said = run(build(kind) / "simt_self_test", "uninitialised_shared", "planted")
    assert code == 0, said


def test_a_launch_has_the_shared_memory_it_was_granted(build):
    program = build("plain") / "simt_self_test"
    code, said = run(program, "ungranted_shared", "planted")
    assert code != 0 and "with 49153 bytes of dynamic shared memory: the kernel is allowed 49152" in said
    code, said = run(program, "ungranted_shared", SIMT_SHARED_BYTES="1000")
    assert code != 0 and "the device has 1000, at " in said


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("other_stream", "wrong_mask<false> goes to another stream than the current one, at "),
        ("lowered_limit", "1024 bytes of dynamic shared memory are lowered to 512, .* at "),
        ("many_parameters", r"many_parameters<true> with 4\d+ bytes of parameters, .* not asked or is too old, at "),
    ],
)
def test_wrong_launches_are_named(build, name, message):
    program = build("plain") / "simt_self_test"
    code, said = run(program, name, "planted")
    assert code != 0 and re.search(f"simt: .*{message}{re.escape(str(SIMT))}", said), said


def test_an_old_driver_takes_few_parameters(build):
    code, said = run(build("plain") / "simt_self_test", "many_parameters", SIMT_DRIVER="12000")
    assert code != 0 and "bytes of parameters" in said


def test_the_device_is_what_the_environment_says(build):
    program = build("plain") / "simt_self_test"
    assert "3 multiprocessors, 49152 bytes of shared memory\n" in run(program, "settings")[1]
    said = run(program, "settings", SIMT_MULTIPROCESSORS="5", SIMT_SHARED_BYTES="1000")[1]
    assert "5 multiprocessors, 1000 bytes of shared memory\n" in said


def test_the_log_names_every_launch(build, tmp_path):
    program = build("plain") / "simt_self_test"
    code, said = run(program, "ungranted_shared", SIMT_LOG=str(tmp_path / "log"))
    assert code == 0, said
    (line,) = (tmp_path / "log").read_text().splitlines()
    blocks, threads, shared_bytes, place, library = line.split("\t")
    assert (blocks, threads, shared_bytes) == ("1", "32", str(48 << 10))
    assert Path(library) == program and int(place, 16) > 0
    code, said = run(program, "ungranted_shared", SIMT_LOG=str(tmp_path / "no folder" / "log"))
    assert code != 0 and f"can't write of a launch to SIMT_LOG={tmp_path}/no folder/log, at " in said


def test_fibers_of_other_processors(build):
    code, said = run(build("plain") / "simt_self_test_ucontext", blocks=2, seed=3)
    assert code == 0, said


CALL_AN_OPERATION = """
import sys
import torch
torch.set_num_threads(1)
torch.ops.load_library(sys.argv[1])
out = getattr(torch.ops.talib_fast_simt_test, sys.argv[2])(torch.zeros(64), sys.argv[3] == "planted")
print("done", out[0].item())
"""


@pytest.mark.parametrize(
    ("kind", "operation", "message", "planted"),
    [("address", "ones", OVERFLOW, "shared_overflow"), ("thread", "rotated", RACE, "missing_barrier")],
)
def test_a_python_process_with_torch_finds_planted_bugs(build, kind, operation, message, planted):
    library = build(kind) / "libsimt_race_op.so"
    codes, saids = [], []
    for variant in ("correct", "planted"):
        done = subprocess.run(
            [sys.executable, "-c", CALL_AN_OPERATION, library, operation, variant],
            capture_output=True, text=True, timeout=PATIENCE,
            env={**simt_support.sanitizer_environment(kind), "SIMT_BLOCKS": "2"},
        )  # fmt: skip
        codes.append(done.returncode)
        saids.append(done.stdout + done.stderr)
    assert codes[0] == 0 and saids[0] == "done 1.0\n", saids[0]
    assert codes[1] != 0 and message in saids[1] and planted_line(planted) in saids[1], saids[1]


def test_nvcc_compiles_the_same_kernels(tmp_path):
    nvcc = shutil.which("nvcc")
    if not nvcc:
        pytest.skip("no nvcc")
    architectures = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in (75, 90)]
    done = subprocess.run(
        [nvcc, "-std=c++20", "-Xcompiler", "-Wall,-Wextra", *architectures, "--keep", "--keep-dir", tmp_path,
         "-I", simt_support.ROOT / "csrc", "-c", SIMT / "self_test.cu", "-o", tmp_path / "self_test.o"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and "warning" not in done.stdout + done.stderr, done.stdout + done.stderr
    for ptx in tmp_path.glob("*.ptx"):
        text = ptx.read_text()
        for instruction in (
            r"ld\.global\.v4\.[ubf]32", r"ld\.global\.cs\.v4\.[ubf]32", r"st\.global\.v4\.[ubf]32",
            r"ld\.relaxed\.gpu\.global\.u32", r"fence\.acq_rel\.gpu", "nanosleep",
            r"red\.release\.gpu\.global\.inc\.u32", r"atom\.acq_rel\.gpu\.global\.inc\.u32",
        ):  # fmt: skip
            assert re.search(instruction, text), f"{ptx.name} has no {instruction}"
    assert list(tmp_path.glob("*.ptx"))
