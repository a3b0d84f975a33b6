#!/usr/bin/env bash
# Tests, checks and measures the CUDA kernels on a machine that is there for a quarter of an hour, its start included,
# and may not come back. Two commands, each of which ends by itself:
#
#   bash benchmarks/gpu.sh first     # 240 s: library, smoke test, CUDA tests, each kernel's figures, stoch_norm
#   bash benchmarks/gpu.sh second    # 400 s: compute-sanitizer, then the other benchmarks
#
# Both take the compiled library in talib_fast/ if it is of these sources and for this GPU, and else build it, which
# takes a minute or two of theirs. On another machine with nvcc, beforehand, for compute capability 9.0:
#
#   FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST=9.0 python setup.py build_ext --inplace
#
# They end at once if PyTorch serves any operation in place of a kernel. Otherwise every step runs, within its limit and
# whatever became of the one before, and any failure makes the exit status 1. What there is so far is in place every few
# seconds, benchmarks write after every case: a run that is stopped from outside leaves it behind.
#
# They need a GPU and a python3 with torch >= 2.10 for CUDA, numpy, safetensors and pytest; to build, nvcc, setuptools >=
# 77 and ninja; `second` compute-sanitizer, and torchvision for whole steps. With pytest-xdist the tests take all cores,
# with pytest-timeout a test that hangs takes no other with it, with matplotlib there are plots. Nothing is fetched or
# installed.
#
#   PYTHON   the interpreter, python3
#   OUT      a folder for three files a command: gpu-first.json, which holds all results, gpu-first.txt, which says what
#            became of each step, and gpu-first.tar.gz, which holds logs, tables and plots; without it these are in
#            benchmarks/results, and results in benchmarks/results/cuda too
#   COMMIT   what the results name as their commit where this is no git checkout
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

half=${1-}
python=${PYTHON:-python3}

fail() {
  echo "gpu.sh: $1" >&2
  exit 1
}

sanitizers=(memcheck racecheck initcheck synccheck)
case $half in
  first) whole_run=240 steps=(library smoke tests kernels bench_stoch_norm) ;;
  second)
    whole_run=400 steps=(library "${sanitizers[@]}")
    steps+=(bench_squared_distance bench_spectral_tail bench_step bench_bi_tuning bench_co_tuning bench_host_overhead)
    ;;
  *) fail "expected first or second, got ${half:-nothing}" ;;
esac

command -v "$python" >/dev/null || fail "there is no $python: set PYTHON to an interpreter that has torch"
"$python" -c 'import torch' 2>/dev/null || fail "$python has no torch: set PYTHON to an interpreter that has it"
arch=$("$python" -c '
import torch
print(*torch.cuda.get_device_capability(), sep=".") if torch.cuda.is_available() else None
' 2>/dev/null)
[[ $arch =~ ^[0-9]+\.[0-9]+$ ]] || fail "no GPU that this torch can use: nothing was built or measured"

work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
logs=$work/logs
mkdir -p "$logs" "$work/states"
out=${OUT:-benchmarks/results}
results=${OUT:+$work/results}
results=${results:-benchmarks/results}
mkdir -p "$out" "$results"

export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export TORCH_CUDA_ARCH_LIST=$arch MAX_JOBS=${MAX_JOBS:-$(nproc)}
export PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin

place() {  # FILE NAME: at once, so that nobody finds half of it
  cp "$1" "$out/.$2" && mv "$out/.$2" "$out/$2"
}

# Puts in place what there is so far.
collect() {
  local name packed=(logs)
  {
    echo "GPU architecture $arch, commit ${COMMIT:-$(git describe --always --dirty 2>/dev/null || echo unknown)}"
    for name in "${steps[@]}"; do
      cat "$work/states/$name" 2>/dev/null || printf '%-24s %7s  %s\n' "$name" - "FAIL, did not end"
    done
  } >"$work/summary"
  "$python" benchmarks/gather.py "$work/summary" "$results/cuda" "$work/json" && place "$work/json" "gpu-$half.json"
  [[ $results == "$work/results" && -d $results/cuda ]] && packed+=(results)
  tar -czf "$work/tar" -C "$work" "${packed[@]}" && place "$work/tar" "gpu-$half.tar.gz"
  place "$work/summary" "gpu-$half.txt"
}

# step NAME SECONDS TOOL COMMAND...: run it with its own log, under its limit; TOOL is the program that it needs
step() {
  local name=$1 limit=$2 tool=$3 begun=$SECONDS left=$((whole_run - SECONDS)) status job
  shift 3
  ((limit < left)) || limit=$left
  if ! command -v "$tool" >/dev/null; then
    status="FAIL, $tool is missing"
  elif ((limit < 5)); then
    status="FAIL, no time was left"
  else
    # Interrupted, pytest says what failed so far; what a background job would ignore. What hangs is killed.
    timeout --signal=INT --kill-after=5 "$limit" env --default-signal=INT "$@" >"$logs/$name.log" 2>&1 &
    job=$!
    while sleep 3 & wait -n "$job" $!; kill -0 "$job" 2>/dev/null; do
      collect
    done >/dev/null 2>&1
    wait "$job"
    case $? in
      0) status=pass ;;
      124 | 137) status="FAIL, stopped after $limit s" ;;
      *) status=FAIL ;;
    esac
  fi
  printf '%-24s %5d s  %s\n' "$name" $((SECONDS - begun)) "$status" >"$work/states/$name"
  cat "$work/states/$name"
  [[ $status == pass || ! -e $logs/$name.log ]] || tail -n 15 "$logs/$name.log" | sed 's/^/    /'
  collect
  [[ $status == pass ]]
}

# Ends with how everything came out.
finish() {
  echo
  cat "$out/gpu-$half.txt"
  [[ -s $out/gpu-$half.json ]] && ! grep -q FAIL "$out/gpu-$half.txt"
  exit
}

library() {
  "$python" benchmarks/check_library.py && return
  echo "building it"
  "$python" setup.py build_ext --inplace --force && "$python" benchmarks/check_library.py
}
export -f library
export python

step library 150 "$python" bash -c library || finish
export TALIB_FAST_BACKEND=compiled  # without the library there is nothing to test and to measure

# Warnings of versions that this machine happens to have are no errors here, as they are elsewhere.
run_tests=("$python" -m pytest -p no:cacheprovider -W default)

measure() {  # NAME SECONDS OPTIONS...
  local name=$1 limit=$2
  shift 2
  step "bench_$name" "$limit" "$python" "$python" "benchmarks/bench_$name.py" --device cuda "$@" \
    --out "$results/cuda/$name" && tail -n 90 "$logs/bench_$name.log"
}

if [[ $half == first ]]; then
  host_only=(architectures batch_norm_tools build build_parts distributed fusion kernels_on_host norm_act packages pages)
  host_only+=(autograd_versions gpu_model machine_code recipes simt torch_private)  # reach no GPU
  host_only+=(cli finetune images inference_commands inference_metrics networks training_data training_recipes)
  host_only+=(training_report)
  others=("${host_only[@]/#/--ignore=tests/test_}")
  others=("${others[@]/%/.py}" --ignore=tests/test_every_kernel.py)  # which has just run
  parallel=()
  if "$python" -c 'import xdist' 2>/dev/null; then
    parallel=(-n "$(nproc)" --dist worksteal -p no:benchmark)
    if "$python" -c 'import pytest_timeout' 2>/dev/null; then
      parallel+=(--timeout 40 --timeout-method thread)  # which ends the process, and xdist starts another
    fi
  fi
  step smoke 20 "$python" "${run_tests[@]}" tests/test_every_kernel.py -k cuda -q
  step tests 90 "$python" "${run_tests[@]}" tests "${others[@]}" "${parallel[@]}" -v --tb=short \
    -k "(cuda or gpu or synchronise or side_stream) and not GpuScript"
  step kernels 70 "$python" "$python" benchmarks/kernels.py --out "$results/cuda/kernels" && cat "$logs/kernels.log"
  measure stoch_norm 70 --rounds 3 --dtype bfloat16 float32 --layouts channels_last contiguous
  finish
fi

for tool in "${sanitizers[@]}"; do
  settings=() options=(--kernel-regex kns=talib_fast)
  case $tool in  # torch's allocator hands out parts of larger blocks, which would hide what these two look for
    memcheck | initcheck) settings+=(PYTORCH_NO_CUDA_MEMORY_CACHING=1) ;;
  esac
  [[ $tool != initcheck ]] || options=()  # it has to see what torch's kernels initialise
  step "$tool" 45 compute-sanitizer env "${settings[@]}" \
    compute-sanitizer --tool "$tool" "${options[@]}" --error-exitcode 1 \
    "${run_tests[@]}" tests/test_every_kernel.py -q \
    -k "cuda and not torch.float16 and not torch.float64"  # bfloat16 and float32 take the same ways
done
measure squared_distance 40 --rounds 7
measure spectral_tail 30 --rounds 5
measure step 70 --rounds 7 --ways stochnorm "stochnorm + bss"
measure bi_tuning 25 --rounds 7
measure co_tuning 20 --rounds 7
measure host_overhead 25 --rounds 25
finish
